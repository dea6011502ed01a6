"""What a run records for its report: completions, settings, and what is sent to trackers."""

import json
import sys
from pathlib import Path

import pytest
import torch

from grpo_ext.report.completions_file import MAX_GROUPS, CompletionInfo, append_completions
from grpo_ext.report.display_text import MAX_CHARACTERS, shorten, to_text
from grpo_ext.report.run_files import COMPLETIONS_FILE, SETTINGS_FILE, append_row, keep_rows_until, read_rows
from grpo_ext.report.run_settings import REDACTED, command_line, redact
from tests.tools.models import random_lora
from tests.tools.training import log_of

GOLD = {"answer": ["3", "71", "4", "15"]}


class Watched:
    """A reward that keeps its arguments, and logs a column only in its first call."""

    def __init__(self):
        self.calls = []

    __name__ = "watched"

    def __call__(self, prompts, completions, completion_ids, answer, log_extra, **columns):
        scores = [len(set(text)) / 10 for text in completions]
        self.calls.append((prompts, completions, completion_ids, answer, scores))
        if len(self.calls) == 1:
            log_extra("first sign", [text[:1] for text in completions])
        return scores


def recorded(trainer):
    return list(read_rows(Path(trainer.args.output_dir, COMPLETIONS_FILE)))


def test_the_record_is_what_the_rewards_saw_and_the_update_used(build, small_model, tokenizer):
    """A completion with the wrong reward, gold answer or advantage would make the whole page wrong."""
    reward = Watched()
    trainer = build(small_model, peft_config=random_lora(), reward=reward, columns=GOLD, temperature=1.5)
    trainer.train()
    rows = recorded(trainer)
    assert [row["step"] for row in rows] == [1, 2]
    for row, (prompts, completions, ids, gold, scores) in zip(rows, reward.calls, strict=True):
        answers = [answer for group in row["groups"] for answer in group["answers"]]
        assert [answer["text"] for answer in answers] == completions
        assert [answer["rewards"] for answer in answers] == [{"watched": pytest.approx(s, abs=1e-4)} for s in scores]
        assert [answer["tokens"] for answer in answers] == list(map(len, ids))
        assert [answer["cut"] for answer in answers] == [one[-1] != tokenizer.eos_token_id for one in ids]
        logged = [{"first sign": text[:1]} if row["step"] == 1 else {} for text in completions]
        assert [answer["extra"] for answer in answers] == logged  # TRL keeps the old column
        assert [group["prompt"] for group in row["groups"]] == prompts[::4]
        assert [group["gold"] for group in row["groups"]] == gold[::4]
        of_group = torch.tensor(scores, dtype=torch.float64).view(-1, 4)
        spread = of_group.std(dim=1, correction=0, keepdim=True) + 1e-8
        expected = ((of_group - of_group.mean(dim=1, keepdim=True)) / spread).flatten().tolist()
        assert [answer["advantage"] for answer in answers] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"share_prompt": False},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 4},
        {"dead_groups": "resample", "max_resample_rounds": 2},
        {"num_generations_max": 8},
        {"replay_fraction": 0.5, "max_steps": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_of_making_a_rollout_is_recorded_once(build, small_model, options):
    """Rollouts may be sampled in rounds, be replayed, or serve several steps. Gold answers and rewards stay with their
    prompts, and each rollout is written once, at the step that it is sampled for."""

    def is_even(completions, answer, **columns):
        return [float(len(text) % 2) if gold != "4" else 0.0 for text, gold in zip(completions, answer, strict=True)]

    trainer = build(small_model, peft_config=random_lora(), reward=is_even, columns=GOLD, temperature=1.5, **options)
    trainer.train()
    rows = recorded(trainer)
    every = 2 if "steps_per_generation" in options else 1
    assert [row["step"] for row in rows] == list(range(1, trainer.args.max_steps + 1, every))
    gold_of = {"Question: 1+2=?\nAnswer:": "3", "Question: 30+41=?\nAnswer:": "71", "2+2=": "4"}
    for group in (group for row in rows for group in row["groups"]):
        if group["gold"] is not None:  # it is not kept for replayed groups
            assert group["gold"] == gold_of.get(group["prompt"], "15")
        for answer in group["answers"]:
            expected = float(len(answer["text"]) % 2) if group["prompt"] != "2+2=" else 0.0
            assert answer["rewards"] == {"is_even": expected}
            assert answer["tokens"] == 12 or not answer["cut"]
    if options == {"share_prompt": False}:  # then TRL's own sampling truncates them
        cut = [answer["cut"] for group in rows[0]["groups"] for answer in group["answers"]]
        assert sum(cut) / len(cut) == log_of(trainer, "completions/clipped_ratio")[0] not in (0.0, 1.0)


def test_a_run_that_is_resumed_keeps_the_record_up_to_its_checkpoint(build, small_model):
    """Repeated steps must not be recorded twice, and earlier ones must not be lost."""
    settings = {"peft_config": random_lora(), "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer = build(small_model, **settings)
    trainer.train()
    path = Path(trainer.args.output_dir, COMPLETIONS_FILE)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "grou')  # killed here
    first = recorded(trainer)
    resumed = build(trainer.model.unload(), **settings)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert [row["step"] for row in recorded(resumed)] == [1, 2, 3]
    assert recorded(resumed)[:2] == first[:2]
    fresh = build(resumed.model.unload(), peft_config=random_lora(), max_steps=1)
    fresh.train()
    assert [row["step"] for row in recorded(fresh)] == [1]


def test_a_record_is_bounded(build, small_model):
    """Long completions must not fill a disk, and the end of a completion, which has its result, must be kept."""
    args = build(small_model, peft_config=random_lora()).args
    Path(args.output_dir).mkdir(exist_ok=True)
    count = 4 * (MAX_GROUPS + 3)
    text = "a" * 100_000 + "#### 12"
    logs = {"prompt": ["p" * 9000] * count, "completion": [[{"role": "assistant", "content": text}]] * count}
    logs |= {"advantages": [float("nan")] * count, "rewards": {"r": [float("nan")] * count}, "extra": {}}
    append_completions(args, 1, logs, [CompletionInfo(tokens=9, is_cut=True, gold=None)] * count, [])
    (row,) = read_rows(Path(args.output_dir, COMPLETIONS_FILE))
    assert (len(row["groups"]), row["left_out"]) == (MAX_GROUPS, 3)
    answer = row["groups"][0]["answers"][0]
    assert answer["text"].endswith("#### 12")
    assert f"[{100_007 - MAX_CHARACTERS} characters left out]" in answer["text"]
    assert (answer["found"], answer["rewards"], answer["advantage"]) == ("12", {"r": None}, None)
    assert len(json.dumps(row)) < MAX_GROUPS * (4 + 1) * (MAX_CHARACTERS + 300)


def test_messages_become_text():
    user = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"text": "Hi"}]},
    ]
    assert to_text(user) == "[system] Be brief.\n[user] [image] Hi"
    assert to_text([{"role": "assistant", "content": None, "tool_calls": ["f()"]}]) == "['f()']"
    assert shorten("x" * 10, 10) == "x" * 10


