"""docs/parallel_model.py: what it counts, and that it prints the tables of docs/distributed.md."""

from __future__ import annotations

import re
import shlex
from types import ModuleType

import pytest
import torch
from docs_scripts import DOCS, load_script


@pytest.fixture(scope="module")
def model() -> ModuleType:
    return load_script("parallel_model")


def test_the_page_has_what_the_script_prints(model: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = r"^    python docs/parallel_model\.py(.*)\n\n((?:    .*\n)+)"
    found = re.findall(pattern, (DOCS / "distributed.md").read_text(), re.MULTILINE)
    assert len(found) == 5
    for command, table in found:
        model.main(shlex.split(command))
        printed = capsys.readouterr().out.splitlines()
        assert [line.split() for line in table.splitlines()] == [line.split() for line in printed]


def test_even_routes_by_hand(model: ModuleType) -> None:
    args = model.arguments(["--network-gb-s", "1", "--tokens", "1000", "--layers", "3", "--per-host", "2"])
    shape = model.Shape(64, 32, 8, 2)
    cost = model.divided(args, shape, 4, "even", False)
    to_a_rank = 1 - 6 / 8 * 5 / 7  # of K = 2 from 8, one of two at least
    assert cost.there == pytest.approx(4 * to_a_rank, rel=0.02)
    both = sum(model.exchange_bytes(64, 2))
    assert cost.sent == pytest.approx(3 * both * 2 * to_a_rank, rel=0.03)
    assert cost.network == pytest.approx(cost.sent * 1000 * 2 / 1e9)
    of_host = model.on_each_host(args, shape, 4)
    lora = 3 * 3 * 16 * 8 * (64 + 32) * 4
    assert of_host.network == pytest.approx(2 * 3 / 4 * lora / 1e9)
    assert model.on_each_host(args, shape, 2).network == 0


def test_parts_by_load_are_no_worse(model: ModuleType) -> None:
    args = model.arguments(["--layers", "1"])
    shape = model.PRESETS["qwen3-235b-a22b"]
    equal, balanced = (model.divided(args, shape, 16, "recorded", by_load) for by_load in (False, True))
    assert 1 < balanced.busiest < equal.busiest
    assert float(model.popularity(128, "recorded").std()) > 0.3
    assert torch.equal(model.popularity(5, "even"), torch.ones(5))


def test_chunks_by_hand(model: ModuleType) -> None:
    assert model.in_chunks(3.0, 6.0, 1) == pytest.approx(9)  # one after the other
    # Forward: half of the rows come, are computed, two results follow each other. Backward: both halves are
    # computed, and the second result is behind them.
    assert model.in_chunks(3.0, 6.0, 2) == pytest.approx(0.5 + 0.515 + 2 + 0.5 + 2 * 1.03 + 1)
    assert model.in_chunks(3.0, 0.0, 4) == pytest.approx(3 * 1.05)
    assert model.in_chunks(0.0, 6.0, 4) == pytest.approx(6)
