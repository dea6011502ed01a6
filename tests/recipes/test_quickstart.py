"""The notebook: it runs without a GPU or a network, and its committed outputs come from a whole run.

After a change to the notebook, run it again, in place (a few minutes):

    jupyter execute --inplace --NbClientApp.skip_cells_with_tag=needs-gpu recipes/quickstart.ipynb
"""

import os
import re
import shlex
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from peft import PeftModel

from grpo_ext import cli
from grpo_ext.evaluation.complete import complete
from tests.tools.paths import ROOT, TINY_DATA, TINY_MODEL
from tests.tools.waiting import PATIENCE

NOTEBOOK = ROOT / "recipes" / "quickstart.ipynb"
NEEDS_GPU = "needs-gpu"
FEW_STEPS = "\nSTEPS, SHORT, HELD_OUT = 1, 1, 8"
OF_A_MACHINE = re.compile(r"site-packages|(?<![\w.])/(?:home|root|tmp|work|usr|opt|var|Users)/")  # paths


def read_notebook() -> NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook: NotebookNode, tag: str) -> NotebookNode:
    """The only cell with this tag."""
    (cell,) = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", []))
    return cell


def text_of(cell: NotebookNode) -> str:
    """What a cell shows, pictures left out."""
    shown = [output.get("text", "") for output in cell.outputs]
    shown += [text for output in cell.outputs for kind, text in output.get("data", {}).items() if "image" not in kind]
    return "\n".join(shown)


def kinds_of_outputs(notebook: NotebookNode) -> dict[str, set[str]]:
    """Cell -> the kinds of its outputs: text, HTML, pictures."""
    return {
        cell.id: {kind for output in cell.outputs for kind in output.get("data", {"text/plain": ""})}
        for cell in code_cells(notebook)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An empty folder for the notebook to run in."""
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def executed(folder, tmp_path_factory) -> NotebookNode:
    """The notebook after a short run, with this checkout installed."""
    notebook = read_notebook()
    tagged(notebook, "parameters").source += FEW_STEPS
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython"))}
    environment.pop("PYTHONSAFEPATH", None)
    client = NotebookClient(
        notebook,
        timeout=PATIENCE,
        kernel_name="python3",
        skip_cells_with_tag=NEEDS_GPU,
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute(env=environment)  # raises the error of the first cell that has one


@pytest.mark.slow
def test_every_cell_runs(executed, folder):
    """Held-out accuracy is printed for each task, and nothing is written outside of `outputs/`."""
    shown = {cell.id: text_of(cell) for cell in code_cells(executed)}
    change = re.compile(r"held-out accuracy: [01]\.\d\d \[.*\] -> [01]\.\d\d \[.*\]")
    assert [name for name, text in shown.items() if change.search(text)] == ["after", "data-train"]
    assert "[1.0, None]" in shown["isolated"]
    assert [path.name for path in folder.iterdir()] == ["outputs"]


@pytest.mark.slow
def test_its_adapter_is_one_of_plain_peft(executed, folder, tiny_model, tokenizer):
    """The last cell prints the answer of the saved adapter."""
    shown = text_of(code_cells(executed)[-1]).rstrip("\n")
    prompt = "Question: 538+478=?\nAnswer:"
    model = PeftModel.from_pretrained(tiny_model, folder / "outputs" / "quickstart" / "sums")
    assert any(weight.any() for name, weight in model.named_parameters() if "lora_B" in name)
    assert shown == prompt + complete(model, tokenizer, [prompt], max_new_tokens=48)[0]


@pytest.mark.slow
def test_committed_outputs_have_the_form_of_a_run(executed):
    """A cell that gained or lost an output was changed and not run again."""
    assert kinds_of_outputs(read_notebook()) == kinds_of_outputs(executed)


def test_committed_outputs_are_those_of_one_whole_run():
    """Every cell was run once, from first to last, in a fresh kernel."""
    notebook = read_notebook()
    hub = tagged(notebook, NEEDS_GPU)
    assert (hub.execution_count, hub.outputs) == (None, [])
    counts = [cell.execution_count for cell in code_cells(notebook) if cell is not hub]
    assert counts == list(range(1, len(counts) + 1))


def test_committed_outputs_can_be_published():
    """No error, and no path of the machine that ran it; small enough to download."""
    notebook = read_notebook()
    assert NOTEBOOK.stat().st_size < 1_000_000
    for cell in code_cells(notebook):
        assert all(output.output_type != "error" for output in cell.outputs), cell.id
        assert not OF_A_MACHINE.search(text_of(cell)), cell.id


def test_links_lead_somewhere():
    texts = "\n".join(cell.source for cell in read_notebook().cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https?://)([^)#]+)", texts)
    assert {"../README.md", "README.md", "FAQ.md"} <= set(links)
    assert all((NOTEBOOK.parent / link).exists() for link in links)


@pytest.mark.slow
def test_the_command_for_a_gpu_is_accepted(tmp_path, capsys):
    """With the embedded model and its problems, up to the checks before the first step."""
    command = tagged(read_notebook(), NEEDS_GPU).source.replace("\\\n", " ").removeprefix("!")
    for name, here in (
        ("{GRPO_EXT}", "grpo-ext"),
        ("Qwen/Qwen2.5-0.5B-Instruct", shlex.quote(str(TINY_MODEL))),
        ("openai/gsm8k", shlex.quote(str(TINY_DATA))),
        ("{OUTPUT}", shlex.quote(str(tmp_path))),
    ):
        assert name in command
        command = command.replace(name, here)
    checks_only = ["--dry_run", "true", "--max_completion_length", "48"]  # the embedded model has 256 positions
    _, *arguments = shlex.split(command)
    cli.main([*arguments, *checks_only])
    assert "dry run: all checks passed" in capsys.readouterr().out
