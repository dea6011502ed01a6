"""Only complete checkpoints of the same run are resumed. Others are skipped or refused, with the reason."""

import copy
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOTrainer

from grpo_ext.checkpoints import files
from grpo_ext.checkpoints.other_processes import PROCESSES, why_impossible
from grpo_ext.checkpoints.resume import FORMAT
from grpo_ext.report.run_reader import read_metrics
from tests.tools.lanes import slow_but, thinned
from tests.tools.models import random_lora, small_llama
from tests.tools.reward_functions import PROMPTS, half_dead, likes_step_two, share_of_digits
from tests.tools.training import adapter_of, log_of

# Every option that writes its own file into a checkpoint.
EVERYTHING = {
    "per_device_train_batch_size": 16,
    "num_iterations": 2,
    "replay_fraction": 0.5,
    "temperature_schedule": "entropy",
    "temperature_entropy_target": 2.0,
    "sync_ref_model": True,
    "ref_model_sync_steps": 1,
}


@pytest.fixture
def saved(build, small_model):
    """`saved()` trains the small model with one checkpoint per step and returns the trainer."""

    def run(**settings):
        trainer = build(
            small_model, **{"peft_config": random_lora(), "save_strategy": "steps", "save_steps": 1} | settings
        )
        trainer.train()
        return trainer

    return run


@pytest.fixture
def again(build, tokenizer):
    """`again()` builds another trainer like that of `saved`, with changes."""

    def make(**settings):
        settings = {"peft_config": random_lora(), "save_strategy": "steps", "save_steps": 1} | settings
        return build(settings.pop("model", None) or small_llama(tokenizer), **settings)

    return make


# Damage


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_a_flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def missing(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


DAMAGES = (truncated, with_a_flipped_bit, missing, empty)


def test_every_damage_to_every_file_is_found(saved, caplog):
    """A run resumed from a truncated optimizer or rollout would diverge, or load garbage."""
    folder = Path(saved(max_steps=3, **EVERYTHING).args.output_dir)
    last, before = folder / "checkpoint-3", folder / "checkpoint-2"
    names = sorted(path.relative_to(last).as_posix() for path in last.rglob("*") if path.is_file())
    expected = "adapter_model.safetensors ref/adapter_model.safetensors optimizer.pt scheduler.pt rng_state.pth "
    expected += "trainer_state.json state_0.json state_0.safetensors run.json complete.json"
    assert set(expected.split()) <= set(names)
    assert files.find_checkpoint("last", folder) == last
    for name in names:
        whole = (last / name).read_bytes()
        for damage in DAMAGES:
            damage(last / name)
            caplog.clear()
            assert files.find_checkpoint("last", folder) == before, (name, damage)
            (warning,) = caplog.messages
            assert warning.startswith(f"{last} is skipped: ")
            assert name in warning or name == "complete.json"
            with pytest.raises(ValueError, match=rf"checkpoint-3' cannot be resumed: .*\. Use {before}\."):
                files.find_checkpoint(str(last), folder)
            (last / name).write_bytes(whole)
    assert files.why_unusable(last) is None


def test_last_resumes_from_the_checkpoint_before_a_damaged_one(saved, again, caplog):
    whole = saved(max_steps=4)
    folder = Path(whole.args.output_dir)
    adapter = adapter_of(whole)
    shutil.rmtree(folder / "checkpoint-4")
    truncated(folder / "checkpoint-3" / "optimizer.pt")
    resumed = again(max_steps=4)
    resumed.train(resume_from_checkpoint="last")
    assert "checkpoint-3 is skipped: optimizer.pt has" in caplog.text
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]
    for name, value in adapter_of(resumed).items():
        assert torch.equal(value, adapter[name]), name


def test_no_whole_checkpoint(saved, tmp_path, caplog):
    """A run killed before its first checkpoint starts again from step 0. If all finished checkpoints are damaged, it
    stops."""
    assert files.find_checkpoint("last", tmp_path) is None
    (tmp_path / "checkpoint-1").mkdir()
    assert files.find_checkpoint("last", tmp_path) is None
    assert "checkpoint-1 is skipped: it is unfinished" in caplog.text
    assert f"no finished checkpoint in {tmp_path}: the run starts at step 0" in caplog.text
    folder = Path(saved(max_steps=1).args.output_dir)
    missing(folder / "checkpoint-1" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"is complete\. checkpoint-1: optimizer\.pt is missing\. Restore one"):
        files.find_checkpoint("last", folder)
    with pytest.raises(
        ValueError, match=r"cannot be resumed: optimizer\.pt is missing\. Start without resume_from_checkpoint\."
    ):
        files.find_checkpoint(folder / "checkpoint-1", folder)
    with pytest.raises(ValueError, match="nowhere' cannot be resumed: there is no such folder"):
        files.find_checkpoint("nowhere", folder)


