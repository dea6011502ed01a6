"""Publishing, with the Hub's own client against a small server: what is pushed, when, and what happens on a failure."""

import json
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import huggingface_hub.constants
import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.utils import close_session
from peft import IA3Config, get_peft_model

from grpo_ext import GRPOExtConfig, cli
from grpo_ext.data import Problems
from grpo_ext.recipe import train_and_report
from grpo_ext.report.hub import check_write_access
from grpo_ext.rewards import math_answer_reward
from tests.report.hub_server import READ_TOKEN, WRITE_TOKEN, HubServer
from tests.tools.lanes import thinned
from tests.tools.models import random_lora
from tests.tools.paths import ROOT, TINY_DATA, TINY_MODEL
from tests.tools.reward_functions import share_of_digits

BASE, REPO = "someone/tiny-base", "someone/tiny-math"
WEIGHTS = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local Hub for the client in this process, which is logged in."""
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield server
        close_session()


def pushing(build, model, **changes):
    """A trainer that saves and pushes at every step."""
    settings = {"push_to_hub": True, "hub_model_id": REPO, "hub_always_push": True}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    return build(model, peft_config=random_lora(), **settings | changes)


def problems(count=8):
    lines = (TINY_DATA / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:count]]
    return [{"prompt": f"Question: {row['question']}\nAnswer:", "answer": row["answer"]} for row in rows]


def code_of(card):
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 6
    return code


def test_a_run_is_published_and_its_card_loads_it_elsewhere(hub, build, tiny_model, tmp_path, capsys):
    """From the first save to the last, exactly these files are pushed, without any path of this machine. The code of
    the card loads the adapter in a process that knows nothing of the run."""
    hub.commits[BASE] = {"main": [("", {path.name: path.read_bytes() for path in TINY_MODEL.iterdir()})]}
    tiny_model.config._name_or_path = BASE
    trainer = pushing(build, tiny_model, hub_strategy="all_checkpoints", sync_ref_model=True, ref_model_sync_steps=1)
    trainer.train_dataset.info.dataset_name = "someone/sums"
    heldout = Dataset.from_list(problems())
    train_and_report(
        trainer, Problems(train=trainer.train_dataset, heldout=heldout, note=""), math_answer_reward, recipe="math"
    )
    assert "pass@1" in capsys.readouterr().out.splitlines()[-1]

    messages, states = zip(*hub.commits[REPO]["main"], strict=True)
    steps = [f"Training in progress, step {step}{part}" for step in (1, 2) for part in ("", ", checkpoint")]
    assert list(messages) == ["first commit", *steps, "Model save"]
    assert set(states[1]) == WEIGHTS | {"README.md", "curves.png"}
    checkpoints = {f"checkpoint-{step}/{name}" for step in (1, 2) for name in WEIGHTS}
    assert set(states[-1]) == WEIGHTS | {"README.md", "curves.png", "summary.json"} | checkpoints
    assert states[1]["adapter_model.safetensors"] != states[-1]["adapter_model.safetensors"]
    assert not [name for name, content in states[-1].items() if str(tmp_path).encode() in content]
    assert (tmp_path / "run/checkpoint-2/ref").is_dir()  # not pushed

    unfinished = ModelCard(states[1]["README.md"].decode())
    assert "Not measured before this was saved (after step 1)." in unfinished.text
    assert "![Curves of the run](curves.png)" in unfinished.text
    assert unfinished.data.eval_results is None
    card = ModelCard(states[-1]["README.md"].decode())
    summary = json.loads(states[-1]["summary.json"])
    after = summary["pass_at_1_after"]
    result, lenient = card.data.eval_results
    assert lenient.metric_value >= result.metric_value
    assert card.data.datasets == "someone/sums"
    assert card.data.to_dict()["base_model"] == summary["base_model"] == BASE
    assert (result.metric_value, result.metric_args["low"], result.metric_args["n"]) == (
        after["value"],
        after["low"],
        8,
    )
    assert f"| {after['value']:.2f} [{after['low']:.2f}, {after['high']:.2f}] | 8 |" in card.text

    weights = "print(sum(p.double().abs().sum().item() for n, p in model.named_parameters() if 'lora' in n))"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1"}
    stranger = subprocess.run(
        [sys.executable, "-c", f"{code_of(card)}\n{weights}"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert stranger.returncode == 0, stranger.stderr
    answer, total = stranger.stdout.strip().splitlines()
    assert "Your question" in answer
    trained = sum(p.double().abs().sum().item() for p in trainer.model.parameters() if p.requires_grad)
    assert float(total) == pytest.approx(trained, rel=1e-12)


@pytest.mark.parametrize(
    ("strategy", "at_saves"),
    thinned([("every_save", 1), ("end", 0), ("checkpoint", 2)], [("every_save", 1)]),  # the strategy of other tests
)
def test_when_it_is_pushed(hub, build, small_model, tmp_path, strategy, at_saves):
    """`hub_strategy` selects every save or only the end. The folder of `checkpoint` can be loaded but not resumed. The
    summary of an earlier run in the output folder is not pushed."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    trainer = pushing(build, small_model, hub_strategy=strategy, max_steps=1)
    trainer.train()
    assert len(hub.commits[REPO]["main"]) == 1 + at_saves
    trainer.save_model()
    assert len(hub.commits[REPO]["main"]) == 2 + at_saves
    assert "summary.json" not in hub.files(REPO)
    in_folders = {name for name in hub.files(REPO) if "/" in name}
    assert in_folders == ({f"last-checkpoint/{name}" for name in WEIGHTS} if strategy == "checkpoint" else set())


