"""The topology, read from recorded machines, whole and damaged, and from this one."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sys_trees as trees
from hypothesis import given
from hypothesis import strategies as st
from sys_trees import Machine, Node, write_tree

from kt_moe import _core, cpu_info

GIB = 2**30


def read(root: Path, machine: Machine, cpus: list[int] | None = None) -> dict[str, Any]:
    return _core.read_topology(str(write_tree(root, machine)), cpus)


def check(topology: dict[str, Any], cpus: list[int], ids: list[int]) -> None:
    """What holds of every topology of these CPUs and nodes."""
    nodes = topology["nodes"]
    assert [node["id"] for node in nodes] == ids
    assert topology["numa_nodes"] == len(nodes)
    assert sorted(itertools.chain(*(node["cpus"] for node in nodes))) == sorted(cpus)
    assert 1 <= topology["cores"] <= topology["cpus"] <= len(cpus)
    for i, node in enumerate(nodes):
        assert set(node["cores"]) <= set(node["cpus"])
        assert bool(node["cores"]) == bool(node["cpus"])
        assert len(node["distances"]) == len(nodes)
        assert node["distances"][i] == 10
        assert 0 <= node["free_bytes"] <= node["memory_bytes"]
    for level in ("l2", "l3"):
        sharing = topology.get(f"{level}_sharing", [])
        members = list(itertools.chain(*sharing))
        assert len(sharing) in (0, topology[f"{level}_domains"])
        assert len(members) == len(set(members))
        assert set(members) <= set(cpus)


def usable(topology: dict[str, Any], mask: set[int]) -> list[int]:
    """The mask's CPUs that are online, or all of it where damage leaves none."""
    return sorted(mask & set(topology["online"]) or mask)


@pytest.mark.parametrize("name", trees.MACHINES)
def test_every_machine_has_its_cpus_and_nodes(name: str, tmp_path: Path) -> None:
    machine = trees.MACHINES[name]()
    topology = read(tmp_path, machine)
    check(topology, machine.cpus, [n.id for n in machine.nodes])
    assert topology["online"] == machine.cpus
    assert topology["model"] == machine.cpu[3]
    assert topology["packages"] == len({n.package for n in machine.nodes if n.cores})
    assert topology["caches"] == {"l1d": 48 << 10, "l2": 2 << 20, "l3": 32 << 20}
    assert topology["l2_sharing"] == sorted(
        sorted(set(core) - set(machine.offline))
        for n in machine.nodes
        for core in n.cores
        if set(core) - set(machine.offline)
    )
    assert [n["memory_bytes"] for n in topology["nodes"]] == [int(n.gib * GIB) for n in machine.nodes]


def test_sub_numa_clusters(tmp_path: Path) -> None:
    topology = read(tmp_path, trees.xeon_snc2())
    assert (topology["cpus"], topology["cores"], topology["threads_per_core"]) == (224, 112, 2)
    assert topology["l3_domains"] == 2
    second = topology["nodes"][1]
    assert second["cores"] == list(range(28, 56))
    assert second["cpus"] == [*range(28, 56), *range(140, 168)]
    assert second["distances"] == [12, 10, 32, 32]
    assert second["free_bytes"] == int(256 * 2**20 * 0.9) * 1024


def test_l3_of_core_complexes(tmp_path: Path) -> None:
    topology = read(tmp_path, trees.epyc_nps4())
    assert (topology["cpus"], topology["cores"], topology["packages"]) == (256, 128, 2)
    assert topology["l3_domains"] == 16
    assert topology["l3_sharing"][1] == [*range(8, 16), *range(136, 144)]


def test_no_folder_of_nodes_is_one_node(tmp_path: Path) -> None:
    (node,) = read(tmp_path, trees.container())["nodes"]
    assert node["cpus"] == list(range(12))
    assert node["memory_bytes"] == 64 * GIB


