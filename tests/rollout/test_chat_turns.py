"""Environment replies between the turns of a chat model, against its chat template applied to the whole dialogue."""

import pytest
from transformers import AutoTokenizer
from trl.chat_template_utils import gemma3_chat_template, qwen2_5_chat_template, qwen3_chat_template

from grpo_ext.rollout.chat_turns import TurnTokenizer
from grpo_ext.rollout.dialogue import Dialogue, dialogue_reward
from grpo_ext.rollout.example_envs import GuessNumber
from tests.tools.models import random_lora, small_llama
from tests.tools.paths import TINY_MODEL
from tests.tools.training import log_of

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Guess."},
    {"role": "assistant", "content": "12"},
    {"role": "user", "content": "higher"},
    {"role": "assistant", "content": "70"},
    {"role": "user", "content": "lower"},
]


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer of the embedded model, with the special tokens of Qwen's template."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL, model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    return tokenizer


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("template", [qwen2_5_chat_template, qwen3_chat_template, gemma3_chat_template])
def test_turns_are_those_of_the_chat_template(tokenizer, template, is_cut):
    """Appending turn by turn gives the same text as the template applied to the whole conversation, even if a turn was
    cut before its end. Qwen3's template drops the start of a turn once another one follows, so TRL's training template
    replaces it."""
    tokenizer.chat_template = template
    eos = tokenizer.eos_token_id
    turns = TurnTokenizer(tokenizer, [eos])
    ids = turns.encode_first(CONVERSATION[:2])
    ends = "" if is_cut or template is gemma3_chat_template else "<|im_end|>"
    for turn, reply in ((CONVERSATION[2], CONVERSATION[3]), (CONVERSATION[4], CONVERSATION[5])):
        sampled = tokenizer(turn["content"] + ends)["input_ids"]
        assert turns.decode(sampled) == turn["content"]
        ids += sampled + turns.encode_reply(reply["content"], sampled[-1])
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    if template is qwen3_chat_template:
        assert turns._template is not None
        whole = whole.replace("<think>\n\n</think>\n\n", "")
    assert tokenizer.decode(ids) == whole
    assert turns.encode_first("Guess.") == turns.encode_first(CONVERSATION[1:2])


def test_a_template_that_rewrites_turns_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}{{ '(last)' if loop.last }}{{ m['content'] }}"
        "{% endfor %}"
    )
    with pytest.raises(ValueError, match="changes an assistant turn once another turn follows"):
        TurnTokenizer(tokenizer, [tokenizer.eos_token_id])


class RecordedGame(GuessNumber):
    """Records its conversation."""

    def reset(self, row):
        first = super().reset(row)
        self.messages = [{"role": "user", "content": first}]
        return first

    def step(self, text):
        reply, is_over = super().step(text)
        self.messages += [{"role": "assistant", "content": text}, {"role": "user", "content": reply}]
        return reply, is_over


def test_a_chat_model_plays(build, tokenizer, monkeypatch):
    """The completion of every row is the template's rendering of its game's conversation."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokenizer.chat_template = qwen2_5_chat_template
    played = []

    def game():
        played.append(RecordedGame())
        return played[-1]

    no_specials = [tokenizer.convert_tokens_to_ids(token) for token in ("<pad>", "<eos>", "<unk>", "<|im_start|>")]
    trainer = build(
        small_llama(tokenizer),
        peft_config=random_lora(),
        reward=dialogue_reward,
        columns={"answer": ["5", "50", "77", "90"]},
        arguments={"rollout_func": Dialogue(game, max_turns=3, max_turn_tokens=20)},
        max_completion_length=600,
        max_steps=1,
        beta=0.0,
        generation_kwargs={"suppress_tokens": no_specials},
    )
    trainer.train()
    rows = trainer._buffered_inputs[0]
    completions = {
        tokenizer.decode(ids[mask.bool()]).removesuffix("<|im_end|>")
        for ids, mask in zip(rows["completion_ids"], rows["completion_mask"], strict=True)
    }
    rendered = set()
    for game in played:
        whole = tokenizer.apply_chat_template(game.messages[:-1], tokenize=False)
        first = tokenizer.apply_chat_template(game.messages[:1], tokenize=False, add_generation_prompt=True)
        rendered.add(whole.removeprefix(first).removesuffix("\n").removesuffix("<|im_end|>"))
    assert completions == rendered
    assert log_of(trainer, "dialogue/turns")[0] > 2
