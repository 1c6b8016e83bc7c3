"""`kt-moe doctor` on recorded machines, and on this one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sys_trees as trees
import torch
from sys_trees import Machine, Node, gpu, read_tree, write_tree

import kt_moe
from kt_moe.cli import main
from kt_moe.cli.doctor import findings, gpus
from kt_moe.cli.doctor.gpus import Gpu, Gpus, Link
from kt_moe.cli.doctor.machine import OVERRIDES, read_machine
from kt_moe.cli.doctor.machine import Machine as Seen
from kt_moe.cli.doctor.report import describe

GIB = 2**30
THP = "sys/kernel/mm/transparent_hugepage/enabled"
SHARED_THP = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
BALANCING = "proc/sys/kernel/numa_balancing"
GOVERNOR = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
DRIVER = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_driver"


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OVERRIDES:
        monkeypatch.delenv(name, raising=False)


def found(root: Path, machine: Machine) -> dict[str, bool]:
    """The findings' names: whether they cost speed."""
    return {f.name: f.slow for f in findings.find(read_tree(write_tree(root, machine)))}


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
    pytest.param(ONE, {}, id="nothing"),
    pytest.param(TWO, {}, id="nothing on two"),
    pytest.param(trees.container(), {}, id="container"),
    pytest.param(trees.xeon_snc2(), {}, id="a thread a core"),
    pytest.param(trees.epyc_nps4(), {}, id="nps4"),
    pytest.param(trees.gaps(), {}, id="gaps"),
    pytest.param(trees.cxl(), {}, id="cxl"),
    pytest.param(trees.memoryless(), {"node-without-memory": True}, id="memoryless"),
    pytest.param(ONE.with_files({THP: "always madvise [never]\n"}), {"huge-pages-off": True}, id="thp off"),
    pytest.param(ONE.with_files({THP: "[always] madvise never\n"}), {}, id="thp always"),
    pytest.param(ONE.with_files({THP: None}), {}, id="thp unknown"),
    pytest.param(
        ONE.with_files({SHARED_THP: "always within_size advise [never] deny force\n"}),
        {"shared-huge-pages-off": False},
        id="thp of shared memory off",
    ),
    pytest.param(
        ONE.with_files({SHARED_THP: "always within_size [advise] never deny force\n"}), {}, id="and on"
    ),
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
    pytest.param(TWO.with_files({"sys/fs/cgroup/memory.max": f"{GIB}\n"}), {}, id="memory limit"),
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
    pytest.param(Machine(nodes(0.9, 0.05)), {"node-full": True}, id="a full node"),
    pytest.param(Machine(nodes(0.08, 0.05)), {"little-free": True, "node-full": True}, id="full nodes"),
    pytest.param(Machine(nodes(0.05)), {"little-free": True}, id="little free on one"),
    pytest.param(TWO.with_files(FILES_IN_NODE_1), {"node-full": True}, id="files in memory"),
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
        {},
        id="no bf16",
    ),
    pytest.param(
        replace(ONE, cpu=("AuthenticAMD", 25, 1, "Milan"), flags="avx2 fma f16c"),
        {},
        id="no avx512",
    ),
    pytest.param(ONE.with_files(gpu()), {}, id="gpu"),
    pytest.param(ONE.with_files(gpu(lanes=8)), {"gpu-link": True}, id="gpu of 8 lanes"),
    pytest.param(ONE.with_files(gpu(speed="2.5")), {}, id="gpu at rest"),
    pytest.param(ONE.with_files(gpu(vendor="0x8086", lanes=1)), {}, id="another's gpu"),
    pytest.param(TWO.with_files(gpu(node=1)), {}, id="gpu of node 1"),
    pytest.param(TWO.with_files(gpu(node=-1)), {}, id="gpu of no node"),
    pytest.param(
        replace(TWO, allowed=tuple(range(8)), files=gpu(node=1)),
        {"affinity": True, "gpu-far": True},
        id="gpu of a node without CPUs for us",
    ),
]


@pytest.mark.parametrize(("machine", "expected"), CASES)
def test_findings(machine: Machine, expected: dict[str, bool], tmp_path: Path) -> None:
    assert found(tmp_path, machine) == expected


def seen(root: Path, machine: Machine, **changes: Any) -> dict[str, bool]:
    """Findings of a recorded machine with what no tree can say."""
    changes.setdefault("environment", PASSIVE)
    changed: Seen = replace(read_tree(write_tree(root, machine)), **changes)
    return {f.name: f.slow for f in findings.find(changed)}


def probe(node: int, **changes: Any) -> dict[str, Any]:
    return {"node": node, "asked": True, "bound": True, "pages": 8, "right": 8, "unknown": 0, **changes}


