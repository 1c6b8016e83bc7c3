"""One rank of the tests of expert parallelism: `expert_parallel_ranks.py PART RANK WORLD DIRECTORY DEVICE`.

Its results lie in DIRECTORY/PART-RANK.pt. The problems are made here, for ranks and for the one process that
they are compared with. DEVICE is cpu, or cuda, where each rank has a GPU of its own.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reference import LORA_NAMES, Problem
from strategies import make_problem
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import kt_moe
from kt_moe import _core, functional
from kt_moe.expert_parallel import ExpertParallel, local_experts
from kt_moe.rank_parameters import norm_of_all_ranks

TOKENS = {2: (9, 30), 3: (11, 0, 22), 4: (7, 0, 13, 5)}  # of each rank
EXPERTS = {2: 5, 3: 5, 4: 3}  # not divisible; a rank without experts
COUNTS = torch.tensor([9, 1, 1, 1, 1])  # of experts, for parts by load
ROUTINGS = ("random", "one", "repeat", "sparse", "none")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKPOINTS = [(reentrant, choice) for reentrant in (False, True) for choice in ("recompute", "retain")]
# Of what is not the experts'; older releases of torch have no fully_shard on the CPU, or none that leaves out
# parameters.
WRAPPERS = ["frozen router", "DistributedDataParallel"]
if hasattr(torch.cpu.Stream, "record_event") and "ignored_params" in signature(fully_shard).parameters:
    WRAPPERS.append("fully_shard")
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
STEPS = 20
MAX_NORM = 0.1
Results = dict[str, Any]


def problem_of(world: int, routing: str = "random", device: str = "cpu") -> Problem:
    ranks = {"gate": 4, "up": 8, "down": 3}
    problem = make_problem(sum(TOKENS[world]), 64, 48, EXPERTS[world], 2, ranks, routing=routing, seed=7)
    on = {
        n: getattr(problem, n).to(device) for n in ("hidden_states", "topk_ids", "topk_weights", "grad_out")
    }
    return dataclasses.replace(problem, **on, lora={n: t.to(device) for n, t in problem.lora.items()})


def tokens_of(world: int, rank: int) -> slice:
    first = sum(TOKENS[world][:rank])
    return slice(first, first + TOKENS[world][rank])


def experts_of(problem: Problem, part: range) -> kt_moe.Experts | None:
    if len(part) == 0:
        return None
    gate, up, down = (w[part.start : part.stop] for w in problem.weights if w is not None)
    return kt_moe.Experts(gate, up, down, runtime=kt_moe.Runtime(threads=1))


def leaf(tensor: Tensor, dtype: torch.dtype | None = None, needed: bool = True) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(needed)


def gradients(out: Tensor, grad_out: Tensor, leaves: dict[str, Tensor]) -> Results:
    out.backward(grad_out.to(out.dtype))
    found = {"out": out.detach(), **{name: t.grad for name, t in leaves.items() if t.requires_grad}}
    return {name: None if tensor is None else tensor.cpu() for name, tensor in found.items()}


class Block(nn.Module):
    """A router, trained or not, and a layer of experts with LoRA.

    layer: computes as `kt_moe.moe` with experts bound.
    """

    def __init__(self, problem: Problem, part: range, layer: Callable[..., Tensor], router: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.router = nn.Linear(problem.hidden_states.shape[1], len(problem.weights[1]))
        self.router.requires_grad_(router)
        self.lora = nn.ParameterDict(
            {name: t[part.start : part.stop].clone() for name, t in problem.lora.items() if len(part)}
        )
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(dim=-1).topk(2)
        return x + self.layer(x, ids, weights, dict(self.lora), scaling=(2.0, 1.5, 0.5))


def optimizer_of(block: Block) -> torch.optim.Optimizer:
    # In groups of their own: AdamW updates no mixture of tensors and DTensors at once.
    groups = [{"params": list(part.parameters())} for part in (block.router, block.lora)]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3)


def loss_of(out: Tensor, problem: Problem, tokens: slice) -> Tensor:
    """Mean over the tokens; 0, with a graph, of none."""
    target = problem.grad_out[tokens].float()
    return (out - target).square().sum() / max(1, target.numel())


class Rank:
    def __init__(self, rank: int, world: int, device: str) -> None:
        self.rank, self.world, self.tokens, self.device = rank, world, tokens_of(world, rank), device
        self.problem = problem_of(world, device=device)
        self.part = local_experts(EXPERTS[world])

    def layer(self, problem: Problem | None = None, **options: Any) -> ExpertParallel:
        experts = experts_of(problem or self.problem, self.part)
        return ExpertParallel(experts, EXPERTS[self.world], **options)

    def leaves(self, problem: Problem, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        mine = {
            "hidden_states": leaf(problem.hidden_states[self.tokens], dtype),
            "topk_weights": leaf(problem.topk_weights[self.tokens]),
        }
        if len(self.part):
            for name in LORA_NAMES:
                mine[name] = leaf(problem.lora[name][self.part.start : self.part.stop])
        return mine

    def run(
        self,
        layer: ExpertParallel,
        problem: Problem,
        leaves: dict[str, Tensor],
        around: Callable[..., Tensor] = lambda f, *args: f(*args),
        dropout: float = 0.0,
    ) -> Results:
        lora = {name: leaves[name] for name in LORA_NAMES if name in leaves}
        ids = problem.topk_ids[self.tokens]

        def call(x: Tensor, weights: Tensor) -> Tensor:
            # Before and behind the layer something else that saves tensors, and changes no number.
            x = x.clamp(-1e9, 1e9)
            out = layer(x, ids, weights, lora, scaling=problem.scaling, dropout=dropout)
            return out.clamp(-1e9, 1e9)

        out = around(call, leaves["hidden_states"], leaves["topk_weights"])
        return gradients(out, problem.grad_out[self.tokens], leaves)

    def results(self) -> Iterator[tuple[str, Results]]:
        yield from self.equality()
        for wrapper in WRAPPERS:
            yield wrapper, self.train(wrapper)

    def equality(self) -> Iterator[tuple[str, Results]]:
        for routing in ROUTINGS:
            problem = problem_of(self.world, routing, self.device)
            layer = self.layer(problem, average=False)
            for name, dtype in DTYPES.items():
                yield f"{routing} {name}", self.plain(layer, problem, dtype)
        for chunks in (2, 4):
            layer = self.layer(average=False, chunks=chunks)
            for name, dtype in DTYPES.items():
                yield f"{chunks} chunks {name}", self.plain(layer, self.problem, dtype)
            yield from self.checkpointed(layer, f"{chunks} chunks ")
            yield f"{chunks} chunks only lora", self.only_lora(layer)
        equal = self.part
        self.part = local_experts(EXPERTS[self.world], counts=COUNTS[: EXPERTS[self.world]])
        yield "by load", self.plain(self.layer(average=False), self.problem, torch.float32)
        yield "parts", {"equal": torch.tensor(len(equal)), "by load": torch.tensor(len(self.part))}
        self.part = equal
        layer = self.layer(average=False)
        yield "again", self.plain(layer, self.problem, torch.float32)
        yield "average", self.plain(self.layer(), self.problem, torch.float32)
        yield from self.checkpointed(layer)
        for name, around in {
            "dropout": lambda f, *args: f(*args),
            "dropout checkpoint": lambda f, *args: checkpoint(f, *args, use_reentrant=False),
        }.items():
            torch.manual_seed(self.rank)
            leaves = self.leaves(self.problem, torch.float32)
            yield name, self.run(layer, self.problem, leaves, around, dropout=0.5)
        with torch.no_grad():
            leaves = self.leaves(self.problem, torch.float32)
            yield "no_grad", {"out": self.call(layer, self.problem, leaves).cpu()}
        leaves = self.leaves(self.problem, torch.float32)
        out = self.call(layer, self.problem, leaves) + self.call(layer, self.problem, leaves)
        yield "two calls", gradients(out, self.problem.grad_out[self.tokens], leaves)
        yield "only lora", self.only_lora(layer)
        for name, tensor in (leaves := self.leaves(self.problem, torch.float32)).items():
            tensor.requires_grad_(self.rank == 0 and name == "hidden_states")
        out = self.call(layer, self.problem, leaves)
        yield "only tokens of rank 0", gradients(out, self.problem.grad_out[self.tokens], leaves)

    def checkpointed(self, layer: ExpertParallel, prefix: str = "") -> Iterator[tuple[str, Results]]:
        for reentrant, choice in CHECKPOINTS:
            if layer.experts is not None:
                layer.experts.checkpoint_experts = choice

            def around(f: Any, *args: Any, reentrant: bool = reentrant) -> Tensor:
                return checkpoint(f, *args, use_reentrant=reentrant)

            leaves = self.leaves(self.problem, torch.float32)
            found = self.run(layer, self.problem, leaves, around)
            yield f"{prefix}checkpoint {reentrant} {choice}", found

    def only_lora(self, layer: ExpertParallel) -> Results:
        leaves = self.leaves(self.problem, torch.float32)
        for name in ("hidden_states", "topk_weights"):
            leaves[name].requires_grad_(False)
        out = self.call(layer, self.problem, leaves)
        return gradients(out, self.problem.grad_out[self.tokens], leaves)

    def plain(self, layer: ExpertParallel, problem: Problem, dtype: torch.dtype) -> Results:
        leaves = self.leaves(problem, dtype)
        return gradients(self.call(layer, problem, leaves), problem.grad_out[self.tokens], leaves)

    def call(self, layer: ExpertParallel, problem: Problem, leaves: dict[str, Tensor]) -> Tensor:
        lora = {name: leaves[name] for name in LORA_NAMES if name in leaves}
        x, ids, weights = leaves["hidden_states"], problem.topk_ids[self.tokens], leaves["topk_weights"]
        return layer(x, ids, weights, lora, scaling=problem.scaling)

    def train(self, wrapper: str) -> Results:
        layer = self.layer(group=dist.new_group())
        block = Block(self.problem, self.part, layer, wrapper != "frozen router").to(self.device)
        wrapped: nn.Module = block
        if wrapper == "fully_shard":
            fully_shard(
                block,
                mesh=init_device_mesh(self.device, (self.world,)),
                ignored_params={*block.lora.values()},
            )
        if wrapper == "DistributedDataParallel":
            ours = [f"lora.{name}" for name in block.lora]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(block, ours)
            wrapped = DistributedDataParallel(block)
        optimizer = optimizer_of(block)
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            out = wrapped(self.problem.hidden_states[self.tokens].float())
            loss = loss_of(out, self.problem, self.tokens)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().cpu())
        gathered = kt_moe.gather_lora(dict(block.lora), layer.group)
        parameters = {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu().clone()
            for name, p in block.named_parameters()
        }
        shared, local = block.router.parameters(), block.lora.parameters()
        norm = kt_moe.clip_grad_norm_(shared, local, MAX_NORM, layer.group)
        clipped = {name: p.grad.cpu() for name, p in block.named_parameters() if name.startswith("lora")}
        return {
            "losses": torch.stack(losses),
            "parameters": parameters,
            "gathered": gathered,
            "norm": norm.cpu(),
            "clipped": clipped,
        }

    def errors(self) -> Iterator[tuple[str, Any]]:
        problem, layer = self.problem, self.layer()
        leaves = self.leaves(problem)

        def first(x: Tensor) -> Tensor:
            return self.call(layer, problem, {**leaves, "hidden_states": x})

        def backward(x: Tensor) -> None:
            run_again = self.rank == 0
            out = checkpoint(first, x, use_reentrant=False) if run_again else first(x)
            out.sum().backward()

        x = leaves["hidden_states"]
        yield "recomputed by one", said(lambda: backward(x))
        with torch.set_grad_enabled(self.rank != 1):
            yield "recorded by some", said(lambda: first(x))
        yield "worked in between", said(lambda: first(x))
        ids = problem.topk_ids.clone()
        ids[tokens_of(self.world, 0)] = EXPERTS[self.world] + (1 if self.rank == 0 else 0)
        beyond = dataclasses.replace(problem, topk_ids=ids)
        yield "ids", said(lambda: self.call(layer, beyond, leaves))
        wrong = leaves
        if self.rank == 0:
            wrong = {**leaves, "up_lora_a": torch.zeros(1, 8, 64)[:, :, :-1]}
        yield "lora", said(lambda: self.call(layer, problem, wrong))
        if self.rank == 0:
            wrong = {**leaves, "up_lora_a": leaves["up_lora_a"].detach().numpy()}
        yield "array", said(lambda: self.call(layer, problem, wrong))
        seed: Any = "seven" if self.rank == 2 else 7  # which has no experts here
        few = ExpertParallel(experts_of(problem, local_experts(2)), 2, chunks=2)
        inputs = leaves["hidden_states"], problem.topk_ids[self.tokens] % 2, leaves["topk_weights"]
        yield "seed", said(lambda: few(*inputs, dropout=0.5, seed=seed))
        other = self.layer()
        yield (
            "layers in another order",
            said(lambda: self.call(other if self.rank == 1 else layer, problem, leaves)),
        )
        narrow = dataclasses.replace(problem, topk_ids=problem.topk_ids[:, :1].contiguous())
        fewer = {**leaves, "topk_weights": leaves["topk_weights"][:, :1]}
        one = self.rank == 1
        fresh = self.layer()
        yield "K", said(lambda: self.call(fresh, narrow if one else problem, fewer if one else leaves))
        experts, count = experts_of(problem, self.part), EXPERTS[self.world]
        yield "num_experts", said(lambda: ExpertParallel(experts, count + (self.rank == 1)))
        small = make_problem(1, 32, 48, count, 2, {})
        yield (
            "hidden_size",
            said(lambda: ExpertParallel(experts_of(small, self.part) if self.rank == 1 else experts, count)),
        )
        yield (
            "part",
            said(
                lambda: ExpertParallel(
                    experts_of(problem, range(count)) if self.rank == 1 else experts, count
                )
            ),
        )
        yield "kind", said(lambda: ExpertParallel(problem if self.rank == 1 else experts, count))
        yield "average", said(lambda: ExpertParallel(experts, count, average=self.rank == 1))
        chunks = 2 if self.rank == 1 else None
        yield "chunks", said(lambda: ExpertParallel(experts, count, chunks=chunks))
        for wrong in (3, 2.0):
            yield f"{wrong} chunks", said(partial(ExpertParallel, experts, count, chunks=wrong))
        yield from self.norms()
        alone = dist.new_group([0])
        yield "group", said(lambda: local_experts(count, alone))
        yield "works still", said(lambda: first(x))

    def norms(self) -> Iterator[tuple[str, Any]]:
        """Rank 1's gradient is not a number."""
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.full((1,), float("nan" if self.rank == 1 else 1))
        of_all = partial(norm_of_all_ranks, [parameter.grad], group=None, device=torch.device("cpu"))
        yield "norms", [of_all(norm_type=norm_type) for norm_type in (2.0, float("inf"))]
        yield "norm 0", said(lambda: of_all(norm_type=0.0))
        kt_moe.clip_grad_norm_([], [parameter], MAX_NORM)
        yield "clipped by NaN", parameter.grad

    def killed(self) -> Iterator[tuple[str, str]]:
        """Rank 1 is gone in backward."""
        layer, leaves = self.layer(), self.leaves(self.problem)
        out = self.call(layer, self.problem, leaves)
        if self.rank == 1:
            os._exit(7)
        yield "killed", said(lambda: out.sum().backward())

    def killed_in_forward(self) -> Iterator[tuple[str, str]]:
        """Rank 1 is killed by its own experts."""
        layer, leaves = self.layer(), self.leaves(self.problem)
        if self.rank == 1:
            functional._core = Broken(forward=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        yield "killed", said(lambda: self.call(layer, self.problem, leaves))

    def faults(self) -> Iterator[tuple[str, Any]]:
        """Rank 1 is slow, fails in its experts' backward, is silent, and fails outside of any layer."""
        layer = self.layer()
        yield "as it should be", self.plain(layer, self.problem, torch.float32)
        if self.rank == 1:
            time.sleep(1.5)
        yield "slow", self.plain(layer, self.problem, torch.float32)
        core = functional._core
        if self.rank == 1:
            functional._core = Broken(backward=out_of_memory)
        yield "backward", said(lambda: self.plain(layer, self.problem, torch.float32))
        functional._core = core
        yield "afterwards", self.plain(layer, self.problem, torch.float32)
        chunks = self.layer(chunks=4)
        yield "chunks", self.plain(chunks, self.problem, torch.float32)
        for name, broken in {
            "backward": Broken(backward=out_of_memory),
            "forward": Broken(forward=out_of_memory),
        }.items():
            if self.rank == 1:
                functional._core = broken
            yield f"{name} in chunks", said(lambda: self.plain(chunks, self.problem, torch.float32))
            functional._core = core
        yield "chunks afterwards", self.plain(chunks, self.problem, torch.float32)
        short = self.layer(group=dist.new_group(timeout=timedelta(seconds=2)))
        began = time.monotonic()
        if self.rank != 1:
            yield "silent", said(lambda: self.plain(short, self.problem, torch.float32))
        yield "seconds", time.monotonic() - began
        dist.barrier()
        if self.rank == 1:
            raise ValueError("a row of the data set is empty")
        yield "uncaught", said(lambda: self.plain(layer, self.problem, torch.float32))


class Broken:
    """The core with other functions."""

    def __init__(self, **functions: Any) -> None:
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(_core, name)


def out_of_memory(*_: object) -> None:
    raise MemoryError("no memory for dG")


def said(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@contextmanager
def group(rank: int, world: int, directory: Path, part: str, device: str) -> Iterator[None]:
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend, store = BACKENDS[device], f"file://{directory}/store-{part}"
    dist.init_process_group(
        backend, init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    yield
    if part in ("results", "errors"):
        dist.barrier()


def main(part: str, rank: str, world: str, directory: str, device: str) -> None:
    torch.set_num_threads(1)
    with group(int(rank), int(world), Path(directory), part, device):
        results = dict(getattr(Rank(int(rank), int(world), device), part)())
        torch.save(results, Path(directory) / f"{part}-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    # A group's end waits, with the GIL, for a thread of gloo's that may want the GIL.
    os._exit(0)
