"""Models whose experts are divided over processes: `global_training.py PART DIRECTORY WORLD...`.

One process imports everything and makes the ranks of each world by fork, one world after the other. Their
results lie in DIRECTORY/PART-WORLD-RANK.pt. A world of one process has no group: it is what the others are
compared with.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from accelerate import Accelerator
from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command_parser,
    prepare_multi_gpu_env,
)
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from expert_parallel_ranks import said
from tiny_models import load
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import kt_moe
from kt_moe import job
from kt_moe.hf.divided import parameters_of
from kt_moe.rank_parameters import whole
from kt_moe.token_exchange import timeout_of

ROWS = 2  # of each rank in a step
STEPS = 20
MAX_NORM = 0.5
MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3-moe"
FSDP2 = MODEL.parent / "accelerate" / "fsdp2.yaml"
TEXTS = [{"text": f"def add{n}(a, b):\n    return a + b + {n}"} for n in range(12)]
PAIRS = [
    {"prompt": "def f(x):", "chosen": f" return x + {n}", "rejected": f" pass  # {n}"} for n in range(12)
]
TIMEOUT = timedelta(seconds=60)
STARTS = ("pissa", "pissa_niter_4", "olora")
# Of a model beside its family: how its experts are kept, how LoRA on them starts, how they are checkpointed.
VARIANTS: dict[str, dict[str, Any]] = {
    "wrap": {},
    **{start: {} for start in STARTS},
    "int4": {"format": "int4"},
    "fp8": {"format": "fp8"},
    "reentrant": {},
    "not reentrant": {},
    "retain": {"checkpoint_experts": "retain"},
}
Results = Any


@dataclass(frozen=True)
class Case:
    """adapter, base: directories. worlds: numbers of processes."""

    adapter: str
    base: str
    wrapper: str
    worlds: tuple[int, ...]

    def name(self, world: int) -> str:
        return f"{self.adapter}-{self.wrapper}-{world}"


CASES = {
    "DDP": Case("both", "base", "ddp", (2, 4)),
    "fully_shard": Case("both", "base", "fsdp", (3,)),
    "ZeroRedundancyOptimizer": Case("both", "base", "zero", (2,)),
    "experts alone": Case("experts", "base", "ddp", (4,)),
    "skewed": Case("on skewed", "skewed", "none", (3,)),
}


def wrapped(model: Any, wrapper: str) -> Any:
    if dist.is_initialized() and wrapper in ("ddp", "zero"):
        return DistributedDataParallel(model)
    if dist.is_initialized() and wrapper == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


def optimizers_of(trained: dict[str, Any], divided: dict[str, Any], wrapper: str) -> list[Any]:
    """Of one process that has all, or of a rank."""
    if not dist.is_initialized() or wrapper != "zero":
        # torch's kernels for many parameters at once take no sharded ones beside others
        return [torch.optim.AdamW(trained.values(), lr=1e-2, foreach=wrapper == "fsdp")]
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of torch.jit

    refused = said(ZeroRedundancyOptimizer(trained.values(), torch.optim.AdamW, lr=1e-2).step)
    assert refused.startswith("ValueError: ZeroRedundancyOptimizer has LoRA of experts"), refused
    own = [p for name, p in trained.items() if name in divided]
    shared = [p for name, p in trained.items() if name not in divided]
    return [
        torch.optim.AdamW(own, lr=1e-2),
        ZeroRedundancyOptimizer(shared, torch.optim.AdamW, lr=1e-2),
    ]


def synchronised(model: Any, last: bool) -> Any:
    """Gradients are exchanged in the last backward of a step alone."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    if hasattr(model, "no_sync") and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def fsdp_on_cpu() -> None:
    """Have accelerate take FSDP without a GPU too."""
    init = AcceleratorState.__init__

    def made(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = made


class Rank:
    """What a rank, or one process with everything, does."""

    def __init__(self, directory: Path, rank: int, world: int) -> None:
        self.directory, self.rank, self.world = directory, rank, world

    def base(self, name: str = "base", **options: Any) -> Any:
        config = kt_moe.KtMoeConfig(expert_parallel="global", **options)
        return load(self.directory / name, quantization_config=config)

    def model(self, adapter: str, base: str = "base") -> Any:
        found = peft.PeftModel.from_pretrained(self.base(base), self.directory / adapter, is_trainable=True)
        return found.train()

    def results(self) -> Iterator[tuple[str, Results]]:
        for name, case in CASES.items():
            if self.world == 1:
                for world in case.worlds:
                    yield f"{name} of {world}", self.steps(case, world)
            elif self.world in case.worlds:
                yield name, self.steps(case, self.world)

    def steps(self, case: Case, world: int) -> Results:
        """20 steps, each from the parameters that one process has then.

        One process does the work of all ranks of a world in turn: each row is a call, so that shapes, and
        with them roundings, are alike.
        """
        alone = self.world == 1
        model = self.model(case.adapter, case.base)
        call = wrapped(model, case.wrapper)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        divided = dict(model.named_parameters()) if alone else {n: d for n, _, d in parameters_of(model)}
        optimizers = optimizers_of(trained, divided, case.wrapper)
        start = None if alone else torch.load(self.directory / f"{case.name(world)}.pt")
        found: Results = {"losses": [], "norms": [], "gradients": [], "parameters": []}
        for number, batch in enumerate(torch.load(self.directory / "batches.pt")):
            if start is not None and number:
                put(trained, divided, start[number - 1])
            shares = batch[: world * ROWS].chunk(world)
            losses = []
            for share in shares if alone else [shares[self.rank]]:
                for index, row in enumerate(share.split(1)):
                    with synchronised(call, index == ROWS - 1):
                        loss = call(input_ids=row, labels=row).loss / ROWS
                        loss.backward()
                    losses.append(loss.detach())
            for name, p in trained.items():
                if alone:
                    p.grad /= world
                elif case.wrapper == "none" and name not in divided:
                    dist.all_reduce(p.grad)
                    p.grad /= world
            mean = torch.stack(losses).sum() / world
            if not alone:
                dist.all_reduce(mean)
            found["losses"].append(float(mean))
            found["gradients"].append({name: whole(p.grad).clone() for name, p in trained.items()})
            found["norms"].append(float(whole(torch.nn.utils.clip_grad_norm_(trained.values(), MAX_NORM))))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            found["parameters"].append({name: whole(p.detach()).clone() for name, p in trained.items()})
        if alone:
            torch.save(found["parameters"], self.directory / f"{case.name(world)}.pt")
        kt_moe.save_adapter(model, self.directory / f"{case.name(world)}-{self.world}")
        return found

    def saving(self) -> Iterator[tuple[str, Results]]:
        model = self.model("both")
        if self.world > 1:
            yield "timeout", str(timeout_of(next(parameters_of(model))[2].group))
            patience, job._PATIENCE = job._PATIENCE, (0.1, 0.2)
            for save in (partial(kt_moe.save_adapter, model), model.save_pretrained):
                alone = said(partial(save, self.directory / "alone")) if self.rank == 0 else ""
                dist.barrier()
            job._PATIENCE = patience
            yield "saving alone", alone
            alike = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
            yield "accelerate", said(partial(Accelerator.get_state_dict, alike, model))
        kt_moe.save_adapter(model, self.directory / f"by-kt_moe-{self.world}")
        model.save_pretrained(self.directory / f"by-peft-{self.world}")
        torch.manual_seed(3)
        config = {"r": 4, "target_modules": ["experts", "q_proj"]}
        for how in (True, "gaussian", "orthogonal", "olora"):
            fresh = peft.get_peft_model(self.base(), peft.LoraConfig(init_lora_weights=how, **config))
            kt_moe.save_adapter(fresh, self.directory / f"start-{how}-{self.world}")
            if how is True:
                yield "counts", fresh.get_nb_trainable_parameters()
        with_same = peft.LoraConfig(**config)
        with_same.__class__ = kt_moe.SharedOuterLoraConfig
        yield "shared outer", said(lambda: peft.get_peft_model(self.base(), with_same))
        own = [p for _, p, _ in parameters_of(model)]
        for p in own:
            p.grad = torch.zeros_like(p)
        yield "Adafactor", said(lambda: transformers.Adafactor(own).step())
        yield from self.resuming()
        yield "formats", said(partial(self.base, format="int8" if self.rank == 1 else "as-stored"))

    def resuming(self) -> Iterator[tuple[str, Results]]:
        """Two processes save a state after three steps; all numbers of processes go on from there."""
        batches = torch.load(self.directory / "batches.pt")[:5, :6]  # rows for one, two and three processes
        model = self.model("both")
        call = wrapped(model, "ddp")
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)

        def state() -> dict[str, Any]:
            of_model, of_optimizer = get_state_dict(call, optimizer)
            of_model = {name: t for name, t in of_model.items() if "lora_" in name}
            return {"model": of_model, "optimizer": of_optimizer}

        def step(batch: Tensor) -> None:
            call(input_ids=(share := batch.chunk(self.world)[self.rank]), labels=share).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        place = self.directory / "dcp"
        if self.world == 2:
            for batch in batches[:3]:
                step(batch)
            dcp.save(state(), checkpoint_id=place)
        else:
            found = state()
            dcp.load(found, checkpoint_id=place)
            set_state_dict(
                call, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"],
                options=StateDictOptions(strict=False),
            )  # fmt: skip
        for batch in batches[3:]:
            step(batch)
        kt_moe.save_adapter(model, self.directory / f"resumed-{self.world}")
        yield "state", {"steps": {float(s["step"]) for s in optimizer.state.values()}}

    def families(self) -> Iterator[tuple[str, Results]]:
        for name, (base, variant) in torch.load(self.directory / "families.pt").items():
            yield name, self.family(name, self.directory / base, variant)

    def family(self, name: str, base: Path, variant: str) -> Results:
        """Outputs, and gradients of all that torch has, with fixed gradients of the outputs; a row a call."""
        config = kt_moe.KtMoeConfig(expert_parallel="global", **VARIANTS.get(variant, {}))
        made = getattr(transformers, transformers.AutoConfig.from_pretrained(base).architectures[0])
        options = {} if variant == "wrap" else {"quantization_config": config}
        model = made.from_pretrained(base, dtype=torch.float32, **options)
        if variant == "wrap":
            kt_moe.wrap(model, config)
        torch.manual_seed(3)
        start = variant if variant in STARTS else False
        lora = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["experts"], init_lora_weights=start)
        model = peft.get_peft_model(model, lora)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        if variant in ("reentrant", "not reentrant", "retain"):
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": variant == "reentrant"})
        random = torch.Generator().manual_seed(1)
        outs = []
        for row in torch.randint(3, 60, (6, 10), generator=random).chunk(self.world)[self.rank].split(1):
            torch.manual_seed(0)  # of models that start from noise
            out = model(input_ids=row)[0]
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(int(row.sum()))))
            outs.append(out.detach())
        kt_moe.save_adapter(model, self.directory / f"{name}-{self.world}")
        divided = {n for n, *_ in parameters_of(model)}
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        # Those of the experts are means over processes.
        return outs, {n: g * self.world if n in divided else g for n, g in gradients.items()}, divided

    def trainers(self) -> Iterator[tuple[str, Results]]:
        yield "SFT", self.train("SFT", TEXTS, self.directory / f"sft-{self.world}")
        if self.world != 2:  # goes on from the checkpoint of two
            out = self.directory / f"sft-resumed-{self.world}"
            yield "resumed", self.train("SFT", TEXTS, out, self.directory / "sft-2" / "checkpoint-2")
        if self.world < 3:
            yield "DPO", self.train("DPO", PAIRS, self.directory / f"dpo-{self.world}")

    def fsdp2(self) -> Iterator[tuple[str, Results]]:
        """By the configuration of accelerate that is among the examples."""
        args = launch_command_parser().parse_args([f"--config_file={FSDP2}", "program.py"])
        os.environ |= prepare_multi_gpu_env(_validate_launch_command(args)[0])
        fsdp_on_cpu()
        for how in ("host", "global"):
            out = self.directory / f"fsdp2-{how}"
            yield how, self.train("SFT", TEXTS, out, how=how)
            resumed = self.train("SFT", TEXTS, out / "resumed", out / "checkpoint-2", how=how)
            yield f"{how}, resumed", resumed

    def dpo(self) -> Iterator[tuple[str, Results]]:
        for how in ("host", "global") if self.world > 1 else ("off",):
            yield how, self.train("DPO", PAIRS, self.directory / f"dpo-{how}", how=how, steps=STEPS)

    def deepspeed(self) -> Iterator[tuple[str, Results]]:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which it would compile
        for stage in (1, 2, 3):
            config = {
                "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                # As for large models: else ZeRO-3 leaves tiny parameters whole.
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            }  # fmt: skip
            out = self.directory / f"deepspeed-{stage}"
            yield f"{stage}", self.train("SFT", TEXTS, out, how="host", deepspeed=config)
            train = partial(self.train, "SFT", TEXTS, out / "global", deepspeed=config)
            yield f"{stage}, global", said(train)

    def train(
        self,
        kind: str,
        rows: list[dict[str, Any]],
        out: Path,
        checkpoint: Path | None = None,
        how: str = "global",
        steps: int = 4,
        **arguments: Any,
    ) -> Results:
        import trl
        from datasets import Dataset
        from transformers import AutoTokenizer

        args = getattr(trl, f"{kind}Config")(
            output_dir=str(out), max_steps=steps, logging_steps=1,
            per_device_train_batch_size=4 // self.world, gradient_accumulation_steps=2,
            learning_rate=1e-3, bf16=False, gradient_checkpointing=True,
            report_to="none", save_steps=steps // 4, save_total_limit=3, disable_tqdm=True, max_grad_norm=0.1,
            dataloader_pin_memory=False, seed=0, use_cpu=True, eval_strategy="steps", eval_steps=steps // 2,
            per_device_eval_batch_size=4 // self.world, router_aux_loss_coef=0.0, **arguments,
        )  # fmt: skip
        torch.manual_seed(0)
        config = kt_moe.KtMoeConfig(expert_parallel=how)
        base = transformers.AutoModelForCausalLM.from_pretrained(
            MODEL, dtype=torch.float32, quantization_config=config
        )
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "experts"])
        trainer = getattr(trl, f"{kind}Trainer")(
            peft.get_peft_model(base, lora), args=args, train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:4]), processing_class=AutoTokenizer.from_pretrained(MODEL),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_model(str(out / "last"))
        AcceleratorState._reset_state(True)
        return {
            what: [log[what] for log in trainer.state.log_history if what in log]
            for what in ("loss", "grad_norm", "eval_loss")
        }


