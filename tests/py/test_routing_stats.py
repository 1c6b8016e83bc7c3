"""How often experts are chosen: counts of models, the history of a run, its file and its picture."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import PEFT_WARNINGS, load, save_tiny_checkpoint, tiny_model, tokens, with_lora
from torch import Tensor, nn

import kt_moe
from kt_moe import RoutingHistory, plot_routing, routing_counts
from kt_moe.routing_stats import Balance, routing_figure

pytestmark = PEFT_WARNINGS

E, H, I, K = 8, 32, 16, 2  # noqa: E741


def layer(seed: int = 0) -> kt_moe.MoELayer:
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(s, generator=random) for s in ((E, I, H), (E, I, H), (E, H, I))]
    return kt_moe.MoELayer(kt_moe.Experts(*weights), rank=4)


def route(module: nn.Module, count: int = 12, seed: int = 0, first: int = 0) -> Tensor:
    """Send tokens through a layer; the routes of each expert. Experts before `first` get none."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E - first, generator=random)[:K] + first for _ in range(count)])
    ids[0, 0] = E  # no route
    module(torch.randn(count, H, generator=random), ids, torch.full((count, K), 0.5))
    return torch.bincount(ids.flatten(), minlength=E + 1)[:E]


def test_counts_are_those_of_the_ids() -> None:
    model = nn.ModuleDict({"a": layer(), "b": layer(1)})
    assert {name: counts.tolist() for name, counts in routing_counts(model).items()} == {
        "a": [0] * E,
        "b": [0] * E,
    }
    expected = route(model["a"]) + route(model["a"], seed=1)
    counts = routing_counts(model)
    assert counts["a"].dtype == torch.int64
    assert torch.equal(counts["a"], expected)
    assert int(counts["b"].sum()) == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"))


