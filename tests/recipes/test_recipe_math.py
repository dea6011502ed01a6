"""`recipes/math.py` as users run it: every way of launching it, the files that it writes, and that it learns.

If Python's own `math` is a shared object, a script named math.py in the first folder of sys.path would become `math`
for every other module, and `import random` would fail. So it is started by `accelerate launch` from the root, in
`distributed/test_recipe.py` by `torchrun` in its own folder, and in `cli/test_wheel.py` as a module from elsewhere.
"""

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from peft import PeftModel
from trl import get_peft_config

import grpo_ext.recipes.math as recipe
from grpo_ext import GRPOExtTrainer
from grpo_ext.data import load_problems
from grpo_ext.evaluation.callback import load_initial_evaluation
from grpo_ext.evaluation.complete import evaluate
from grpo_ext.model.load import load_tokenizer, model_init_kwargs
from grpo_ext.rewards import math_answer_reward
from tests.tools.lanes import THOROUGH
from tests.tools.metrics import comparable
from tests.tools.paths import TINY_DATA, TINY_MODEL
from tests.tools.processes import LAUNCH, launch

TWO_STEPS = (
    "--max_steps 2 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --max_completion_length 16 "
    "--max_eval_prompts 8 --eval_samples 2 --eval_steps 1 --save_steps 1 --seed 0"
).split()
IN_THIS_PROCESS = [*TWO_STEPS, "--reward_workers", "0"]
SUMMARY_FIELDS = (
    "recipe base_model device steps seconds prompts_seen completions_seen pass_at_1_before pass_at_1_after "
    "pass_at_k_before pass_at_k_after k peak_memory_mb trainable_parameters total_parameters versions seed"
).split()


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_a_run_prints_and_writes(tmp_path):
    """Banner, samples and verdict; adapter, card, checkpoints, metrics, picture and summary."""
    code, output = launch([*LAUNCH, "recipes/math.py", *TWO_STEPS, "--output_dir", str(tmp_path)])
    assert code == 0, output
    assert "held-out pass@1: " in output.strip().splitlines()[-1]
    for text in (
        "recipes/tiny_math/model, 0.87M parameters in float32",
        "163,840 parameters",
        "the same backbone with the adapter off (no second model); beta = 0.1",
        "8 completions (1 prompt x 8)",
        "steps      2, learning rate 0.001",
        "held out: 8 problems of split 'test'",
        "The loss does not measure progress in GRPO",
        "reward=",
        "pass@1=",
        "Held-out problems, greedy completions",
    ):
        assert text in output
    assert "Traceback" not in output
    assert "FutureWarning" not in output
    left = {path.name for path in tmp_path.iterdir()}
    assert left >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "checkpoint-1", "checkpoint-2"}
    assert left >= {"metrics.jsonl", "curves.png", "report.html", "summary.json", "completions.jsonl", "run.json"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) >= set(SUMMARY_FIELDS)
    assert (summary["steps"], summary["prompts_seen"], summary["completions_seen"], summary["k"]) == (2, 2, 16, 2)
    assert set(summary["pass_at_1_before"]) == {"value", "low", "high", "n"}
    assert set(summary["pass_at_1_difference"]) == {"value", "low", "high", "n", "better", "worse", "p_value"}
    assert list(summary["pass_at_after"]) == ["2"]
    metrics = lines_of(tmp_path / "metrics.jsonl")
    for name in ("heldout/pass@1", "heldout/sampled_pass@1"):
        assert [row["step"] for row in metrics if name in row] == [0, 1, 2]
    assert [row["step"] for row in metrics if "loss" in row] == [1, 2]
    assert [row["step"] for row in lines_of(tmp_path / "completions.jsonl")] == [1, 2]
    heldout = lines_of(tmp_path / "heldout.jsonl")
    assert [row["step"] for row in heldout] == [0, 1, 2]
    assert {(len(row["right"]), len(row["answers"])) for row in heldout} == {(8, 4)}
    page = (tmp_path / "report.html").read_text()
    assert "of 8 held-out problems" in page
    assert "accelerate launch recipes/math.py --max_steps 2" in page
    assert str(tmp_path.parent) not in page


