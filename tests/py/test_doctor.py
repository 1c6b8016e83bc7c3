"""`kt-moe doctor` on recorded machines, and on this one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sys_trees as trees
from sys_trees import Machine, Node, write_tree

from kt_moe.cli import main
from kt_moe.cli.doctor import findings
from kt_moe.cli.doctor.machine import Machine as Seen
from kt_moe.cli.doctor.machine import read_machine, read_recorded
from kt_moe.cli.doctor.report import describe
from kt_moe.cli.info import OVERRIDES

GIB = 2**30
THP = "sys/kernel/mm/transparent_hugepage/enabled"
BALANCING = "proc/sys/kernel/numa_balancing"
GOVERNOR = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
DRIVER = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_driver"


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OVERRIDES:
        monkeypatch.delenv(name, raising=False)


def found(root: Path, machine: Machine) -> dict[str, bool]:
    """The findings' names: whether they cost speed."""
    return {f.name: f.slow for f in findings.find(read_recorded(write_tree(root, machine)))}


def zones(*blocks: tuple[int, int]) -> str:
    """proc/buddyinfo of (pages, big blocks) free in each node."""
    return "".join(
        f"Node {n}, zone   Normal {pages:6} {' '.join(['0'] * 8)} {big:6} 0 \n"
        for n, (pages, big) in enumerate(blocks)
    )


def nodes(*free: float, gib: float = 64) -> tuple[Node, ...]:
    return tuple(Node(n, trees.cores(8 * n, 8), gib, free=f, package=n) for n, f in enumerate(free))


TWO = Machine(nodes(0.9, 0.9))
ONE = trees.single()
FILES_IN_NODE_1 = {
    "sys/devices/system/node/node1/meminfo": "Node 1 MemTotal: 67108864 kB\nNode 1 MemFree: 1048576 kB\n"
    "Node 1 Active(file): 30000000 kB\nNode 1 Inactive(file): 9000000 kB\n"
}

CASES = [
    pytest.param(ONE, {}, id="nothing"),
    pytest.param(TWO, {}, id="nothing on two"),
    pytest.param(trees.container(), {}, id="container"),
    pytest.param(trees.xeon_snc2(), {}, id="a thread a core"),
    pytest.param(trees.epyc_nps4(), {}, id="nps4"),
    pytest.param(trees.gaps(), {}, id="gaps"),
    pytest.param(trees.cxl(), {"node-without-cpus": False}, id="cxl"),
    pytest.param(trees.memoryless(), {"node-without-memory": True}, id="memoryless"),
    pytest.param(ONE.with_files({THP: "always madvise [never]\n"}), {"huge-pages-off": True}, id="thp off"),
    pytest.param(ONE.with_files({THP: "[always] madvise never\n"}), {}, id="thp always"),
    pytest.param(ONE.with_files({THP: None}), {}, id="thp unknown"),
    pytest.param(replace(TWO, allowed=(0, 1, 8)), {"affinity": True}, id="mask"),
    pytest.param(replace(TWO, mems=(0,)), {"memory-not-allowed": True}, id="mems"),
    pytest.param(
        replace(trees.cxl(), mems=(0,)),
        {"memory-not-allowed": False},
        id="mems of memory alone",
    ),
    pytest.param(
        TWO.with_files({"sys/fs/cgroup/cpu.max": "350000 100000\n"}), {"cpu-limit": True}, id="cpu limit"
    ),
    pytest.param(TWO.with_files({"sys/fs/cgroup/cpu.max": "1600000 100000\n"}), {}, id="cpu limit of all"),
    pytest.param(
        TWO.with_files({"sys/fs/cgroup/memory.max": f"{GIB}\n"}), {"memory-limit": False}, id="memory limit"
    ),
    pytest.param(TWO.with_files({"sys/fs/cgroup/memory.max": f"{100 * GIB}\n"}), {}, id="high memory limit"),
    pytest.param(TWO.with_files({BALANCING: "1\n"}), {"numa-balancing": True}, id="balancing"),
    pytest.param(ONE.with_files({BALANCING: "1\n"}), {}, id="balancing of one node"),
    pytest.param(ONE.with_files({GOVERNOR.format(3): "schedutil\n"}), {"governor": True}, id="governor"),
    pytest.param(
        ONE.with_files({GOVERNOR.format(3): "powersave\n", DRIVER.format(3): "intel_pstate\n"}),
        {"governor": False},
        id="governor in the CPU",
    ),
    pytest.param(ONE.with_files({GOVERNOR.format(c): None for c in range(8)}), {}, id="no governor"),
    pytest.param(Machine(nodes(0.9, 0.05)), {"little-free": True}, id="little free"),
    pytest.param(Machine(nodes(0.05)), {"little-free": True}, id="little free on one"),
    pytest.param(TWO.with_files(FILES_IN_NODE_1), {"little-free": True}, id="files in memory"),
    pytest.param(
        ONE.with_files({"proc/buddyinfo": zones((2**23, 99))}), {"fragmented": True}, id="fragmented"
    ),
    pytest.param(ONE.with_files({"proc/buddyinfo": zones((99, 2**13))}), {}, id="whole"),
    pytest.param(
        ONE.with_files({"proc/meminfo": "HugePages_Free: 2048\nHugepagesize: 2048 kB\n"}),
        {"huge-page-pool": False},
        id="pool",
    ),
    pytest.param(replace(ONE, flags=trees.AVX512), {"instructions-hidden": True}, id="hidden"),
    pytest.param(
        replace(ONE, cpu=trees.GENOA, flags=trees.AVX512), {"instructions-hidden": True}, id="hidden bf16"
    ),
    pytest.param(
        replace(ONE, cpu=("GenuineIntel", 6, 106, "Ice Lake"), flags=trees.AVX512),
        {"instructions-missing": False},
        id="no bf16",
    ),
    pytest.param(
        replace(ONE, cpu=("AuthenticAMD", 25, 1, "Milan"), flags="avx2 fma f16c"),
        {"instructions-missing": False},
        id="no avx512",
    ),
]