def chosen(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Routes of each expert of a tiny Qwen3-MoE by its own routers, by the names of the experts' modules."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            found[name] = torch.bincount(args[1].flatten(), minlength=E)

        return hook

    modules = {n: m for n, m in model.named_modules() if n.endswith(".experts")}
    hooks = [m.register_forward_pre_hook(keep(n)) for n, m in modules.items()]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return {name.removeprefix("base_model.model."): counts for name, counts in found.items()}


@pytest.mark.parametrize("lora", [False, True])
def test_counts_of_a_transformers_model(checkpoint: Path, lora: bool) -> None:
    model = with_lora(checkpoint) if lora else load(checkpoint)
    expected = chosen(model, tokens())
    counts = routing_counts(model)
    assert list(counts) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert counts.keys() == expected.keys()
    for name in counts:
        assert torch.equal(counts[name], expected[name])
        assert int(counts[name].sum()) == tokens().numel() * 2


def test_counts_of_a_model_loaded_without_our_config() -> None:
    model = tiny_model()
    assert routing_counts(model) == {}
    model.set_experts_implementation("kt_moe")
    model.requires_grad_(False)
    assert [int(c.sum()) for c in routing_counts(model).values()] == [0, 0]  # not packed yet
    assert kt_moe.model_experts(model) == {}
    model(input_ids=tokens())
    assert [int(c.sum()) for c in routing_counts(model).values()] == [tokens().numel() * 2] * 2
    assert kt_moe.model_experts(model).keys() == routing_counts(model).keys()


def test_counting_loads_no_experts(checkpoint: Path) -> None:
    model = load(checkpoint, quantization_config=kt_moe.KtMoeConfig(lazy=True))
    assert [c.tolist() for c in routing_counts(model).values()] == [[0] * E] * 2
    assert kt_moe.model_experts(model) == {}
    assert "None" in repr(model.model.layers[0].mlp.experts)
    model.model.layers[1].mlp.experts.load()
    assert list(kt_moe.model_experts(model)) == ["model.layers.1.mlp.experts"]


def test_experts_of_a_model_by_name(checkpoint: Path) -> None:
    own = nn.ModuleDict({"a": layer(), "b": nn.Linear(2, 2)})
    assert kt_moe.model_experts(own) == {"a": own["a"].experts}
    config = kt_moe.KtMoeConfig(threads=2, shards=2, placement="expert")
    model = with_lora(checkpoint, base=load(checkpoint, quantization_config=config))
    found = kt_moe.model_experts(model)
    assert list(found) == list(routing_counts(model)) == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    for experts in found.values():
        experts.rebalance(range(E))
    modules = [m for m in model.modules() if isinstance(m, kt_moe.hf.KtExperts)]
    assert [m.experts.homes for m in modules] == [e.homes for e in found.values()] != [None, None]


def test_copies_of_a_layer_share_its_experts() -> None:
    model = nn.ModuleDict({"a": layer()})
    model["b"] = copy.deepcopy(model["a"])
    model["c"] = kt_moe.MoELayer(model["a"].experts, rank=2)
    expected = route(model["a"]) + route(model["b"], seed=1) + route(model["c"], seed=2)
    found = kt_moe.model_experts(model)
    assert list(found) == ["a", "b", "c"]
    for name, experts in found.items():
        assert torch.equal(experts.routed, expected)
        assert torch.equal(routing_counts(model)[name], expected)


def skewed(names: list[str], experts: int = E) -> RoutingHistory:
    history = RoutingHistory()
    history.steps = [1]
    history._rows = {name: [torch.arange(experts)] for name in names}
    return history


def test_homes_by_an_earlier_run(checkpoint: Path, tmp_path: Path) -> None:
    config = kt_moe.KtMoeConfig(threads=2, shards=2, placement="expert")
    model = load(checkpoint, quantization_config=config)
    names = list(routing_counts(model))
    file = tmp_path / "routing.safetensors"
    skewed(names).save(file)
    total = RoutingHistory.load(file).total()
    for name, experts in kt_moe.model_experts(model).items():
        experts.rebalance(total[name])  # as docs/numa.md says
        homes = experts.homes
        assert homes is not None
        assert {homes[E - 1], homes[E - 2]} == {0, 1}  # neighbours without popularity


def test_history_counts_what_lies_between_begin_and_end() -> None:
    model, history = nn.ModuleDict({"a": layer()}), RoutingHistory(every=2)
    route(model["a"])  # before: does not count
    expected = []
    for step in range(1, 6):
        history.begin(model)
        expected.append(route(model["a"], seed=step) + route(model["a"], seed=step + 10))
        history.end(model, step)
        route(model["a"], seed=99)  # an evaluation
    assert history.steps == [2, 4, 5]
    rows = [expected[0] + expected[1], expected[2] + expected[3], expected[4]]
    assert torch.equal(history.counts["a"], torch.stack(rows))
    assert torch.equal(history.total()["a"], sum(expected))


def test_history_survives_counts_that_begin_anew() -> None:
    model, history = nn.ModuleDict({"a": layer()}), RoutingHistory()
    route(model["a"], 40)
    history.begin(model)
    model["a"].experts.reset_routed()
    expected = route(model["a"], 4)
    history.end(model, 1)
    assert torch.equal(history.total()["a"], expected)


def test_a_loaded_history_goes_on(tmp_path: Path) -> None:
    model, file = nn.ModuleDict({"a": layer(), "b": layer(1)}), tmp_path / "routing.safetensors"
    histories = [RoutingHistory(every=3), RoutingHistory(every=3)]
    for step in range(1, 9):
        for history in histories:
            history.begin(model)
        route(model["a"], seed=step)
        route(model["b"], seed=step, first=3)
        for history in histories:
            history.end(model, step)
        if step == 4:
            histories[1].save(file)
            histories[1] = RoutingHistory.load(file)
    assert histories[1].steps == [3, 6, 8]
    assert histories[0].steps == histories[1].steps
    for name, counts in histories[0].counts.items():
        assert torch.equal(counts, histories[1].counts[name])
    stored = load_file(file)
    assert stored["steps"].tolist() == [3, 4]
    assert stored["b"].shape == (2, E)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_history_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "routing.safetensors"
    RoutingHistory().save(file)
    before = file.read_bytes()

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        RoutingHistory(7).save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every is 0, wanted at least 1"):
        RoutingHistory(0)
    history, model = RoutingHistory(), nn.ModuleDict({"a": layer()})
    with pytest.raises(RuntimeError, match="end without begin"):
        history.end(model, 1)
    history.begin(model)
    history.end(model, 1)
    other = nn.ModuleDict({"b": layer()})
    history.begin(other)
    with pytest.raises(ValueError, match=r"experts at \['b'\], the history at \['a'\]"):
        history.end(other, 2)
    with pytest.raises(ValueError, match="counts has no layers"):
        plot_routing({}, tmp_path / "x.png")
    with pytest.raises(FileNotFoundError):
        RoutingHistory.load(tmp_path / "none")
    steps, counts = torch.tensor([1, 2]), torch.ones(2, E, dtype=torch.int64)
    for name, tensors in {
        "foreign": {"weight": torch.zeros(2, 2)},
        "uneven": {"steps": steps, "a": torch.ones(3, E, dtype=torch.int64)},
        "flat": {"steps": steps, "a": counts[:, 0].contiguous()},
        "float": {"steps": steps, "a": counts.double()},
        "negative": {"steps": steps, "a": -counts},
        "no total": {"steps": steps, "a": counts << 62},
        "one step": {"steps": steps[0], "a": counts},
        "empty": {"steps": steps[:0], "a": counts[:0]},
    }.items():
        save_file(tensors, tmp_path / name, metadata=None if name == "foreign" else {"every": "1"})
        with pytest.raises(ValueError, match=f"{name}: no routing history"):
            RoutingHistory.load(tmp_path / name)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="text: no routing history"):
        RoutingHistory.load(tmp_path / "text")


def test_balance() -> None:
    assert Balance.of(torch.tensor([5, 5, 5, 5])) == Balance(1.0, 1.0, 0)
    one = Balance.of(torch.tensor([8, 0, 0, 0]))
    assert (one.imbalance, one.entropy, one.idle) == (4.0, 0.0, 3)
    half = Balance.of(torch.tensor([4, 4, 0, 0]))
    assert half == Balance(2.0, pytest.approx(0.5), 2)  # type: ignore[arg-type]
    none = Balance.of(torch.zeros(4, dtype=torch.int64))
    assert math.isnan(none.imbalance)
    assert none.idle == 4


def test_heat_map(tmp_path: Path) -> None:
    counts = {
        f"model.layers.{n}.mlp.experts": torch.tensor([n, 2, 2, 4 - n], dtype=torch.int64) for n in range(3)
    }
    counts["router"] = torch.zeros(3, dtype=torch.int64)  # fewer experts, and no routes
    figure = routing_figure(counts, "title")
    axes, bar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("expert", "layer", "title")
    assert bar.get_ylabel() == "routes over an equal share"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1", "2", "router"]
    shown = axes.images[0].get_array()
    assert shown.shape == (4, 4)
    assert shown[0].tolist() == [0.0, 1.0, 1.0, 2.0]
    assert shown.mask[3].all()

    file = tmp_path / "routing.png"
    before = copy.deepcopy(counts)
    plot_routing(counts, file)
    with Image.open(file) as image:
        image.verify()
        assert image.format == "PNG"
    assert all(torch.equal(before[name], counts[name]) for name in counts)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
