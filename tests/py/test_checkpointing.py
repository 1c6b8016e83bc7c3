"""Gradient checkpointing: which run of a region a layer is in, and experts that are computed once."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import kt_moe
from kt_moe import Experts, MoELayer, checkpointing

E, H, INTERMEDIATE, K, T = 8, 32, 24, 2, 20
SHAPES = ((INTERMEDIATE, H), (INTERMEDIATE, H), (H, INTERMEDIATE))
NO_GRAD = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
BOTH = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])

checkpointing.watch()


class Block(nn.Module):
    """Norm, router, experts with LoRA, residual."""

    def __init__(self, experts: Experts, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(H), nn.Linear(H, E)
        self.moe = MoELayer(experts, rank=4, dropout=dropout)
        for parameter in self.moe.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        weights, ids = self.router(normed).softmax(-1).topk(K)
        return x + self.moe(normed, ids, weights).sin()


class Stack(nn.Module):
    """Blocks, each in a checkpointed region unless `how` is None."""

    def __init__(self, layers: int = 3, dropout: float = 0.0, mode: str = "retain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(make_experts(mode), dropout) for _ in range(layers))
        self.how: dict[str, Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.how is None else checkpoint(block, x, **self.how)
        return x


def make_experts(mode: str = "retain", **options: Any) -> Experts:
    experts = Experts(*(torch.randn(E, *s) * 0.2 for s in SHAPES), **options)
    experts.checkpoint_experts = mode
    return experts


def some_rows(seed: int = 1, *, requires_grad: bool = True) -> Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(seed)).requires_grad_(requires_grad)


def gradients_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


def train(
    model: Stack, how: dict[str, Any] | None, seed: int = 1
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The output, the gradients, and torch's random state after a step."""
    model.how = how
    model.zero_grad()
    x = some_rows(seed)
    torch.manual_seed(7)
    out = model(x)
    out.square().mean().backward()
    return out.detach(), gradients_of(model, x), torch.get_rng_state()


