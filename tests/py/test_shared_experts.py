"""Experts in memory that several processes share: one loads them, the others map them."""

from __future__ import annotations

import functools
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import kt_moe
from kt_moe import distributed
from kt_moe.experts import FORMATS

E, H, I = 8, 512, 1024  # noqa: E741
# Prints the inode of the memory behind the layer, and waits for a line.
HOLDER = """
import signal, sys, os
import kt_moe
from shared_memory import inodes
path, format, dies = sys.argv[1:]
def progress(count):  # of the first bytes that are loaded
    if dies == "True":
        print("loading", flush=True)
        sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGKILL)
experts = kt_moe.Experts.from_checkpoint(path, 0, format=format, shared=True, progress=progress)
assert experts.verify()
print(*inodes(), flush=True)
sys.stdin.readline()
"""
# The part of it that the test uses too.
SHARED_MEMORY = '''
import re
from pathlib import Path


def inodes():
    """Of the shared layers that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({int(line.split()[4]) for line in lines if re.search("memfd:.*layer-", line)})
'''


def inodes() -> list[int]:
    found: dict[str, Any] = {}
    exec(SHARED_MEMORY, found)
    return found["inodes"]()  # type: ignore[no-any-return]


def sizes() -> tuple[int, int]:
    """Kilobytes of shared layers in this process: in memory, and its part of them (Rss, Pss)."""
    rss = pss = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = "memfd:" in line
        elif inside and line.startswith(("Rss:", "Pss:")):
            rss, pss = (
                (rss + int(line.split()[1]), pss) if line[0] == "R" else (rss, pss + int(line.split()[1]))
            )
    return rss, pss


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the processes of a test find each other; every layer is gone before and after it."""
    (tmp_path / "shared_memory.py").write_text(SHARED_MEMORY)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield Path(tmp_path, f"kt_moe-{os.geteuid()}-{os.stat('/proc/self/ns/pid').st_ino}")
    gc.collect()
    assert not inodes()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    random = torch.Generator().manual_seed(3)
    tensors = {}
    for name, shape in (("gate_proj", (I, H)), ("up_proj", (I, H)), ("down_proj", (H, I))):
        for e in range(E):
            weight = torch.randn(shape, generator=random).mul(0.05).bfloat16()
            tensors[f"model.layers.0.mlp.experts.{e}.{name}.weight"] = weight
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def hold(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a process that has the layer until it ends; the inodes are what it prints."""
    running = []

    def start(format: str = "as-stored", dies: bool = False) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(checkpoint), format, str(dies)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def printed(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


def load(checkpoint: Path, **options: Any) -> kt_moe.Experts:
    return kt_moe.Experts.from_checkpoint(checkpoint, 0, **{"shared": True, **options})


def links(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_symlink())


@pytest.mark.parametrize("format", FORMATS)
def test_two_processes_have_the_same_memory(checkpoint: Path, hold: Any, format: str) -> None:
    ours, own = load(checkpoint, format=format), load(checkpoint, format=format, shared=False)
    assert (ours.shared, ours.mapped, own.shared) == (True, False, False)
    assert ours.verify()
    if format == "bf16":
        before, alone = sizes()
        assert before == alone >= ours.nbytes // 1024
    other = hold(format)
    assert printed(other) == inodes()
    if format == "bf16":
        rss, pss = sizes()
        assert rss == before
        assert pss < 0.55 * rss
    for ours_part, own_part in zip(ours.dequantize(), own.dequantize(), strict=True):
        assert torch.equal(ours_part, own_part)
    assert ours.quantization_error == own.quantization_error
    assert ours.nbytes == own.nbytes


@pytest.mark.parametrize("placement", ["tensor", "expert"])
def test_products_are_those_of_experts_of_ones_own(checkpoint: Path, placement: str) -> None:
    runtime = kt_moe.Runtime(threads=2, shards=2)
    ours, own = (
        load(checkpoint, shared=shared, runtime=runtime, placement=placement) for shared in (True, False)
    )
    x = torch.randn(40, H).bfloat16()
    ids, weights = torch.randint(E, (40, 2)), torch.rand(40, 2)
    results = []
    for experts in (ours, own):
        hidden = x.clone().requires_grad_()
        out = kt_moe.moe(hidden, ids, weights, experts)
        out.float().square().sum().backward()
        results.append((out.detach(), hidden.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


def test_who_loaded_it_may_be_killed(checkpoint: Path, hold: Any, temporary: Path) -> None:
    first = hold()
    (inode,) = printed(first)
    ours = load(checkpoint)
    assert inodes() == [inode]
    first.kill()
    first.wait()
    assert len(links(temporary)) == 2  # its own leads nowhere now
    assert ours.verify()
    assert printed(hold()) == [inode]  # from us
    assert len(links(temporary)) == 2


def test_who_waits_loads_it_if_the_loader_is_killed(checkpoint: Path, hold: Any, temporary: Path) -> None:
    loader = hold(dies=True)
    assert loader.stdout.readline() == "loading\n"
    with ThreadPoolExecutor() as pool:
        waits = pool.submit(load, checkpoint)
        time.sleep(0.5)
        assert not waits.done()
        loader.communicate("\n")
        ours = waits.result()
    assert loader.returncode == -signal.SIGKILL
    assert ours.verify()
    assert len(links(temporary)) == 1


def test_a_fork_while_loading_keeps_nobody_waiting(checkpoint: Path) -> None:
    children: list[int] = []

    def fork(count: int) -> None:
        if not children:
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            children.append(child)

    ours = load(checkpoint, progress=fork)
    with ThreadPoolExecutor() as pool:
        waits = pool.submit(load, checkpoint)
        time.sleep(0.5)
        done = waits.done()
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)
        assert waits.result().verify()
    assert done
    assert ours.verify()


def test_progress_that_loads_the_layer_again_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    """It would wait for itself."""
    for options in ({}, {"shared": False, "cache_dir": tmp_path / "cache"}):
        again = functools.partial(load, checkpoint, **options)
        with pytest.raises(RuntimeError, match=r"progress of layer 0, .*, loads it again"):
            load(checkpoint, progress=lambda _, again=again: again(), **options)
        with pytest.raises(RuntimeError, match="loads it again"):
            again(progress=lambda _, again=again: again())
        assert again().verify()


def test_memory_and_links_go_with_the_last_user(checkpoint: Path, hold: Any, temporary: Path) -> None:
    ours = load(checkpoint)
    (inode,) = inodes()
    assert [name.split(".")[-2] for name in links(temporary)] == [str(os.getpid())]
    child = os.fork()
    if child == 0:
        del ours
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(links(temporary)) == 1  # a fork's end takes nothing
    other = hold()
    assert printed(other) == [inode]
    other.communicate("\n")
    assert other.returncode == 0
    assert len(links(temporary)) == 1
    del ours
    gc.collect()
    assert not links(temporary)


def test_nobody_can_change_it(checkpoint: Path, temporary: Path) -> None:
    ours = load(checkpoint)
    (link,) = (path for path in temporary.iterdir() if path.is_symlink())
    with open(link, "r+b", buffering=0) as file:
        with pytest.raises(PermissionError):
            file.write(b"x")
        with pytest.raises(PermissionError):
            file.truncate(1)
    assert ours.verify()


@pytest.mark.parametrize("what", ["nowhere", "a file", "a socket", "unsealed", "another layer"])
def test_a_link_to_something_else_is_passed_over(
    checkpoint: Path, temporary: Path, tmp_path: Path, what: str
) -> None:
    ours = load(checkpoint)
    (link,) = (path for path in temporary.iterdir() if path.is_symlink())
    memory = os.memfd_create("stranger", os.MFD_ALLOW_SEALING)
    strangers = socket.socketpair()
    targets = {
        "nowhere": "/proc/0/fd/0",
        "a file": tmp_path / "shared_memory.py",
        "a socket": f"/proc/self/fd/{strangers[0].fileno()}",
        "unsealed": f"/proc/self/fd/{memory}",
    }
    other = None
    if what == "another layer":  # as after an update of the checkpoint under the same name
        other = load(checkpoint, format="int8")
        targets[what] = next(
            path for path in temporary.iterdir() if "int8" in path.name and path.is_symlink()
        )
    del ours
    gc.collect()
    link.symlink_to(targets[what])
    if other is None:
        ours = load(checkpoint)
    else:
        with pytest.warns(
            UserWarning, match="layer 0 in memory that cannot be shared: it holds a layer of an"
        ):
            ours = load(checkpoint)
    assert ours.verify()
    os.close(memory)
    for stranger in strangers:
        stranger.close()


def test_a_directory_of_others_is_refused(checkpoint: Path, temporary: Path) -> None:
    temporary.mkdir(mode=0o700)
    temporary.chmod(0o777)
    with pytest.raises(PermissionError, match="is no directory that only this user may write"):
        load(checkpoint)
    temporary.rmdir()
    temporary.touch()
    with pytest.raises(PermissionError, match="is no directory that only this user may write"):
        load(checkpoint)
    temporary.unlink()
    temporary.symlink_to("/")
    with pytest.raises(PermissionError, match="is no directory that only this user may write"):
        load(checkpoint)


def test_options_that_exclude_each_other(checkpoint: Path, tmp_path: Path) -> None:
    for options in ({"paged": True}, {"cache_dir": tmp_path}):
        with pytest.raises(
            ValueError, match="shared keeps the weights in memory, paged and cache_dir leave them in files"
        ):
            load(checkpoint, **options)
    with pytest.raises(TypeError, match="shared is 1, wanted True or False"):
        load(checkpoint, shared=1)
    with pytest.raises(ValueError, match='expert_parallel="host" and paged or cache_dir'):
        kt_moe.KtMoeConfig(expert_parallel="host", paged=True)
    with pytest.raises(ValueError, match="expert_parallel is 'hosts', wanted one of"):
        kt_moe.KtMoeConfig(expert_parallel="hosts")


def test_auto_shares_where_a_launcher_started_several(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = kt_moe.KtMoeConfig()
    assert not config.shares_memory()
    assert kt_moe.KtMoeConfig(expert_parallel="host").shares_memory()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert config.shares_memory()
    assert not kt_moe.KtMoeConfig(expert_parallel="off").shares_memory()
    assert not kt_moe.KtMoeConfig(cache_dir=tmp_path).shares_memory()
    for rank in ("4", "-1", "x"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(ValueError, match=f"LOCAL_RANK is '{rank}' and LOCAL_WORLD_SIZE is '4'"):
            config.shares_memory()


def machine(*cores: int, allowed: int | None = None) -> dict[str, Any]:
    """With so many cores on each NUMA node; node 1 has memory alone."""
    numbers = [0, *range(2, len(cores) + 1)][: len(cores)]
    nodes = [{"id": n, "cores": list(range(c))} for n, c in zip(numbers, cores, strict=True)]
    return {"cores": allowed or sum(cores), "nodes": [*nodes, {"id": 1, "cores": []}]}


def divided(monkeypatch: pytest.MonkeyPatch, of: dict[str, Any], size: int) -> list[Any]:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))
    result = []
    for rank in range(size):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        result.append(distributed.cores_of_rank(of))
    return result


def test_the_processes_of_a_machine_divide_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    split = lambda of, size: divided(monkeypatch, of, size)  # noqa: E731
    assert split(machine(16), 1) == [(16, None)]
    assert split(machine(16), 3) == [(5, None), (5, None), (6, None)]
    assert split(machine(2), 4) == [(1, None)] * 4  # more processes than cores
    assert split(machine(16, allowed=4), 2) == [(2, None)] * 2
    assert split(machine(8, 8), 2) == [(8, [0]), (8, [2])]
    assert split(machine(8, 8), 4) == [(4, [0]), (4, [0]), (4, [2]), (4, [2])]
    assert split(machine(8, 8, 4, 4), 2) == [(16, [0, 2]), (8, [3, 4])]
    assert split(machine(8, 8, allowed=8), 2) == [(4, [0]), (4, [2])]
    gpus = {0: 2, 1: 2, 2: 0}
    monkeypatch.setattr(distributed, "_gpu_node", gpus.get)
    assert split(machine(8, 8), 3) == [(4, [2]), (4, [2]), (8, [0])]
    assert split(machine(8, 8), 4)[0] == (4, [0])  # of a process without a GPU nothing is known


def test_the_address_of_a_gpu() -> None:
    properties = SimpleNamespace(pci_domain_id=1, pci_bus_id=0x17, pci_device_id=0)
    assert distributed.pci_address(properties) == "0001:17:00.0"
    assert distributed.pci_address(object()) == ""  # of an older torch


def test_a_launcher_that_binds_its_processes_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = {0: {0, 1}, os.getppid(): {0, 1, 2, 3}}
    monkeypatch.setattr(os, "sched_getaffinity", masks.__getitem__)
    assert divided(monkeypatch, machine(2), 2) == [(2, None)] * 2
    masks[os.getppid()] = {0, 1}
    assert divided(monkeypatch, machine(2), 2) == [(1, None)] * 2


def test_a_runtime_takes_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KT_MOE_THREADS", "KT_NUM_THREADS", "KT_MOE_NODES"):
        monkeypatch.delenv(name, raising=False)
    whole = kt_moe.Runtime().threads
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert kt_moe.Runtime().threads == max(1, whole // 2)
    assert kt_moe.Runtime(threads=whole).threads == whole
    monkeypatch.setenv("KT_MOE_THREADS", str(whole))
    assert kt_moe.Runtime().threads == whole