@pytest.mark.parametrize(("machine", "expected"), CASES)
def test_findings(machine: Machine, expected: dict[str, bool], tmp_path: Path) -> None:
    assert found(tmp_path, machine) == expected


def seen(root: Path, machine: Machine, **changes: Any) -> dict[str, bool]:
    """Findings of a recorded machine with what no tree can say."""
    changed: Seen = replace(read_recorded(write_tree(root, machine)), **changes)
    return {f.name: f.slow for f in findings.find(changed)}


def probe(node: int, **changes: Any) -> dict[str, Any]:
    return {"node": node, "asked": True, "bound": True, "pages": 8, "right": 8, "unknown": 0, **changes}


@pytest.mark.parametrize(
    ("probes", "expected"),
    [
        ([probe(0), probe(1)], {}),
        ([probe(0, asked=False), probe(1, asked=False)], {"placement-refused": True}),
        ([probe(0), probe(1, right=6)], {"placed-elsewhere": True}),
        ([probe(0), probe(1, right=0, unknown=8)], {"placement-unknown": False}),
    ],
)
def test_placement(probes: list[dict[str, Any]], expected: dict[str, bool], tmp_path: Path) -> None:
    assert seen(tmp_path / "two", TWO, probes=probes) == expected
    assert seen(tmp_path / "one", ONE, probes=probes[:1]) == {}


def test_amx_that_the_kernel_refuses(tmp_path: Path) -> None:
    sets = {"scalar": "available", "avx512_bf16": "available", "amx": "this CPU lacks amx_bf16"}
    assert seen(tmp_path, ONE, kernel_sets=sets, selected="avx512_bf16") == {"amx-refused": True}


@pytest.mark.parametrize(
    ("overrides", "changes", "slow"),
    [
        ({"KT_MOE_ISA": "avx2"}, {"selected": "avx2"}, True),
        ({"KT_MOE_ISA": "amx"}, {}, False),
        ({"KT_MOE_SHARDS": "2"}, {"shards": 2}, False),
        ({"KT_MOE_THREADS": "2"}, {"threads": 2}, True),
        ({"KT_MOE_THREADS": "8"}, {}, False),
        ({"KT_MOE_INDEX_CACHE": "0"}, {}, False),
    ],
)
def test_overrides(overrides: dict[str, str], changes: dict[str, Any], slow: bool, tmp_path: Path) -> None:
    assert seen(tmp_path, ONE, overrides=overrides, **changes) == ({"override": True} if slow else {})


