"""`kt-moe doctor` on recorded machines, and on this one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import sys_trees as trees
import torch
from sys_trees import Machine, Node, gpu, read_tree, write_tree

import kt_moe
from kt_moe.cli import main
from kt_moe.cli.doctor import findings
from kt_moe.cli.doctor import machine as machines
from kt_moe.cli.doctor.machine import describe, read_machine

GIB = 2**30
THP = "sys/kernel/mm/transparent_hugepage/enabled"


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machines._VARIABLES:
        monkeypatch.delenv(name, raising=False)


def found(root: Path, machine: Machine, **changes: Any) -> set[str]:
    """The findings' names, of a recorded machine with what no tree can say."""
    return {f.name for f in findings.find(read_tree(write_tree(root, machine)) | changes)}


def nodes(*free: float, gib: float = 64) -> tuple[Node, ...]:
    return tuple(Node(n, trees.cores(8 * n, 8), gib, free=f, package=n) for n, f in enumerate(free))


TWO = Machine(nodes(0.9, 0.9))
PASSIVE = {"OMP_WAIT_POLICY": "passive"}
ONE = trees.single()
FILES_IN_NODE_1 = {
    "sys/devices/system/node/node1/meminfo": "Node 1 MemTotal: 67108864 kB\nNode 1 MemFree: 1048576 kB\n"
    "Node 1 Active(file): 30000000 kB\nNode 1 Inactive(file): 9000000 kB\n"
}

CASES = [
    pytest.param(ONE, set(), id="nothing"),
    pytest.param(TWO, set(), id="nothing on two"),
    pytest.param(trees.container(), set(), id="container"),
    pytest.param(trees.xeon_snc2(), set(), id="a thread a core"),
    pytest.param(trees.epyc_nps4(), set(), id="nps4"),
    pytest.param(trees.gaps(), set(), id="gaps"),
    pytest.param(trees.cxl(), set(), id="cxl"),
    pytest.param(trees.memoryless(), set(), id="memoryless"),
    pytest.param(ONE.with_files({THP: "always madvise [never]\n"}), {"huge-pages-off"}, id="thp off"),
    pytest.param(ONE.with_files({THP: "[always] madvise never\n"}), set(), id="thp always"),
    pytest.param(ONE.with_files({THP: None}), set(), id="thp unknown"),
    pytest.param(replace(TWO, allowed=(0, 1, 8)), {"affinity"}, id="mask"),
    pytest.param(TWO.with_files({"sys/fs/cgroup/cpu.max": "350000 100000\n"}), {"cpu-limit"}, id="cpu limit"),
    pytest.param(TWO.with_files({"sys/fs/cgroup/cpu.max": "1600000 100000\n"}), set(), id="limit of all"),
    pytest.param(TWO.with_files({"sys/fs/cgroup/memory.max": f"{GIB}\n"}), set(), id="memory limit"),
    pytest.param(Machine(nodes(0.9, 0.05)), {"node-full"}, id="a full node"),
    pytest.param(Machine(nodes(0.05)), set(), id="little free on one"),
    pytest.param(TWO.with_files(FILES_IN_NODE_1), {"node-full"}, id="files in memory"),
]


@pytest.mark.parametrize(("machine", "expected"), CASES)
def test_findings(machine: Machine, expected: set[str], tmp_path: Path) -> None:
    assert found(tmp_path, machine) == expected


def test_placement(tmp_path: Path) -> None:
    probes: list[dict[str, Any]] = [{"node": 0, "asked": True}, {"node": 1, "asked": True}]
    assert found(tmp_path / "two", TWO, probes=probes) == set()
    probes[0]["asked"] = False
    assert found(tmp_path / "two", TWO, probes=probes) == {"placement-refused"}
    assert found(tmp_path / "one", ONE, probes=probes[:1]) == set()


def test_amx_that_the_kernel_refuses(tmp_path: Path) -> None:
    sets = {"scalar": "available", "avx512_bf16": "available", "amx": "this CPU lacks amx_bf16"}
    assert found(tmp_path, ONE, kernel_sets=sets, selected="avx512_bf16") == {"amx-refused"}


H200 = {"name": "NVIDIA H200", "capability": [9, 0], "copy_rate": 55e9}
NO_CUDA = "torch 2.11 is built without CUDA"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set()),
        ({"gpus": [], "without_cuda": NO_CUDA, "nvidia_gpus": 1}, {"gpu-unused"}),
        ({"gpus": [], "without_cuda": NO_CUDA}, set()),
        ({"page_lock": "cudaHostRegister of 9 bytes: no"}, {"page-lock-refused"}),
        ({"gpus": [{**H200, "capability": [7, 5]}]}, {"gpu-old"}),
        ({"gpus": [H200, {**H200, "copy_rate": 20e9}]}, {"gpu-link"}),
        ({"gpus": [{**H200, "capability": [8, 9], "copy_rate": 20e9}]}, set()),  # by PCIe 4
        ({"gpus": [{**H200, "capability": [8, 9], "copy_rate": 13e9}]}, {"gpu-link"}),
        ({"gpus": [{**H200, "copy_rate": 0.0}]}, set()),
    ],
)
def test_gpus(changes: dict[str, Any], expected: set[str], tmp_path: Path) -> None:
    assert found(tmp_path, ONE, **{"gpus": [H200], "environment": PASSIVE, **changes}) == expected


