"""Gradient checkpointing that does not compute experts twice: `Experts.checkpoint_experts = "retain"`.

`torch.utils.checkpoint` runs a function in forward and, as it keeps nothing of that run, again in backward. A
layer that retains its experts keeps its result and what its backward needs in the first run, and takes them
back in the second. What is kept belongs to the region: to the autograd node, or the frame, that torch has for
one checkpointed call. It goes when it is taken, or with the graph.

torch does not tell a function which run it is in. `watch` wraps two places of `torch.utils.checkpoint`, which
are passed once a region and never compiled, and keeps a stack of runs in each thread:

- `CheckpointFunction.forward(ctx, run_function, ...)`, public, of `use_reentrant=True`: `run_function` is
  called by it and by `CheckpointFunction.backward`. All calls pass here, however `checkpoint` was imported.
- `_checkpoint_hook(frame)`, private, of `use_reentrant=False`: it is entered for the first run, and
  `frame.recompute_fn` is called for the others. The hooks on top of torch's stack would tell the same, but
  torch 2.6 does not show them, and the hooks of others inside a region (`save_on_cpu`) hide them.

To look for `CheckpointFunction.forward` among the callers' frames would need no wrapper, but takes 5 to 8
microseconds in every call under `no_grad`; a look at the stack of runs takes a fifth of one. With a torch
that lacks these places `watch` warns, and experts are computed again.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _python_dispatch

if TYPE_CHECKING:
    from kt_moe.experts import Experts

Phase = Literal["first", "recompute"]
CHOICES = ("recompute", "retain")  # of experts in checkpointed regions


class Inputs(NamedTuple):
    """What a recomputation must find again to be given what was kept.

    Attributes:
        ids: [T, K], of the routes.
        others: shapes, options and versions, compared by `==`.
    """

    ids: Tensor
    others: tuple[object, ...]

    @classmethod
    def of(cls, hidden_states: Tensor, ids: Tensor, options: object, lora: Sequence[Tensor | None]) -> Inputs:
        """Of a call.

        The values of the hidden states are not compared: where a recomputation differs in rounding, kept
        results are as good as its own. Changed LoRA is told by the tensors' version counters. To compare ids
        on a GPU is to wait for it.

        Args:
            options: scaling and dropout of LoRA, and what computes: kept state is in its form.
        """
        x = hidden_states
        return cls(ids, (x.shape, x.dtype, x.device, options, tuple(_version(t) for t in lora)))

    def agree(self, other: Inputs) -> bool:
        """Whether both are of the same call."""
        mine, theirs = self.ids, other.ids
        if self.others != other.others or mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return False
        return mine.device == theirs.device and torch.equal(mine, theirs)


class Kept(NamedTuple):
    """What a first run kept: the layer's result, and what `Call.keep` was given for its backward."""

    out: Tensor
    state: Any


@dataclass(frozen=True)
class _Entry:
    """Kept results of one call.

    out_version: a result that the model changed in place since is not what the layer computed.
    """

    inputs: Inputs
    kept: Kept
    out_version: int


class _Region(dict[tuple["Experts", int], _Entry]):
    """Entries of one checkpointed call, by layer and by how many calls of that layer came before."""


@dataclass(eq=False)
class _Run:
    """One run of the function of a region.

    reentrant: grad mode is off in its first run, although a backward may come.
    calls: of each layer so far.
    """

    region: _Region
    phase: Phase
    reentrant: bool
    calls: dict[Experts, int] = field(default_factory=dict)

    def key(self, experts: Experts) -> tuple[Experts, int]:
        number = self.calls.get(experts, 0)
        self.calls[experts] = number + 1
        return experts, number


class _Stack(threading.local):
    """The runs that the current thread is in, the innermost last."""

    def __init__(self) -> None:
        self.runs: list[_Run] = []


_stack = _Stack()


def phase() -> Phase | None:
    """Which run of the innermost checkpointed region the current thread is in; None: it is in none.

    Known of regions that began after `watch`. Only where a backward may follow is there a region: a
    checkpoint under `no_grad` is an ordinary call.
    """
    runs = _stack.runs
    return runs[-1].phase if runs else None


