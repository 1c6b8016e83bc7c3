"""The cut between CPU and GPU, the slots and the order in which they are filled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kt_moe.gpu.plan import Costs, Cut, Rates, cut, cut_by_share, end, layer_costs, seconds_of
from kt_moe.gpu.prefetch import Feed, Pass, PassOrder, Wanted
from kt_moe.gpu.rest_timer import RestTimer
from kt_moe.gpu.slots import Slots
from kt_moe.gpu.streams import Streams

counts_ = st.lists(st.integers(0, 300), min_size=1, max_size=40).map(lambda c: np.array(c, dtype=np.int64))
seconds = st.floats(0, 1e-2)
costs_ = st.builds(Costs, *[seconds] * 7)


def ends(counts: np.ndarray, costs: Costs, gpu: tuple[int, ...], cpu: tuple[int, ...]) -> float:
    """When the last of link, GPU and CPU ends; only the link works in `rest_seconds`."""
    gpu_rows, cpu_rows = (sum(int(counts[e]) for e in place) for place in (gpu, cpu))
    return max(
        len(gpu) * costs.link_expert,
        costs.rest_seconds + len(gpu) * costs.gpu_expert + gpu_rows * costs.gpu_row,
        costs.rest_seconds
        + len(cpu) * costs.cpu_expert
        + cpu_rows * costs.cpu_row
        + bool(cpu) * costs.cpu_call,
    )


@given(counts=counts_, costs=costs_)
def test_no_other_place_to_cut_ends_sooner(counts, costs):
    found = cut(counts, costs)
    experts = (*found.gpu, *found.cpu)
    assert sorted(experts) == np.flatnonzero(counts).tolist()
    rows = [int(counts[e]) for e in experts]
    assert rows == sorted(rows, reverse=True)
    assert found.rows == (sum(rows[: len(found.gpu)]), sum(rows[len(found.gpu) :]))
    assert found.seconds == seconds_of(found, costs)
    taken = ends(counts, costs, found.gpu, found.cpu)
    assert end(costs, *found.seconds) == pytest.approx(taken)
    soonest = min(ends(counts, costs, experts[:n], experts[n:]) for n in range(len(experts) + 1))
    assert taken <= soonest * (1 + 1e-9) / (1.0 if found.cpu else 0.9)
    assert cut(counts, costs) == found


@given(counts=counts_, share=st.floats(0, 1))
def test_a_share_is_met_as_near_as_whole_experts_can(counts, share):
    found: Cut = cut_by_share(counts, share)
    assert found.seconds is None
    total = int(counts.sum())
    experts = (*found.gpu, *found.cpu)

    def distance(n: int) -> float:
        return abs(sum(int(counts[e]) for e in experts[n:]) - share * total)

    assert distance(len(found.gpu)) <= min(map(distance, range(len(experts) + 1)))
    if share == 0.0:
        assert not found.cpu
    if share == 1.0:
        assert not found.gpu


def test_the_cpu_takes_the_tail_and_more_of_it_the_slower_the_link_is():
    counts = np.array([500, 3, 200, 0, 80, 5, 9, 300], dtype=np.int64)
    shares = []
    for link in (1e9, 1e10, 1e11, 1e12):
        rates = Rates(link, 4e14, 2e12, 4e12, 6e10)
        found = cut(counts, layer_costs(rates, 2048, 768, 9_437_184, 48, 1.0, True, True))
        assert set(found.cpu) <= {1, 5, 6, 4, 2, 7, 0}
        shares.append(sum(int(counts[e]) for e in found.cpu))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


def test_the_link_gets_more_the_longer_the_rest_of_the_model_takes():
    counts = np.arange(1, 65, dtype=np.int64)
    numbers = []
    for rest_seconds in (0.0, 2e-3, 4e-3, 1.0):
        rates = Rates(5e10, 4e14, 2e12, 4e12, 6e10, rest_seconds)
        numbers.append(len(cut(counts, layer_costs(rates, 2048, 768, 9_437_184, 48, 1.0, True, True)).gpu))
    assert numbers == sorted(numbers)
    assert numbers[0] < numbers[1] < numbers[2] <= numbers[3] == 64


def test_what_lies_on_the_gpu_costs_no_link():
    rates = Rates(5e10, 4e14, 2e12, 4e12, 6e10)
    resident = layer_costs(rates, 2048, 768, 9_437_184, 48, 0.0, True, True)
    assert resident.link_expert == 0.0
    found = cut(np.full(128, 32), resident)
    assert not found.cpu
    crossing = layer_costs(rates, 2048, 768, 9_437_184, 48, 1.0, True, True)
    assert crossing.link_expert == pytest.approx(2 * 9_437_184 / 5e10)
    forward = layer_costs(rates, 2048, 768, 9_437_184, 48, 1.0, False, True)
    assert forward.link_expert == pytest.approx(crossing.link_expert / 2)
    assert forward.gpu_row < crossing.gpu_row / 2


class Stored:
    """Experts whose bytes are all their number."""

    slot_bytes = expert_bytes = 64
    pinned = True

    def __init__(self, number: int) -> None:
        self.number = number
        numbers = 16 * number + torch.arange(8, dtype=torch.uint8)
        self.bytes = numbers[:, None].expand(8, 64).contiguous()

    def addresses(self, expert: int) -> list[tuple[int, int, int]]:
        return [(self.bytes[expert].data_ptr(), 64, 0)]

    def copy_expert(self, expert: int, to: torch.Tensor) -> None:
        to[:64] = 16 * self.number + expert


class Unpinned(Stored):
    pinned = False


def make_slots(count: int) -> Slots:
    return Slots(Streams(torch.device("cpu")), 64, count)


@given(
    data=st.data(),
    count=st.integers(1, 6),
    kind=st.sampled_from([Stored, Unpinned]),
)
def test_slots_hold_what_was_claimed_until_it_is_released(data, count, kind):
    slots = make_slots(count)
    layers = [kind(number) for number in range(3)]
    claimed: dict[tuple[int, int], None] = {}
    for _ in range(data.draw(st.integers(1, 20))):
        layer = data.draw(st.integers(0, 2))
        experts = data.draw(st.lists(st.integers(0, 7), unique=True, max_size=4))
        experts = [e for e in experts if (layer, e) not in claimed]
        done = slots.claim(layer, layers[layer], experts)
        assert done == min(len(experts), done)
        claimed |= dict.fromkeys((layer, e) for e in experts[:done])
        assert len(claimed) <= count
        if done < len(experts):
            assert len(claimed) == count  # only for want of slots
        for key in claimed:
            (slot,) = slots.use(key[0], [key[1]])
            assert (slots.memory[slot] == 16 * key[0] + key[1]).all()
        for key in data.draw(st.lists(st.sampled_from(sorted(claimed)), unique=True)) if claimed else []:
            slots.release(slots.use(key[0], [key[1]]))
            del claimed[key]


@pytest.mark.parametrize("roomy", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_an_interrupted_claim_loses_no_slot(roomy, copied):
    slots = Slots(Streams(torch.device("cpu")), 64, 8, roomy=roomy)
    layer = Stored(0)
    copy, done = slots._copy, []

    def interrupted(*args):
        done.append(args)
        if copied or len(done) != 3:
            copy(*args)
        if len(done) == 3:
            raise KeyboardInterrupt

    slots._copy = interrupted
    with pytest.raises(KeyboardInterrupt):
        slots.claim(0, layer, range(8))
    assert not slots.arrived((0, 2))
    slots.release_all()
    assert slots.claim(0, layer, range(8)) == 8
    for expert, slot in enumerate(slots.use(0, range(8))):
        assert (slots.memory[slot] == expert).all()


def test_a_slot_is_filled_again_behind_all_streams_that_read_it():
    class Noting(Streams):
        """Two streams of a caller, and what every stream has waited for."""

        stream = 1

        def __init__(self):
            super().__init__(torch.device("cpu"))
            self.behind = {1: set(), 2: set(), "link": set()}

        def current(self):
            return self.stream

        def record(self, name=None):
            event = super().record(name)
            event.seen = {*self.behind[name or self.stream], event}
            self.behind[name or self.stream].add(event)
            return event

        def wait(self, event, name=None):
            self.behind[name or self.stream] |= event.seen

    streams = Noting()
    slots, layer = Slots(streams, 64, 1), Stored(0)
    reads = []
    for streams.stream in (1, 2):
        slots.claim(0, layer, [0])
        slots.release(slots.use(0, [0]))
        reads.append(slots._used[0])
    slots.claim(0, layer, [1])
    assert set(reads) <= streams.behind["link"]


def test_the_least_recently_used_slot_goes_first():
    slots = make_slots(3)
    layer = Stored(0)
    for expert in (0, 1, 2, 0):
        assert slots.claim(0, layer, [expert]) == 1
        slots.release(slots.use(0, [expert]))
    moved = slots.bytes_moved
    assert moved == 3 * 64
    slots.claim(0, layer, [3])
    assert slots.arrived((0, 0))
    assert slots.arrived((0, 2))
    assert not slots.arrived((0, 1))
    slots.release_all()
    slots.forget(0)
    assert not any(slots.arrived((0, e)) for e in range(4))
    assert slots.claim(0, layer, [0, 1, 2]) == 3


def test_a_copy_that_fails_leaves_no_expert_behind():
    slots = make_slots(2)

    class Broken(Stored):
        def addresses(self, expert):
            if expert == 1:
                raise RuntimeError("the link is down")
            return super().addresses(expert)

    with pytest.raises(RuntimeError, match="the link is down"):
        slots.claim(0, Broken(0), [0, 1])
    assert not slots.arrived((0, 0))  # its copy has begun, but no event tells when it ends
    assert not slots.arrived((0, 1))
    slots.release_all()
    assert slots.claim(0, Stored(0), [1, 2]) == 2
    assert (slots.memory[slots.use(0, [1])[0]] == 1).all()


def forward_and_back(layers: int, again: bool) -> list[Pass]:
    """The passes of a step; `again`: with gradient checkpointing, which computes each forward twice."""
    back = [
        Pass(n, backward)
        for n in reversed(range(layers))
        for backward in ((False, True) if again else (True,))
    ]
    return [Pass(n, False) for n in range(layers)] + back


@pytest.mark.parametrize("again", [False, True])
def test_the_order_of_passes_is_learned(again):
    order = PassOrder()
    step = forward_and_back(3, again)
    for this in step * 2:
        order.begin(this)
    for number, this in enumerate(step):
        assert order.begin(this) == (number >= 3 and not this.backward)
        following = list(order.following())
        after = [*step[number + 1 :], *step]
        assert [pass_ for pass_, _ in following] == (after + step)[: len(following)]
        assert len(following) >= len(step) - 1
        new = 0 if number < 2 else len(step) - number - 1  # the first pass whose routes are not known
        assert [known for _, known in following] == [place < new for place in range(len(following))]
    order.forget(1)
    order.begin(step[0])
    assert list(order.following()) == []


class Clock(Streams):
    """Points in time are what a test says."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.now = 0

    def mark(self, name=None):
        return self.now


