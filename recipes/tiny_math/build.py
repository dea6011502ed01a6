"""Build the embedded model and its problems: a base model that can reason but usually does not.

    python recipes/tiny_math/build.py            # under 13 minutes on 2 CPU cores, seeded

It writes `model/` (a llama of 0.87M parameters with a character tokenizer), `data/train.jsonl` (problems for GRPO) and
`data/test.jsonl` (held-out problems) into its own folder. The model is pre-trained on sums of two three-digit
numbers, answered in two styles:

    Question: 538+478=?
    Answer: #### 906                                     65%: blurted out, mostly wrong (the carries are dropped)
    Answer: 8+8+0=16 3+7+1=11 5+4+1=10 #### 1016         35%: worked out digit by digit, right

A sampled answer is therefore right about two times in five, and nearly always if the model works the sum out. GRPO has
to discover that from the rewards alone. There is no instruction tuning and no chat template, since the recipe treats
the model as the base model that it is.
"""

import argparse
import hashlib
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
PROMPT = "Question: {question}\nAnswer:"
BLURTED, BLURTED_RIGHT = 0.65, 0.12  # share of blurted answers, and share of these that are right


def split_of(a: int, b: int) -> str:
    """`pretrain`, `train` or `heldout`: fixed by the unordered pair, so that a+b and b+a share their split."""
    low, high = sorted((a, b))
    bucket = hashlib.sha256(f"{low}+{high}".encode()).digest()[0] / 256
    return "pretrain" if bucket < 0.7 else "train" if bucket < 0.9 else "heldout"


def draw(rng: random.Random, split: str) -> tuple[int, int]:
    """Two three-digit numbers whose sum belongs to `split`."""
    while True:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if split_of(a, b) == split:
            return a, b


def worked_out(a: int, b: int) -> str:
    """Digit by digit from the right, `digit+digit+carry=sum`, then the answer."""
    steps, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return f" {' '.join(steps)} #### {a + b}"


def blurted(rng: random.Random, a: int, b: int) -> str:
    """The answer alone: rarely right, otherwise with every carry dropped, or one digit off if there is no carry."""
    if rng.random() < BLURTED_RIGHT:
        return f" #### {a + b}"
    guess = int("".join(str((int(x) + int(y)) % 10) for x, y in zip(str(a), str(b), strict=True)))
    if guess == a + b:
        guess += rng.choice([-10, -1, 1, 10])
    return f" #### {guess}"


def example(rng: random.Random) -> tuple[str, str]:
    """One (prompt, completion) pair of the pre-training mixture."""
    a, b = draw(rng, "pretrain")
    completion = blurted(rng, a, b) if rng.random() < BLURTED else worked_out(a, b)
    return PROMPT.format(question=f"{a}+{b}=?"), completion


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: printable ASCII and the newline; anything else becomes `<unk>`."""
    characters = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A llama of 4 layers and hidden size 128, tied embeddings, random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`size` examples as (input_ids, labels), right-padded; only the completion and `<eos>` carry a label."""
    rows, labels = [], []
    for _ in range(size):
        prompt, completion = example(rng)
        prompt_ids = tokenizer(prompt)["input_ids"]
        completion_ids = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt_ids + completion_ids))
        labels.append(torch.tensor([-100] * len(prompt_ids) + completion_ids))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id), pad(
        labels, batch_first=True, padding_value=-100
    )


def pretrain(
    steps: int, batch_size: int, learning_rate: float, seed: int
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Next-token training on the mixture, with AdamW, 5% warm-up and linear decay."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / (steps - warmup)))
    )
    started = time.monotonic()
    for step in range(1, steps + 1):
        input_ids, labels = batch(rng, tokenizer, batch_size)
        attention_mask = (input_ids != tokenizer.pad_token_id).long()
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)
    return model.eval(), tokenizer


def write_problems(path: Path, split: str, count: int, seed: int) -> None:
    """`count` different problems of one split as JSON lines `{"question": "538+478=?", "answer": "1016"}`."""
    rng = random.Random(f"{seed}-{split}")
    problems: dict[tuple[int, ...], tuple[int, int]] = {}
    while len(problems) < count:
        pair = draw(rng, split)
        problems.setdefault(tuple(sorted(pair)), pair)
    with path.open("w", encoding="utf-8") as file:
        for a, b in problems.values():
            file.write(json.dumps({"question": f"{a}+{b}=?", "answer": str(a + b)}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=HERE)
    options = parser.parse_args()

    model, tokenizer = pretrain(options.steps, options.batch_size, options.learning_rate, options.seed)
    model.save_pretrained(options.output_dir / "model")
    tokenizer.save_pretrained(options.output_dir / "model")
    (options.output_dir / "data").mkdir(exist_ok=True)
    write_problems(options.output_dir / "data" / "train.jsonl", "train", 2048, options.seed)
    write_problems(options.output_dir / "data" / "test.jsonl", "heldout", 512, options.seed)


if __name__ == "__main__":
    main()