def test_the_folder_of_a_run_is_not_a_checkpoint(saved):
    folder = Path(saved(max_steps=2).args.output_dir)
    with pytest.raises(ValueError, match=rf"it is unfinished \(no complete\.json\)\. Use {folder}/checkpoint-2\."):
        files.find_checkpoint(str(folder), folder)


@pytest.mark.parametrize("text", slow_but(["True", "true", "last", True], ["last"]))
def test_values_from_a_command_line(saved, text):
    """On a command line, `True` is a string, which transformers would take for a folder."""
    trainer = saved(max_steps=2)
    assert trainer.find_checkpoint(text) == Path(trainer.args.output_dir, "checkpoint-2")
    for nothing in ("False", "false", "", None, False):
        assert trainer.find_checkpoint(nothing) is None


# Writing


def verbose_reward(completions, log_extra, **columns):
    log_extra("why", ["because " * 2_000] * len(completions))
    return share_of_digits(completions)


def fill_disk_at_step_two(trainer, max_bytes):
    """In the save at step 2, no file can exceed `max_bytes`."""
    save = trainer._save_checkpoint

    def on_a_full_disk(*args):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes if trainer.state.global_step == 2 else soft, hard))
        try:
            save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    trainer._save_checkpoint = on_a_full_disk


@pytest.mark.parametrize(
    ("max_bytes", "settings"),
    slow_but([(4_000, {}), (9_000, {}), (40_000, {}), (80_000, {"num_iterations": 3})], [(40_000, {})]),
)
def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(build, small_model, max_bytes, settings):
    """In the second save, no file can exceed `max_bytes`, so writing fails at the card, the adapter, the optimizer or,
    after all files of transformers, the state. With save_total_limit=1, transformers would have deleted the first
    checkpoint."""
    settings = settings | {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = build(small_model, peft_config=random_lora(), reward=verbose_reward, **settings)
    fill_disk_at_step_two(trainer, max_bytes)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written: .*Earlier checkpoints are unchanged"):
        trainer.train()
    folder = Path(trainer.args.output_dir)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert files.find_checkpoint("last", folder) == folder / "checkpoint-1"
    assert trainer.args.save_total_limit == 1


def test_a_full_disk_keeps_the_checkpoint_that_was_to_be_replaced(saved, again):
    """The run is resumed from an earlier one, and writes step 2 once more."""
    folder = Path(saved(max_steps=2).args.output_dir)
    resumed = again(max_steps=3)
    fill_disk_at_step_two(resumed, 40_000)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written: .*Earlier checkpoints are unchanged"):
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert files.find_checkpoint("last", folder) == folder / "checkpoint-2"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(("replaced", "removed"))]


def test_an_existing_checkpoint_is_replaced(saved, again):
    """Otherwise, files left in the folder by an earlier session would be taken for files of this checkpoint."""
    folder = Path(saved(max_steps=2).args.output_dir)
    (folder / "checkpoint-2" / "state_0.safetensors").write_bytes(b"of another session")
    again(max_steps=2).train(resume_from_checkpoint=folder / "checkpoint-1")
    assert not (folder / "checkpoint-2" / "state_0.safetensors").exists()
    assert files.find_checkpoint("last", folder) == folder / "checkpoint-2"
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("limit", slow_but(thinned([1, 2, 3], [3]), [2]))
def test_rotation_keeps_the_same_checkpoints_as_transformers(build, small_model, tmp_path, limit):
    """Both always keep the newest and the best."""
    kept = {}
    for kind in (None, GRPOTrainer):
        settings = {
            "save_strategy": "steps",
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "max_steps": 5,
        }
        settings |= {"metric_for_best_model": "reward", "greater_is_better": True, "save_total_limit": limit}
        trainer = build(
            small_model if kind is None else small_model.__class__(small_model.config),
            **({} if kind is None else {"trainer": kind}),
            peft_config=random_lora(),
            reward=likes_step_two,
            arguments={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]})},
            output_dir=str(tmp_path / str(kind)),
            **settings,
        )
        trainer.train()
        kept[kind] = sorted(path.name for path in (tmp_path / str(kind)).glob("checkpoint-*"))
    assert kept[None] == kept[GRPOTrainer]
    assert "checkpoint-2" in kept[None]