def test_nothing_is_known_of_an_empty_tree(tmp_path: Path) -> None:
    topology = _core.read_topology(str(tmp_path))
    check(topology, [0], [0])
    assert topology["model"] == "unknown"
    assert topology["caches"] == {"l1d": 0, "l2": 0, "l3": 0}
    assert topology["cgroup_cpu_limit"] is None
    assert topology == _core.read_topology(str(tmp_path / "nowhere"))


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    root = write_tree(tmp_path, trees.single())
    (root / "proc/cpuinfo").write_bytes(b"model name\t: Xe\xff\xfeon\x01\n")
    assert _core.read_topology(str(root))["model"] == "Xe??on?"


def test_offline_cpus_are_no_siblings(tmp_path: Path) -> None:
    topology = read(tmp_path, trees.offline())
    assert [len(node["cpus"]) for node in topology["nodes"]] == [8, 14]
    assert (topology["cpus"], topology["cores"], topology["threads_per_core"]) == (22, 15, 2)


def test_the_mask_decides_which_cpus_and_cores_there_are(tmp_path: Path) -> None:
    topology = read(tmp_path, trees.xeon_snc2(), [112, 113, 30, 5])
    check(topology, [112, 113, 30, 5], [0, 1, 2, 3])
    assert topology["nodes"][0] | {"free_bytes": 0} == topology["nodes"][0] | {
        "cpus": [5, 112, 113],
        "cores": [5, 112, 113],
        "free_bytes": 0,
    }
    assert topology["nodes"][1]["cpus"] == [30]
    assert topology["nodes"][2]["cpus"] == topology["nodes"][2]["cores"] == []
    assert topology["threads_per_core"] == 1
    assert topology["l2_sharing"] == [[5], [30], [112], [113]]


def test_the_mask_of_the_recorded_process(tmp_path: Path) -> None:
    machine = Machine(trees.single().nodes, allowed=(2, 3, 99))
    topology = read(tmp_path, machine)
    check(topology, [2, 3], [0])
    assert topology["online"] == list(range(8))


def test_caches_are_those_of_an_allowed_cpu(tmp_path: Path) -> None:
    machine = trees.single().with_files(
        {f"sys/devices/system/cpu/cpu3/cache/index{i}/level": None for i in range(4)}
    )
    machine = machine.with_files({"sys/devices/system/cpu/cpu4/cache/index2/size": "1M\n"})
    assert read(tmp_path, machine, [3, 4, 5])["caches"]["l2"] == 1 << 20


def test_nodes_that_may_give_no_memory(tmp_path: Path) -> None:
    machine = Machine(trees.xeon_snc2().nodes, mems=(0, 1))
    assert [n["memory_allowed"] for n in read(tmp_path, machine)["nodes"]] == [True, True, False, False]


def test_memory_of_nodes_that_are_not_here(tmp_path: Path) -> None:
    assert read(tmp_path, Machine(trees.single().nodes, mems=(5,)))["nodes"][0]["memory_allowed"]


