"""What mkdocs does to a page: links to source files go to the repository, README is the start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SOURCE = "https://github.com/fastalex/fastalex/blob/main/"
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand outside docs/."""
    for page, path in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_relinked(text, "")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point a page's links out of docs/ at the repository."""
    return markdown if page.file.src_uri in PAGES else _relinked(markdown, "docs/")


def _relinked(text: str, folder: str) -> str:
    def link(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if re.match(r"[a-z]+:|#", target) or not target:
            return found[0]
        path = Path(*Path(folder, target).parts)
        inside = (ROOT / path).resolve().relative_to(ROOT).as_posix()
        pages = {source: page for page, source in PAGES.items()}
        if inside in pages:
            return f"]({pages[inside]}{anchor})"
        if inside.startswith("docs/"):
            return f"]({target if folder else inside.removeprefix('docs/')}{anchor})"
        return f"]({SOURCE}{inside}{anchor})"

    return re.sub(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", link, text)
