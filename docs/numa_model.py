"""How fast a layer's experts are on machines with several memory nodes: the tables of numa.md.

Bytes and FLOPs of each node are counted from the cut, as numa.md derives them, and divided by the rates of
memory, links and cores. Nodes are all alike.

    python docs/numa_model.py --preset qwen3-30b-a3b --tokens 1024 --nodes 1,2,4
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from kt_moe.cli.bench.cases import PRESETS, Shape
from kt_moe.cli.formats import QUANTISED, projection_bytes
from kt_moe.cli.terminal import count_text, integer, list_of, table
from kt_moe.experts import PLACEMENTS

BF16 = 2
FP32 = 4
LORA_BYTES = 4  # fp32, the default
BLOCK_ROWS = 512  # kBlockRows of src/cpp/moe/plan.h
GEMV_ROWS = 8  # kGemvRows of src/cpp/kernels/kernel_set.h
CACHE_BYTES = 512 << 10  # kMostCacheBytes, of a task's weights
ROW_BYTES = 3 * 256 * FP32  # kChunksInUse chunks of kChunkCols columns of a routed token's result
TASK, WAIT, FAR_WAIT = 1e-6, 2e-6, 5e-6  # seconds to take a task, to see that others are done, from far
DRAWS = 32  # of the routes of one token; as many more tokens, as many fewer
GATE, UP, DOWN = range(3)


@dataclass(frozen=True)
class Node:
    """Bytes/s of its memory and of its links to all others, FLOP/s of a core, bytes of its last cache."""

    cores: int
    local: float
    remote: float
    core_flops: float
    cache: float


@dataclass(frozen=True)
class Call:
    """Forward or backward of a layer."""

    shape: Shape
    tokens: int
    routes: np.ndarray  # [E]
    rank: int
    weight_bytes: tuple[int, int, int]  # of one expert's gate, up and down
    backward: bool
    saved: bool  # forward keeps G, U and P; backward has them, or else computes them again


class Account:
    """Bytes that each of S nodes moves and FLOPs that it computes in a call.

    Args:
        widths: [S], what each node has of the intermediate dimension.
        homes: [E], the node that computes an expert whole; None: each node computes its slice of all.

    Attributes:
        moved: [S, S] bytes that a node reads and writes (rows) in the memory of another (columns).
        rows: [S] of those in its own, fp32 results of routes; flops: [S] of products.
        kept: [S] routes whose rows it keeps at a time.
    """

    def __init__(self, call: Call, widths: list[int], homes: list[int] | None) -> None:
        self.call, self.whole = call, homes is not None
        self.nodes, self.hidden = len(widths), call.shape.hidden
        self.summed = not self.whole and self.nodes > 1
        self.moved = np.zeros((self.nodes, self.nodes))
        self.rows, self.flops = np.zeros(self.nodes), np.zeros(self.nodes)
        cut = np.array(widths, dtype=float)
        self.part = cut / call.shape.intermediate
        self.width = np.full(self.nodes, float(call.shape.intermediate)) if self.whole else cut
        self.share_out(homes)
        if call.backward:
            self.backward()
        else:
            self.forward()

    def share_out(self, homes: list[int] | None) -> None:
        """Routes, their blocks and those that are packed, and whose P and Q each node computes or adds up."""
        routes = self.call.routes
        blocks = -(-routes // BLOCK_ROWS)
        amounts = np.stack([routes, blocks, np.where(routes > GEMV_ROWS, routes, 0), np.ones_like(routes)])
        if homes is not None:
            shared = np.zeros((4, self.nodes))
            np.add.at(shared, (slice(None), homes), amounts)
            self.home_routes, self.home_blocks = shared[0], shared[1]
            self.kept = shared[0]
        else:
            shared = np.where(self.width > 0, amounts.sum(axis=1, keepdims=True), 0).astype(float)
            home = np.arange(blocks.sum()) % self.nodes  # in turn
            each = np.repeat(routes / np.maximum(blocks, 1), blocks)
            self.home_routes = np.bincount(home, each, minlength=self.nodes)
            self.home_blocks = np.bincount(home, minlength=self.nodes)
            self.kept = np.full(self.nodes, float(routes.sum()))
        self.routes, self.blocks, self.packed, self.experts = shared

    def forward(self) -> None:
        self.gather()
        self.gate_up(self.call.saved)
        self.own(BF16 * (self.routes + self.packed) * self.width)  # h, read and packed
        self.product_of_slice(copies=2 if self.call.saved else 1)
        self.weights(DOWN)
        self.own(BF16 * self.packed * self.width)
        self.second_of_row()
        self.sum()

    def backward(self) -> None:
        if not self.call.saved:
            self.gather()
            self.gate_up(keep=True)
            self.product_of_slice(copies=1)
        self.gather()  # dY
        self.product_of_row(copies=2)
        self.weights(DOWN)
        self.second_of_slice()
        self.own(BF16 * (self.packed * self.hidden + 5 * self.routes * self.width))  # dh, dG, dU, h
        self.own(2 * BF16 * (self.routes + self.packed) * self.width)
        for projection in (GATE, UP):
            self.product_of_slice(copies=2)
            self.weights(projection)
            self.own(BF16 * self.packed * self.width)
            self.second_of_row()
        self.sum()
        for _ in range(3):
            self.gradient_of_row()
            self.gradient_of_slice()

    def gather(self) -> None:
        self.callers(BF16 * self.routes * self.hidden)
        self.own(BF16 * self.packed * self.hidden)

    def gate_up(self, keep: bool) -> None:
        for projection in (GATE, UP):
            self.product_of_row(copies=1)
            self.weights(projection)
            self.second_of_slice()
        self.own(BF16 * (self.packed * self.hidden + (3 if keep else 1) * self.routes * self.width))

    def sum(self) -> None:
        """[T, H]: who wrote rows adds them up; then all nodes add the sums of each, some of the tokens."""
        result = self.call.tokens * self.hidden
        row_bytes = FP32 * self.hidden
        self.own(row_bytes * self.routes)
        self.rows += row_bytes * self.routes
        if self.whole:
            self.moved += row_bytes * np.outer(self.part, self.routes)
            self.rows += row_bytes * self.part * self.routes
        else:
            there = self.width > 0
            self.own(row_bytes * self.routes)
            self.rows += row_bytes * self.routes
            if self.summed:
                self.own(FP32 * result * there)
                self.moved += FP32 * result * np.outer(self.part, there)
        self.callers(BF16 * result * self.part)

    # Products with the LoRA matrix that has a side of H, which is not cut. The first, [routes, H] by [H, r]:
    # P of gate and up, Q of down. At home, in `copies`, and read by whoever has those routes.
    def product_of_row(self, copies: int) -> None:
        self.second_of_row()  # as many FLOPs, and as much of LoRA
        self.own(copies * BF16 * self.home_routes * self.call.rank)
        self.read_low_rank(np.ones(self.nodes))

    # The second, [routes, r] by [r, H], at home: of the other nodes' sums it is no part.
    def second_of_row(self) -> None:
        self.flops += 2 * self.home_routes * self.call.rank * self.hidden
        self.callers(self.home_blocks * self.hidden * self.call.rank * LORA_BYTES)

    # The gradient of that matrix, by any node.
    def gradient_of_row(self) -> None:
        part = np.ones(self.nodes) if self.whole else self.part
        side = self.hidden * self.call.rank
        self.flops += 2 * part * self.routes * side
        if self.call.rank:
            self.callers(BF16 * part * self.routes * self.hidden + part * self.experts * side * LORA_BYTES)
        self.read_low_rank(part)

    # Products with the one that has a side of I, of which each node has a slice. The first, [routes, I] by
    # [I, r]: Pd, and Q of gate and up. Sums of fp32, which the home of their routes adds up and rounds.
    def product_of_slice(self, copies: int) -> None:
        self.second_of_slice()
        if self.summed:
            self.own(FP32 * self.routes * self.call.rank)
            self.moved += FP32 * self.call.rank * np.outer(self.home_routes, self.width > 0)
        self.own((copies + 1) * BF16 * self.home_routes * self.call.rank)

    # The second, [routes, r] by [r, I].
    def second_of_slice(self) -> None:
        self.flops += 2 * self.routes * self.call.rank * self.width
        self.callers(self.blocks * self.width * self.call.rank * LORA_BYTES)

    def gradient_of_slice(self) -> None:
        if not self.call.rank:
            return
        self.flops += 2 * self.routes * self.width * self.call.rank
        self.own(BF16 * self.routes * self.width)
        self.callers(self.experts * self.width * self.call.rank * LORA_BYTES)
        self.read_low_rank((self.width > 0).astype(float))

    def read_low_rank(self, part: np.ndarray) -> None:
        """A part of P or Q of the routes that a node computes, from their homes."""
        if self.whole:
            self.own(part * BF16 * self.home_routes * self.call.rank)
        else:
            self.moved += BF16 * self.call.rank * np.outer(part * (self.routes > 0), self.home_routes)

    def weights(self, projection: int) -> None:
        """A node's part of them, once a block, and the products with them."""
        self.own(self.blocks * self.call.weight_bytes[projection] * self.width / self.call.shape.intermediate)
        self.flops += 2 * self.routes * self.hidden * self.width

    def own(self, of_each: np.ndarray) -> None:
        self.moved += np.diag(of_each)

    def callers(self, of_each: np.ndarray) -> None:
        """Memory of the caller lies on all nodes alike."""
        self.moved += np.outer(of_each, np.full(self.nodes, 1 / self.nodes))