def test_unfinished_checkpoints_do_not_count_in_rotation(tmp_path):
    """A folder left by a killed run must not take the place of a checkpoint that can be resumed."""
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 3:
            files.seal(tmp_path / f"checkpoint-{step}")
    files.rotate(tmp_path, 2, {tmp_path / "checkpoint-4"})
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "3", "4"]
    files.rotate(tmp_path, None, set())
    files.rotate(tmp_path, 0, set())
    assert len(list(tmp_path.iterdir())) == 3


# Another run


@pytest.mark.slow
def test_checkpoint_of_another_run_is_refused(saved, again, tmp_path, small_model):
    other_weights = small_model.__class__(small_model.config)
    other_config = copy.deepcopy(small_model)
    other_config.config.rms_norm_eps = 1e-3
    saved(max_steps=1)
    differences = {
        "r=4; this run has r=8. Start without resume_from_checkpoint, or restore r=4.": {
            "peft_config": random_lora(r=8)
        },
        "lora_alpha=8; this run has lora_alpha=9": {"peft_config": random_lora(lora_alpha=9)},
        r"target_modules=\['model.layers.0.mlp.down_proj', .*\.\.\.; this run has target_modules=\['q_proj'\]": {
            "peft_config": random_lora(target_modules=["q_proj"])
        },
        r"base_model= \(weights \w{8}\); this run has base_model= \(weights": {"model": other_weights},
        "model_config=": {"model": other_config},
        r"train_dataset=4 rows \(\w{8}\); this run has train_dataset=5 rows": {"prompts": [*PROMPTS, "1+1="]},
        "train_dataset=4 rows": {"prompts": [*PROMPTS[:3], "1+1="]},
        r"reward_funcs=\['share_of_digits'\]; this run has reward_funcs=\['likes_step_two'\]": {
            "reward": likes_step_two
        },
        "per_device_train_batch_size=8; this run has per_device_train_batch_size=4": {"per_device_train_batch_size": 4},
        "num_generations=4; this run has num_generations=2": {"num_generations": 2},
        "gradient_accumulation_steps=1; this run has gradient_accumulation_steps=2": {"gradient_accumulation_steps": 2},
        "seed=3; this run has seed=4": {"seed": 4},
        "learning_rate=0.001; this run has learning_rate=0.002": {"learning_rate": 2e-3},
        "loss_type=grpo_sequence; this run has loss_type=grpo": {"loss_type": "grpo"},
        "beta=0.1; this run has beta=0.0": {"beta": 0.0},
        "num_iterations=1; this run has num_iterations=2": {"num_iterations": 2},
        "max_completion_length=12; this run has max_completion_length=13": {"max_completion_length": 13},
        "dead_groups=skip; this run has dead_groups=resample": {"dead_groups": "resample"},
    }
    for message, changes in differences.items():
        with pytest.raises(ValueError, match=f"The checkpoint was made with {message}"):
            again(**changes).train(resume_from_checkpoint="last")
    may_differ = {"logging_steps": 2, "save_steps": 5, "max_steps": 3, "chunk_tokens": 64, "report_to": "none"}
    may_differ |= {"output_dir": str(tmp_path / "other"), "reward_workers": 1, "log_completions": True}
    longer = again(**may_differ)
    longer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert longer.state.global_step == 3


@pytest.mark.parametrize("field", ["keep", None])
def test_a_checkpoint_from_before_dead_groups_were_skipped_by_default(saved, again, tmp_path, field):
    """Its fingerprint has the old default, or lacks the field. The adapter does not depend on it, so the run goes on,
    and ends as it would have ended."""
    settings = {"reward": half_dead, "beta": 0.0, "entropy_coef": 0.0, "num_iterations": 2, "max_steps": 4}
    settings |= {"per_device_train_batch_size": 16}
    whole = saved(dead_groups="keep", **settings)
    folder = tmp_path / "run" / "checkpoint-3"  # in the middle of a rollout
    if field is None:
        run = json.loads((folder / "run.json").read_text())
        del run["dead_groups"]
        (folder / "run.json").write_text(json.dumps(run))
        files.seal(folder)
    resumed = again(output_dir=str(tmp_path / "again"), **settings)
    assert resumed.args.dead_groups == "skip"
    resumed.train(resume_from_checkpoint=str(folder))
    assert log_of(resumed, "frac_dead_groups")[-1] == 0.5
    for name, value in adapter_of(resumed).items():
        assert torch.equal(value, adapter_of(whole)[name]), name


