"""`report.html`: a run as one self-contained file that needs no network, made from the current contents of its folder.

It shows a verdict in one sentence, the panels of `plot_data.py`, the completions and rewards of each group, the same
held-out problems over time, settings, versions, and the command that repeats the run. A comparison of several runs
shows their curves in shared panels, and the settings that differ.

Text of the model is not trusted. It is JSON data, which `page.js` shows as text. A content security policy in the page
forbids all requests, and allows only two scripts, Bokeh's and its own, by their hashes. Styles are allowed because
Bokeh writes them when it draws; they can neither run a script nor load anything.
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

from grpo_ext.report.compare import differing_settings, distinct_names, outcome_table, overlay_panels
from grpo_ext.report.plot_data import PALETTE, Panel, build_panels
from grpo_ext.report.run_files import COMPLETIONS_FILE, HELDOUT_FILE, NEWEST_ROWS, PAGE_FILE, read_downsampled
from grpo_ext.report.run_reader import (
    RunRecord,
    accuracy_table,
    failure_counts,
    format_setting,
    provenance,
    run_status,
    verdict,
)

MAX_PAGE_BYTES = 5_000_000
COMPLETIONS_BUDGET = 2_500_000  # bytes of completions; reduced if the page is still too large

TEMPLATES = Path(__file__).parent / "template"
# Characters that change the direction of the surrounding text, are invisible, or move the cursor.
_INVISIBLE = re.compile(
    "[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u200b\ufeff\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
)


def write_page(output_dir: str | Path) -> Path:
    """Write `output_dir/report.html` and return its path; also works on a run that has not finished.

    Raises:
        ValueError: the folder has no metrics.
    """
    run = RunRecord.read(output_dir)
    panels = _panel_data(build_panels(run.rows))
    budget = COMPLETIONS_BUDGET
    while len(page := _render_run(run, panels, budget).encode()) > MAX_PAGE_BYTES and budget > 1:
        budget //= 2
    return _replace_file(page, Path(output_dir, PAGE_FILE))


def write_comparison(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Write a page that compares the runs of these folders, and return its path.

    Raises:
        ValueError: a folder has no metrics.
    """
    runs = [RunRecord.read(folder) for folder in folders]
    names = distinct_names(runs)
    context = {
        "title": f"{len(runs)} runs",
        "names": names,
        "verdicts": [verdict(run) for run in runs],
        "outcomes": outcome_table(runs),
        "differences": differing_settings(runs),
    }
    page = render_page("comparison.html", context, {"panels": _panel_data(overlay_panels(runs, names))})
    return _replace_file(page.encode(), Path(path))


def _replace_file(page: bytes, path: Path) -> Path:
    """Write a file atomically: a reader finds the old page or the new one, never a part."""
    new = path.with_name(f"{path.name}.part")
    new.write_bytes(page)
    return new.replace(path)


def _render_run(run: RunRecord, panels: list[dict[str, Any]], budget: int) -> str:
    rollouts, every = read_downsampled(run.folder / COMPLETIONS_FILE, budget)
    evaluations, _ = read_downsampled(run.folder / HELDOUT_FILE, budget // 4)
    context = {
        "title": run.name,
        "verdict": verdict(run),
        "status": run_status(run),
        "results": accuracy_table(run),
        "reliability": {name: [f"{count:,}"] for name, count in failure_counts(run).items()},
        "command": run.settings.get("command"),
        "provenance": {name: [value] for name, value in provenance(run).items()},
        "settings": {name: [format_setting(value)] for name, value in run.settings.get("settings", {}).items()},
        "every": every,
        "newest": NEWEST_ROWS,
        "rollouts": len(rollouts),
        "evaluations": len(evaluations),
    }
    data = {
        "panels": panels,
        "rollouts": rollouts,
        "evaluations": [{"step": row["step"], "answers": row["answers"]} for row in evaluations],
    }
    return render_page("page.html", context, data)


def render_page(template: str, context: dict[str, Any], data: dict[str, Any]) -> str:
    """A page from a template of this folder.

    Args:
        context: the variables of the template; they are escaped.
        data: data for `page.js`, as JSON in the element `data`.
    """
    from grpo_ext.report.bokeh_plots import (
        DARK_COLOURS,
        bokeh_js,
    )  # takes a second that the start of a run can do without

    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    colours = "".join(f"--{name}: {value};" for name, value in PALETTE.items())
    style = f":root {{{colours}}}\n{(TEMPLATES / 'page.css').read_text(encoding='utf-8')}"
    scripts = [bokeh_js(), (TEMPLATES / "page.js").read_text(encoding="utf-8")]
    hashes = " ".join(f"'{_csp_hash(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    text = json.dumps(escape_invisible(data | {"inTheDark": DARK_COLOURS}), ensure_ascii=False, separators=(",", ":"))
    return environment.get_template(template).render(
        **escape_invisible(context),
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        policy=Markup(policy),
        data=Markup(text.replace("<", "\\u003c")),  # so that it cannot end the script element or start a comment
    )


def escape_invisible(value: Any) -> Any:
    """The same data with `_INVISIBLE` characters replaced by their code points: ⟨U+202E⟩."""
    if isinstance(value, str):
        return _INVISIBLE.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", value)
    if isinstance(value, dict):
        return {escape_invisible(name): escape_invisible(item) for name, item in value.items()}
    return [escape_invisible(item) for item in value] if isinstance(value, list | tuple) else value


def _panel_data(panels: list[Panel]) -> list[dict[str, Any]]:
    """Panels in the form that `page.js` reads."""
    from grpo_ext.report.bokeh_plots import to_bokeh

    return [asdict(to_bokeh(panel)) for panel in panels]


def _csp_hash(text: str) -> str:
    """The source expression of an inline script for a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
