"""One layer call on CPU, link and GPU together, on one device.

A call knows its routes. `plan.cut` divides the routed experts; those of the GPU cross the link into `Slots`
and are computed chunk by chunk on the caller's stream; those of the CPU are computed by the core, in a thread
of the engine, meanwhile. Both are added up in fp32: the GPU's rows of a token in the order of the plan, then
the CPU's sum. So the result depends on the inputs, the rates and the options, and neither on timing nor on
what happened to lie on the GPU.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kt_moe.gpu import cpu_part
from kt_moe.gpu import lora as lora_transfer
from kt_moe.gpu.chunk import Chunk, Gradients, Layer, backward_chunk, empty_jobs, forward_chunk
from kt_moe.gpu.chunks import Chunks, PassData
from kt_moe.gpu.cpu_part import CpuPart, Worker
from kt_moe.gpu.layers import Identity, Layers
from kt_moe.gpu.lora import Crossed, LoraCall, LoraOptions, LoraStack, each_tensor, split_down
from kt_moe.gpu.pass_log import PassLog
from kt_moe.gpu.plan import Cut, cut, cut_by_share, layer_costs
from kt_moe.gpu.prefetch import Feed, Pass, PassOrder, Wanted
from kt_moe.gpu.rest_timer import RestTimer
from kt_moe.gpu.routes import Rows, count_routes, sort_routes
from kt_moe.gpu.slots import Slots
from kt_moe.gpu.stored import StoredExperts
from kt_moe.gpu.streams import Event, streams_of

if TYPE_CHECKING:
    from kt_moe.experts import Experts

# The routes of a next forward are not known yet. Guessed are experts that were on the GPU in so many of the
# last ones (a forward counts as much as all before it together), the most popular first; all of them where so
# many of the last guess were right, otherwise so many bytes of them, or what the link brings while the model
# computes what is before them.
_LIKELY = 0.5
_GOOD_GUESS = 0.85
_GUESS_BYTES = 64 << 20
_FORWARD_PART = 0.25  # of `rest_seconds`; backward has more than twice the products


@dataclass(eq=False)
class _Held:
    """A layer that the engine knows.

    Attributes:
        biases: of gate, up and down on the device, or None.
        not_locked: why its memory cannot be page-locked; None: it was not tried, or is.
        planned: experts on the GPU in the last forward, which its backward wants again.
        forward: rows of each expert, the CPU's share, whether it trains, and the cut: of the last forward, as
            long as no backward has followed.
        popular: [E] how often each of them was, an average over the last forwards.
        likely: the guess for the next one, the most popular first.
        right: the part of the last guess that was right.
    """

    stored: StoredExperts
    biases: Sequence[Tensor | None]
    number: int
    popular: NDArray[np.float64]
    not_locked: str | None = None
    planned: tuple[int, ...] = ()
    forward: tuple[NDArray[np.int64], float | str, bool, Cut] | None = None
    likely: tuple[int, ...] = ()
    right: float = 0.0

    def same_cut(self, counts: NDArray[np.int64], share: float | str, train: bool) -> Cut | None:
        """The last forward's cut for a forward that may be computed again by gradient checkpointing.

        The rates and the layers that there are may have changed meanwhile, and what a forward saves may not.
        """
        if self.forward is None or self.forward[1:3] != (share, train):
            return None
        return self.forward[3] if np.array_equal(self.forward[0], counts) else None

    def note_plan(self, experts: tuple[int, ...], again: bool) -> None:
        """Take note of a forward's plan; `again`: of one that seems to be computed again."""
        if again and experts == self.planned:
            return
        self.right = len(set(self.likely) & set(experts)) / max(len(self.likely), 1)
        here = np.zeros_like(self.popular)
        here[list(experts)] = 1.0
        self.popular = here if not self.planned else (self.popular + here) / 2
        order = np.argsort(-self.popular, kind="stable")
        self.likely = tuple(int(e) for e in order if self.popular[e] >= _LIKELY)
        self.planned = experts


@dataclass(frozen=True)
class SavedCall:
    """What a backward needs of its forward, beside the arguments.

    Attributes:
        counts: rows of each of the GPU's experts.
        options: scalings, dropout and its seed.
        crossed: of each stack of LoRA matrices, see `LoraStack`.
        tensors: apart from the rest, for `save_for_backward`. `Rows` without counts; [rows] fp32, the routing
            weights; of each stack of LoRA matrices [jobs, rows, r] bf16 (see `Chunk`); and if there is one,
            `CpuPart`'s.
    """

    cut: Cut
    counts: tuple[int, ...]
    options: LoraOptions
    crossed: tuple[Crossed, ...]
    tensors: tuple[Tensor | None, ...]

    def pass_data(self, lora: LoraCall) -> tuple[PassData, CpuPart | None]:
        """For backward, of a call whose tensors are there."""
        permutation, inverse, row_weights, *rest = self.tensors
        rows = Rows(self.counts, cast(Tensor, permutation), cast(Tensor, inverse))
        stacks = len(lora.together)
        low_rank, of_part = cast("list[Tensor]", rest[:stacks]), rest[stacks:]
        part = CpuPart.from_tensors(of_part, lora) if of_part else None
        return PassData(self.cut.gpu, rows, cast(Tensor, row_weights), low_rank), part