def test_before_linux_5_2_and_without_lists(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu/cpu{}/topology/{}"
    machine = trees.xeon_snc2()
    old = machine.with_files({cpu.format(c, "core_cpus_list"): None for c in machine.cpus})
    assert read(tmp_path / "old", old)["cores"] == 112
    ids = old.with_files({cpu.format(c, "thread_siblings_list"): None for c in machine.cpus})
    assert read(tmp_path / "ids", ids)["cores"] == 112
    nothing = ids.with_files({cpu.format(c, "core_id"): None for c in machine.cpus})
    assert read(tmp_path / "nothing", nothing)["cores"] == 224


CGROUPS = [
    pytest.param(
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "350000 100000\n"},
        3.5,
        None,
        id="parent",
    ),
    pytest.param(
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None, None, id="max"
    ),
    pytest.param(
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "600000 100000\n",
            "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/a/b/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.max": "max\n",
        },
        2,
        4 * GIB,
        id="tightest",
    ),
    pytest.param({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5, None, id="container"),
    pytest.param(
        {"proc/self/cgroup": "0::/host/path\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"},
        1,
        None,
        id="host path",
    ),
    pytest.param(
        {"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1, None, id="above"
    ),
    pytest.param(
        {
            "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/c/d\n1:name=systemd:/c\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/c/d/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/c/d/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/m/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
        3,
        GIB,
        id="version 1",
    ),
    pytest.param(
        {
            "proc/self/cgroup": None,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        0.5,
        None,
        id="no proc",
    ),
    pytest.param(
        {"sys/fs/cgroup/cpu.max": "100000\n", "sys/fs/cgroup/memory.max": "-5\n"}, None, None, id="damaged"
    ),
    pytest.param({"sys/fs/cgroup/cpu.max": "100000 0\n"}, None, None, id="zero"),
]


@pytest.mark.parametrize(("files", "cpus", "memory"), CGROUPS)
def test_limits_of_control_groups(
    files: dict[str, str | None], cpus: float | None, memory: int | None, tmp_path: Path
) -> None:
    topology = read(tmp_path, trees.single().with_files(files))
    assert topology["cgroup_cpu_limit"] == cpus
    assert topology["cgroup_memory_limit"] == memory
    expected = 8 if cpus is None else max(1, -int(-cpus // 1))
    assert topology["cpus"] == topology["cores"] == expected
    assert len(topology["nodes"][0]["cpus"]) == 8


def test_a_cpu_in_no_list_and_one_in_two(tmp_path: Path) -> None:
    node = "sys/devices/system/node/node{}/cpulist"
    machine = trees.asymmetric()
    lost = machine.with_files({node.format(0): "0-19\n"})
    topology = read(tmp_path / "lost", lost)
    check(topology, machine.cpus, [0, 1])
    assert len(topology["nodes"][0]["cpus"]) == 24
    twice = machine.with_files({node.format(1): "20-31\n"})
    topology = read(tmp_path / "twice", twice)
    check(topology, machine.cpus, [0, 1])
    assert len(topology["nodes"][1]["cpus"]) == 8


HOSTILE = (
    "",
    "\n",
    "garbage",
    "0-4294967295\n",
    "0-65535," * 30000,
    "18446744073709551616\n",
    "-1\n",
    "3-0\n",
    "0-",
    ",,,",
    "0,\x00\xff,1",
    "1 2 3",
    "Node 0 MemTotal: 99999999999999999999 kB",
    "MemTotal: -5 kB\nMemFree: 1 kB",
    "0::" + "/a" * 100000,
    "0::/\n" * 50000,
    "9" * 300000,
)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_machine_where_every_file_holds_the_same_damage(text: str, tmp_path: Path) -> None:
    root = write_tree(tmp_path, trees.offline())
    for path in root.rglob("*"):
        if path.is_file():
            path.write_bytes(text.encode("latin-1"))
    start = time.perf_counter()
    topology = _core.read_topology(str(root))
    assert time.perf_counter() - start < 10
    check(topology, list(itertools.chain(*(n["cpus"] for n in topology["nodes"]))), [0, 1])
    masked = _core.read_topology(str(root), [1, 2])
    check(masked, usable(masked, {1, 2}), [0, 1])


def test_odd_names_and_kinds_of_files(tmp_path: Path) -> None:
    root = write_tree(tmp_path, trees.single())
    nodes = root / "sys/devices/system/node"
    for name in ("node", "node01", "nodeX", "node-1", "node99999999999", "node5000", "power"):
        (nodes / name).mkdir()
    os.mkfifo(root / "sys/fs_pipe")
    (nodes / "node0/cpulist").unlink()
    (nodes / "node0/cpulist").symlink_to(root / "sys/fs_pipe")
    (nodes / "node0/distance").unlink()
    (nodes / "node0/distance").mkdir()
    check(_core.read_topology(str(root)), list(range(8)), [0])


@pytest.mark.parametrize("cpus", [[-1, 3], [3, 1 << 30], [3, 3]])
def test_cpus_that_cannot_be(cpus: list[int], tmp_path: Path) -> None:
    check(read(tmp_path, trees.single(), cpus), [3], [0])


def test_many_nodes_cost_little(tmp_path: Path) -> None:
    root = write_tree(tmp_path, trees.sixteen())
    start = time.perf_counter()
    _core.read_topology(str(root))
    assert time.perf_counter() - start < 2


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """Of any shape: ids with gaps, nodes without CPUs or memory, SMT or not, CPUs dealt out at random."""
    ids = sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=6)))
    sizes = draw(st.lists(st.integers(0, 5), min_size=len(ids), max_size=len(ids)))
    sizes[0] = max(1, sizes[0])
    threads = draw(st.integers(1, 4))
    numbers = draw(st.permutations(range(threads * sum(sizes))))
    dealt = iter(numbers)
    nodes = tuple(
        Node(
            id,
            tuple(tuple(sorted(itertools.islice(dealt, threads))) for _ in range(size)),
            gib=draw(st.sampled_from([0, 1, 64])),
            package=draw(st.integers(0, 2)),
            l3=draw(st.sampled_from([None, 1, 3])),
        )
        for id, size in zip(ids, sizes, strict=True)
    )
    off = draw(st.sets(st.sampled_from(numbers), max_size=len(numbers) - 1))
    return Machine(nodes, offline=tuple(sorted(off)))


@given(machine=machines(), data=st.data())
def test_any_machine(machine: Machine, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("tree")
    ids = [n.id for n in machine.nodes]
    try:
        whole = read(root, machine)
        check(whole, machine.cpus, ids)
        alive = [core for n in machine.nodes for core in n.cores if set(core) - set(machine.offline)]
        assert whole["cores"] == len(alive)
        mask = data.draw(st.sets(st.sampled_from(machine.cpus), min_size=1))
        part = _core.read_topology(str(root), sorted(mask))
        check(part, sorted(mask), ids)
        assert part["cores"] == sum(1 for core in alive if set(core) & mask)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        chance = random.Random(data.draw(st.integers(0, 2**32 - 1)))
        for path in chance.sample(files, min(len(files), 8)):
            text = path.read_bytes()
            damage = [
                text[: chance.randrange(len(text) + 1)],
                chance.randbytes(20),
                chance.choice(HOSTILE).encode(),
            ]
            path.write_bytes(chance.choice(damage))
        damaged = _core.read_topology(str(root), sorted(mask))
        check(damaged, usable(damaged, mask), ids)
    finally:
        shutil.rmtree(root)


def test_this_machine() -> None:
    info = cpu_info()
    check(info, sorted(os.sched_getaffinity(0)), [n["id"] for n in info["nodes"]])
    json.dumps(info)
    assert info["nodes"][0]["memory_bytes"] > 0


def test_the_affinity_of_the_thread() -> None:
    last = max(os.sched_getaffinity(0))
    found: list[dict[str, Any]] = []

    def pinned() -> None:
        os.sched_setaffinity(0, {last})
        found.append(_core.read_topology("/"))

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()
    check(found[0], [last], [n["id"] for n in found[0]["nodes"]])


def test_memory_is_placed_or_the_probe_says_that_it_is_not() -> None:
    with_memory = [n["id"] for n in cpu_info()["nodes"] if n["memory_bytes"] and n["memory_allowed"]]
    probes = _core.probe_nodes()
    assert [probe["node"] for probe in probes] == with_memory
    for probe in probes:
        assert probe["pages"] == 1024
        assert 0 <= probe["right"] + probe["unknown"] <= 1024
        if len(with_memory) == 1 and not probe["unknown"]:
            assert probe["right"] == 1024