@pytest.mark.parametrize(
    ("probes", "expected"),
    [
        ([probe(0), probe(1)], {}),
        ([probe(0, asked=False), probe(1, asked=False)], {"placement-refused": True}),
        ([probe(0), probe(1, right=6)], {"placed-elsewhere": True}),
        ([probe(0), probe(1, right=0, unknown=8)], {}),
    ],
)
def test_placement(probes: list[dict[str, Any]], expected: dict[str, bool], tmp_path: Path) -> None:
    assert seen(tmp_path / "two", TWO, probes=probes) == expected
    assert seen(tmp_path / "one", ONE, probes=probes[:1]) == {}


def test_amx_that_the_kernel_refuses(tmp_path: Path) -> None:
    sets = {"scalar": "available", "avx512_bf16": "available", "amx": "this CPU lacks amx_bf16"}
    assert seen(tmp_path, ONE, kernel_sets=sets, selected="avx512_bf16") == {"amx-refused": True}


LINK = Link("0000:17:00.0", 5, 16, 5, 16, 0)
H200 = Gpu("NVIDIA H200", LINK, (9, 0), 140 * GIB, 139 * GIB, 55e9)
GOOD = Gpus((H200,), "", True, "pinned")


@pytest.mark.parametrize(
    ("seen_gpus", "expected"),
    [
        (GOOD, {}),
        (
            replace(GOOD, gpus=(Gpu("", LINK),), without_cuda="torch 2.11 is built without CUDA"),
            {"gpu-unused": True},
        ),
        (Gpus((), "torch 2.11 is built without CUDA"), {}),
        (replace(GOOD, triton=False), {"no-triton": True}),
        (replace(GOOD, page_lock="cudaHostRegister of 9 bytes: no"), {"page-lock-refused": True}),
        (replace(GOOD, gpus=(replace(H200, capability=(7, 5)),)), {"gpu-old": True}),
        (replace(GOOD, gpus=(replace(H200, capability=(0, 0)),)), {"gpu-old": True}),
        (replace(GOOD, gpus=(replace(H200, copy_rate=20e9),)), {"gpu-link": True}),
        (
            replace(GOOD, gpus=(replace(H200, link=replace(LINK, generation=3), copy_rate=13e9),)),
            {"gpu-link": True},
        ),
        # A virtual machine is told so.
        (replace(GOOD, gpus=(replace(H200, link=replace(LINK, generation=1, lanes=1)),)), {}),
        (replace(GOOD, gpus=(replace(H200, link=None),)), {}),
        (replace(GOOD, gpus=(replace(H200, link=Link("0000:17:00.0")),)), {}),
    ],
)
def test_gpus(seen_gpus: Gpus, expected: dict[str, bool], tmp_path: Path) -> None:
    assert seen(tmp_path, ONE, gpus=seen_gpus) == expected


@pytest.mark.parametrize(
    ("environment", "slow"),
    [
        ({"OMP_WAIT_POLICY": "active"}, True),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, True),
        ({"OMP_WAIT_POLICY": "passive"}, False),
        ({"GOMP_SPINCOUNT": "infinite"}, True),
        ({"GOMP_SPINCOUNT": "30000000000", "OMP_WAIT_POLICY": "passive"}, True),
        ({"GOMP_SPINCOUNT": "0"}, False),
        ({"GOMP_SPINCOUNT": "many"}, False),
    ],
)
def test_threads_that_spin(environment: dict[str, str], slow: bool, tmp_path: Path) -> None:
    expected = {"omp-spins": True} if slow else {}
    assert seen(tmp_path, ONE, environment=environment) == expected
    assert seen(tmp_path, ONE, environment=environment, gpus=GOOD) == expected


def test_threads_that_spin_beside_a_gpu_as_they_do_by_default(tmp_path: Path) -> None:
    assert seen(tmp_path, ONE, environment={}, gpus=GOOD) == {"omp-spins": True}
    assert seen(tmp_path, ONE, environment={}) == {}
    unused = replace(GOOD, without_cuda="no driver", page_lock="")
    assert seen(tmp_path, ONE, environment={}, gpus=unused) == {"gpu-unused": True}


def shown(root: Path) -> str:
    """The doctor's words."""
    machine = read_tree(root)
    return describe(machine, findings.find(machine))


def test_gpus_for_people(tmp_path: Path) -> None:
    files = gpu() | gpu("0000:65:00.0", lanes=4, node=1)
    root = write_tree(tmp_path, TWO.with_files(files))
    text = shown(root)
    assert "\nGPU 0    NVIDIA, 0000:17:00.0 PCIe 5 x16 at node 0\n" in text
    assert "\nSLOW  GPU 1 is connected by PCIe 5 x4, can have PCIe 5 x16\n" in text
    rates = kt_moe.Rates(55e9, 4.2e14, 3.5e12, 4.6e12, 1.1e11)
    text = describe(replace(read_tree(root), gpus=replace(GOOD, rates=rates)), [])
    assert "NVIDIA H200, 139.00 GiB of 140.00 GiB free, 0000:17:00.0 PCIe 5 x16 at node 0, 55.0 GB/s " in text
    assert max(map(len, text.splitlines())) <= 140
    given = next(line.strip() for line in text.splitlines() if "kt_moe.Gpu(" in line)
    assert eval(given, {"kt_moe": kt_moe}).rates == rates