class Call:
    """A layer's call inside one or more checkpointed regions; see `call`."""

    def __init__(self, experts: Experts, runs: Sequence[_Run]) -> None:
        self._places = [(run, run.key(experts)) for run in runs]

    @property
    def hides_grad(self) -> bool:
        """Whether a backward may follow although grad mode is off and no input may require a gradient."""
        return any(run.reentrant and run.phase == "first" for run, _ in self._places)

    def take(self, inputs: Inputs) -> Kept | None:
        """What the first run kept of this call. It is dropped here, whether it is of the same inputs or not.

        Returns:
            None if there is nothing, or nothing of these inputs: the experts have to be computed.
        """
        for run, key in reversed(self._places):
            entry = run.region.pop(key, None) if run.phase == "recompute" else None
            if entry is None or entry.kept.out._version != entry.out_version:
                continue
            if entry.inputs.agree(inputs):
                return entry.kept
        return None

    def keep(self, inputs: Inputs, out: Tensor, state: Any) -> None:
        """Keep results for every region around that is in its first run, if there is one.

        Args:
            out: what the layer returns.
            state: what its backward needs. No tensor in it may have a grad_fn: it would hold the graph that
                holds it.
        """
        places = [(run, key) for run, key in self._places if run.phase == "first"]
        if places:
            detached = out.detach()  # of the same version counter; `out` itself gets a grad_fn
            entry = _Entry(inputs, Kept(detached, state), detached._version)
            for run, key in places:
                run.region[key] = entry


def call(experts: Experts) -> Call | None:
    """Begin a call of a layer: once a call, before anything that may fail. None outside of regions."""
    runs = _stack.runs
    return Call(experts, runs) if runs else None


def unseen() -> AbstractContextManager[None]:
    """Hide operations from dispatch modes.

    Selective checkpointing counts the operations of a region and wants as many in the recomputation. A layer
    that takes kept results, or whose weights already lie on the GPU, has fewer.
    """
    if torch._C._len_torch_dispatch_stack() == 0:
        return _nothing
    modes: AbstractContextManager[None] = _python_dispatch._disable_current_modes()
    return modes


_nothing = nullcontext()
_watching = False
_lock = threading.Lock()


def watch() -> None:
    """Have regions that begin from now on known to `phase` and `call`. Once is enough."""
    global _watching
    with _lock:
        if _watching:
            return
        import torch.utils.checkpoint as checkpoint

        hook = getattr(checkpoint, "_checkpoint_hook", None)
        _watch_reentrant(checkpoint.CheckpointFunction)
        if hook is None:
            warnings.warn(
                f"torch {torch.__version__} has no torch.utils.checkpoint._checkpoint_hook: with "
                'use_reentrant=False, checkpoint_experts="retain" computes experts again',
                stacklevel=3,
            )
        else:
            _watch_hook(hook)
        _watching = True


def _watch_reentrant(function: Any) -> None:
    forward = function.forward

    @functools.wraps(forward)
    def watched(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        # Without next nodes no backward comes to this one: nothing requires a gradient, or grad mode is off.
        # If it is off because of a reentrant checkpoint around this one, calls are in that one's region.
        if ctx.next_functions:
            run_function = _runs(run_function, _Region(), "first", reentrant=True)
        return forward(ctx, run_function, *args)

    function.forward = staticmethod(watched)


def _watch_hook(hook: Any) -> None:
    init, enter, leave = hook.__init__, hook.__enter__, hook.__exit__

    @functools.wraps(init)
    def watched_init(self: Any, frame: Any, *args: Any, **kwargs: Any) -> None:
        init(self, frame, *args, **kwargs)
        region = _Region()
        frame.recompute_fn = _runs(frame.recompute_fn, region, "recompute", reentrant=False)
        self._kt_moe_run = _running(_Run(region, "first", reentrant=False))

    @functools.wraps(enter)
    def watched_enter(self: Any) -> Any:
        result = enter(self)
        self._kt_moe_run.__enter__()
        return result

    @functools.wraps(leave)
    def watched_exit(self: Any, *exception: Any) -> Any:
        self._kt_moe_run.__exit__(None, None, None)
        return leave(self, *exception)

    hook.__init__, hook.__enter__, hook.__exit__ = watched_init, watched_enter, watched_exit


def _runs(
    function: Callable[..., Any], region: _Region, first: Phase, *, reentrant: bool
) -> Callable[..., Any]:
    """The function, each of whose calls is a run of the region: the first is `first`, others recompute."""
    phases: list[Phase] = [first]

    def run(*args: Any, **kwargs: Any) -> Any:
        with _running(_Run(region, phases.pop() if phases else "recompute", reentrant)):
            return function(*args, **kwargs)

    return run


@contextmanager
def _running(run: _Run) -> Iterator[None]:
    runs = _stack.runs
    runs.append(run)
    try:
        yield
    finally:
        # After an exception older releases of torch leave the hook to the garbage collector, which may end
        # this late and in another thread: the run need not be the last, nor one of the current thread.
        runs.remove(run)


def _version(tensor: Tensor | None) -> tuple[object, ...] | None:
    if tensor is None:
        return None
    # Tensors that the region itself makes of parameters, as of several adapters, lie elsewhere the next time.
    owner = tensor._base if tensor._is_view() else tensor
    address = tensor.data_ptr() if isinstance(owner, torch.nn.Parameter) else None
    return tensor.shape, tensor.dtype, tensor._version, address