@dataclass(frozen=True)
class Pass:
    """One pass of a layer, or the mean of several.

    Attributes:
        seconds: of the layer; limit: what takes most of the slowest node's time.
        local, remote: bytes that a node moves in its own memory and in others', the mean over nodes.
    """

    seconds: float
    limit: str
    local: float
    remote: float


def time_of(call: Call, node: Node, widths: list[int], homes: list[int] | None) -> Pass:
    """The time of the slowest node, and of handing out tasks and waiting for each other."""
    a = Account(call, widths, homes)
    local = np.diag(a.moved)
    remote, served = a.moved.sum(axis=1) - local, a.moved.sum(axis=0) - local
    cached = a.kept * ROW_BYTES <= node.cache
    memory = (local + served - np.where(cached, a.rows, 0)) / node.local
    times = np.stack([a.flops / (node.cores * node.core_flops), memory, remote / node.remote])
    slowest = float(times.max())
    limit = ("compute", "memory", "remote")[int(times.max(axis=1).argmax())]

    again = call.backward and not call.saved
    blocks = float((-(-call.routes // BLOCK_ROWS)).sum())
    weights = 3 * BF16 * call.shape.hidden * call.shape.intermediate
    tasks = blocks * (3 + math.ceil(weights / CACHE_BYTES)) * (2 if again else 1)
    near, far = (5 if call.backward else 4) + (2 if again else 0), 1
    if not a.whole:
        far += 3 if call.backward else 2  # P or Q from home, its parts, the parts of the sum
    if a.nodes == 1:
        near, far = near + 1, 0
    overhead = tasks * TASK / (a.nodes * node.cores) + near * WAIT + far * FAR_WAIT
    if overhead > slowest:
        limit = "overhead"
    return Pass(slowest + overhead, limit, float(local.mean()), float(remote.mean()))


def slices(intermediate: int, nodes: int, kind: dict[str, Any]) -> list[int]:
    """[S], as `split_by` of src/cpp/base/split.h cuts it for nodes that are alike."""
    align = 32
    for block in (kind["scale_rows"], kind["scale_cols"]):
        if kind["scale"] != "none" and 0 < block < intermediate:
            align = math.lcm(align, block)
    blocks = -(-intermediate // align)
    cuts = [min(intermediate, (blocks * n + nodes // 2) // nodes * align) for n in range(nodes + 1)]
    return [end - begin for begin, end in pairwise(cuts)]


def share_out_homes(popularity: np.ndarray, nodes: int) -> list[int]:
    """[E], as `assign_homes` of src/cpp/weights/layer_memory.cpp does it for nodes that are alike."""
    room = [-(-len(popularity) // nodes)] * nodes
    load = [0.0] * nodes
    homes = [0] * len(popularity)
    relative = popularity / popularity.max()
    for e in np.argsort(-popularity, kind="stable"):
        best = min((s for s in range(nodes) if room[s]), key=lambda s: load[s])
        homes[e] = best
        load[best] += relative[e]
        room[best] -= 1
    return homes


def popularity(experts: int, skew: float) -> np.ndarray:
    """Share of each expert, [E]: all alike, or in proportion to n^-skew."""
    weights = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    return weights / weights.sum()


@lru_cache(maxsize=16)
def draw_routes(tokens: int, experts: int, topk: int, skew: float, seed: int) -> list[np.ndarray]:
    """Routes of each expert, [E], several times: `topk` different experts a token, by their popularity."""
    random, log = np.random.default_rng(seed), np.log(popularity(experts, skew))
    draws = []
    for _ in range(max(1, DRAWS // tokens)):
        counts = np.zeros(experts, dtype=np.int64)
        for first in range(0, tokens, 1024):
            # the largest of log p + Gumbel noise are a sample without replacement
            keys = log + random.gumbel(size=(min(1024, tokens - first), experts))
            chosen = np.argpartition(-keys, topk - 1, axis=1)[:, :topk]
            counts += np.bincount(chosen.ravel(), minlength=experts)
        draws.append(counts)
    return draws


def predict(
    args: argparse.Namespace,
    shape: Shape,
    node: Node,
    tokens: int,
    nodes: int,
    placement: str,
    backward: bool,
) -> Pass:
    """The mean over draws of routes."""
    kind = QUANTISED[args.format]
    gate, up, down = projection_bytes(kind, 1, shape.hidden, shape.intermediate).values()
    widths = slices(shape.intermediate, nodes, kind)
    homes = share_out_homes(popularity(shape.experts, args.skew), nodes) if placement == "expert" else None
    passes = [
        time_of(
            Call(shape, tokens, routes, args.rank, (gate, up, down), backward, not args.recompute),
            node, widths, homes,
        )
        for routes in draw_routes(tokens, shape.experts, shape.topk, args.skew, args.seed)
    ]  # fmt: skip
    return Pass(
        seconds=float(np.mean([p.seconds for p in passes])),
        limit=Counter(p.limit for p in passes).most_common(1)[0][0],
        local=float(np.mean([p.local for p in passes])),
        remote=float(np.mean([p.remote for p in passes])),
    )


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="qwen3-30b-a3b", help="shape of a model")
    for name in ("hidden", "intermediate", "experts", "topk"):
        add(f"--{name}", type=integer(1), help="instead of the model's")
    add("--layers", type=integer(1), default=1, help="with experts; default: 1")
    add("--format", choices=list(QUANTISED), default="bf16", help="of the weights; default: bf16")
    add("--tokens", type=list_of(integer(1)), default=[1, 64, 1024, 8192], help="default: 1,64,1024,8192")
    add("--rank", type=integer(0), default=16, help="of LoRA on all three; default: 16")
    add("--recompute", action="store_true", help="backward computes G and U again")
    add("--skew", type=float, default=0.0, help="popularity of the n-th expert is n^-X; default: 0")
    add("--seed", type=integer(0), default=0, help="of the routes drawn; default: 0")
    add("--nodes", type=list_of(integer(1)), default=[1, 2, 4, 8, 16], help="default: 1,2,4,8,16")
    add("--cores-per-node", type=integer(1), default=48)
    add("--local-gb-s", type=float, default=285, help="10^9 bytes/s of a node's memory")
    add("--remote-gb-s", type=float, default=110, help="of its reads and writes of all others")
    add("--tflops-per-core", type=float, default=0.7, help="that products reach")
    add("--cache-mb", type=float, default=256, help="last cache of a node, 10^6 bytes")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    shape = PRESETS[args.preset]
    own = {name: getattr(args, name) for name in ("hidden", "intermediate", "experts", "topk")}
    if any(own.values()):
        shape = replace(shape, name="custom", **{name: value for name, value in own.items() if value})
    if shape.topk > shape.experts:
        raise SystemExit(f"--topk is {shape.topk}, more than the {shape.experts} experts there are")
    node = Node(
        args.cores_per_node, args.local_gb_s * 1e9, args.remote_gb_s * 1e9,
        args.tflops_per_core * 1e12, args.cache_mb * 1e6,
    )  # fmt: skip
    header = ["tokens", "nodes", "placement"]
    header += ["fwd local", "remote", "ms", "limit", "bwd local", "remote", "ms", "limit", "tokens/s"]
    lines = [header]
    for tokens in args.tokens:
        for nodes in args.nodes:
            for placement in PLACEMENTS:
                cells, seconds = [str(tokens), str(nodes), placement], 0.0
                for backward in (False, True):
                    p = predict(args, shape, node, tokens, nodes, placement, backward)
                    megabytes = (p.local / tokens / 1e6, p.remote / tokens / 1e6)
                    cells += [*map(digits, megabytes), digits(p.seconds * 1e3), p.limit]
                    seconds += args.layers * p.seconds
                lines.append([*cells, digits(tokens / seconds)])
    numeric = [i for i, name in enumerate(header) if name not in ("placement", "limit")]
    print(table(lines, right=numeric))
    print("\nlocal, remote: MB a token that a node reads and writes in its own memory and in others'.")
    print(f"ms: of a layer. tokens/s: forward and backward of {count_text(args.layers, 'layer')}.")


def digits(value: float) -> str:
    """Three of them, or all before the point."""
    if value >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:.{2 if value >= 1 else 3}f}" if value < 10 else f"{value:.1f}"


if __name__ == "__main__":
    main()