def assert_same(ours: Any, expected: Any) -> None:
    assert torch.equal(ours[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.equal(ours[1][name], gradient), name
    assert torch.equal(ours[2], expected[2])


_made: list[weakref.ref[Any]] = []


class Counted(checkpointing._Entry):
    """An entry that `entries` knows of."""

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        _made.append(weakref.ref(self))


def entries() -> int:
    """Results that are kept anywhere in the process."""
    if any(entry() is not None for entry in _made):
        gc.collect()
    return sum(entry() is not None for entry in _made)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one with every call of the core's forward."""
    calls: list[Any] = []
    forward = kt_moe._core.forward
    monkeypatch.setattr(kt_moe._core, "forward", lambda *args: (calls.append(args[0]), forward(*args))[1])
    return calls


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(checkpointing, "_Entry", Counted)
    yield
    assert not checkpointing._stack.runs
    assert entries() == 0


# Phases


def recorder(seen: list[str | None]) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        seen.append(checkpointing.phase())
        return x.sin().exp()

    return function


@BOTH
def test_phases_of_a_region(reentrant: bool) -> None:
    seen: list[str | None] = []
    x = torch.ones(2, requires_grad=True)
    out = checkpoint(recorder(seen), x, use_reentrant=reentrant)
    assert checkpointing.phase() is None
    out.sum().backward()
    assert seen == ["first", "recompute"]
    assert checkpointing.phase() is None


@BOTH
@NO_GRAD
def test_an_ordinary_call_is_in_no_phase(reentrant: bool) -> None:
    seen: list[str | None] = []
    function, x = recorder(seen), torch.ones(2, requires_grad=True)
    function(x).sum().backward()
    with torch.no_grad():
        function(x)
        checkpoint(function, x, use_reentrant=reentrant)
    with torch.inference_mode():
        checkpoint(function, x, use_reentrant=reentrant)
    with save_on_cpu():
        function(x).sum().backward()
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        function(x).sum().backward()
    assert seen == [None] * 6
    if reentrant:  # nothing to differentiate, and nothing will be recomputed
        checkpoint(function, x.detach(), use_reentrant=True)
        assert seen[-1] is None


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
@NO_GRAD
def test_phases_of_nested_regions(outer: bool, inner: bool) -> None:
    around: list[str | None] = []
    within: list[str | None] = []

    def function(x: Tensor) -> Tensor:
        around.append(checkpointing.phase())
        x = checkpoint(recorder(within), x.cos(), use_reentrant=inner)
        around.append(checkpointing.phase())
        return x.sin()

    checkpoint(function, torch.ones(2, requires_grad=True), use_reentrant=outer).sum().backward()
    # torch stops a recomputation that is not reentrant where it has all tensors that backward wants.
    assert around == ["first"] * 2 + ["recompute"] * 2
    assert within == ["first", "first", "recompute"]


@BOTH
def test_phases_where_hooks_of_others_are_active(reentrant: bool) -> None:
    seen: list[str | None] = []
    function, x = recorder(seen), torch.ones(2, requires_grad=True)
    with save_on_cpu():
        checkpoint(function, x, use_reentrant=reentrant).sum().backward()

    def offloaded(x: Tensor) -> Tensor:
        with save_on_cpu():
            return function(x.cos()).sin()

    checkpoint(offloaded, x, use_reentrant=reentrant).sum().backward()
    assert seen[:2] == ["first", "recompute"]
    # Not reentrant, the tensors of the second were saved by the inner hooks: none is to be recomputed.
    assert seen[2:] == (["first", "recompute"] if reentrant else ["first"])


@BOTH
def test_phases_of_other_threads(reentrant: bool) -> None:
    inside, done = threading.Event(), threading.Event()
    seen: list[str | None] = []

    def function(x: Tensor) -> Tensor:
        inside.set()
        assert done.wait(30)
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    thread = threading.Thread(target=lambda: checkpoint(function, x, use_reentrant=reentrant))
    thread.start()
    assert inside.wait(30)
    recorder(seen)(x)
    checkpoint(recorder(seen), x, use_reentrant=reentrant).sum().backward()
    done.set()
    thread.join()
    assert seen == [None, "first", "recompute"]


@BOTH
def test_an_exception_ends_a_phase(reentrant: bool) -> None:
    def function(x: Tensor, fail: list[bool]) -> Tensor:
        if fail[0]:
            raise KeyError
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    with contextlib.suppress(KeyError):
        checkpoint(function, x, [True], use_reentrant=reentrant)
    assert checkpointing.phase() is None
    fail = [False]
    out = checkpoint(function, x, fail, use_reentrant=reentrant)
    fail[0] = True
    with contextlib.suppress(KeyError):
        out.sum().backward()
    assert checkpointing.phase() is None


# Experts computed once


@BOTH
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute", [False, True], ids=["G and U saved", "G and U computed again"])
def test_retained_experts_are_computed_once(
    reentrant: bool, dropout: float, recompute: bool, computed: list[Any]
) -> None:
    model = Stack(dropout=dropout)
    for block in model.blocks:
        block.moe.experts.recompute = recompute
    expected = train(model, None)
    assert len(computed) == 3
    assert_same(train(model, {"use_reentrant": reentrant}), expected)
    assert len(computed) == 6
    for block in model.blocks:
        block.moe.experts.checkpoint_experts = "recompute"
    assert_same(train(model, {"use_reentrant": reentrant}), expected)
    assert len(computed) == 12


@BOTH
def test_what_backward_needs_is_kept_and_not_made_again(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reentrant, grad mode is off in the first run and the first layer's input needs no gradient."""
    given: list[bool] = []
    backward = kt_moe._core.backward
    monkeypatch.setattr(
        kt_moe._core, "backward", lambda *args: (given.append(args[8] is not None), backward(*args))[1]
    )
    train(Stack(), {"use_reentrant": reentrant})
    assert given == [True] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BOTH
def test_other_dtypes(reentrant: bool, dtype: torch.dtype, computed: list[Any]) -> None:
    experts = make_experts()
    ids, weights = torch.arange(T * K).view(T, K) % E, torch.full((T, K), 0.5)

    def run(checkpointed: bool) -> Tensor:
        x = some_rows().detach().to(dtype).requires_grad_()
        function = partial(kt_moe.moe, topk_ids=ids, topk_weights=weights, experts=experts)
        out = checkpoint(function, x, use_reentrant=reentrant) if checkpointed else function(x)
        assert out.dtype is dtype
        out.sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(run(True), run(False))
    assert len(computed) == 2


@BOTH
def test_several_layers_and_one_layer_twice_in_a_region(reentrant: bool, computed: list[Any]) -> None:
    model = Stack(layers=2)

    def function(x: Tensor) -> Tensor:
        for block in (*model.blocks, *model.blocks):
            x = block(x)
        return x

    def run(checkpointed: bool) -> dict[str, Tensor]:
        model.zero_grad()
        x = some_rows()
        out = checkpoint(function, x, use_reentrant=reentrant) if checkpointed else function(x)
        out.square().mean().backward()
        return gradients_of(model, x)

    expected, ours = run(False), run(True)
    assert all(torch.equal(ours[name], gradient) for name, gradient in expected.items())
    assert len(computed) == 8


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
@NO_GRAD
def test_nested_regions(outer: bool, inner: bool, computed: list[Any]) -> None:
    model = Stack(layers=3, dropout=0.2)
    expected = train(model, None)
    computed.clear()
    blocks = model.blocks
    model.how = {"use_reentrant": inner}

    def function(x: Tensor) -> Tensor:
        return Stack.forward(model, x)

    model.zero_grad()
    x = some_rows()
    torch.manual_seed(7)
    out = checkpoint(function, x, use_reentrant=outer)
    out.square().mean().backward()
    assert_same((out, gradients_of(model, x), torch.get_rng_state()), expected)
    assert len(computed) == len(blocks)


@BOTH
def test_two_forwards_in_flight(reentrant: bool, computed: list[Any]) -> None:
    model = Stack()

    def run(how: dict[str, Any] | None, order: tuple[int, int]) -> list[dict[str, Tensor]]:
        model.how = how
        inputs = [some_rows(1), some_rows(2)]
        outs = [model(x) for x in inputs]
        found = []
        for which in order:
            model.zero_grad()
            outs[which].square().mean().backward()
            found.append(gradients_of(model, inputs[which]))
        return found

    for order in ((0, 1), (1, 0)):
        expected, ours = run(None, order), run({"use_reentrant": reentrant}, order)
        for one, other in zip(expected, ours, strict=True):
            assert all(torch.equal(other[name], gradient) for name, gradient in one.items())
    assert len(computed) == 4 * 6


@BOTH
@pytest.mark.parametrize("training", [True, False], ids=["train mode", "eval mode"])
@NO_GRAD
def test_an_evaluation_in_between(reentrant: bool, training: bool, computed: list[Any]) -> None:
    model = Stack()
    expected = train(model, None)
    computed.clear()
    model.how = {"use_reentrant": reentrant}
    model.zero_grad()
    x = some_rows()
    torch.manual_seed(7)
    out = model(x)
    kept = entries()
    assert kept == 3
    with torch.no_grad():
        model.train(training)
        model(some_rows(5))
        model.train()
    assert entries() == kept
    out.square().mean().backward()
    assert entries() == 0
    assert_same((out, gradients_of(model, x), torch.get_rng_state()), expected)
    assert len(computed) == 6


@BOTH
def test_what_is_kept_goes_with_the_graph(reentrant: bool) -> None:
    model = Stack()
    model.how = {"use_reentrant": reentrant}
    out = model(some_rows())
    assert entries() == 3
    del out
    assert entries() == 0


@BOTH
def test_an_exception_in_between(reentrant: bool, computed: list[Any]) -> None:
    model = Stack()
    expected = train(model, None)
    last = model.blocks[2]

    def failing(x: Tensor) -> Tensor:
        raise KeyError

    model.how = {"use_reentrant": reentrant}
    with contextlib.suppress(KeyError):
        x = some_rows()
        for block in model.blocks[:2]:
            x = checkpoint(block, x, use_reentrant=reentrant)
        assert entries() == 2
        checkpoint(lambda x: failing(last(x)), x, use_reentrant=reentrant)
    del x
    assert entries() == 0
    computed.clear()
    assert_same(train(model, model.how), expected)
    assert len(computed) == 3


@BOTH
def test_an_exception_in_a_recomputation(reentrant: bool, computed: list[Any]) -> None:
    """The second try starts at the first layer, which has given away what it kept."""
    model, fail = Stack(layers=2), [False]

    def function(x: Tensor) -> Tensor:
        x = model.blocks[0](x)
        if fail[0]:
            raise KeyError
        return model.blocks[1](x)

    def run(checkpointed: bool) -> dict[str, Tensor]:
        model.zero_grad()
        x = some_rows()
        out = checkpoint(function, x, use_reentrant=reentrant) if checkpointed else function(x)
        if checkpointed:
            fail[0] = True
            with contextlib.suppress(KeyError):
                out.square().mean().backward(retain_graph=True)
            fail[0] = False
        out.square().mean().backward()
        return gradients_of(model, x)

    expected = run(False)
    computed.clear()
    ours = run(True)
    assert all(torch.equal(ours[name], gradient) for name, gradient in expected.items())
    assert len(computed) == 3


@BOTH
def test_a_region_recomputed_twice(reentrant: bool, computed: list[Any]) -> None:
    model = Stack(layers=1)

    def run(how: dict[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model.how = how
        x = some_rows()
        loss = model(x).square().mean()
        found = []
        for retain in (True, False):
            model.zero_grad()
            x.grad = None
            loss.backward(retain_graph=retain)
            found.append(gradients_of(model, x))
        return found[0], found[1]

    expected = run(None)
    computed.clear()
    for ours in run({"use_reentrant": reentrant}):
        assert all(torch.equal(ours[name], gradient) for name, gradient in expected[0].items())
    assert len(computed) == 2  # the second recomputation finds nothing any more


@BOTH
def test_a_result_that_was_changed_in_place(reentrant: bool, computed: list[Any]) -> None:
    block = Block(make_experts())

    def function(x: Tensor) -> Tensor:
        weights, ids = block.router(x).softmax(-1).topk(K)
        out: Tensor = block.moe(x, ids, weights)
        out += x
        return out.sin()

    def run(checkpointed: bool) -> dict[str, Tensor]:
        block.zero_grad()
        x = some_rows()
        (checkpoint(function, x, use_reentrant=reentrant) if checkpointed else function(x)).sum().backward()
        found = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        return found | {"x": x.grad}  # type: ignore[dict-item]

    expected = run(False)
    computed.clear()
    ours = run(True)
    assert all(torch.equal(ours[name], gradient) for name, gradient in expected.items())
    assert len(computed) == 2


@BOTH
@pytest.mark.parametrize("change", ["routes", "LoRA", "tokens"])
def test_a_recomputation_of_other_inputs(reentrant: bool, change: str, computed: list[Any]) -> None:
    model = Stack(layers=1)
    moe = model.blocks[0].moe

    def run(mode: str) -> Tensor:
        moe.experts.checkpoint_experts = mode
        x, ids = some_rows(), torch.arange(T * K).view(T, K) % E
        weights, recomputed = torch.full((T, K), 0.5), [False]

        def function(x: Tensor) -> Tensor:
            rows, routes = x, ids
            if recomputed[0] and change == "tokens":
                rows, routes = x.flip(0), ids.flip(0)
            if recomputed[0] and change == "routes":
                routes = (ids + 1) % E
            return moe(rows, routes, weights).sin()

        out = checkpoint(function, x, use_reentrant=reentrant)
        recomputed[0] = True
        with torch.no_grad():
            if change == "LoRA":
                moe.up_lora_b.mul_(2)
        out.sum().backward()
        with torch.no_grad():
            if change == "LoRA":
                moe.up_lora_b.div_(2)
        assert x.grad is not None
        return x.grad

    assert torch.equal(run("retain"), run("recompute"))
    assert len(computed) == 4


@BOTH
def test_dropout_without_torchs_random_state(reentrant: bool) -> None:
    """Where the recomputation draws another seed, backward takes that of the mask it was computed with."""
    model = Stack(layers=1, dropout=0.5)
    expected = train(model, None)
    how = {"use_reentrant": reentrant, "preserve_rng_state": False}
    ours = train(model, how)
    assert torch.equal(ours[0], expected[0])
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in expected[1].items())


@pytest.mark.parametrize("policy", ["matrix products", "everything"])
def test_selective_checkpointing(policy: str, computed: list[Any]) -> None:
    """Operations are counted there; those of a layer that takes kept results must not be missed."""
    save = [torch.ops.aten.addmm.default, torch.ops.aten._to_copy.default, torch.ops.aten.sin.default]
    contexts = partial(
        create_selective_checkpoint_contexts,
        save[:1] if policy == "matrix products" else save,
    )
    model = Stack(dropout=0.2)
    expected = train(model, None)
    computed.clear()
    assert_same(train(model, {"use_reentrant": False, "context_fn": contexts}), expected)
    assert len(computed) == 3


def test_debug_mode(computed: list[Any]) -> None:
    model = Stack()
    expected = train(model, None)
    assert_same(train(model, {"use_reentrant": False, "debug": True}), expected)
    assert len(computed) == 6


@BOTH
def test_hooks_of_others(reentrant: bool, computed: list[Any]) -> None:
    model = Stack()
    expected = train(model, None)
    computed.clear()
    with save_on_cpu():
        assert_same(train(model, {"use_reentrant": reentrant}), expected)
    assert len(computed) == 3


def test_no_early_stop(computed: list[Any]) -> None:
    model = Stack()
    expected = train(model, None)
    computed.clear()
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        assert_same(train(model, {"use_reentrant": False}), expected)
    assert len(computed) == 3


@BOTH
def test_threads_that_train_the_same_layers(reentrant: bool) -> None:
    model, found = Stack(), {}
    model.requires_grad_(False)
    model.how = {"use_reentrant": reentrant}

    def run(seed: int) -> None:
        for _ in range(5):
            x = some_rows(seed)
            model(x).square().mean().backward()
            found[seed] = x.grad

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model.how = None
    for seed, gradient in found.items():
        x = some_rows(seed)
        model(x).square().mean().backward()
        assert torch.equal(gradient, x.grad)


def test_choices() -> None:
    experts = make_experts("recompute")
    with pytest.raises(
        ValueError, match=r"checkpoint_experts is 'keep', wanted one of \['recompute', 'retain'\]"
    ):
        experts.checkpoint_experts = "keep"
    assert experts.checkpoint_experts == "recompute"


def test_a_torch_without_the_hook_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Function:
        @staticmethod
        def forward(ctx: Any, run_function: Any) -> None: ...

    monkeypatch.setattr(checkpointing, "_watching", False)
    monkeypatch.setattr(torch.utils.checkpoint, "CheckpointFunction", Function)
    monkeypatch.delattr(torch.utils.checkpoint, "_checkpoint_hook")
    with pytest.warns(UserWarning, match="_checkpoint_hook: with use_reentrant=False"):
        make_experts("retain")


@BOTH
def test_nothing_is_kept_unless_asked(reentrant: bool) -> None:
    model = Stack(mode="recompute")
    model.how = {"use_reentrant": reentrant}
    out = model(some_rows())
    assert entries() == 0
    out.sum().backward()


# The GPU engine, on the CPU


def test_what_another_engine_kept_is_not_taken() -> None:
    experts, gpu = make_experts(), kt_moe.Gpu("cpu", cpu_share=0.0)
    hidden = torch.randn(6, experts.hidden_size)
    ids, weights = torch.randint(experts.num_experts, (6, 2)), torch.rand(6, 2)
    gradients = []
    for first, second in ((gpu, gpu), (gpu, "off"), ("off", gpu)):
        x = hidden.clone().requires_grad_()
        experts.gpu = first
        out = checkpoint(lambda x: kt_moe.moe(x, ids, weights, experts), x, use_reentrant=True)
        experts.gpu = second
        out.sum().backward()
        gradients.append(x.grad)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=2e-2, atol=2e-2)


@BOTH
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_engines_experts_are_computed_once(
    reentrant: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kt_moe.gpu.engine import Engine

    calls: list[Any] = []
    forward = Engine.forward
    monkeypatch.setattr(
        Engine, "forward", lambda *args, **options: (calls.append(1), forward(*args, **options))[1]
    )
    model, gpu = Stack(dropout=0.2), kt_moe.Gpu("cpu", cpu_share=share)
    for block in model.blocks:
        block.moe.experts.gpu = gpu
    expected = train(model, None)
    calls.clear()
    assert_same(train(model, {"use_reentrant": reentrant}), expected)
    assert len(calls) == 3


@BOTH
@pytest.mark.parametrize("engine", [False, True], ids=["core", "engine"])
def test_lora_that_the_region_makes_does_not_hold_the_graph(reentrant: bool, engine: bool) -> None:
    experts, factor = make_experts(), torch.ones((), requires_grad=True)
    if engine:
        experts.gpu = kt_moe.Gpu("cpu", cpu_share=0.5)
    a, b = torch.randn(E, 4, H, requires_grad=True), torch.randn(E, INTERMEDIATE, 4, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        weights, ids = x[:, :E].softmax(-1).topk(K)
        lora = {"gate_lora_a": a * factor, "gate_lora_b": b * factor}
        return kt_moe.moe(x, ids, weights, experts, lora).sin()

    out = checkpoint(function, some_rows(), use_reentrant=reentrant)
    assert entries() == 1
    del out
    assert entries() == 0


# Models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from tiny_models import save_tiny_checkpoint

    return save_tiny_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning:transformers")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@BOTH
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_model_retains_its_experts(reentrant: bool, adapters: int, tiny: Path, computed: list[Any]) -> None:
    from peft import LoraConfig
    from tiny_models import gradients, load, tokens, with_lora

    from kt_moe.hf import KtMoeConfig

    def run(checkpointing: bool, **options: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        base = load(tiny, quantization_config=KtMoeConfig(**options))
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
        dropout = {"lora_dropout": 0.1}
        model = with_lora(tiny, ["q_proj", "experts"], base=base, **dropout).train()
        if adapters == 2:
            torch.manual_seed(4)
            config = LoraConfig(r=2, target_modules=["q_proj", "experts"], init_lora_weights=False, **dropout)
            model.add_adapter("other", config)
            model.base_model.set_adapter(["default", "other"])
        torch.manual_seed(3)
        computed.clear()
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        return loss.detach(), gradients(model), len(computed)

    loss, expected, once = run(False)
    for mode, number in (("retain", once), ("recompute", 2 * once)):
        again, ours, count = run(True, checkpoint_experts=mode)
        assert torch.equal(again, loss)
        assert all(torch.equal(ours[name], gradient) for name, gradient in expected.items())
        assert count == number
