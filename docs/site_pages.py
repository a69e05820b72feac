"""Makes the repository's pages those of the site: README, CONTRIBUTING and CHANGELOG, docs and what was measured.

They keep their places, so that a link works on the site as it does in the repository. A link to what is no page (code,
a folder) is shown as the path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["*.md", "docs/**/*.md", "benchmarks/results/*.md"]
SHOWN = ["benchmarks/results/*.svg"]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)\)")
ITEM = re.compile(r"([-*]|\d+\.) ")


def found(*patterns: str) -> list[str]:
    """Paths of the repository, in their order."""
    return [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def on_config(config: Any) -> None:
    config.nav = [expanded(entry) for entry in config.nav]


def expanded(entry: Any) -> Any:
    """An entry of the navigation, with the pages that a pattern in it finds."""
    if not isinstance(entry, dict):
        return entry
    ((title, inside),) = entry.items()
    if isinstance(inside, list):
        return {title: [expanded(one) for one in inside]}
    return {title: found(inside) if "*" in inside else inside}


def on_files(files: Files, config: Any) -> Files:
    theirs = [file for file in files if file.src_dir != config.docs_dir]
    ours = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in found(*PAGES, *SHOWN)]
    return Files([*theirs, *ours])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    def shown(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[2]))
        if "://" in link[2] or files.get_file_from_path(path) is not None or not (ROOT / path).exists():
            return link[0]
        return f"`{path}`" if link[1] in (path, f"`{path}`") else f"{link[1]} (`{path}`)"

    return LINK.sub(shown, deeper(markdown))


def deeper(markdown: str) -> str:
    """The same page for Python-Markdown, which wants four spaces where GitHub takes two.

    What belongs to an item of a list is put twice as far in, and an item of several paragraphs ends with an empty line.
    """
    lines: list[str] = []
    in_list = has_paragraphs = False
    fence: int | None = None
    for line in markdown.splitlines():
        far_in = len(line) - len(line.lstrip(" "))
        if fence is None and line.strip() and not far_in:
            begins = ITEM.match(line) is not None
            if in_list and begins and has_paragraphs and lines[-1].strip():
                lines.append("")
            in_list, has_paragraphs = begins, False
        has_paragraphs = has_paragraphs or not line.strip()
        lines.append(" " * (far_in if fence is None else fence) * in_list + line)
        if line.lstrip(" ").startswith("```"):
            fence = far_in if fence is None else None
    return "\n".join(lines)