def test_training_continues_while_a_save_is_pushed(hub, build, small_model, tmp_path):
    """Meanwhile it changes files of the output folder, but each push has the files of its own save. The Hub does not
    answer until the third step."""
    calls = []

    def reward(completions, **columns):
        calls.append(len(completions))
        if len(calls) == 3:
            assert len(hub.commits[REPO]["main"]) == 1
            hub.answers.set()
        return share_of_digits(completions)

    trainer = pushing(build, small_model, reward=reward, max_steps=3)
    hub.answers.clear()
    trainer.train()
    _, *pushed = hub.commits[REPO]["main"]
    name = "adapter_model.safetensors"
    saved = [sha256((tmp_path / f"run/checkpoint-{step}" / name).read_bytes()).digest() for step in (1, 2, 3)]
    assert [sha256(files[name]).digest() for _, files in pushed] == saved
    assert len(set(saved)) == 3


def test_failed_pushes_do_not_end_the_run(hub, build, small_model, capsys):
    """Seven saves fail in seven ways. The run continues and names the command that pushes again, which works."""
    trainer = pushing(build, small_model, max_steps=7, hub_private_repo=True)
    hub.fail("/preupload/", 401)
    hub.fail("/objects/batch", 403)
    hub.fail("/commit/", 401, 403, 429, 500, "drop")
    trainer.train()
    message = capsys.readouterr().out
    command = f"grpo-ext push {trainer.args.output_dir} {REPO} --private"
    assert len(hub.commits[REPO]["main"]) == 1
    assert message.count(f"Push again: {command}\n") == 7
    for reason in (
        "there is no token",
        "the token may not write there",
        "429 Too Many",
        "'500 Internal",
        "disconnected",
    ):
        assert reason in message
    assert trainer.state.global_step == 7
    cli.main(command.split()[1:])
    assert hub.visibility[REPO] == "private"
    assert set(hub.files(REPO)) == WEIGHTS | {"README.md", "curves.png"}


def test_a_picture_that_fails_does_not_end_the_run(hub, build, small_model, caplog):
    """If the picture cannot be written, everything else is still pushed."""
    trainer = pushing(build, small_model, max_steps=1)
    Path(trainer.args.output_dir, "curves.png").symlink_to("/nowhere/curves.png")
    trainer.train()
    assert trainer.state.global_step == 1
    assert f"Once this is fixed, run: grpo-ext report {trainer.args.output_dir}" in caplog.text
    assert set(hub.files(REPO)) == WEIGHTS | {"README.md"}


def finished(trainer):
    """The output folder of a run without the Hub."""
    trainer.train()
    trainer.save_model()
    return trainer.args.output_dir


def test_short_failures_are_retried(hub, build, small_model, capsys):
    """The Hub's client retries by itself, and these retries must be left to finish. The branch does not exist yet."""
    folder = finished(build(small_model, peft_config=random_lora(), max_steps=1))
    hub.fail("/preupload/", 429)
    hub.fail("/objects/batch", 500)
    hub.fail("/lfs/", "drop")
    cli.main(["push", folder, "tiny-math", "--revision", "trial"])
    assert f"pushed to {hub.endpoint}/{REPO}/commit/" in capsys.readouterr().out
    assert hub.faults == []
    assert set(hub.files(REPO, "trial")) == WEIGHTS | {"README.md"}
    assert hub.files(REPO, "main") == {}


