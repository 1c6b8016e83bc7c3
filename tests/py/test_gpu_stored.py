"""Experts copied out of the core's memory into slots: every byte in its place, page-locked for the copy."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import stored_formats as stored
import torch
from safetensors.torch import save_file
from torch import Tensor

import kt_moe
from kt_moe.experts import FORMATS, PLACEMENTS, Experts
from kt_moe.gpu import page_lock, torch_products
from kt_moe.gpu.stored import StoredExperts

E, H, I = 3, 256, 192  # noqa: E741
LAYER = 5
ROOT = f"model.layers.{LAYER}.mlp.experts"
RUNTIMES = {shards: kt_moe.Runtime(threads=2, shards=shards) for shards in (1, 3)}
OTHER = 0xA5  # what slots are full of before

Tensors = dict[str, Tensor]
ways = pytest.mark.parametrize("placement", PLACEMENTS)
shards = pytest.mark.parametrize("shards", RUNTIMES)


def weights(E: int = E, H: int = H, inner: int = I) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(E * H * inner)
    shapes = ((E, inner, H), (E, inner, H), (E, H, inner))
    gate, up, down = (torch.randn(s, generator=random).mul(0.05).bfloat16() for s in shapes)
    return gate, up, down


def decoded(experts: StoredExperts, slots: Tensor, whole: tuple[Tensor, ...]) -> list[Tensor]:
    """gate, up and down as the parts say they lie in slots [E, slot_bytes]; `whole` has their shapes."""
    index = torch.arange(E, dtype=torch.int32)
    results = [torch.full_like(matrix, float("nan")) for matrix in whole]
    for part in experts.parts:
        into = results[part.projection]
        last = part.first + (part.cols if part.projection == 2 else part.rows)
        view = into[:, :, part.first : last] if part.projection == 2 else into[:, part.first : last]
        assert view.shape[1:] == (part.rows, part.cols)
        torch_products.dequantize(slots, index, part, view)
    return results


def check(experts: Experts) -> StoredExperts:
    """The slots, filled run by run and by copy_expert, hold what the kernels multiply by."""
    mine = StoredExperts(experts)
    assert mine.slot_bytes % 64 == 0
    for offset in (o for part in mine.parts for o in (part.codes, part.scales, part.zeros)):
        assert offset == -1 or offset % 64 == 0
    by_runs, by_copies = torch.full((2, experts.num_experts, mine.slot_bytes), OTHER, dtype=torch.uint8)
    for e in range(experts.num_experts):
        runs = mine.runs(e)
        assert sum(len(host) for host, _ in runs) == pytest.approx(
            mine.expert_bytes, abs=64 * len(mine.parts)
        )
        end = 0
        for host, offset in runs:
            assert offset >= end
            end = offset + len(host)
            by_runs[e, offset:end] = host
        mine.copy_expert(e, by_copies[e])
    assert torch.equal(by_runs, by_copies)
    whole = experts.dequantize()
    for got, want in zip(decoded(mine, by_runs, whole), whole, strict=True):
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    return mine


@pytest.mark.parametrize("format", FORMATS)
@ways
@shards
def test_from_tensors(format: str, placement: str, shards: int) -> None:
    experts = Experts(*weights(), format=format, runtime=RUNTIMES[shards], placement=placement)
    mine = check(experts)
    split = shards > 1 and placement == "tensor"
    for e in range(E):
        assert len(mine.runs(e)) == (len(mine.parts) if split else 1)
    assert [part.projection for part in mine.parts] == sorted(part.projection for part in mine.parts)
    assert len(mine.parts) > 3 if split else len(mine.parts) == 3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 33, 31), (3, 1, 1), (3, 129, 257), (3, 64, 48)])
@shards
def test_awkward_shapes(format: str, shape: tuple[int, int, int], shards: int) -> None:
    check(Experts(*weights(*shape), format=format, runtime=RUNTIMES[shards]))


def per_expert(make: Callable[[int, int, int], stored.Matrix]) -> Tensors:
    tensors = {}
    for p, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        for e in range(E):
            matrix, _ = make(*((H, I) if name == "down_proj" else (I, H)), 100 * p + e)
            tensors |= {f"{ROOT}.{e}.{name}.{tail}": tensor for tail, tensor in matrix.items()}
    return tensors


def plain() -> Tensors:
    names = ("gate_proj", "up_proj", "down_proj")
    return {
        f"{ROOT}.{e}.{name}.weight": stack[e].contiguous()
        for name, stack in zip(names, weights(), strict=True)
        for e in range(E)
    }


def fused() -> Tensors:
    gate, up, down = weights()
    return {f"{ROOT}.gate_up_proj": torch.cat((gate, up), 1), f"{ROOT}.down_proj": down}


def mxfp4() -> Tensors:
    tensors = {
        f"{ROOT}.gate_up_proj_bias": torch.randn(E, 2 * I).bfloat16(),
        f"{ROOT}.down_proj_bias": torch.randn(E, H).bfloat16(),
    }
    for seed, (name, out, into) in enumerate((("gate_up_proj", 2 * I, H), ("down_proj", H, I))):
        blocks, scales, _ = stored.mxfp4(E, out, into, seed)
        tensors |= {f"{ROOT}.{name}_blocks": blocks, f"{ROOT}.{name}_scales": scales}
    return tensors


def kt_int8() -> Tensors:
    tensors = {}
    for p, name in enumerate(("gate", "up", "down")):
        shape = (H, I) if name == "down" else (I, H)
        for e in range(E):
            parts, _ = stored.kt_matrix(*shape, 100 * p + e, bits=8, parts=3, down=name == "down")
            for part, (made, _) in enumerate(parts):
                key = f"blk.{LAYER}.ffn_{name}_exps.{e}.numa.{part}"
                tensors |= {f"{key}.{tail}": tensor for tail, tensor in made.items()}
    return tensors


CHECKPOINTS: dict[str, Callable[[], Tensors]] = {
    "bf16": plain,
    "bf16 fused": fused,
    "int8 rows": lambda: per_expert(stored.int8_rows),
    "kt int8": kt_int8,
    "int4": lambda: per_expert(lambda o, i, s: stored.compressed_tensors(o, i, s, group=32)),
    "int4, zero points": lambda: per_expert(
        lambda o, i, s: stored.compressed_tensors(o, i, s, group=64, asymmetric=True)
    ),
    "gptq": lambda: per_expert(lambda o, i, s: stored.gptq(o, i, s, group=32, asymmetric=True)),
    "awq": lambda: per_expert(lambda o, i, s: stored.awq(o, i, s, group=64)),
    "fp8": lambda: per_expert(stored.fp8),
    "fp8, bf16 scales": lambda: per_expert(lambda o, i, s: stored.fp8(o, i, s, scale_dtype=torch.bfloat16)),
    "fp8 rows": lambda: per_expert(
        lambda o, i, s: stored.fp8(o, i, s, block=(1, i), scale_shape=(o, 1), tail="weight_scale")
    ),
    "fp8 matrices": lambda: per_expert(
        lambda o, i, s: stored.fp8(o, i, s, block=(o, i), scale_shape=(1,), tail="weight_scale")
    ),
    "mxfp4": mxfp4,
    "nvfp4": lambda: per_expert(stored.nvfp4),
    "nvfp4 of ModelOpt": lambda: per_expert(lambda o, i, s: stored.nvfp4(o, i, s, modelopt=True)),
}


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in CHECKPOINTS[request.param]().items()}, path)
    return path


@pytest.mark.parametrize(("placement", "shards"), [("tensor", 1), ("tensor", 3), ("expert", 3)])
def test_from_checkpoint(checkpoint: Path, tmp_path: Path, placement: str, shards: int) -> None:
    """In memory of its own, packed into files, and where the files' layout allows it paged from them."""
    options = {"runtime": RUNTIMES[shards], "placement": placement}
    check(Experts.from_checkpoint(checkpoint, LAYER, **options))
    packed = check(Experts.from_checkpoint(checkpoint, LAYER, cache_dir=tmp_path / "cache", **options))
    assert all(len(packed.runs(e)) == 1 for e in range(E))
    if kt_moe.Checkpoint(checkpoint).layer(LAYER).mappable:
        check(Experts.from_checkpoint(checkpoint, LAYER, paged=True, **options))


