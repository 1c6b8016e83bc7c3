"""docs/numa_model.py: what it counts, and that it prints the tables of docs/numa.md."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from docs_scripts import DOCS, load_script

NODE = {"cores": 48, "local": 285e9, "remote": 110e9, "core_flops": 0.7e12, "cache": 256e6}


@pytest.fixture(scope="module")
def model() -> ModuleType:
    return load_script("numa_model")


def tables() -> Iterator[Any]:
    """Command lines of docs/numa.md that a table follows, and its rows."""
    text = (DOCS / "numa.md").read_text()
    variables = dict(re.findall(r'^    (\w+)="(.*)"$', text, re.MULTILINE))
    pattern = r"^    python docs/numa_model\.py (.*)\n\n    tokens .*\n((?:    .*\n)+)"
    for found in re.finditer(pattern, text, re.MULTILINE):
        command = re.sub(r"\$(\w+)", lambda name: variables[name[1]], found[1])
        yield pytest.param(command, [line.split() for line in found[2].splitlines()], id=found[1][:60])


@pytest.mark.parametrize(("command", "rows"), list(tables()))
def test_the_page_has_what_the_script_prints(
    model: ModuleType, capsys: pytest.CaptureFixture[str], command: str, rows: list[list[str]]
) -> None:
    model.main(shlex.split(command))
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row for row in printed if row and row[0].isdigit()] == rows


def small_call(model: ModuleType, rank: int, backward: bool, saved: bool) -> Any:
    shape = model.Shape(hidden=64, intermediate=96, experts=3, topk=2)
    return model.Call(shape, 400, np.array([600, 0, 5]), rank, (100, 100, 200), backward, saved)


def test_forward_without_lora_on_one_node_by_hand(model: ModuleType) -> None:
    shape = model.Shape(hidden=8, intermediate=6, experts=2, topk=2)
    call = model.Call(shape, 10, np.array([20, 3]), 0, (96, 96, 96), False, True)
    a = model.Account(call, [6], None)
    routes, packed = 23, 20  # three rows are multiplied where they lie
    rows = 4 * routes * 8  # written, then read
    gather, gate_up = 2 * 8 * (routes + packed), 2 * 2 * 96 + 2 * packed * 8 + 2 * 3 * routes * 6
    hidden, down = 2 * 6 * (routes + packed), 2 * 96 + 2 * packed * 6
    assert a.moved == gather + gate_up + hidden + down + 2 * rows + 2 * 10 * 8
    assert a.rows == 2 * rows
    assert a.flops == 3 * 2 * routes * 8 * 6


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_flops_are_the_same_for_every_cut(model: ModuleType, rank: int, backward: bool, saved: bool) -> None:
    call = small_call(model, rank, backward, saved)
    one = model.Account(call, [96], None)
    slices = [([48, 48], None), ([96, 0, 0], None), ([32, 32, 32], None)]
    for widths, homes in [*slices, ([48, 48], [0, 1, 1]), ([96], [0, 0, 0])]:
        assert model.Account(call, widths, homes).flops.sum() == pytest.approx(one.flops.sum())
    assert np.array_equal(model.Account(call, [96], [0, 0, 0]).moved, one.moved)


def test_homes_share_out_the_popular(model: ModuleType) -> None:
    assert model.share_out_homes(np.array([5, 5, 1, 1]), 2) == [0, 1, 0, 1]
    assert model.share_out_homes(np.array([1, 2, 3, 4]), 4) == [3, 2, 1, 0]
    assert sum(model.slices(768, 5, model.QUANTISED["bf16"])) == 768


def test_a_slower_node_part_takes_longer(model: ModuleType) -> None:
    call = small_call(model, 4, False, True)
    base = model.time_of(call, model.Node(**NODE), [48, 48], None).seconds
    for slower in ("local", "remote", "core_flops"):
        node = model.Node(**{**NODE, slower: NODE[slower] / 1e6})
        found = model.time_of(call, node, [48, 48], None)
        assert found.seconds > base
        assert found.limit == {"local": "memory", "core_flops": "compute"}.get(slower, slower)
