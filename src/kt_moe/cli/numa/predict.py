"""A layer on a machine with nodes that are all alike, by the core's scaling model (src/cpp/moe/cost.h)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kt_moe import _core
from kt_moe.cli.bench.layer import Shape
from kt_moe.cli.formats import QUANTISED, projection_bytes

_LORA_BYTES = 4  # fp32, the default
_DRAWS = 32  # of the routes of one token; as many more tokens, as many fewer


@dataclass(frozen=True)
class Machine:
    """One of its nodes.

    Attributes:
        local, remote: bytes/s of its memory, and of its links to all others.
        flops_per_core: FLOP/s that products reach.
        cache: bytes of its last level.
        notes: where these come from, if not from the caller.
    """

    cores: int
    local: float
    remote: float
    flops_per_core: float
    cache: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """What is trained, and how tokens choose their experts."""

    layers: int
    format: str
    rank: int
    recompute: bool
    skew: float
    seed: int


@dataclass(frozen=True)
class Pass:
    """Forward or backward of one layer, the mean over draws of routes.

    Attributes:
        seconds: of the layer.
        limit: what takes most of the slowest node's time, in most draws.
        whole: whether experts are computed at their homes alone, in most draws.
        local, remote: bytes a token that a node reads and writes, the mean over nodes.
        nodes: for each node "local", "remote", "served" and "rows" bytes and "flops" of the layer.
    """

    seconds: float
    limit: str
    whole: bool
    local: float
    remote: float
    nodes: list[dict[str, float]]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    tokens: int
    nodes: int
    placement: str
    forward: Pass
    backward: Pass

    def tokens_per_second(self, layers: int) -> float:
        """Through forward and backward of all layers."""
        return self.tokens / (layers * (self.forward.seconds + self.backward.seconds))


def popularity(experts: int, skew: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Share of each expert, [E]: all alike, or in proportion to n^-skew."""
    weights = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    result: np.ndarray[Any, np.dtype[np.float64]] = weights / weights.sum()
    return result


@lru_cache(maxsize=16)
def draw_routes(tokens: int, experts: int, topk: int, skew: float, seed: int) -> tuple[tuple[int, ...], ...]:
    """Routes of each expert, several times: `topk` different experts a token, by their popularity."""
    random, log = np.random.default_rng(seed), np.log(popularity(experts, skew))
    draws = []
    for _ in range(max(1, _DRAWS // tokens)):
        counts = np.zeros(experts, dtype=np.int64)
        for first in range(0, tokens, 1024):
            # the largest of log p + Gumbel noise are a sample without replacement
            keys = log + random.gumbel(size=(min(1024, tokens - first), experts))
            chosen = np.argpartition(-keys, topk - 1, axis=1)[:, :topk]
            counts += np.bincount(chosen.ravel(), minlength=experts)
        draws.append(tuple(counts.tolist()))
    return tuple(draws)


def predict(shape: Shape, run: Run, machine: Machine, tokens: int, nodes: int, placement: str) -> Row:
    """Both passes of a layer."""
    forward, backward = (_pass(shape, run, machine, tokens, nodes, placement, b) for b in (False, True))
    return Row(tokens, nodes, placement, forward, backward)


def _pass(
    shape: Shape, run: Run, machine: Machine, tokens: int, nodes: int, placement: str, backward: bool
) -> Pass:
    gate, up, down = projection_bytes(QUANTISED[run.format], 1, shape.hidden, shape.intermediate).values()
    cores = [machine.cores] * nodes
    rates = [(machine.local, machine.remote, machine.cores * machine.flops_per_core, machine.cache)] * nodes
    popular = popularity(shape.experts, run.skew).tolist()
    homes = [] if placement == "tensor" else _core.assign_homes(shape.experts, cores, popular)
    align = _core.cut_align(run.format, shape.intermediate)
    results, ways = [], []
    for routes in draw_routes(tokens, shape.experts, shape.topk, run.skew, run.seed):
        call = _core.LayerCall(
            tokens=tokens, hidden=shape.hidden, intermediate=shape.intermediate, routes=list(routes),
            ranks=(run.rank,) * 3, weight_bytes=(gate, up, down), lora_bytes=_LORA_BYTES,
            backward=backward, saved=not run.recompute,
        )  # fmt: skip
        whole = placement == "expert"
        if placement == "auto":
            whole = _core.whole_is_sooner(call, cores, homes, rates, align)
        ways.append(whole)
        results.append(_core.layer_time(call, cores, homes, rates, whole, align))
    means = [
        {key: float(np.mean([r["traffic"][n][key] for r in results])) for key in results[0]["traffic"][n]}
        for n in range(nodes)
    ]
    return Pass(
        seconds=float(np.mean([r["seconds"] for r in results])),
        limit=Counter(r["limit"] for r in results).most_common(1)[0][0],
        whole=Counter(ways).most_common(1)[0][0],
        local=float(np.mean([n["local"] for n in means])) / tokens,
        remote=float(np.mean([n["remote"] for n in means])) / tokens,
        nodes=means,
    )