def step_of(
    clock: Clock, timer: RestTimer, layers: int, again: bool = False, slow: int = 1, fails: int = -1
) -> list[float]:
    """What `begin` returns in a training step.

    1 ms before a forward, 3 before a backward or the forward that is computed again for it; a `slow` step
    takes so many times as long; the pass of number `fails` fails.
    """
    found = []
    for number, this in enumerate(forward_and_back(layers, again)):
        gap = 1_000_000 if number < layers else 50_000 if again and this.backward else 3_000_000
        clock.now += gap * slow * (100 if number == 0 else 1)  # the optimizer, and data
        timer.arrive()
        if (seconds := timer.begin(this, True)) is not None:
            found.append(seconds)
        clock.now += 7_000_000
        if number != fails:
            timer.leave()
    return found


@pytest.mark.parametrize("again", [False, True])
def test_the_rest_of_the_model_is_measured_in_two_steps(again):
    clock = Clock()
    timer = RestTimer(clock)
    assert step_of(clock, timer, 8, again, slow=50) == []  # kernels are compiled
    assert step_of(clock, timer, 8, again) == []
    expected = 1e-3 * 7 / 8 + 3e-3 * 7 / 8 + 50e-6 * again
    assert step_of(clock, timer, 8, again)[0] == pytest.approx(expected, rel=0.15)


