"""`--dry_run` and `kt-moe plan`: the memory a run will take, whether it is there, and its speed at most."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from kt_moe import Runtime
from kt_moe.cli.described import blamed_on, read_config
from kt_moe.cli.plan.memory import Part, make_plan, weights_on_gpu, weights_part
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.outline import Outline, outline
from kt_moe.cli.plan.report import describe
from kt_moe.cli.plan.speed import modes_of, rates_of, step_of
from kt_moe.cli.terminal import UserError
from kt_moe.cli.train import Options
from kt_moe.gpu import parse_bytes
from kt_moe.gpu.predict import CARDS, ROUTINGS
from kt_moe.host_memory import free_memory, resident


def dry_run(options: Options) -> int:
    """Print the plan of a run; 0 if it fits, 1 if not.

    Raises:
        UserError: no such model, an architecture that the core cannot compute, or wrong options.
    """
    asked, experts, name = options.plan, options.experts, options.model.model_name_or_path
    trusted = {"trust_remote_code": options.training.trust_remote_code}
    config = read_config(name, revision=options.model.model_revision, **trusted)
    try:
        made = replace(experts, experts_gpu_rates=None).to_config()  # refuses what a run would
        if asked.plan_gpu is None:
            made.warn_without_gpu()
        wanted = Run.from_options(options)
        experts.rates()
        runtime = Runtime(experts.experts_threads)
        # The run will not be beside this process.
        free = free_memory() + resident("RssAnon")
        if asked.plan_host_memory is not None:
            free = parse_bytes("--plan_host_memory", asked.plan_host_memory)
        job = {"hosts": asked.plan_hosts, "ranks": asked.plan_ranks, "network": asked.plan_network * 1e9}
        for name_of, value in job.items():
            if not value > 0:
                raise ValueError(f"--plan_{name_of} is {value:g}, wanted a positive number")
        gpu_free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
        if asked.plan_gpu in CARDS:
            gpu_free = CARDS[asked.plan_gpu][0] << 30
        elif asked.plan_gpu is not None:
            gpu_free = parse_bytes("--plan_gpu", asked.plan_gpu)
    except ValueError as error:
        names = f"; or one of {', '.join(CARDS)}" if "--plan_gpu" in str(error) else ""
        raise UserError(f"{error}{names}") from error
    process = Part("process", process_bytes(), "measured: Python, PyTorch and other libraries")
    with blamed_on(name):
        model = outline(config, wanted, **trusted)
        weights, format = weights_part(Path(name), config, model, wanted.format)

    def plan(of: Outline, experts: Part) -> tuple[list[Part], list[Part]]:
        return make_plan(of, wanted, experts, process, max(1, runtime.threads // asked.plan_ranks), gpu_free)

    host, gpu = plan(model, weights)
    rates, sources = rates_of(options, model.layers[0], format, runtime)
    try:
        steps = [step_of(model, wanted, format, weights, rates, gpu_free, routing) for routing in ROUTINGS]
    except ValueError as error:
        raise UserError(f"--experts_gpu_memory: {error}") from error
    memory = weights_on_gpu(model, wanted, weights.nbytes, gpu_free)
    speed = {"memory": memory, "rates": asdict(rates), "sources": sources}
    found: dict[str, Any] = {
        "model": asdict(model),
        "run": asdict(wanted),
        "host": _add_up(host, free),
        "gpu": None if gpu_free is None else _add_up(gpu, gpu_free),
        "speed": {**speed, "predictions": [{**asdict(step), "bound": step.bound} for step in steps]},
        "job": job,
        "modes": [],
    }
    found["fits"] = all(found[place]["spare"] >= 0 for place in ("host", "gpu") if found[place])
    if asked.plan_hosts * asked.plan_ranks > 1:
        found["modes"] = modes_of(job, model, wanted, format, weights, rates, plan, free, gpu_free)
        found["fits"] = any(mode["fits"] for mode in found["modes"])
    print(json.dumps(found, indent=2) if asked.plan_json else describe(found))
    return 0 if found["fits"] else 1


def _add_up(parts: list[Part], available: int) -> dict[str, Any]:
    """What of the run lies in a memory, and what it leaves there; "spare" is negative if it does not fit."""
    nbytes, listed = sum(part.nbytes for part in parts), [asdict(part) for part in parts]
    return {"parts": listed, "nbytes": nbytes, "available": available, "spare": available - nbytes}


def process_bytes() -> int:
    """Resident bytes of this process once PyTorch has loaded what a training step uses of it."""
    x = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    heads = functional.silu(x @ x).view(1, 64, 4, 16).transpose(1, 2)
    out = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    functional.cross_entropy(out.float().reshape(-1, 16), torch.zeros(256, dtype=torch.long)).backward()  # type: ignore[no-untyped-call]
    torch.optim.AdamW([x]).step()
    return resident()