def save(tensors: Tensors, folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file(tensors, path)
    return path


def test_biases(tmp_path: Path) -> None:
    tensors = mxfp4()
    both, down = tensors[f"{ROOT}.gate_up_proj_bias"], tensors[f"{ROOT}.down_proj_bias"]
    mine = StoredExperts(Experts.from_checkpoint(save(tensors, tmp_path), LAYER))
    for got, want in zip(mine.biases(), (both[:, 0::2], both[:, 1::2], down), strict=True):
        assert got is not None
        assert torch.equal(got, want)
    bias = torch.randn(E, I)
    gate, up, down_bias = StoredExperts(Experts(*weights(), up_bias=bias)).biases()
    assert gate is None
    assert down_bias is None
    assert up is not None
    assert torch.equal(up, bias.bfloat16())


def test_biases_go_into_tensors_of_their_shape() -> None:
    core = Experts(*weights(), down_bias=torch.zeros(E, H))._core
    with pytest.raises(ValueError, match=r"into has shape \[3, 192\], wanted \[E, rows\] = \[3, 256\]"):
        core.bias("down", torch.empty(E, I, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match='projection is "side"'):
        core.bias("side", None)


def test_the_core_s_memory_lives_as_long_as_a_run() -> None:
    (run, _), *_ = StoredExperts(Experts(*weights())).runs(1)
    gc.collect()
    gate, up, down = weights()
    expected = torch.cat([matrix[1].reshape(-1).view(torch.uint8) for matrix in (gate, up, down)])
    assert torch.equal(run, expected)


def test_a_slot_that_is_too_short_is_refused() -> None:
    mine = StoredExperts(Experts(*weights()))
    with pytest.raises(ValueError, match="wanted uint8 of at least"):
        mine.copy_expert(0, torch.empty(mine.slot_bytes - 1, dtype=torch.uint8))


class Cuda:
    """The CUDA runtime's page locks, as strict as the real ones."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.calls: list[tuple[int, int, int]] = []
        self.refuse_from = -1
        self.error = 2

    def cudaHostRegister(self, begin: int, size: int, flags: int) -> int:  # noqa: N802
        assert begin % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
        if len(self.calls) == self.refuse_from:
            return self.error
        if any(begin < end and start < begin + size for start, end in self.locked.items()):
            return 712
        ctypes.string_at(begin, size)  # it is there
        self.locked[begin] = begin + size
        self.calls.append((begin, size, flags))
        return 0

    def cudaHostUnregister(self, begin: int) -> int:  # noqa: N802
        end = self.locked.pop(begin)
        ctypes.string_at(begin, end - begin)  # it is still there
        return 0

    def cudaGetErrorString(self, error: int) -> str:  # noqa: N802
        return {1: "invalid argument", 2: "out of memory"}[error]

    def may_copy(self, host: Tensor) -> bool:
        """Whether one region has all of it."""
        first = host.data_ptr()
        return any(begin <= first and first + len(host) <= end for begin, end in self.locked.items())


def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Page locks are this object's."""
    fake = Cuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(page_lock, "_cudart", lambda: fake)
    monkeypatch.setattr(page_lock, "_forget_last_error", lambda: None)
    return fake


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return fake_cuda(monkeypatch)


def may_copy(cuda: Cuda, experts: StoredExperts) -> bool:
    return all(cuda.may_copy(host) for e in range(experts.num_experts) for host, _ in experts.runs(e))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_pinned() -> None:
    mine = StoredExperts(Experts(*weights()))
    assert mine.pin() == "there is no CUDA device"
    assert not mine.pinned
    mine.unpin()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("paged", [False, True])
@shards
def test_copied_to_a_device(tmp_path: Path, paged: bool, shards: int) -> None:
    """Memory of the layer's own can be pinned; a mapped file where system and device allow it."""
    checkpoint = kt_moe.Checkpoint(two_layers(tmp_path))
    for layer in (LAYER, LAYER + 1):
        experts = Experts.from_checkpoint(checkpoint, layer, paged=paged, runtime=RUNTIMES[shards])
        mine = StoredExperts(experts)
        answer = mine.pin(torch.cuda.synchronize)
        assert mine.pinned == (answer == "pinned")
        assert mine.pinned or (paged and "cudaHostRegister" in answer)
        slots = torch.full((E, mine.slot_bytes), OTHER, dtype=torch.uint8, device="cuda")
        for e in range(E):
            for host, offset in mine.runs(e):
                assert host.is_pinned() == mine.pinned
                slots[e, offset : offset + len(host)].copy_(host, non_blocking=mine.pinned)
        whole = experts.dequantize()
        for got, want in zip(decoded(mine, slots.cpu(), whole), whole, strict=True):
            assert torch.equal(got, want)
        mine.unpin()
        assert not any(host.is_pinned() for host, _ in mine.runs(0))


@ways
@shards
def test_pinned_where_it_lies(cuda: Cuda, placement: str, shards: int) -> None:
    mine = StoredExperts(Experts(*weights(), runtime=RUNTIMES[shards], placement=placement))
    synchronised: list[int] = []
    assert mine.pin(lambda: synchronised.append(len(cuda.locked))) == "pinned"
    assert mine.pin() == "pinned"  # once
    assert mine.pinned
    assert all(flags == 0 for _, _, flags in cuda.calls)
    assert len(cuda.calls) <= shards
    assert may_copy(cuda, mine)
    mine.unpin()
    mine.unpin()
    assert not mine.pinned
    assert not cuda.locked
    assert synchronised == [len(cuda.calls)]


def test_unpinned_before_the_memory_goes(cuda: Cuda) -> None:
    synchronised: list[int] = []
    mine = StoredExperts(Experts(*weights()))
    mine.pin(lambda: synchronised.append(len(cuda.locked)))
    del mine
    gc.collect()
    assert synchronised == [1]
    assert not cuda.locked


def two_layers(folder: Path) -> Path:
    """Of which the last page of one is the first of the other."""
    one = plain()
    return save(one | {name.replace(".5.", ".6."): t.clone() for name, t in one.items()}, folder)


def test_layers_of_one_file_share_pages(cuda: Cuda, tmp_path: Path) -> None:
    checkpoint = kt_moe.Checkpoint(two_layers(tmp_path))
    both = [
        StoredExperts(Experts.from_checkpoint(checkpoint, layer, paged=True)) for layer in (LAYER, LAYER + 1)
    ]
    again = StoredExperts(Experts.from_checkpoint(checkpoint, LAYER, paged=True))
    for mine in (*both, again):
        assert mine.pin() == "pinned"
    assert all(flags == 8 for _, _, flags in cuda.calls)
    assert len(cuda.calls) == 2
    for mine in (*both, again):
        assert may_copy(cuda, mine)
        copied = torch.zeros(mine.slot_bytes, dtype=torch.uint8)
        mine.copy_expert(E - 1, copied)
        whole = torch.cat([matrix[E - 1].reshape(-1).view(torch.uint8) for matrix in weights()])
        assert torch.equal(copied, whole)
    both[0].unpin()
    assert len(cuda.locked) == 2
    assert may_copy(cuda, both[1])
    assert may_copy(cuda, again)
    again.unpin()
    both[1].unpin()
    assert not cuda.locked


def test_regions_fill_the_holes_between_those_there_are(cuda: Cuda) -> None:
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 10 * page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    at = [begin + i * page for i in range(11)]
    first = page_lock.lock([(at[2] + 5, 10), (at[5], page)], memory)
    second = page_lock.lock([(at[1], 7 * page)], memory)
    assert [(b, s // page) for b, s, _ in cuda.calls] == [
        (at[2], 1), (at[5], 1), (at[1], 1), (at[3], 2), (at[6], 2),
    ]  # fmt: skip
    assert second.begins == [at[1], at[2], at[3], at[5], at[6]]
    first.release()
    assert len(cuda.locked) == 5
    second.release()
    assert not cuda.locked


def test_all_or_nothing(cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_lock.resource, "getrlimit", lambda _: (65536, 65536))
    mine = StoredExperts(Experts.from_checkpoint(save(plain(), tmp_path), LAYER, paged=True))
    page = mmap.PAGESIZE
    lowest = min(host.data_ptr() for e in range(E) for host, _ in mine.runs(e)) // page * page
    hole = page_lock.lock([(lowest + page, 1)], None)  # which leaves two regions to be locked
    cuda.refuse_from = 2
    assert re.fullmatch(
        r'cudaHostRegister of \d+ bytes of a mapped file: "out of memory" \(error 2\); '
        r"RLIMIT_MEMLOCK is 65536 bytes \(ulimit -l\)",
        mine.pin(),
    )
    assert not mine.pinned
    assert list(cuda.locked) == [lowest + page]
    cuda.error = 1  # which is no matter of limits
    assert mine.pin().endswith('"invalid argument" (error 1)')
    hole.release()
    assert not cuda.locked


def test_a_file_as_large_as_memory_is_not_pinned(
    cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = StoredExperts(Experts.from_checkpoint(save(plain(), tmp_path), LAYER, paged=True))
    monkeypatch.setattr("kt_moe.gpu.stored.free_memory", lambda: 1 << 20)
    assert "more than half of the 1048576 bytes that are free" in mine.pin()
    assert not cuda.calls


def test_a_finaliser_never_waits_for_the_table(cuda: Cuda) -> None:
    """It may run in the thread that holds the table."""
    mine = StoredExperts(Experts(*weights()))
    mine.pin()
    with page_lock._table:
        del mine
        gc.collect()
        assert len(cuda.locked) == 1
    other = StoredExperts(Experts(*weights()))
    other.pin()
    assert len(cuda.locked) == 1
    other.unpin()


def test_many_threads_pin_and_unpin(cuda: Cuda) -> None:
    def work() -> None:
        for _ in range(20):
            mine = StoredExperts(experts)
            assert mine.pin() == "pinned"
            assert may_copy(cuda, mine)

    experts = Experts(*weights())
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    page_lock._unregister_released()
    assert not cuda.locked


def test_forked_children_unlock_nothing(cuda: Cuda) -> None:
    mine = StoredExperts(Experts(*weights()))
    mine.pin(lambda: os._exit(2))
    child = os.fork()
    if child == 0:
        mine.unpin()
        os._exit(0 if cuda.locked else 1)
    assert os.waitpid(child, 0)[1] == 0
    mine._unlock.detach()
    mine._lock._before_release = None
    mine._lock.release()
    assert not cuda.locked


def test_the_interpreter_s_exit_unlocks_nothing() -> None:
    script = """
import torch, kt_moe
from kt_moe.gpu import page_lock
from kt_moe.gpu.stored import StoredExperts
class Cuda:
    def cudaHostRegister(self, *_): return 0
    def cudaHostUnregister(self, _): print("unlocked")
torch.cuda.is_available = lambda: True
page_lock._cudart = Cuda
mine = StoredExperts(kt_moe.Experts(*torch.ones(3, 2, 8, 8)))
print(mine.pin())
cycle = [mine]; cycle.append(cycle)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("pinned\n", "")