def test_lines_after_a_kill(tmp_path):
    path = tmp_path / "a" / "lines.jsonl"
    keep_rows_until(path, 0)
    append_row(path, {"step": 1})
    append_row(path, {"step": 2})
    with path.open("a") as file:
        file.write('{"step": 3, "x')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    keep_rows_until(path, 1)
    append_row(path, {"step": 2, "again": True})
    assert list(read_rows(path)) == [{"step": 1}, {"step": 2, "again": True}]


def test_settings_are_recorded_without_secrets(build, small_model, monkeypatch, tmp_path):
    """A report is shown to others, so it contains no token, password or home folder."""
    monkeypatch.chdir(tmp_path)
    token = "hf_" + "abcdefghij" * 3
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", token, "--beta=0.2", f"--run_name=x-{token}"])
    settings = {"hub_token": token, "run_name": f"run-{token}", "learning_rate": 2e-4}
    trainer = build(small_model, peft_config=random_lora(), max_steps=1, **settings)
    trainer.train()
    text = Path(trainer.args.output_dir, SETTINGS_FILE).read_text(encoding="utf-8")
    assert token not in text
    assert str(tmp_path) not in text
    run = json.loads(text)
    assert "hub_token" not in run["settings"]
    assert run["settings"]["output_dir"] == "run"
    assert run["command"] == f"python train.py --hub_token '{REDACTED}' --beta=0.2 '--run_name=x-{REDACTED}'"
    assert run["settings"]["learning_rate"] == 2e-4
    assert {"learning_rate", "num_generations"} <= set(run["changed"])
    assert not {"temperature", "loss_type", "dead_groups", "debug"} & set(run["changed"])
    assert run["adapter"]["r"] == 4
    assert run["steps"] == 1


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [
        ("https://user:secret@host/x", "vllm_server_base_url", f"https://{REDACTED}@host/x"),
        ({"token": "abc", "revision": "main"}, "model_init_kwargs", {"token": REDACTED, "revision": "main"}),
        (512, "chunk_tokens", 512),
        ("/somewhere/else/model", "model", ".../model"),
        ("/home/someone/runs/a", "output_dir", "~/runs/a"),
        ({"q_proj", "k_proj"}, "target_modules", ["k_proj", "q_proj"]),
    ],
)
def test_what_a_setting_shows(value, name, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert redact(value, name) == expected


def test_the_command_names_its_launcher(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/math.py", "--seed", "1"])
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert command_line() == "torchrun --nproc_per_node 2 recipes/math.py --seed 1"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert command_line() == "accelerate launch recipes/math.py --seed 1"


def test_completions_are_printed_and_trackers_get_every_metric(build, small_model, capsys):
    """`--log_completions` is TRL's table, and `--report_to` its callbacks. Both receive what this trainer logs."""
    options = {"log_completions": True, "num_completions_to_print": 2, "report_to": "tensorboard", "max_steps": 1}
    trainer = build(small_model, peft_config=random_lora(), **options)
    trainer.train()
    printed = capsys.readouterr().out
    assert "Step 1" in printed
    assert "share_of_digits" in printed
    events = b"".join(path.read_bytes() for path in Path(trainer.args.output_dir).rglob("events.out.tfevents*"))
    for name in ("reward", "kl_sequence", "time/update", "frac_groups/mixed", "peak_memory_mb"):
        assert log_of(trainer, name)
        assert f"train/{name}".encode() in events
