"""`report.html`: a run in one file that opens anywhere, without a network, from what is in its folder so far.

The verdict in one sentence, the curves of `report/plot_data.py`, what the policy wrote in each group and what it
earned, the same held-out problems over time, settings, versions, and the command to repeat it. Of several runs: their
curves over each other, and what differs.

What the model wrote is not to be trusted: it is text inside JSON, which `page.js` shows as text. A policy in the page
itself forbids every script but Bokeh's and its own, by their hashes, and every request. Styles are allowed, since Bokeh
writes them as it draws: none can run a script or load anything.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from grpo_ext.evaluation.callback import HELDOUT_FILE
from grpo_ext.report.bokeh_plots import IN_THE_DARK, drawn, library
from grpo_ext.report.compare import differences, names_of, outcomes, overlaid
from grpo_ext.report.completions_file import COMPLETIONS_FILE
from grpo_ext.report.downsample import NEWEST, read_thinned
from grpo_ext.report.plot_data import PALETTE, Panel, panels_of
from grpo_ext.report.run_reader import Run, provenance, reliability, results, status, verdict, written

PAGE_FILE = "report.html"
MOST_BYTES = 5_000_000
ROOM = 2_500_000  # bytes of completions; less where the page would still be too large

TEMPLATES = Path(__file__).parent / "template"
# Signs that turn the order of the text around them, and those that show nothing or move the cursor.
_UNSEEN = re.compile(
    "[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u200b\ufeff\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
)


def write_page(output_dir: str | Path) -> Path:
    """Write `output_dir/report.html` and return its path; works on a run that is still going or that died.

    Raises:
        ValueError: the folder has no metrics.
    """
    run = Run.read(output_dir)
    panels = _data(panels_of(run.rows))
    room = ROOM
    while len(page := _page_of(run, panels, room).encode()) > MOST_BYTES and room > 1:
        room //= 2
    return _put(page, Path(output_dir, PAGE_FILE))


def write_comparison(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Write a page that lays the runs of these folders over each other, and return its path.

    Raises:
        ValueError: a folder has no metrics.
    """
    runs = [Run.read(folder) for folder in folders]
    names = names_of(runs)
    context = {
        "title": f"{len(runs)} runs",
        "names": names,
        "verdicts": [verdict(run) for run in runs],
        "outcomes": outcomes(runs),
        "differences": differences(runs),
    }
    page = render("comparison.html", context, {"panels": _data(overlaid(runs, names))})
    return _put(page.encode(), Path(path))


def _put(page: bytes, path: Path) -> Path:
    """Whoever reloads the page meanwhile has the old one or the new one."""
    new = path.with_name(f"{path.name}.part")
    new.write_bytes(page)
    return new.replace(path)


def _page_of(run: Run, panels: list[dict[str, Any]], room: int) -> str:
    rollouts, every = read_thinned(run.folder / COMPLETIONS_FILE, room)
    evaluations, _ = read_thinned(run.folder / HELDOUT_FILE, room // 4)
    context = {
        "title": run.name,
        "verdict": verdict(run),
        "status": status(run),
        "results": results(run),
        "reliability": {name: [f"{count:,}"] for name, count in reliability(run).items()},
        "command": run.settings.get("command"),
        "provenance": {name: [value] for name, value in provenance(run).items()},
        "settings": {name: [written(value)] for name, value in run.settings.get("settings", {}).items()},
        "every": every,
        "newest": NEWEST,
        "rollouts": len(rollouts),
        "evaluations": len(evaluations),
    }
    data = {
        "panels": panels,
        "rollouts": rollouts,
        "evaluations": [{"step": row["step"], "answers": row["answers"]} for row in evaluations],
    }
    return render("page.html", context, data)


def render(template: str, context: dict[str, Any], data: dict[str, Any]) -> str:
    """A page from a template of this folder.

    Args:
        context: what the template names; it is escaped.
        data: what `page.js` finds as JSON in the element `data`.
    """
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    colours = "".join(f"--{name}: {value};" for name, value in PALETTE.items())
    style = f":root {{{colours}}}\n{(TEMPLATES / 'page.css').read_text()}"
    scripts = [library(), (TEMPLATES / "page.js").read_text()]
    hashes = " ".join(f"'{_hash(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    text = json.dumps(visible(data | {"inTheDark": IN_THE_DARK}), ensure_ascii=False, separators=(",", ":"))
    return environment.get_template(template).render(
        **visible(context),
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        policy=Markup(policy),
        data=Markup(text.replace("<", "\\u003c")),  # so that no end of a script, and no comment, can stand in it
    )


def visible(value: Any) -> Any:
    """The same data, with signs that are not to be seen, or that turn text around, written as their numbers."""
    if isinstance(value, str):
        return _UNSEEN.sub(lambda sign: f"⟨U+{ord(sign.group()):04X}⟩", value)
    if isinstance(value, dict):
        return {visible(name): visible(item) for name, item in value.items()}
    return [visible(item) for item in value] if isinstance(value, list | tuple) else value


def _data(panels: list[Panel]) -> list[dict[str, Any]]:
    """Panels as `page.js` shows them."""
    return [asdict(drawn(panel)) for panel in panels]


def _hash(text: str) -> str:
    """As a content security policy names an inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
