"""`grpo-ext eval`: the accuracy that a run would measure, for models, adapters and 4-bit bases."""

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import grpo_ext.recipes.math as recipe
from grpo_ext import cli
from grpo_ext.data import load_problems
from grpo_ext.evaluation.complete import complete, evaluate
from grpo_ext.model.load import disable_4bit_repacking
from grpo_ext.recipes.tiny_math import build
from grpo_ext.rewards import math_answer_reward
from grpo_ext.rewards.completion import text_of
from tests.tools.paths import TINY_DATA, TINY_MODEL

TASK = ["--model", str(TINY_MODEL), "--data", str(TINY_DATA), "--max_new_tokens", "40", "--batch_size", "256"]


def evaluated(capsys, *flags):
    capsys.readouterr()
    cli.main(["eval", *TASK, *flags])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def worked_out_adapter(tmp_path_factory):
    """An adapter with a known effect: trained to work every sum out, which the embedded model does correctly."""
    rng, tokenizer = random.Random(0), AutoTokenizer.from_pretrained(TINY_MODEL)
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY_MODEL), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(20):
        pairs = [build.draw(rng, "pretrain") for _ in range(32)]
        prompts = [build.PROMPT.format(question=f"{a}+{b}=?") for a, b in pairs]
        texts = [
            f"{prompt}{build.worked_out(a, b)}{tokenizer.eos_token}"
            for prompt, (a, b) in zip(prompts, pairs, strict=True)
        ]
        inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for row, prompt in zip(labels, prompts, strict=True):
            row[: len(prompt)] = -100  # one token per character
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("worked_out_adapter")
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_accuracy_of_the_embedded_model_and_of_an_adapter(capsys, worked_out_adapter):
    """On the problems that a run holds out; 0.14 is the accuracy before the run in the README."""
    base = evaluated(capsys)
    assert base["pass_at_1"]["value"] == pytest.approx(0.14, abs=0.005)
    assert (base["pass_at_1"]["n"], base["sampled_pass_at_1"], base["k"]) == (256, None, 0)
    adapted = evaluated(capsys, "--adapter", worked_out_adapter, "--max_problems", "64")
    assert adapted["pass_at_1"]["value"] > 0.9
    assert (adapted["adapter"], adapted["pass_at_1"]["n"]) == (worked_out_adapter, 64)


def test_results_equal_those_of_a_run(capsys, tmp_path, tiny_model, tokenizer):
    """Problems are held out, prompted and scored as in a recipe, including samples. The results go to a JSON file and
    to one human-readable line."""
    problems = load_problems(str(TINY_DATA), tokenizer, max_heldout=32, seed=7).heldout.to_list()
    settings = {"max_new_tokens": 40, "temperature": 0.6, "samples": 3, "batch_size": 256, "seed": 7}
    expected = evaluate(tiny_model, tokenizer, problems, math_answer_reward, **settings)
    file = tmp_path / "results" / "found.json"  # in a folder that does not exist yet
    flags = "--max_problems 32 --temperature 0.6 --samples 3 --seed 7".split()
    rates = tmp_path / "rates.jsonl"
    cli.main(["eval", *TASK, *flags, "--json", str(file), "--save_pass_rates", str(rates)])
    saved = [json.loads(line) for line in rates.read_text().splitlines()]
    assert [row["prompt"] for row in saved] == [problem["prompt"] for problem in problems]
    assert [row["passes"] / row["answers"] for row in saved] == pytest.approx(expected.shares)
    found = json.loads(file.read_text())
    assert found["pass_at_1"] == asdict(expected.greedy)
    assert found["sampled_pass_at_1"] == asdict(expected.sampled)
    assert found["pass_at_k"] == asdict(expected.pass_at_k)
    assert found["k"] == 3
    line = f"pass@1 {expected.greedy} (any format: {expected.greedy})  sampled pass@1 {expected.sampled} ("
    output = capsys.readouterr().out
    assert line in output
    assert f")  pass@3 {expected.pass_at_k}  (32 problems" in output