def test_a_command_that_cannot_push(hub, build, small_model, tmp_path):
    """One sentence names what failed and the command to repeat, or what the folder has instead of an adapter."""
    trainer = build(small_model, peft_config=random_lora(), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = trainer.args.output_dir
    with pytest.raises(SystemExit, match=f"nothing to push. The last .* grpo-ext push {folder}/checkpoint-1 REPO"):
        cli.main(["push", folder, REPO])
    assert hub.requests == []
    for fault in (401, 403, 429, 500, "drop"):
        hub.fail("/commit/", fault)
        with pytest.raises(SystemExit, match=f"^grpo-ext: Not pushed: .*: grpo-ext push {folder}/checkpoint-1 {REPO}$"):
            cli.main(["push", f"{folder}/checkpoint-1", REPO])
    cli.main(["push", f"{folder}/checkpoint-1", REPO])
    assert set(hub.files(REPO)) == WEIGHTS | {"README.md"}


@pytest.mark.parametrize("request_", ["/repos/create", "/auth-check/write"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (401, "Log in with `hf auth login`"),
        (403, "Use a token with write access"),
        (429, "429 .* Try again later"),
        (500, "500 .* Try again later"),
        ("drop", "RemoteProtocolError: .* Try again later"),
    ],
)
def test_access_is_checked_before_training(hub, tmp_path, request_, fault, message):
    """A push that would fail after hours of training fails before them, with what was received and what to type."""
    args = GRPOExtConfig(str(tmp_path / "tiny-math"), push_to_hub=True)
    hub.fail(request_, fault)
    with pytest.raises(
        ValueError, match=rf"^'tiny-math' on the Hub .*{message}.* grpo-ext push {args.output_dir} tiny-math"
    ):
        check_write_access(args)
    assert check_write_access(args) == REPO


def test_tokens_that_cannot_write(hub, tmp_path, monkeypatch, build, small_model):
    """A read-only token, for which creating an existing repository succeeds; no token; a Hub that is switched off."""
    args = GRPOExtConfig(str(tmp_path), push_to_hub=True, hub_model_id=REPO, hub_token=WRITE_TOKEN)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert check_write_access(args) == REPO
    args.hub_token = None
    with pytest.raises(ValueError, match="the token may not write there"):
        check_write_access(args)
    with pytest.raises(ValueError, match="the token may not write there"):
        pushing(build, small_model)
    nowhere = tmp_path / "without_weights"
    small_model.config.save_pretrained(nowhere)
    with pytest.raises(ValueError, match="the token may not write there"):  # before weights are loaded
        pushing(build, str(nowhere), guards=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="there is no token"):
        check_write_access(args)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        check_write_access(args)


def test_a_local_base_stays_unnamed(hub, build, tiny_model, tmp_path, monkeypatch, capsys):
    """A local folder may appear neither in the card nor in PEFT's config. The card says what to put there."""
    folder = finished(build(tiny_model, peft_config=random_lora(), max_steps=1))
    assert str(TINY_MODEL) in (tmp_path / "run/adapter_config.json").read_text()  # on this machine it is useful
    cli.main(["push", folder, REPO])
    files = hub.files(REPO)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert not [name for name, content in files.items() if str(ROOT).encode() in content]
    card = ModelCard(files["README.md"].decode())
    assert "base_model" not in card.data.to_dict()
    assert "a local llama model that is not on the Hub" in card.text
    assert code_of(card).count(REPO) == 2
    code = code_of(ModelCard.load(tmp_path / "run/README.md"))
    assert code.count("PATH/OF/THE/BASE/MODEL") == 1
    monkeypatch.chdir(folder)
    exec(code.replace("PATH/OF/THE/BASE/MODEL", str(TINY_MODEL)), {})
    assert "Your question" in capsys.readouterr().out


def test_a_whole_model_is_published_without_other_files(hub, build, small_model):
    trainer = build(small_model, max_steps=1, beta=0.0)
    cli.main(["push", finished(trainer), REPO])
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(hub.files(REPO)) == model | {"README.md"}


def test_cards_of_other_adapters_and_of_chat_models(build, small_model, tokenizer, tmp_path, monkeypatch):
    """A card that cannot be written would end the run at its first save."""
    modules = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    messages = [[{"role": "user", "content": f"{i}+1="}] for i in range(4)]
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    trainer = build(small_model, peft_config=IA3Config(task_type="CAUSAL_LM", **modules), prompts=messages)
    trainer.create_model_card(model_name="chatty", dataset_name="someone/talk", tags="mine")
    card = ModelCard.load(tmp_path / "run/README.md")
    assert "| adapter | IA3 |" in card.text
    assert card.text.strip().startswith("# chatty")
    assert (card.data.datasets, card.data.tags[-1]) == ("someone/talk", "mine")
    assert '[{"role": "user", "content": "Your question"}]' in code_of(card)


def test_cards_of_peft_are_not_pushed(hub, tiny_model, tmp_path):
    """An adapter saved by PEFT has a card with the path of its base model."""
    get_peft_model(tiny_model, random_lora()).save_pretrained(tmp_path)
    assert str(TINY_MODEL) in (tmp_path / "README.md").read_text()
    cli.main(["push", str(tmp_path), REPO])
    assert set(hub.files(REPO)) == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"] is None
