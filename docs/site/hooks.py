"""What the site needs beyond docs/: the repository's other documents as pages, and links between them.

In the repository a document links to others by their paths, which also works where the files are read as they
are. A link to a file that has no page, such as a source file, becomes plain text.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
log = logging.getLogger("mkdocs.hooks.links")


def pages_outside() -> list[str]:
    """Paths, from the root of the repository, of documents and examples that are not in docs/."""
    scripts = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    return [
        *("CONTRIBUTING.md", "CHANGELOG.md", "src/cpp/README.md"),
        *("examples/README.md", "examples/tiny-qwen3-moe/README.md"),
        *(f"examples/{name}" for name in scripts),
    ]


def page_of(path: str) -> str | None:
    """The page, relative to docs/, of a path from the root; None if it has none."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return path  # the site's first page stands for it
    if path in pages_outside():
        return path.replace(".py", ".md")
    return None


def on_files(files: Files, config: Any) -> Files:
    """Add the pages whose sources are outside docs/."""
    for path in pages_outside():
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".py"):
            text = f"# {Path(path).name}\n\n```python\n{text}```\n"
        files.append(File.generated(config, str(page_of(path)), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links by paths of the repository into links between pages."""
    source = page.file.src_uri
    if source.endswith(".ipynb") or (source.startswith("examples/") and source.count("/") == 1
                                     and not source.endswith("README.md")):  # fmt: skip
        return markdown
    here = source if source in pages_outside() else f"docs/{source}"

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, mark, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return found.group()
        wanted = os.path.normpath(os.path.join(os.path.dirname(here), path))
        if not (ROOT / wanted).exists():
            log.warning(f"{here} links to {target}, which is not in the repository")
        to = page_of(wanted)
        if to is None:
            return str(text)
        return f"[{text}]({os.path.relpath(to, os.path.dirname(source) or '.')}{mark}{anchor})"

    # code between fences or indented is left alone by the pattern: it has no ](path) with a file behind it
    return LINK.sub(link, markdown)
