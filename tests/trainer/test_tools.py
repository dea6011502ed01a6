"""Completions in which the model calls tools, on shared prompts: against stock TRL, and the sequence loss by hand."""

import copy
import itertools
import random
import re

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import pad
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOTrainer
from trl.chat_template_utils import qwen2_5_chat_template

from grpo_ext import GRPOExtTrainer
from tests.tools.lanes import thinned
from tests.tools.models import random_lora, small_shape
from tests.tools.paths import TINY_MODEL
from tests.tools.training import (
    adapter_of,
    assert_same_training,
    log_of,
    loss_by_hand,
    tokens_of_the_policy,
    train_on_a_copy,
)

# A call takes three tokens, although all other text is in characters, so that a two-layer model can learn it.
CALL, CALLED = '<tool_call>\n{"name": "look_up", "arguments": {"page": ', "}}\n</tool_call>"
QUESTIONS = [[{"role": "user", "content": text}] for text in ("Which page?", "How old is it?", "Who?", "7+8=?")]
# The text between two turns of the model, which did not write it.
BETWEEN_TURNS = re.compile(
    r"\n<\|im_start\|>user\n<tool_response>\n[^<]*\n</tool_response><\|im_end\|>\n<\|im_start\|>assistant\n"
)


def look_up(page: int) -> str:
    """
    Read a page of the book.

    Args:
        page: its number, from 0 to 9.
    """
    if page > 9:
        raise ValueError(f"There is no page {page}.")
    return str(page * 7)


def shelves():
    """A class of environments, numbered from 0. What `reset` adds to the prompt differs within a group."""
    numbers = itertools.count()

    class Shelf:
        def __init__(self):
            self.number = next(numbers)

        def reset(self, **columns):
            self.pages = []
            return f" It is on shelf {self.number % 2}."

        def look_up(self, page: int) -> str:
            """
            Read a page.

            Args:
                page: its number, from 0 to 9.
            """
            self.pages.append(page)
            return f"{page * 7}, and {len(self.pages)} read"

        def get_reward(self):
            return float(len(set(self.pages)))

    return Shelf


def calls_and_digits(completions, **columns):
    """The number of tool calls, plus a tenth of the sum of the digits in the last message."""
    return [
        sum(message["role"] == "tool" for message in messages)
        + sum(map(int, re.findall(r"\d", messages[-1]["content"]))) / 10
        for messages in completions
    ]


# How the tool is passed: as a function, or as a class of environments, which is new for each trainer.
KINDS = {"tools": lambda: {"tools": [look_up]}, "environment_factory": lambda: {"environment_factory": shelves()}}


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer of the embedded model, with Qwen's chat template, whose tool calls TRL can parse."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL, model_max_length=2048)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.add_tokens([CALL, CALLED])
    tokenizer.chat_template = qwen2_5_chat_template
    return tokenizer


@pytest.fixture(scope="module")
def caller(tokenizer):
    """A llama of two layers, trained to call the tool in most turns and to answer in the others."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**small_shape(tokenizer) | {"max_position_embeddings": 2048}))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rng = random.Random(0)
    for _ in range(60):
        rows = [turns(tokenizer, rng) for _ in range(8)]
        longest = max(len(ids) for ids, _ in rows)
        ids_BT, labels_BT = (
            torch.stack([pad(torch.tensor(row[i]), (0, longest - len(row[i])), value=fill) for row in rows])
            for i, fill in ((0, tokenizer.pad_token_id), (1, -100))
        )
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def turns(tokenizer, rng):
    """Token ids of a conversation with a few tool calls, and its labels: the model's own tokens."""
    prompt = tokenizer.apply_chat_template(rng.choice(QUESTIONS), add_generation_prompt=True, tokenize=False)
    ids, labels = [], []
    for text, is_own in [(prompt, False), *turns_and_results(rng)]:
        part = tokenizer(text)["input_ids"]
        ids += part
        labels += part if is_own else [-100] * len(part)
    return ids, labels