@pytest.mark.parametrize(
    ("flags", "banner"),
    [
        (["--load_in_4bit"], "163,840 parameters (15.91%), the adapter, in float32"),
        (["--use_peft", "false"], "the whole model"),
    ],
)
def test_own_data_on_a_4bit_base_or_without_adapter(tmp_path, capsys, monkeypatch, flags, banner):
    """The flags of a real task: a model by name, problems in a file, and NF4 or a full fine-tune."""
    rows = [{"question": f"{i}+{i}=?", "solution": f"twice {i}\n#### {2 * i}"} for i in range(100, 160)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ["--model_name_or_path", str(TINY_MODEL), "--dataset_name", str(tmp_path / "problems.jsonl")]
    monkeypatch.setenv("COLUMNS", "160")
    recipe.main([*task, *flags, *IN_THIS_PROCESS, "--output_dir", str(tmp_path)])
    output = capsys.readouterr().out
    assert banner in output
    assert "52 problems; held out: 8 problems taken out of split 'train'" in output
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2


def test_flags_and_config_files(tmp_path, capsys):
    """No flags: the embedded preset. A YAML file replaces it, and flags win over both."""
    script_args, args, model_args = recipe.parse(["--seed", "7"])
    assert (args.seed, args.max_steps, args.learning_rate) == (7, 35, 1e-3)
    assert Path(model_args.model_name_or_path).is_dir()
    assert Path(script_args.dataset_name).is_dir()
    (tmp_path / "c.yaml").write_text("model_name_or_path: m\ndataset_name: d\nlearning_rate: 3.0e-5\nbeta: 0.2\n")
    _, args, model_args = recipe.parse(["--config", str(tmp_path / "c.yaml"), "--beta", "0.3"])
    assert (args.learning_rate, args.beta, model_args.model_name_or_path) == (3e-5, 0.3, "m")
    assert args.num_generations == 8
    with pytest.raises(SystemExit):
        recipe.parse(["--model_name_or_path", "m"])
    assert "give both --model_name_or_path and --dataset_name" in capsys.readouterr().err


def test_offline_a_hub_name_gives_one_sentence(tmp_path):
    """SystemExit, which prints no stack trace, if the model or the data set cannot be fetched."""
    with pytest.raises(SystemExit, match="Data set 'openai/gsm8k' is not a local path and could not be fetched"):
        recipe.main(["--model_name_or_path", str(TINY_MODEL), "--dataset_name", "openai/gsm8k"])
    with pytest.raises(SystemExit, match="Model 'nobody/nothing' is not a local path and could not be fetched"):
        recipe.main(["--model_name_or_path", "nobody/nothing", "--dataset_name", "x", "--output_dir", str(tmp_path)])


@pytest.mark.skipif(not THOROUGH, reason="run with THOROUGH=1: test_hub.py has a picture that fails")
def test_a_picture_that_fails_does_not_end_the_run(tmp_path, caplog):
    """Here folders occupy both names; the adapter and the summary are written all the same."""
    for name in ("report.html", "curves.png"):
        (tmp_path / name / "taken").mkdir(parents=True)
    recipe.main([*IN_THIS_PROCESS, "--output_dir", str(tmp_path)])
    assert f"Once this is fixed, run: grpo-ext report {tmp_path}" in caplog.text
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2


def test_a_resumed_recipe_reports_from_its_start(tmp_path, tokenizer):
    """The evaluation before training is kept from the first session, and report and log are those of one run."""
    flags = [*IN_THIS_PROCESS, "--output_dir", str(tmp_path), "--disable_tqdm", "True"]
    recipe.main(flags)

    def left_behind():
        summary = json.loads((tmp_path / "summary.json").read_text())
        del summary["seconds"], summary["peak_memory_mb"]
        return summary, comparable(tmp_path / "metrics.jsonl")

    at_once = left_behind()
    shutil.rmtree(tmp_path / "checkpoint-2")
    recipe.main([*flags, "--resume_from_checkpoint", "True"])
    assert left_behind() == at_once
    heldout, others = (
        load_problems(str(TINY_DATA), tokenizer, max_heldout=8, seed=seed).heldout.to_list() for seed in (0, 1)
    )
    before = load_initial_evaluation(tmp_path, problems=heldout, samples=2)
    assert asdict(before.greedy) == at_once[0]["pass_at_1_before"]
    assert load_initial_evaluation(tmp_path, problems=heldout, samples=3) is None
    assert load_initial_evaluation(tmp_path, problems=others, samples=2) is None
    kept = tmp_path / "heldout_before.json"
    kept.write_text(kept.read_text().replace(f'"value": {before.pass_at_k.value}', '"value": 0.0625'))
    recipe.main([*flags, "--resume_from_checkpoint", "last"])
    assert left_behind()[0]["pass_at_k_before"]["value"] == 0.0625  # it is not measured again
    kept.write_text("{")  # killed while it was written
    assert load_initial_evaluation(tmp_path, problems=heldout, samples=2) is None


@pytest.mark.slow
def test_the_embedded_run_learns(tmp_path, tiny_model, tokenizer):
    """In 14 of its 35 steps, with sequence-level GRPO alone and beta > 0. Plain PEFT loads the adapter and finds the
    same accuracy."""
    short = "--seed 1 --max_steps 14 --eval_steps 100 --eval_samples 2 --max_eval_prompts 64".split()
    recipe.main([*short, "--output_dir", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    before, after = summary["sampled_pass_at_1_before"], summary["sampled_pass_at_1_after"]
    assert before["n"] == after["n"] == 64
    assert after["value"] - before["value"] >= 0.35
    assert after["value"] >= 0.85
    assert summary["pass_at_1_after"]["value"] >= 0.95
    lengths = [row["completions/mean_length"] for row in lines_of(tmp_path / "metrics.jsonl") if "loss" in row]
    assert lengths[-1] > 1.5 * lengths[0]  # from blurting to steps

    model = PeftModel.from_pretrained(tiny_model, tmp_path)
    rows = lines_of(TINY_DATA / "test.jsonl")[:50]
    prompts = [f"Question: {row['question']}\nAnswer:" for row in rows]
    ids = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    completions = tokenizer.batch_decode(
        model.generate(**ids, max_new_tokens=48, do_sample=False), skip_special_tokens=True
    )
    right = [text.endswith("#### " + row["answer"]) for text, row in zip(completions, rows, strict=True)]
    assert sum(right) / len(right) == pytest.approx(summary["pass_at_1_after"]["value"], abs=0.04)


@pytest.mark.slow
@pytest.mark.skipif(not THOROUGH, reason="run with THOROUGH=1")
def test_shuffled_rewards_teach_nothing(tmp_path):
    """The same run with the rewards of each batch in random order: any gain would not come from the rewards."""
    flags = ["--output_dir", str(tmp_path), "--max_steps", "10", "--disable_tqdm", "True", "--report_to", "none"]
    script_args, args, model_args = recipe.parse(flags)
    tokenizer = load_tokenizer(model_args)
    problems = load_problems(script_args.dataset_name, tokenizer, max_heldout=64)
    order = random.Random(0)

    def shuffled(completions, answer, **columns):
        rewards = math_answer_reward(completions, answer)
        order.shuffle(rewards)
        return rewards

    args.model_init_kwargs = model_init_kwargs(model_args, args)
    trainer = GRPOExtTrainer(
        model_args.model_name_or_path,
        shuffled,
        args,
        problems.train,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )

    def accuracy():
        rows = problems.heldout.to_list()
        settings = {"max_new_tokens": 48, "temperature": 0.8, "samples": 2, "batch_size": 256}
        return evaluate(trainer.model, tokenizer, rows, math_answer_reward, **settings).sampled.value

    before = accuracy()
    trainer.train()
    assert trainer.state.global_step == 10  # the real run is at 0.9 by then
    assert accuracy() < before + 0.1