def test_custom_reward_and_data_without_answers_in_4_bits(capsys, tmp_path, monkeypatch, tokenizer):
    """A reward from a file in the current folder uses a column of its own: whether a text equals the NF4 model's."""
    (tmp_path / "judge_of_mine.py").write_text(
        "def same(completions, expected, **columns):\n"
        "    return [float(text == other) for text, other in zip(completions, expected, strict=True)]\n"
    )
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, quantization_config=four_bits, dtype=torch.float32)
    disable_4bit_repacking(model)
    prompts = [f"Question: {i}+{2 * i}=?\nAnswer:" for i in range(200, 216)]
    texts = complete(model, tokenizer, prompts, max_new_tokens=40)
    rows = [{"prompt": prompt, "expected": text} for prompt, text in zip(prompts, texts, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "rows.jsonl", "--split", "train", "--reward", "judge_of_mine:same"]
    found = evaluated(capsys, *flags, "--load_in_4bit")
    assert (found["pass_at_1"]["value"], found["pass_at_1"]["n"]) == (1.0, 16)
    assert evaluated(capsys, *flags)["pass_at_1"]["value"] < 1.0


def test_a_benchmark_in_a_local_copy_strict_and_lenient(capsys, tmp_path, monkeypatch):
    """The embedded model marks its answers with ####. For a reward that demands a box, every answer is wrong, and as
    many as ever are right in any format."""
    (tmp_path / "boxes.py").write_text(
        "from grpo_ext.rewards import MathAnswerReward\nboxed = MathAnswerReward(strict=True)\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = "--max_problems 32 --samples 2 --batch_size 256 --max_new_tokens 40".split()

    def found(*more):
        capsys.readouterr()
        cli.main(["eval", "--model", str(TINY_MODEL), "--task", *more, *flags])
        return json.loads(capsys.readouterr().out)

    usual = found("gsm8k", "--data", str(TINY_DATA))
    boxed = found(str(TINY_DATA), "--reward", "boxes:boxed")
    assert usual["pass_at_1"]["value"] > 0
    assert usual["pass_at_1"] == boxed["lenient_pass_at_1"]
    assert usual["sampled_pass_at_1"] == boxed["lenient_sampled_pass_at_1"]
    assert boxed["pass_at_1"]["value"] == boxed["sampled_pass_at_1"]["value"] == 0.0
    assert (usual["reward"], usual["task"]) == ("grpo_ext.rewards:math_answer_reward", "gsm8k")


needs_sandbox = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@needs_sandbox
@pytest.mark.parametrize("flags", [["--task", "humaneval", "--data"], ["--task"], ["--data"]], ids=" ".join)
def test_a_benchmark_of_programs(capsys, tmp_path, flags):
    """Its rows have no answers, and one of them has a test that cannot be converted. Without the name of a benchmark,
    the columns decide: otherwise the rows would be refused because they have no gold answers."""
    rows = [
        {"prompt": "def add(a, b):\n", "entry_point": "add", "test": f"def check(candidate):\n    assert {test}\n"}
        for test in ("candidate(1, 2) == 3", "candidate(1, 2) == 3", "candidate is not None")
    ]
    file = tmp_path / "copy.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli.main(["eval", "--model", str(TINY_MODEL), *flags, str(file), "--max_new_tokens", "8"])
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["reward"] == "grpo_ext.rewards:program_reward"
    assert found["pass_at_1"]["n"] == found["lenient_pass_at_1"]["n"] == 2
    assert "1 problems with unsupported tests were left out" in output.err


@needs_sandbox
def test_programs_without_any_supported_test(tmp_path):
    file = tmp_path / "copy.jsonl"
    file.write_text(json.dumps({"prompt": "Write f.", "test_list": ["assert f(1) > open('x')"]}) + "\n")
    with pytest.raises(SystemExit, match=r"No problem of '.*copy.jsonl' has tests that the code reward supports"):
        cli.main(["eval", "--model", str(TINY_MODEL), "--data", str(file)])


@pytest.mark.slow
def test_chat_template_kwargs_are_those_of_training(capsys, tmp_path, tiny_model, tokenizer):
    """Otherwise a model trained without thinking is measured with it, by a recipe and later by the command. Here the
    template renders the prompt format that the model was trained on only if it gets `ending`."""
    chat, questions, out = (str(tmp_path / name) for name in ("chat", "questions", "out"))
    shutil.copytree(TINY_MODEL, chat)
    chatting = AutoTokenizer.from_pretrained(TINY_MODEL)
    chatting.chat_template = "{{ messages[-1].content }}{{ ending }}"  # ends no turn, so needs --chat true
    chatting.save_pretrained(chat)
    Path(questions).mkdir()
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (TINY_DATA / f"{split}.jsonl").read_text().splitlines()[:12]]
        rows = [row | {"question": f"Question: {row['question']}"} for row in rows]
        Path(questions, f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prompts = [f"{row['question']}\nAnswer:" for row in rows]
    expected = complete(tiny_model, tokenizer, prompts, max_new_tokens=40)
    without_ending = complete(tiny_model, tokenizer, [row["question"] for row in rows], max_new_tokens=40)
    ending = '{"ending": "\\nAnswer:"}'
    flags = ["--model_name_or_path", chat, "--chat", "true", "--dataset_name", questions, "--max_steps", "1"]
    flags += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--guards", "false"]
    flags += ["--max_completion_length", "40", "--output_dir", out, "--chat_template_kwargs", ending]
    recipe.main(flags)
    before = json.loads(Path(out, "heldout_before.json").read_text(encoding="utf-8"))
    assert sorted(map(text_of, before["completions"])) == sorted(expected) != sorted(without_ending)
    found = evaluated(capsys, "--model", chat, "--chat", "true", "--data", questions, "--chat_template_kwargs", ending)
    assert found["pass_at_1"]["value"] == before["greedy"]["value"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "dev"], "has no split 'dev'; it has: train, test. Add --split train"),
        (["--samples", "2", "--temperature", "0"], "--temperature 0.0 must be above 0 with --samples"),
        (["--save_pass_rates", "rates.jsonl"], "--save_pass_rates needs samples of each problem. Type --samples 8"),
        (["--model", "no/such"], "'no/such' is not a local path and could not be fetched"),
        (["--adapter", str(TINY_MODEL)], "Can't find 'adapter_config.json'"),
        (["--reward", "grpo_ext.rewards:nope"], "the module grpo_ext.rewards has no nope"),
        (["--reward", "my_reward"], "--reward my_reward must be module:name"),
        (["--max_problems", "0"], "--max_problems 0 must be 1 or more"),
        (
            ["--json", "mine"],
            "--json mine cannot be written. Name a file",
        ),  # a folder; found before the model is loaded
        (
            ["--save_pass_rates", "a/file/rates.jsonl", "--samples", "2"],
            "its folder cannot be created: ",
        ),
        (["--task", "other.csv"], "--task other.csv is no benchmark \\(gsm8k, math500, .*\\), and --data .* as well"),
        (["--model", "mine"], "'mine' is an adapter. Type: --model the/base --adapter mine"),
    ],
)
def test_mistakes_give_one_sentence(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/adapter_config.json").write_text('{"base_model_name_or_path": "the/base"}')
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_text("")
    with pytest.raises(SystemExit, match=message):
        cli.main(["eval", *TASK, *flags])


def test_a_fault_in_code_keeps_its_traceback(tmp_path, monkeypatch):
    """As one line, an error of Python itself would not say where it is."""
    (tmp_path / "faulty_rewards.py").write_text("import json\nreward = json.no_such_function\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AttributeError, match="no_such_function"):
        cli.main(["audit", "--data", str(TINY_DATA), "--reward", "faulty_rewards:reward"])
