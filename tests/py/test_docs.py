"""The documentation: links between files, messages that it quotes, tables that its plots are drawn from."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

import kt_moe

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for folder in ("", "docs", "docs/guides", "examples", "examples/tiny-qwen3-moe", "src/cpp")
    for path in (ROOT / folder).glob("*.md")
)
PLACEHOLDER = "\0"


def messages() -> str:
    """All literal text of the Python and C++ sources; what is filled in later is a NUL."""
    found = []
    for path in (ROOT / "src" / "kt_moe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else PLACEHOLDER for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    for path in (ROOT / "src" / "cpp").rglob("*.cpp"):
        text = re.sub(r'"\s*\n\s*"', "", path.read_text())
        literals = re.findall(r'"((?:[^"\\\n]|\\.)*)"', text)
        found.extend(s.replace('\\"', '"').replace("{}", PLACEHOLDER) for s in literals)
    return "\n".join(found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    """Anchors too are checked where the site is built."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file = target.partition("#")[0]
        if file and "://" not in target:
            assert (path.parent / file).exists(), target


def test_messages_of_the_troubleshooting_page_are_in_the_sources() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(quoted) > 40
    sources = messages()
    for message in quoted:
        pattern = "[^\n]*?".join(re.escape(part) for part in message.split("..."))
        assert re.search(pattern, sources), message


def test_every_public_name_is_on_the_api_page() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    described = set(re.findall(r"^::: kt_moe\.(\w+)$", text, re.MULTILINE))
    other_names = {"__version__", "hf", "merge_adapter"}  # of which the page has parts, or the newer name
    assert described == set(kt_moe.__all__) - other_names


def test_plots_are_drawn_from_the_tables() -> None:
    plots = runpy.run_path(str(ROOT / "docs" / "plots.py"))
    drawn = plots["plots"]((ROOT / "docs" / "performance.md").read_text())
    assert {name for name in drawn} == {"steps.svg", "layer-zen5.svg", "layer-amx.svg"}
    for name, svg in drawn.items():
        assert svg.count("<rect") > 5, name
        assert (ROOT / "docs" / "images" / name).exists()
