"""Weights cut into shards, or spread over them expert by expert: the same numbers, and where they lie."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from strategies import make_problem
from tiny_models import error, load, save_tiny_checkpoint, tokens
from torch import Tensor

import kt_moe
from kt_moe import experts as experts_module
from kt_moe.experts import FORMATS, PLACEMENTS

SHARDS = (1, 2, 3, 5, 8, 16)
EVEN = kt_moe.Runtime(threads=2, shards=2, nodes=[0])  # of several nodes, shards could differ in weight
RUNTIMES = {shards: kt_moe.Runtime(threads=2, shards=shards) for shards in SHARDS}
WHOLE = [p for p in PLACEMENTS if p != "tensor"]

Weights = tuple[Tensor, Tensor, Tensor]


def weights(E: int = 3, H: int = 160, inner: int = 300) -> Weights:
    random = torch.Generator().manual_seed(E * H * inner)
    shapes = ((E, inner, H), (E, inner, H), (E, H, inner))
    gate, up, down = (torch.randn(s, generator=random).mul(0.05).bfloat16() for s in shapes)
    return gate, up, down


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def save(made: Weights, folder: Path) -> Path:
    tensors = {
        f"model.layers.0.mlp.experts.{e}.{name}.weight": stack[e].contiguous()
        for name, stack in zip(("gate_proj", "up_proj", "down_proj"), made, strict=True)
        for e in range(made[0].shape[0])
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(weights(), tmp_path / "model")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("E", "H", "inner"), [(1, 1, 1), (3, 160, 300), (2, 33, 31), (2, 64, 48), (1, 129, 257)]
)
def test_the_same_bits_in_any_number_of_shards(format: str, E: int, H: int, inner: int) -> None:
    made = weights(E, H, inner)
    one = kt_moe.Experts(*made, format=format, runtime=RUNTIMES[1])
    for shards, runtime in RUNTIMES.items():
        for placement in PLACEMENTS:
            experts = kt_moe.Experts(*made, format=format, runtime=runtime, placement=placement)
            assert same(experts.dequantize(), one.dequantize())
            assert experts.quantization_error == one.quantization_error
            assert (experts.shards, experts.nbytes) == (shards, one.nbytes)


@pytest.mark.parametrize("format", ["as-stored", *FORMATS])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_loaded_into_shards(checkpoint: Path, format: str, placement: str) -> None:
    one = kt_moe.Experts.from_checkpoint(checkpoint, 0, format=format, runtime=RUNTIMES[1])
    for runtime in RUNTIMES.values():
        seen: list[int] = []
        experts = kt_moe.Experts.from_checkpoint(
            checkpoint, 0, format=format, runtime=runtime, placement=placement, progress=seen.append
        )
        assert same(experts.dequantize(), one.dequantize())
        assert experts.quantization_error == one.quantization_error
        assert sum(seen) == kt_moe.Checkpoint(checkpoint).layer(0).nbytes


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_files_do_not_depend_on_shards(checkpoint: Path, tmp_path: Path, placement: str) -> None:
    cache = tmp_path / "cache"
    kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=cache, runtime=RUNTIMES[3])
    (path,) = (file for file in cache.rglob("*") if file.is_file())
    before = path.stat()
    for runtime in RUNTIMES.values():
        for options in ({"cache_dir": cache}, {"paged": True}):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                experts = kt_moe.Experts.from_checkpoint(
                    checkpoint, 0, runtime=runtime, placement=placement, **options
                )
            assert experts.mapped
            assert experts.verify()
            assert same(experts.dequantize(), weights())
            pages = experts.page_nodes()
            assert len(pages) == runtime.shards
            if placement != "tensor":
                experts.rebalance([1, 2, 3])
                assert same(experts.dequantize(), weights())
    assert path.stat() == before


def test_a_broken_off_load_leaves_the_runtime_usable(checkpoint: Path) -> None:
    class StopError(Exception):
        pass

    def stop(_: int) -> None:
        raise StopError

    for placement in PLACEMENTS:
        with pytest.raises(StopError):
            kt_moe.Experts.from_checkpoint(
                checkpoint, 0, runtime=RUNTIMES[5], placement=placement, progress=stop
            )
    again = kt_moe.Experts.from_checkpoint(checkpoint, 0, runtime=RUNTIMES[5])
    assert same(again.dequantize(), weights())


def test_infinite_weights_are_named_in_shards_too() -> None:
    gate, up, down = weights()
    down[1, 2, 299] = float("inf")
    with pytest.raises(ValueError, match=r"down: expert 1: .*row 2.*column 299"):
        kt_moe.Experts(gate, up, down, format="int4", runtime=RUNTIMES[3])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_all_pages_are_accounted_for(placement: str) -> None:
    made = weights(E=4, H=512, inner=512)
    for shards in (1, 2, 16):
        experts = kt_moe.Experts(*made, runtime=RUNTIMES[shards], placement=placement)
        pages = experts.page_nodes()
        assert len(pages) == shards
        if kt_moe.cpu_info()["numa_nodes"] == 1:
            assert all(shard["elsewhere"] == 0 for shard in pages)
        assert sum(sum(shard.values()) for shard in pages) >= min(1000, experts.nbytes // 4096)
        if placement == "expert" and shards == 16:
            assert sum(1 for shard in pages if sum(shard.values())) == 4


@pytest.mark.parametrize("placement", WHOLE)
def test_homes(placement: str) -> None:
    made = weights(E=4)

    def homes(**options: Any) -> list[int] | None:
        return kt_moe.Experts(*made, runtime=EVEN, placement=placement, **options).homes

    assert homes() == [0, 0, 1, 1]
    assert homes(popularity=torch.zeros(4)) == [0, 0, 1, 1]
    assert homes(popularity=[5, 5, 1, 1]) == [0, 1, 0, 1]
    numbers = torch.tensor([5.0, 5, 1, 1])
    for four in ((5, 5.0, 1, 1), numbers, numbers.long(), numbers.numpy()):
        assert homes(popularity=four) == [0, 1, 0, 1]
    experts = kt_moe.Experts(*made, runtime=RUNTIMES[16], placement=placement)
    assert experts.placement == placement
    assert sorted(set(experts.homes or [])) == sorted(experts.homes or [])


@pytest.mark.parametrize("other", [torch.ones(4).to_sparse(), torch.ones(4, device="meta")])
def test_popularity_without_numbers_in_memory(other: Tensor) -> None:
    with pytest.raises(ValueError, match="popularity is "):
        kt_moe.Experts(*weights(E=4), runtime=EVEN, placement="expert", popularity=other)


def test_slices_have_no_homes() -> None:
    experts = kt_moe.Experts(*weights(), runtime=RUNTIMES[2])
    assert (experts.placement, experts.homes) == ("tensor", None)
    with pytest.raises(ValueError, match=r'placement is "tensor".*nothing to rebalance'):
        experts.rebalance([1, 2, 3])


@pytest.mark.parametrize("placement", WHOLE)
def test_routes_are_counted_and_homes_follow(placement: str) -> None:
    problem = make_problem(T=40, H=64, inner=96, E=4, K=2, ranks={})
    problem.topk_ids[:8, 0] = 4  # no route
    experts = kt_moe.Experts(*problem.weights, runtime=EVEN, placement=placement)
    assert experts.routed.tolist() == [0, 0, 0, 0]
    experts.rebalance()
    assert experts.homes == [0, 0, 1, 1]

    def call() -> Tensor:
        return kt_moe.moe(problem.hidden_states, problem.topk_ids, problem.topk_weights, experts)

    before = call()
    counts = torch.bincount(problem.topk_ids.flatten(), minlength=5)[:4]
    assert experts.routed.dtype == torch.int64
    assert torch.equal(experts.routed, counts)
    twin = copy.deepcopy(experts)
    call()
    assert torch.equal(experts.routed, 2 * counts)
    assert torch.equal(twin.routed, 2 * counts)  # the weights are shared, and so is the count

    experts.reset_routed()
    assert experts.routed.sum() == 0
    experts.rebalance([0, 9, 9, 0])
    assert experts.homes is not None
    assert experts.homes[1] != experts.homes[2]
    assert same(experts.dequantize(), problem.weights)
    assert torch.allclose(call().double(), before.double(), rtol=0.01, atol=0.01 * float(before.abs().max()))
    experts.rebalance()
    order = counts.argsort(descending=True, stable=True)
    assert experts.homes[order[0]] == 0
    assert experts.homes[order[1]] == 1


@pytest.mark.parametrize(
    ("popularity", "error", "says"),
    [
        ([1, 2], ValueError, "popularity has 2 numbers, wanted 3"),
        ([], ValueError, "popularity has no numbers"),
        ([1, -2, 3], ValueError, "popularity of expert 1 is -2"),
        ([1, 2, float("nan")], ValueError, "popularity of expert 2 is nan"),
        ([1, 2, float("inf")], ValueError, "popularity of expert 2 is inf"),
        (torch.ones(3, 1), ValueError, r"popularity has shape \[3, 1\], wanted \[E\]"),
        (torch.tensor(1.0), ValueError, r"popularity has shape \[\], wanted \[E\]"),
        (3, TypeError, "popularity is 3, wanted a tensor or sequence"),
        ("123", TypeError, "popularity is '123'"),
        ([1, None, 2], TypeError, "popularity is"),
        ([1, "x", 2], TypeError, "popularity is"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "popularity is"),
    ],
)
def test_popularity_that_makes_no_sense(
    checkpoint: Path, popularity: Any, error: type[Exception], says: str
) -> None:
    options = {"runtime": RUNTIMES[2], "placement": "expert"}
    with pytest.raises(error, match=says):
        kt_moe.Experts(*weights(), popularity=popularity, **options)
    with pytest.raises(error, match=says):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, popularity=popularity, **options)
    experts = kt_moe.Experts(*weights(), **options)
    homes = experts.homes
    with pytest.raises(error, match=says):
        experts.rebalance(popularity)
    assert experts.homes == homes


def test_options_that_make_no_sense(checkpoint: Path) -> None:
    wanted = r"placement is 'auto', wanted one of \['tensor', 'expert'\]"
    with pytest.raises(ValueError, match=wanted):
        kt_moe.Experts(*weights(), placement="auto")
    with pytest.raises(ValueError, match=wanted):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, placement="auto")
    with pytest.raises(ValueError, match=f"KtMoeConfig: {wanted}"):
        kt_moe.KtMoeConfig(placement="auto")
    assert kt_moe.KtMoeConfig(placement="expert").to_dict()["placement"] == "expert"
    with pytest.raises(ValueError, match='popularity is given, but placement is "tensor"'):
        kt_moe.Experts(*weights(), popularity=[1, 2, 3])
    with pytest.raises(ValueError, match='popularity is given, but placement is "tensor"'):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, popularity=[1, 2, 3])


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning:transformers")
@pytest.mark.parametrize("placement", WHOLE)
@torch.no_grad()
def test_a_model_with_whole_experts_on_shards(tmp_path: Path, placement: str) -> None:
    save_tiny_checkpoint(tmp_path, num_hidden_layers=1)
    config = kt_moe.KtMoeConfig(threads=2, shards=3, nodes=[0], placement=placement)
    model = load(tmp_path, quantization_config=config)
    experts = model.model.layers[0].mlp.experts.experts
    assert (experts.placement, experts.shards, experts.homes) == (placement, 3, [0, 0, 0, 1, 1, 2, 2, 2])
    logits = model(tokens()).logits
    assert experts.routed.sum() == 2 * tokens().numel()
    assert error(logits, load(tmp_path)(tokens()).logits) < 5e-3


def test_homes_are_not_to_be_changed_during_a_call(checkpoint: Path) -> None:
    experts = kt_moe.Experts(*weights(), runtime=RUNTIMES[2], placement="expert")
    for use in (experts.rebalance, experts.reset_routed, experts.page_nodes):

        def report(_: int, use: Callable[[], object] = use) -> None:
            use()

        with pytest.raises(RuntimeError, match="busy with this thread's own call"):
            kt_moe.Experts.from_checkpoint(checkpoint, 0, runtime=RUNTIMES[2], progress=report)


def test_a_refusal_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module, "_refused_before", False)
    with pytest.warns(UserWarning, match="refused to place expert weights on NUMA nodes"):
        experts_module._warn_refused()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experts_module._warn_refused()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_place_packs_ahead_for_its_own_threads(placement: str) -> None:
    E, H, rows = 80, 1024, 16
    made, ids = weights(E, H, 32), torch.arange(E * rows).remainder(E).unsqueeze(1)

    def scratch(places: int) -> int:
        runtime = kt_moe.Runtime(threads=64, shards=places, nodes=[EVEN.nodes[0]] * places)
        experts = kt_moe.Experts(*made, runtime=runtime, placement=placement)
        kt_moe.moe(torch.randn(E * rows, H).bfloat16(), ids, torch.ones(E * rows, 1), experts)
        return runtime.scratch_bytes

    assert scratch(places=4) < 2.5 * scratch(places=1)  # with rings for all threads in each place 4 times