def turns_and_results(rng):
    while rng.random() < 0.7:
        page = rng.randrange(10)
        yield f"{CALL}{page}{CALLED}<|im_end|>", True
        result = f"\n<tool_response>\n{look_up(page)}\n</tool_response>"
        yield f"\n<|im_start|>user{result}<|im_end|>\n<|im_start|>assistant\n", False
    yield f"{rng.randrange(100)}<|im_end|>", True


@pytest.fixture
def train_caller(build, caller, monkeypatch):
    """`train_caller(trainer_class, kind)`: four steps on two rollouts, whose rows call the tool."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # environment_factory is experimental

    def run(trainer, kind, watch=None, **settings):
        settings = {"max_completion_length": 130, "reward": calls_and_digits} | settings
        settings |= {"prompts": QUESTIONS, "arguments": KINDS[kind]()}
        return train_on_a_copy(build, caller, trainer, watch, peft_config=random_lora(lora_alpha=1), **settings)

    return run


CASES = {
    "tools": {},
    "environment_factory": {},
    "tools, answers cut and masked": {"max_completion_length": 60, "mask_truncated_completions": True},
    "environment_factory, off-policy mask": {"off_policy_mask_threshold": 0.01},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", thinned(CASES, ["tools", "environment_factory"]))
def test_as_stock_trl(train_caller, case):
    """Later turns are sampled on longer prompts, one per row, where a sampler could lose a row or its random state."""
    kind = case.partition(",")[0]
    stock, _ = train_caller(GRPOTrainer, kind, **CASES[case])
    ours, start = train_caller(GRPOExtTrainer, kind, **CASES[case])
    assert_same_training(ours, stock)
    assert all(not torch.equal(value, start[name]) for name, value in adapter_of(ours).items())
    assert min(log_of(ours, "tools/call_frequency")) > 0
    assert (max(log_of(ours, "completions/clipped_ratio")) > 0) is ("cut" in case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_tool_results_are_seen_but_not_trained_on(train_caller, tokenizer, kind):
    """Tool results are inside a completion: the model attends to them, and the loss skips them. The loss and gradients
    of every update equal the sequence-level formula on full logits of the same rows, with the mask found in the text.
    A failure means that the policy is trained on text that it did not write, or does not see the results."""
    updates = []

    def watch(trainer):
        compute_loss = trainer._compute_loss

        def compared(model, inputs):
            loss, by_hand = (
                compute_loss(model, inputs),
                loss_by_hand(trainer, inputs, tokens_of_the_policy(inputs, tokenizer, BETWEEN_TURNS)),
            )
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            grads, wanted = (torch.autograd.grad(of, parameters, retain_graph=True) for of in (loss, by_hand))
            updates.append((loss.item(), by_hand.item(), grads, wanted))
            return loss

        trainer._compute_loss = compared

    ours, _ = train_caller(GRPOExtTrainer, kind, watch, loss_type="grpo_sequence", scale_rewards="population")
    assert ours.shares_prompts
    assert min(log_of(ours, "tools/call_frequency")) > 0
    assert len(updates) == 4
    for loss, by_hand, grads, wanted in updates:
        assert loss == pytest.approx(by_hand, abs=2e-5)
        for grad, want in zip(grads, wanted, strict=True):
            assert want.norm() > 0
            assert (grad - want).norm() < 1e-4 * want.norm()


def test_environments_that_own_their_prompts_are_trained_and_saved(build, caller, tmp_path, monkeypatch):
    """Guards against a model card that reads the column `prompt`: without it, the run would end at its first
    checkpoint."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    class Asks(shelves()):
        def reset(self, **columns):
            super().reset()
            return f"Which page of shelf {columns['shelf']}?"

    data = Dataset.from_dict({"shelf": [0, 1, 2, 3]})
    trainer = build(
        copy.deepcopy(caller),
        peft_config=random_lora(init_lora_weights=True),
        reward=calls_and_digits,
        arguments={"environment_factory": Asks},
        data=data,
        guards=True,
        max_completion_length=60,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    card = (tmp_path / "run" / "checkpoint-2" / "README.md").read_text()
    assert '[{"role": "user", "content": "Your question"}]' in card
