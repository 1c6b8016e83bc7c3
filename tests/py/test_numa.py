"""`kt-moe numa` and the scaling model it asks: its sums, its choices, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sys_trees as trees
from sys_trees import write_tree
from tiny_models import PEFT_WARNINGS, tiny_config

import kt_moe
from kt_moe import _core
from kt_moe.cli import main
from kt_moe.cli.bench import ceilings
from kt_moe.cli.numa import this_machine
from kt_moe.cli.numa.predict import draw_routes, popularity

pytestmark = PEFT_WARNINGS

SHAPE = ["--hidden", "1024", "--intermediate", "512", "--experts", "16", "--topk", "4"]


def table(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main(["numa", *SHAPE, "--json", *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def call(**changes: Any) -> _core.LayerCall:
    values: dict[str, Any] = {
        "tokens": 64, "hidden": 1024, "intermediate": 512, "routes": [16] * 16, "ranks": (8, 8, 8),
        "weight_bytes": (2**20,) * 3, "lora_bytes": 4, "backward": False, "saved": True,
    }  # fmt: skip
    return _core.LayerCall(**{**values, **changes})


def test_the_table_has_a_line_for_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["numa", *SHAPE, "--tokens", "1,64", "--nodes", "1,2", "--layers", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layer    custom: hidden 1024, intermediate 512, 16 experts, 4 a token"
    cases = [line.split()[:3] for line in lines if line.lstrip()[:1].isdigit()]
    assert cases == [[t, n, p] for t in ("1", "64") for n in ("1", "2") for p in ("tensor", "expert")]
    assert lines[-1].endswith("tokens/s: forward and backward of 3 layers.")


def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = table(capsys, "--tokens", "256", "--nodes", "1,4", "--layers", "2", "--rank", "8")
    assert [(row["nodes"], row["placement"]) for row in found["rows"]] == [
        (1, "tensor"), (1, "expert"), (4, "tensor"), (4, "expert"),
    ]  # fmt: skip
    for row in found["rows"]:
        for name in ("forward", "backward"):
            nodes = row[name]["nodes"]
            assert len(nodes) == row["nodes"]
            mean = sum(node["local"] for node in nodes) / len(nodes) / 256
            assert row[name]["local"] == pytest.approx(mean)
            assert sum(node["served"] for node in nodes) == pytest.approx(sum(n["remote"] for n in nodes))
            assert (row[name]["remote"] == 0) == (row["nodes"] == 1)
        seconds = row["forward"]["seconds"] + row["backward"]["seconds"]
        assert row["tokens_per_second"] == pytest.approx(256 / (2 * seconds))
        # The mathematics' own count of forward: 2 T K (3 H I + r (3 H + 3 I)).
        flops = 2 * 256 * 4 * (3 * 1024 * 512 + 8 * 3 * (1024 + 512))
        assert sum(node["flops"] for node in row["forward"]["nodes"]) == pytest.approx(flops)


def test_faster_parts_make_faster_machines(capsys: pytest.CaptureFixture[str]) -> None:
    def seconds(*more: str) -> float:
        rows = table(capsys, "--tokens", "64", "--nodes", "2", "--placement", "tensor", *more)["rows"]
        return float(rows[0]["forward"]["seconds"])

    usual = seconds()
    assert seconds("--local-gb-s", "100") > usual
    assert seconds("--remote-gb-s", "1") > usual
    assert seconds("--tflops-per-core", "0.001") > usual
    assert seconds("--format", "int4") < usual


def test_stages_of_two_shards() -> None:
    found = _core.layer_traffic(call(), [1, 1], [], False)
    assert list(found) == ["gather", "lora_p", "gate_up", "hidden", "down", "merge"]
    assert all(
        set(shard) == {"local", "remote", "served", "rows", "flops"} for s in found.values() for shard in s
    )
    assert found["gather"][0]["remote"] == 256 * 1024 * 2 / 2
    assert found["merge"][1]["remote"] == (64 * 1024 * 4 + 64 * 1024 * 2 / 2) / 2
    assert found["down"][0]["rows"] == found["merge"][0]["rows"] == 256 * 1024 * 4
    uneven = _core.layer_traffic(call(), [3, 1], [], False, 16)
    assert uneven["gate_up"][0]["flops"] == pytest.approx(3 * uneven["gate_up"][1]["flops"])


def test_auto_takes_the_way_that_is_sooner() -> None:
    nodes = [(3e11, 1e11, 3e13, 0.0)] * 2
    at = [e % 2 for e in range(16)]
    for routes in ([16] * 16, [256, 0] * 8, [1, 1] + [0] * 14):
        c = call(routes=routes)
        sliced, whole = (_core.layer_time(c, [48, 48], at, nodes, w)["seconds"] for w in (False, True))
        assert _core.whole_is_sooner(c, [48, 48], at, nodes) == (whole < sliced)


def test_routes_are_drawn_by_popularity() -> None:
    draws = draw_routes(2000, 16, 4, 0.0, 0)
    assert len(draws) == 1
    assert sum(draws[0]) == 8000
    assert min(draws[0]) > 400
    (skewed,) = draw_routes(2000, 16, 4, 2.0, 0)
    assert max(skewed) <= 2000  # an expert once a token
    assert list(skewed[:3]) == sorted(skewed[:3], reverse=True)
    assert len(draw_routes(1, 16, 4, 0.0, 0)) == 32


def test_homes_and_cuts_are_the_loaders() -> None:
    shares = popularity(16, 1.0)
    assert shares[0] == pytest.approx(16 * shares[15])
    homes = _core.assign_homes(16, [8] * 4, shares.tolist())
    assert np.bincount(homes).tolist() == [4] * 4
    assert homes[:4] == [0, 1, 2, 3]
    assert _core.assign_homes(4, [3, 1], []) == [0, 0, 0, 1]
    assert [_core.cut_align(name, 512) for name in ("bf16", "int4", "int8", "fp8")] == [32, 32, 128, 128]
    with pytest.raises(ValueError, match="a shard has 0 cores, wanted at least 1"):
        _core.assign_homes(4, [1, 0], [])


@pytest.mark.parametrize(
    ("machine", "nodes", "cores", "cache"),
    [
        (trees.single(), [0], 8, 32),
        (trees.xeon_snc2(), [0, 1, 2, 3], 28, 16),  # two nodes share a cache
        (trees.epyc_nps4(), [0, 1, 2, 3, 4, 5, 6, 7], 16, 64),
        (trees.epyc_nps4(), [2], 16, 64),
        (replace(trees.xeon_snc2(), allowed=(0, 1, 2, 3, 28, 140)), [0, 1], 2, 16),
        (trees.xeon_snc2().with_files({"sys/fs/cgroup/cpu.max": "800000 100000\n"}), [0, 1, 2, 3], 2, 16),
    ],
)
def test_a_node_of_a_recorded_machine(
    machine: trees.Machine, nodes: list[int], cores: int, cache: int, tmp_path: Path
) -> None:
    topology = _core.read_topology(str(write_tree(tmp_path, machine)))
    assert this_machine.node_of(topology, nodes) == (cores, cache << 20)


@pytest.mark.parametrize("remote", [2e10, None])
def test_this_machine(
    remote: float | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(this_machine, "measure_node", lambda nodes, cores: (5e10, remote, 4e11))
    found = table(capsys, "--this-machine", "--tokens", "4")
    nodes = len(set(kt_moe.Runtime().nodes))
    assert {row["nodes"] for row in found["rows"]} == {nodes}
    assert found["machine"]["local"] == 5e10
    assert found["machine"]["remote"] == (remote or 1.1e11)
    assert found["machine"]["flops_per_core"] == 4e11
    assert main(["numa", *SHAPE, "--this-machine", "--tokens", "4", "--nodes", "1,2"]) == 0
    text = capsys.readouterr().out
    assert ("remote is not measured but the default: " in text) == (remote is None)
    assert f"50 GB/s local, {20 if remote else 110} GB/s remote" in text


def test_rates_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (this_machine, ceilings):
        monkeypatch.setattr(module, "SECONDS", 0.005)
    here = kt_moe.Runtime().nodes[0]
    local, remote, flops = this_machine.measure_node([here], 1)
    assert local > 0
    assert remote is None
    assert flops > 0
    remote = this_machine.measure_node([here, here], 1)[1]
    assert remote is None or remote > 0  # None: the kernel places no memory


def test_an_override_that_does_not_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KT_MOE_NODES", "999")
    assert main(["numa", "--this-machine"]) == 2
    assert "kt-moe numa: error: nodes names node 999" in capsys.readouterr().err


def test_shape_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config("deepseek_v3").save_pretrained(tmp_path)
    assert main(["numa", "--config", str(tmp_path), "--tokens", "4", "--nodes", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shape = {"name": "deepseek_v3", "hidden": 32, "intermediate": 24, "experts": 8, "topk": 2}
    assert found["shape"] == shape
    assert found["run"]["layers"] == 1  # the other one has no experts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "argument --nodes: '0', wanted an integer from 1 to 16"),
        (["--nodes", "2,17"], "argument --nodes: '17', wanted an integer from 1 to 16"),
        (["--tokens", "many"], "argument --tokens: 'many', wanted an integer of at least 1"),
        (["--placement", "both"], "argument --placement: 'both', wanted some of tensor, expert, auto"),
        (["--format", "int3"], "argument --format: invalid choice: 'int3'"),
        (["--experts", "4"], "--topk is 8, more than the 4 experts there are"),
        (["--local-gb-s", "0"], "--local-gb-s is 0, wanted more"),
        (["--this-machine", "--cache-mb", "0"], "--this-machine and --cache-mb exclude each other"),
        (["--config", "nowhere/config.json"], "there is no nowhere/config.json"),
        (["--config", "x", "--preset", "kimi-k2"], "--preset and --config exclude each other"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = main(["numa", *arguments])
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    assert f"kt-moe numa: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": -1}, "tokens is -1, wanted at least 0"),
        ({"intermediate": 0}, "intermediate is 0, wanted at least 1"),
        ({"routes": [1, -2]}, "a number of routes is -2, wanted at least 0"),
    ],
)
def test_calls_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_machines_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="there are no shards, wanted one at least"):
        _core.layer_traffic(call(), [], [], False)
    with pytest.raises(ValueError, match="a shard has 0 cores, wanted at least 1"):
        _core.layer_traffic(call(), [4, 0], [], False)
    with pytest.raises(ValueError, match="homes has 2 entries, wanted a shard for each of 16 experts"):
        _core.layer_traffic(call(), [1], [0, 0], True)
    with pytest.raises(ValueError, match="there are rates of 1 nodes, wanted one for each of 2 shards"):
        _core.layer_time(call(), [1, 1], [], [(1.0, 1.0, 1.0, 0.0)], False)