@pytest.mark.parametrize(
    ("environment", "alone", "beside_a_gpu"),
    [
        ({"OMP_WAIT_POLICY": "active"}, True, True),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, True, True),
        ({"OMP_WAIT_POLICY": "passive"}, False, False),
        ({"GOMP_SPINCOUNT": "0"}, False, False),
        ({}, False, True),
    ],
)
def test_threads_that_spin(
    environment: dict[str, str], alone: bool, beside_a_gpu: bool, tmp_path: Path
) -> None:
    for gpus, slow in (([], alone), ([H200], beside_a_gpu)):
        assert ("omp-spins" in found(tmp_path, ONE, environment=environment, gpus=gpus)) == slow


def test_gpus_of_nvidia_are_counted(tmp_path: Path) -> None:
    others = gpu("0000:65:00.0") | gpu("0000:66:00.0", vendor="0x8086")
    assert read_tree(write_tree(tmp_path, ONE.with_files(gpu() | others)))["nvidia_gpus"] == 2


def test_what_is_measured_of_a_gpu() -> None:
    device = torch.device("cpu")
    assert machines.link_rate(device) > 0
    assert kt_moe.Rates(**machines.measure_rates(device)).rest_seconds == 0


def test_a_gpu_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(machines, "measure", fail)
    assert machines.measure_rates(torch.device("cpu")) == {}


def test_a_gpu_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(machines, "link_rate", lambda device: 20e9)
    monkeypatch.setattr(machines, "measure_rates", lambda device: {})
    monkeypatch.setattr(machines, "lock", Mock(side_effect=machines.PageLockError("no")))
    read = machines.read_gpus()
    assert read["gpus"] == [{**H200, "copy_rate": 20e9}]
    assert read["page_lock"] == "no"


def test_gpus_for_people(tmp_path: Path) -> None:
    rates = {
        "link": 5.5e10,
        "gpu_flops": 4.2e14,
        "gpu_bytes": 3.5e12,
        "cpu_flops": 4.6e12,
        "cpu_bytes": 1.1e11,
    }
    gpus = [H200, {**H200, "copy_rate": 13e9}]
    machine = read_tree(write_tree(tmp_path, TWO)) | {"gpus": gpus, "rates": rates}
    text = describe(machine)
    assert "\nGPU 0    NVIDIA H200, 55.0 GB/s from page-locked memory\n" in text
    said = "SLOW  copies to GPU 1 reach 13.0 GB/s, by PCIe 5 x16, which it can use, 55.0"
    assert said in findings.describe(findings.find(machine))
    given = next(line.removeprefix("rates").strip() for line in text.splitlines() if "kt_moe.Gpu(" in line)
    assert eval(given, {"kt_moe": kt_moe}).rates == kt_moe.Rates(**rates)


def shown(root: Path) -> str:
    """The doctor's words."""
    machine = read_tree(root)
    return f"{describe(machine)}\n\n{findings.describe(findings.find(machine))}"


def test_a_machine_for_people(tmp_path: Path) -> None:
    machine = trees.xeon_snc2().with_files({THP: "always madvise [never]\n"})
    lines = shown(write_tree(tmp_path, machine)).splitlines()
    assert lines == [
        "Intel(R) Xeon(R) Platinum 8480+, 2 packages, 112 cores, 224 CPUs",
        "memory   921.60 GiB for a run",
        "kernels  amx; 112 threads, 4 shards",
        "",
        "SLOW  transparent huge pages are off",
        "      cost: weights and scratch lie in pages of 4 KiB, whose addresses take longer to look up",
        "      mend: echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
    ]


@pytest.mark.parametrize("name", trees.MACHINES)
def test_every_machine_fits_a_screen(name: str, tmp_path: Path) -> None:
    lines = shown(write_tree(tmp_path, trees.MACHINES[name]())).splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize("text", ["", "garbage", "9" * 5000, "0-4294967295", "\x00\xff: ["])
def test_damaged_files(text: str, tmp_path: Path) -> None:
    root = write_tree(tmp_path, TWO)
    for path in root.rglob("*"):
        if path.is_file():
            path.write_bytes(text.encode("latin-1"))
    assert shown(root)


def test_memory_for_a_run_is_what_plan_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_moe.cli.doctor.machine.free_memory", lambda: 5 * GIB)
    monkeypatch.setattr("kt_moe.cli.doctor.machine.resident", lambda kind: GIB)
    assert read_machine()["available_bytes"] == 6 * GIB


def test_an_override_that_does_not_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KT_MOE_ISA", "mmx")
    assert main(["doctor"]) == 2
    assert 'isa is "mmx", wanted one of' in capsys.readouterr().err


def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_MOE_SHARDS", "1")
    status = main(["doctor"])
    text = capsys.readouterr().out
    slow = findings.find(read_machine())
    assert status == (1 if slow else 0)
    assert "\nmemory   " in text
    assert "\nset      KT_MOE_SHARDS=1\n" in text
    assert "\nGPU " in text
    assert main(["doctor", "--json"]) == status
    record = json.loads(capsys.readouterr().out)
    assert record["machine"]["probes"]
    assert [one["name"] for one in record["findings"]] == [one.name for one in slow]


def test_a_copy_of_this_machine_reads_as_it_does(tmp_path: Path) -> None:
    here = read_machine()
    (tmp_path / "proc").symlink_to("/proc")
    (tmp_path / "sys").symlink_to("/sys")
    copy = read_tree(tmp_path)
    for key in ("model", "packages", "cores", "online", "caches", "l3_sharing"):
        assert copy["topology"][key] == here["topology"][key]
    assert copy["isa_flags"] == here["isa_flags"]
