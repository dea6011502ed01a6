"""The parts of a page in Markdown: code blocks, code in sentences, links and anchors.

```bash
make math          ->  Block(language="bash", text="make math\n", line=2)
```
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.tools.paths import tracked_files

_FENCED = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced code block; `line` is that of its first line of code, from 1."""

    language: str
    text: str
    line: int


def pages() -> list[str]:
    """Every page in Markdown that git tracks, relative to the root."""
    return tracked_files("*.md")


def blocks(text: str) -> list[Block]:
    return [
        Block(language=found[2].strip(), text=found[3], line=text.count("\n", 0, found.start(3)) + 1)
        for found in _FENCED.finditer(text)
    ]


def code_in_sentences(text: str) -> list[str]:
    """What is between single backticks."""
    return _CODE.findall(_FENCED.sub("", text))


def links(text: str) -> list[str]:
    """The targets of links and images."""
    return _LINK.findall(_CODE.sub("", _FENCED.sub("", text)))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCED.sub("", text)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        repeated = [slug, *(f"{slug}-{n}" for n in range(1, 100))]
        found.add(next(name for name in repeated if name not in found))
    return found


def broken_links(page: Path) -> list[str]:
    """Links to files or anchors that do not exist; addresses are not opened."""
    text, broken = page.read_text(encoding="utf-8"), []
    for link in links(text):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target) if target else page
        is_there = path.exists() and (not anchor or anchor in anchors(path.read_text(encoding="utf-8")))
        if not is_there:
            broken.append(link)
    return broken
