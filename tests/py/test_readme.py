"""README.md: its Python is valid, its marked example runs, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(<!-- test: run -->\n)?```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", [code for _, code in BLOCKS])
def test_example_compiles(code: str) -> None:
    compile(code, "README.md", "exec")


def test_marked_example_runs() -> None:
    (code,) = [code for marked, code in BLOCKS if marked]
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["hidden_states"].grad.isfinite().all()  # type: ignore[attr-defined]
    assert (names["out"] == names["same"]).all()  # type: ignore[attr-defined]


def test_links_and_anchors_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.+)$", README, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif "://" not in target:
            assert (ROOT / target).exists(), target
    assert len(README.splitlines()) < 200