def test_a_recorded_machine_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = replace(trees.xeon_snc2(), mems=(0, 1, 2)).with_files({THP: "always madvise [never]\n"})
    assert main(["doctor", "--sysfs", str(write_tree(tmp_path, machine))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "Intel(R) Xeon(R) Platinum 8480+, 2 packages, 112 cores, 224 CPUs",
        "caches   L1d 48 KiB, 112 x L2 2 MiB, 2 x L3 32 MiB",
        "node 0  28 cores  CPUs 0-27, 112-139    256.00 GiB  230.40 GiB free  distances 10 12 32 32",
    ]
    assert lines[6:8] == ["kernels  amx; 112 threads, 4 shards", ""]
    assert lines[8:14] == [
        "SLOW  transparent huge pages are off",
        "      cost: weights and scratch lie in pages of 4 KiB, whose addresses take longer to look up",
        "      mend: echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        "SLOW  node 3 may give this process no memory",
        "      cost: its cores read all weights from another node",
        "      mend: docker --cpuset-mems, numactl --membind or a batch system set it",
    ]
    assert lines[-1] == "2 findings cost speed"


def test_a_recorded_machine_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path, TWO.with_files({BALANCING: "1\n", "proc/buddyinfo": zones((5, 70000), (5, 90000))}))
    assert main(["doctor", "--json", "--sysfs", str(tmp_path)]) == 1
    record = json.loads(capsys.readouterr().out)
    assert [node["cpus"] for node in record["machine"]["nodes"]] == [list(range(8)), list(range(8, 16))]
    assert record["machine"]["governors"] == {"performance": 16}
    assert record["machine"]["probes"] is None
    (finding,) = record["findings"]
    assert (finding["name"], finding["slow"]) == ("numa-balancing", True)
    assert finding["mend"] == "echo 0 | sudo tee /proc/sys/kernel/numa_balancing"


@pytest.mark.parametrize("name", trees.MACHINES)
def test_every_machine_fits_a_screen(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--sysfs", str(write_tree(tmp_path, trees.MACHINES[name]()))]) in (0, 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize(
    "text", ["", "garbage", "9" * 5000, "0-4294967295", "\x00\xff: [", "Node 0, zone X 9 9"]
)
def test_damaged_files(text: str, tmp_path: Path) -> None:
    root = write_tree(tmp_path, TWO.with_files({"proc/buddyinfo": zones((5, 7))}))
    for path in root.rglob("*"):
        if path.is_file():
            path.write_bytes(text.encode("latin-1"))
    machine = read_recorded(root)
    assert describe(machine, findings.find(machine))


def test_no_machine_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--sysfs", str(tmp_path / "none")]) == 2
    assert "kt-moe doctor: error: --sysfs" in capsys.readouterr().err


def test_an_override_that_does_not_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KT_MOE_ISA", "mmx")
    assert main(["doctor"]) == 2
    assert 'isa is "mmx", wanted one of' in capsys.readouterr().err


def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_MOE_INDEX_CACHE", "0")
    status = main(["doctor"])
    text = capsys.readouterr().out
    slow = [f for f in findings.find(read_machine()) if f.slow]
    assert status == (1 if slow else 0)
    assert "\nnode 0 " in text
    assert "\nmemory   " in text
    assert "\nset      KT_MOE_INDEX_CACHE=0\n" in text
    assert main(["doctor", "--json"]) == status
    record = json.loads(capsys.readouterr().out)
    assert record["machine"]["probes"]


def test_a_copy_of_this_machine_reads_as_it_does(tmp_path: Path) -> None:
    here = read_machine()
    (tmp_path / "proc").symlink_to("/proc")
    (tmp_path / "sys").symlink_to("/sys")
    copy = read_recorded(tmp_path)
    for key in ("model", "packages", "cores", "online", "caches", "l3_sharing"):
        assert copy.topology[key] == here.topology[key]
    assert copy.flags == here.flags
