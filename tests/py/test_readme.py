"""README.md and docs/: their Python is valid, the marked example runs; the README is one screen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(marked, code, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, (marked, code) in enumerate(
        re.findall(
            r"^(<!-- test: run -->\n)?```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
        )
    )
]


@pytest.mark.parametrize(("marked", "code"), BLOCKS)
def test_example_compiles(marked: str, code: str) -> None:
    compile(code, "example", "exec")


def test_marked_example_runs() -> None:
    (code,) = [str(block.values[1]) for block in BLOCKS if block.values[0]]
    names: dict[str, object] = {}
    exec(compile(code, "example", "exec"), names)
    assert names["hidden_states"].grad.isfinite().all()  # type: ignore[attr-defined]
    assert (names["out"] == names["same"]).all()  # type: ignore[attr-defined]


def test_the_readme_is_one_screen() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 150
    assert [line for line in lines if len(line) > 120] == []
    assert {"make demo", "make test"} <= {line[:9] for line in lines}