class Engine:
    """The slots, streams and thread of a device, which layers share.

    Args:
        layers: which they are, and the options.
        device: of the hidden states.

    Attributes:
        lock: held during a pass.
    """

    def __init__(self, layers: Layers, device: torch.device) -> None:
        self.device, self._layers = device, layers
        self._streams = streams_of(device)
        layers.links.append(self._streams)
        self._worker = Worker()
        self._order = PassOrder()
        self._rest_timer = RestTimer(self._streams) if layers.rates is None else None
        self.log = PassLog(self._streams)
        self._slots: Slots | None = None
        self._reading: Event | None = None  # behind the device's reading of LoRA matrices of the host
        self._held: weakref.WeakKeyDictionary[Identity, _Held] = weakref.WeakKeyDictionary()
        self._numbers = count()
        self._gone: deque[int] = deque()  # numbers of layers that the engine still has to forget
        self.lock = threading.RLock()
        _engines.add(self)

    def forward(
        self, experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, lora: LoraCall, train: bool
    ) -> tuple[Tensor, SavedCall]:
        """The layer's output, [T, H] fp32, and what a backward needs.

        Args:
            x: [T, H] bf16 on the device.
            ids: [T, K] int64 or int32 on the device.
            weights: [T, K] fp32 on the device.
            train: whether a backward will follow.

        Raises:
            ValueError: an id that is not in [0, E].
        """
        streams, share = self._streams, self._layers.cpu_share
        with self.lock, self._one_pass(experts) as held:
            stacks, self._reading = lora_transfer.to_device(lora, share != 1.0, streams)
            counted = count_routes(ids, experts.num_experts, streams)
            plan = held.same_cut(counted.counts, share, train)
            plan = plan or self._cut(experts, held, counted.counts, share, lora, train)
            held.forward = counted.counts, share, train, plan
            self._start(held, plan, backward=False, train=train)
            part = pending = None
            if plan.cpu:
                part = cpu_part.send(
                    experts, plan.cpu, counted.ids.numpy(), x, weights, lora, each_tensor(stacks), train,
                    streams,
                )  # fmt: skip
                pending = cpu_part.submit_forward(experts, part, self._worker, streams)
            feed = self._feed(held, plan, backward=False)
            rows = sort_routes(counted, plan.gpu, streams)
            low_rank = [
                empty_jobs(len(stack.projections), len(rows.permutation), lora.ranks[stack.projections[0]], x)
                for stack in stacks
            ]
            row_weights = weights.reshape(-1).index_select(0, rows.permutation)
            data = PassData(plan.gpu, rows, row_weights, low_rank)
            layer = self._layer(experts, held, lora, stacks)
            out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            for chunk in self._chunks(held, feed, layer, data, backward=False):
                forward_chunk(layer, chunk, x, out)
            if pending is not None:
                pending.add_to(out)
            tensors = rows.permutation, rows.inverse, row_weights, *low_rank
            saved = SavedCall(
                plan,
                rows.counts,
                (lora.scalings, lora.dropout, lora.seed),
                tuple(stack.crossed for stack in stacks),
                tensors if part is None else (*tensors, *part.tensors()),
            )
            on_gpu = list(plan.gpu)
            experts._routed_elsewhere[on_gpu] += counted.counts[on_gpu]
        return out, saved

    def backward(
        self,
        experts: Experts,
        saved: SavedCall,
        x: Tensor,
        weights: Tensor,
        lora: LoraCall,
        dout: Tensor,
        needs: tuple[bool, bool, tuple[bool, ...]],
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], Event | None]:
        """Gradients of x [T, H] fp32, of weights [T, K] fp32, and of the LoRA matrices, each like its matrix.

        The event, if there is one, is when those of the host are there.

        Args:
            x, weights, lora: as in forward.
            dout: [T, H] bf16 on the device.
            needs: which of them are wanted.
        """
        needs_x, needs_weights, needs_lora = needs
        plan, streams = saved.cut, self._streams
        data, part = saved.pass_data(lora)
        only_cpu = part is not None and not plan.gpu
        with self.lock, self._one_pass(experts) as held:
            held.forward = None
            self._start(held, plan, backward=True, train=True)
            of_host = lora_transfer.host_gradients(lora, needs_lora, part is not None, streams)
            pending = None
            if part is not None:
                pending = cpu_part.submit_backward(
                    experts, part, dout, needs_x, needs_weights, of_host, only_cpu, self._worker, streams
                )
            feed = self._feed(held, plan, backward=True)
            crossed = saved.crossed if plan.gpu else ((None, None),) * len(saved.crossed)
            stacks, self._reading = lora_transfer.to_device_again(lora, crossed, streams)
            layer = self._layer(experts, held, lora, stacks)
            of_gpu = lora_transfer.device_gradients(
                lora, [n and not only_cpu for n in needs_lora], len(plan.gpu) == experts.num_experts, streams
            )
            grads = Gradients(
                torch.zeros(x.shape, dtype=torch.float32, device=x.device) if needs_x else None,
                torch.zeros_like(data.row_weights) if needs_weights else None,
                *split_down(of_gpu),
            )
            for chunk in self._chunks(held, feed, layer, data, backward=True):
                backward_chunk(layer, chunk, x, dout, grads)
            dweights = None
            if grads.row_weights is not None:
                dweights = torch.zeros(weights.numel(), dtype=torch.float32, device=x.device)
                dweights.index_copy_(0, data.rows.permutation.long(), grads.row_weights)
                dweights = dweights.view(weights.shape)
            if pending is not None:
                pending.add_to(grads.hidden_states, dweights)
            of_lora, arrived = lora_transfer.join_gradients(
                lora, plan.cpu, needs_lora, each_tensor(of_gpu), of_host, streams
            )
        return grads.hidden_states, dweights, of_lora, arrived

    def drop_slots(self) -> None:
        """Give the GPU memory of experts back; the next call takes what it needs."""
        with self.lock:
            self._drop_slots()

    def _drop_slots(self) -> None:
        if self._slots is not None:
            self._streams.synchronize()  # streams that torch's allocator does not know of use their memory
            self._slots = None

    @contextmanager
    def _one_pass(self, experts: Experts) -> Iterator[_Held]:
        """Alone with the slots. Whatever happens, none stays claimed and none is used again too early."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        ordinary = torch.inference_mode(False)  # what a pass makes may serve a later one that trains
        with on_device, ordinary, torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            self.forget_gone()
            self.log.watch(experts.runtime._profile)
            try:
                timer = self._rest_timer if self._layers.cpu_share == "auto" else None
                if timer is not None:
                    timer.arrive()
                held = self._hold(experts)
                self.log.start(held.number)
                yield held
                self.log.end(self._slots)
                if timer is not None:
                    timer.leave()
            except BaseException as error:
                self._wait_for_reads()
                if self._slots is not None:
                    self._slots.release_all()
                if isinstance(error, torch.OutOfMemoryError):
                    raise torch.OutOfMemoryError(
                        f"{error}\nThe GPU ran out of memory in a layer of experts. Nothing is lost: give "
                        f"their weights less of it (kt_moe.Gpu has memory={self._layers.memory!r}) and go on"
                    ) from error
                raise
            finally:
                reading, self._reading = self._reading, None
                if reading is not None:
                    reading.synchronize()  # from here on the caller may change the matrices
                self._streams.end_pass()

    def _wait_for_reads(self) -> None:
        """Behind a pass that failed: nothing reads the caller's tensors any more."""
        self._worker.wait()
        with suppress(RuntimeError):  # a kernel has failed, of which the caller is told
            self._streams.record("uplink").synchronize()

    def forget(self, experts: Experts) -> None:
        """A layer is given to another `kt_moe.Gpu`."""
        with self.lock:
            held = self._held.pop(experts._identity, None)
            if held is not None:
                self._gone.append(held.number)

    def forget_gone(self) -> None:
        """Layers that are gone leave the slots and the log."""
        with self.lock:
            while self._gone:
                layer = self._gone[0]
                self._order.forget(layer)
                self.log.forget(layer)
                if self._slots is not None:
                    self._slots.forget(layer)
                self._gone.popleft()

    def _hold(self, experts: Experts) -> _Held:
        identity = experts._identity
        held = self._held.get(identity)
        if held is None:
            stored = self._layers.stored(experts)
            biases = [None if bias is None else bias.to(self.device) for bias in stored.biases()]
            held = _Held(stored, biases, next(self._numbers), popular=np.zeros(experts.num_experts))
            # Garbage collection may run anywhere, so that it only takes note.
            weakref.finalize(identity, self._gone.append, held.number).atexit = False
            self._held[identity] = held  # behind that: an interrupt may come in between
        return held

    def _page_lock(self, held: _Held) -> None:
        """Once, before copies of its weights."""
        stored = held.stored
        if stored.pinned or held.not_locked is not None:
            return
        with self._streams.span("host", "lock_pages"):
            found = stored.pin(before_unpin=self._layers.finish_links)
        if not stored.pinned:
            held.not_locked = found
            if self.device.type == "cuda":
                warnings.warn(
                    f"weights of experts go to the GPU through a buffer, which is slower: {found}",
                    stacklevel=2,
                )

    def _cut(
        self,
        experts: Experts,
        held: _Held,
        counts: NDArray[np.int64],
        share: float | str,
        lora: LoraCall,
        train: bool,
    ) -> Cut:
        if isinstance(share, float):
            return cut_by_share(counts, share)
        rates = self._layers.rates_for(experts, self.device)
        _, every = self._layers.sizes()
        missing = 1.0 - len(self._slots_for_layers()) / every
        costs = layer_costs(
            rates, experts.hidden_size, experts.intermediate_size, held.stored.slot_bytes, sum(lora.ranks),
            missing, train, held.stored.in_place, experts.gated,
        )  # fmt: skip
        return cut(counts, costs)

    def _slots_for_layers(self) -> Slots:
        """The cache of experts; made at the first call, and anew when the layers or the budget have changed.

        Raises:
            ValueError: the budget is less than one expert takes.
            torch.OutOfMemoryError: the device does not have it.
        """
        slot_bytes, every = self._layers.sizes()
        self.forget_gone()  # not counted there, so that there may be no slots for them
        budget = self._layers.budget(self.device)
        number = min(every, budget // slot_bytes)
        if number < 1:
            raise ValueError(
                f"the GPU memory for experts is {budget} bytes, wanted at least {slot_bytes}, which one "
                'expert takes: give kt_moe.Gpu a larger memory, or the experts gpu="off"'
            )
        kind = (number, slot_bytes), number == every
        if self._slots is None or (self._slots.memory.shape, self._slots.roomy) != kind:
            self._drop_slots()  # before the memory of new ones is taken
            self._slots = Slots(self._streams, slot_bytes, number, roomy=number == every)
        return self._slots

    def _start(self, held: _Held, plan: Cut, *, backward: bool, train: bool) -> None:
        """Take note of a pass and its plan."""
        this = Pass(held.number, backward)
        again = self._order.begin(this)
        if self._rest_timer is not None and plan.seconds is not None:
            seconds = self._rest_timer.begin(this, train)
            if seconds is not None:
                self._layers.set_rest_seconds(seconds)
                self._rest_timer = None
        self.log.begin(this, plan, self._slots)
        if not backward:
            held.note_plan(plan.gpu, again)

    def _feed(self, held: _Held, plan: Cut, *, backward: bool) -> Feed | None:
        """Start the copies of a pass, and of those to come as there will be room."""
        if not plan.gpu:
            return None
        slots = self._slots_for_layers()
        wanted = [Wanted(held.number, held.stored, plan.gpu)]
        room, kept = len(slots), False
        by_number = {other.number: other for other in self._held.values()}
        for after, known in self._order.following():
            other = by_number.get(after.layer)
            if room <= 0 or other is None:
                break
            if any(wants.layer == after.layer for wants in wanted):
                if after.layer == held.number and not kept:
                    room, kept = room - len(plan.gpu), True  # they stay for it
                continue
            sure = known or other.right >= _GOOD_GUESS
            most = room if sure else min(room, max(1, self._guess_bytes() // other.stored.slot_bytes))
            guess = (other.planned if known else other.likely)[:most]
            wanted.append(Wanted(other.number, other.stored, guess))
            room -= len(guess)
            if not sure:
                break
        for wants in wanted:
            self._page_lock(by_number[wants.layer])
        feed = Feed(slots, wanted)
        feed.advance()
        return feed

    def _guess_bytes(self) -> int:
        rates = self._layers.rates
        return max(_GUESS_BYTES, 0 if rates is None else int(rates.link * rates.rest_seconds * _FORWARD_PART))

    def _chunks(
        self, held: _Held, feed: Feed | None, layer: Layer, data: PassData, *, backward: bool
    ) -> Iterator[Chunk]:
        if feed is None or self._slots is None:
            return iter(())
        chunks = Chunks(held.number, held.stored, self._slots, feed, self._streams, self.log)
        return chunks.of(layer, data, backward)

    def _layer(self, experts: Experts, held: _Held, lora: LoraCall, stacks: Sequence[LoraStack]) -> Layer:
        return Layer(
            self._streams.products, experts.hidden_size, experts.intermediate_size, experts.gated,
            experts.activation, held.biases, *split_down(stacks), lora.scalings, lora.dropout, lora.seed,
        )  # fmt: skip


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    """Another thread may have been in a pass."""
    for engine in list(_engines):
        engine.lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