@torch.no_grad()
def put(trained: dict[str, Any], divided: dict[str, Any], values: dict[str, Tensor]) -> None:
    """Give parameters the values that one process has."""
    for name, p in trained.items():
        if isinstance(p, DTensor):
            p.copy_(distribute_tensor(values[name], p.device_mesh, p.placements))
        else:
            p.copy_(divided[name].own(values[name]) if name in divided else values[name])


def rank_main(part: str, directory: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(11)
    transformers.utils.logging.disable_progress_bar()
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        store = f"file://{directory}/store-{part}-{world}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=TIMEOUT)
    results = {}
    start = time.perf_counter()
    for name, found in getattr(Rank(directory, rank, world), part)():
        results[name] = found
        if rank == 0:
            print(f"{part} {world} {name}: {time.perf_counter() - start:.1f} s", flush=True)
    torch.save(results, directory / f"{part}-{world}-{rank}.pt")
    if world > 1:
        dist.barrier()


def run_world(part: str, directory: Path, world: int) -> int:
    (directory / f"store-{part}-{world}").unlink(missing_ok=True)
    ranks = []
    for rank in range(world):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                rank_main(part, directory, rank, world)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            # A group's end waits, with the GIL, for a thread of gloo's that may want the GIL.
            os._exit(code)
        ranks.append(process)
    return sum(os.waitpid(process, 0)[1] != 0 for process in ranks)


if __name__ == "__main__":
    part, directory, *worlds = sys.argv[1:]
    if part in ("trainers", "dpo", "fsdp2", "deepspeed"):
        import trl  # noqa: F401 (once for all ranks)
    sys.exit(sum(run_world(part, Path(directory), int(world)) for world in worlds))