def test_another_number_of_processes_is_refused(saved, again):
    folder = Path(saved(max_steps=1).args.output_dir, "checkpoint-1")
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"number of processes": 2}))
    files.seal(folder)
    with pytest.raises(ValueError, match="made with number of processes=2, and cannot continue on 1: this run has"):
        again().train(resume_from_checkpoint="last")


def test_a_batch_that_the_processes_cannot_share_has_no_recommended_size():
    """No size per process gives three processes the 8 completions per update of two."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    saved, now = ({PROCESSES: n, "generation_batch_size": 4 * n} | sizes for n in (2, 3))
    reason = why_impossible(saved, now, in_a_rollout=False, is_sharded=False)
    assert reason == "its updates have 8 completions, which 3 processes cannot share equally"


def test_a_checkpoint_without_an_optimizer_is_refused(saved, again):
    saved(max_steps=1, save_only_model=True)
    with pytest.raises(ValueError, match="has no optimizer state: it was made with save_only_model=True"):
        again().train(resume_from_checkpoint="last")


# Changes that a user accepts


class DoublesRate(TrainerCallback):
    """Doubles the learning rate after step 2, as a resumed session with another rate does."""

    def on_step_end(self, args, state, control, optimizer, lr_scheduler, **kwargs):
        if state.global_step == 2:
            schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)
            schedule.base_lrs = [2 * rate for rate in schedule.base_lrs]
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = 2 * group["lr"]
                group["weight_decay"] = 0.1


def test_accepted_changes_take_effect_and_are_recorded(saved, again, tmp_path):
    """PyTorch loads the learning rate with the optimizer, so a new one would be ignored silently."""
    settings = {"lr_scheduler_type": "constant", "max_steps": 4}
    whole = again(output_dir=str(tmp_path / "whole"), **settings)
    whole.add_callback(DoublesRate())
    whole.train()
    saved(**settings | {"max_steps": 2})
    changes = {"learning_rate": 2e-3, "weight_decay": 0.1, "epsilon": 0.3}
    with pytest.raises(
        ValueError, match=r"accept what has changed: --accept_changes learning_rate,weight_decay,epsilon$"
    ):
        again(**settings | changes).train(resume_from_checkpoint="last")
    resumed = again(**settings | changes, accept_changes="learning_rate, weight_decay,epsilon")
    resumed.train(resume_from_checkpoint="last")
    assert log_of(resumed, "learning_rate") == [1e-3, 1e-3, 2e-3, 2e-3]
    for name, value in adapter_of(resumed).items():
        torch.testing.assert_close(value, adapter_of(whole)[name], atol=0, rtol=0, msg=name)
    expected = [{"step": 2, "name": "learning_rate", "was": 1e-3, "is": 2e-3}]
    for path in (tmp_path / "run" / "run.json", tmp_path / "run" / "checkpoint-4" / "run.json"):
        assert json.loads(path.read_text())["accepted_changes"][:1] == expected
    third = again(**settings | changes | {"max_steps": 5, "temperature": 1.1}, accept_changes="temperature")
    third.train(resume_from_checkpoint="last")
    assert third.temperature == 1.1
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["accepted_changes"]
    assert [change["name"] for change in recorded] == ["learning_rate", "weight_decay", "epsilon", "temperature"]


def test_a_temperature_that_was_accepted_starts_its_schedule_again(saved, again):
    """The controller would otherwise go on from the earlier temperature."""
    entropy = {"temperature_schedule": "entropy", "temperature_entropy_target": 2.0}
    saved(max_steps=1, **entropy)
    resumed = again(max_steps=2, temperature=1.2, accept_changes="temperature", **entropy)
    resumed.train(resume_from_checkpoint="last")
    assert log_of(resumed, "temperature")[1] == pytest.approx(1.2, rel=0.1)
    back = again(max_steps=3, temperature=1.2, accept_changes="temperature_schedule,temperature_entropy_target")
    back.train(resume_from_checkpoint="last")
    assert back.temperature == 1.2


def test_the_loss_of_a_resumed_run_is_that_of_the_whole(saved, again):
    """The value that `train` returns: the mean over the steps of all sessions."""
    whole = again(max_steps=4, num_iterations=2)
    expected = whole.train().training_loss
    shutil.rmtree(Path(whole.args.output_dir, "checkpoint-4"))
    resumed = again(max_steps=4, num_iterations=2)
    assert resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2").training_loss == expected != 0


def test_another_estimator_waits_for_the_next_rollout(saved, again):
    """The exact KL needs hidden states of the reference, which the saved rollout does not have."""
    saved(max_steps=1, num_iterations=2, beta=0.1)
    settings = {"max_steps": 3, "num_iterations": 2, "beta": 0.1, "kl_estimator": "exact"}
    with pytest.raises(ValueError, match=r"in the middle of a rollout, .* made for kl_estimator='k3'\. Restore it"):
        again(**settings, accept_changes="kl_estimator").train(resume_from_checkpoint="last")


def test_a_warm_schedule_continues_with_the_accepted_rate(saved, again):
    """The steps that the schedule has counted are kept: after 2 of 4, a linear schedule is at half of the new rate."""
    saved(max_steps=2, lr_scheduler_type="constant")
    changes = {"learning_rate": 4e-3, "lr_scheduler_type": "linear", "max_steps": 4}
    resumed = again(**changes, accept_changes="learning_rate,lr_scheduler_type")
    resumed.train(resume_from_checkpoint="last")
    assert log_of(resumed, "learning_rate")[2:] == pytest.approx([2e-3, 1e-3])


def test_what_cannot_be_accepted(saved, again):
    saved(max_steps=1)
    with pytest.raises(ValueError, match=r"'reward_name' is not a setting .* Close to it: reward_.*funcs"):
        again(accept_changes="reward_name").train(resume_from_checkpoint="last")
    with pytest.raises(ValueError, match=r"'r' is not a setting whose change can be accepted"):
        again(accept_changes="r", peft_config=random_lora(r=8)).train(resume_from_checkpoint="last")
    with pytest.raises(ValueError, match=r"made with num_generations=4; .*, or restore num_generations=4\.$"):
        again(num_generations=2, learning_rate=1.0).train(resume_from_checkpoint="last")


def test_a_newer_format_is_refused(saved, again):
    folder = Path(saved(max_steps=1).args.output_dir, "checkpoint-1")
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"format": FORMAT + 1, "grpo_ext": "9.0"}))
    files.seal(folder)
    message = rf"has format {FORMAT + 1}, of grpo-ext 9\.0, and this is .* formats up to {FORMAT}\. Update it"
    with pytest.raises(ValueError, match=message):
        again().train(resume_from_checkpoint="last")


# Pickles


class MakesFolder:
    """Shows that a pickle can run code: unpickling this creates a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    "name", slow_but(["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"], ["optimizer.pt"])
)
def test_a_malicious_pickle_does_not_run(saved, again, tmp_path, name):
    """Its hash in the manifest is correct: whoever can write the file can write the manifest."""
    folder = Path(saved(max_steps=1).args.output_dir, "checkpoint-1")
    if name == "adapter_model.bin":
        (folder / "adapter_model.safetensors").unlink()
    torch.save({"state": MakesFolder(tmp_path / "ran")}, folder / name)
    files.seal(folder)
    assert files.why_unusable(folder) is None
    with pytest.raises(pickle.UnpicklingError):
        again().train(resume_from_checkpoint="last")
    assert not (tmp_path / "ran").exists()
    torch.load(folder / name, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_pickled_training_arguments_are_not_loaded(saved, again, tmp_path):
    folder = Path(saved(max_steps=1).args.output_dir, "checkpoint-1")
    torch.save({"state": MakesFolder(tmp_path / "ran")}, folder / "training_args.bin")
    files.seal(folder)
    again().train(resume_from_checkpoint="last")
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_the_user_is_kept(saved, tmp_path):
    """A reference adapter would be in a folder `ref`; this run has none."""
    kept = tmp_path / "run" / "ref" / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine", encoding="utf-8")
    saved(max_steps=1).save_model()
    assert kept.exists()