def test_what_is_measured_of_a_gpu() -> None:
    device = torch.device("cpu")
    assert gpus.link_rate(device) > 0
    assert isinstance(gpus.measure_rates(device), kt_moe.Rates)


def test_a_gpu_that_torch_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(tmp_path, ONE.with_files(gpu() | gpu("0000:65:00.0", speed="16.0")))
    by_address, real = gpus.read_link, gpus.recorded_gpus
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=140 * GIB, uuid="x",
        pci_bus_id=0x65, pci_device_id=0, pci_domain_id=0,
    )  # fmt: skip
    monkeypatch.setattr(gpus, "recorded_gpus", lambda _: real(root))
    monkeypatch.setattr(gpus, "read_link", lambda _, address: by_address(root, address))
    monkeypatch.setattr(gpus, "PCI", root / "sys/bus/pci/devices")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100 * GIB, 140 * GIB))
    monkeypatch.setattr(gpus, "link_rate", lambda device: 20e9)
    monkeypatch.setattr(gpus, "measure_rates", lambda device: None)
    found = gpus.read_gpus()
    (one,) = found.gpus
    assert one.free_bytes == 100 * GIB
    assert (one.name, one.capability, one.copy_rate) == ("NVIDIA H200", (9, 0), 20e9)
    assert one.link == Link("0000:65:00.0", 4, 16, 5, 16, 0)
    assert found.page_lock != "pinned"  # there is none really
    del properties.pci_bus_id  # an older torch, and two GPUs: which one is not known
    assert gpus.read_gpus().gpus[0].link is None


def test_a_machine_for_people(tmp_path: Path) -> None:
    machine = replace(trees.xeon_snc2(), mems=(0, 1, 2)).with_files({THP: "always madvise [never]\n"})
    lines = shown(write_tree(tmp_path, machine)).splitlines()
    assert lines[:3] == [
        "Intel(R) Xeon(R) Platinum 8480+, 2 packages, 112 cores, 224 CPUs",
        "caches   L1d 48 KiB, 112 x L2 2 MiB, 2 x L3 32 MiB",
        "node 0  28 cores  CPUs 0-27, 112-139    256.00 GiB  230.40 GiB free  distances 10 12 32 32",
    ]
    assert lines[6:9] == [
        "memory   1.00 TiB, 921.60 GiB of it for a run",
        "kernels  amx; 112 threads, 4 shards",
        "",
    ]
    assert lines[9:15] == [
        "SLOW  transparent huge pages are off",
        "      cost: weights and scratch lie in pages of 4 KiB, whose addresses take longer to look up",
        "      mend: echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        "SLOW  node 3 may give this process no memory",
        "      cost: its cores read all weights from another node",
        "      mend: docker --cpuset-mems, numactl --membind or a batch system set it",
    ]
    assert lines[-1] == "2 findings cost speed"


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
    machine = read_tree(root)
    assert describe(machine, findings.find(machine))


def test_memory_for_a_run_is_what_plan_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_moe.cli.doctor.machine.free_memory", lambda: 5 * GIB)
    monkeypatch.setattr("kt_moe.cli.doctor.machine.resident", lambda kind: GIB)
    assert read_machine().available_bytes == 6 * GIB


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
    slow = [f for f in findings.find(read_machine()) if f.slow]
    assert status == (1 if slow else 0)
    assert "\nnode 0 " in text
    assert "\nmemory   " in text
    assert "\nset      KT_MOE_SHARDS=1\n" in text
    assert "\nGPU " in text
    assert main(["doctor", "--json"]) == status
    record = json.loads(capsys.readouterr().out)
    assert record["machine"]["probes"]
    assert [one["name"] for one in record["findings"] if one["slow"]] == [one.name for one in slow]


def test_a_copy_of_this_machine_reads_as_it_does(tmp_path: Path) -> None:
    here = read_machine()
    (tmp_path / "proc").symlink_to("/proc")
    (tmp_path / "sys").symlink_to("/sys")
    copy = read_tree(tmp_path)
    for key in ("model", "packages", "cores", "online", "caches", "l3_sharing"):
        assert copy.topology[key] == here.topology[key]
    assert (copy.isa_flags, copy.memory_bytes) == (here.isa_flags, here.memory_bytes)