def test_evaluation_before_training_is_not_measured():
    clock = Clock()
    timer = RestTimer(clock)
    for layer in list(range(8)) * 5:
        clock.now += 500_000_000
        timer.arrive()
        assert timer.begin(Pass(layer, False), False) is None
        timer.leave()
    assert step_of(clock, timer, 8, slow=100) == []
    assert step_of(clock, timer, 8) == []
    assert step_of(clock, timer, 8)[0] == pytest.approx(3.5e-3, rel=0.1)


def test_no_gap_begins_at_a_pass_that_failed():
    clock = Clock()
    timer = RestTimer(clock)
    for _ in range(4):
        clock.now += 10**9
        assert (
            step_of(clock, timer, 1, fails=0) == []
        )  # nothing but one pass, and what comes after a failed one


def test_short_gaps_count_nothing():
    timer = RestTimer(Clock())
    found = []
    for _ in range(3):
        for this in forward_and_back(2, False):
            timer.arrive()
            found.append(timer.begin(this, True))
            timer.leave()
    assert found[-1] == 0.0


def test_a_feed_claims_in_order_as_far_as_there_is_room():
    slots = make_slots(4)
    first, second = Stored(0), Stored(1)
    feed = Feed(slots, [Wanted(0, first, [5, 3, 1]), Wanted(1, second, [7, 6])])
    feed.advance()
    assert slots.arrived((1, 7))
    assert not slots.arrived((1, 6))
    slots.release(slots.use(0, [5, 3]))
    feed.advance()
    assert slots.arrived((1, 6))
    # The next pass wants something else: what was guessed can be used again.
    feed = Feed(slots, [Wanted(0, first, [0, 2, 4, 6])])
    feed.advance()
