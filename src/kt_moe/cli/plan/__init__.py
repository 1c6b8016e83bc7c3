"""`--dry_run` and `kt-moe plan`: the memory a run will take, whether it is there, and its speed at most."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn import functional

from kt_moe import Runtime
from kt_moe.cli.described import blamed_on, read_config
from kt_moe.cli.errors import UserError
from kt_moe.cli.plan.memory import Part, make_plan
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.outline import Outline, outline
from kt_moe.cli.plan.ranks import Job, Mode, describe_modes, modes_of
from kt_moe.cli.plan.report import add_up, describe
from kt_moe.cli.plan.speed import speed_of
from kt_moe.cli.plan.weights import weights_part
from kt_moe.cli.train import Options
from kt_moe.gpu import parse_bytes
from kt_moe.gpu.predict import CARDS
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
        job = Job(asked.plan_hosts, asked.plan_ranks, asked.plan_network * 1e9)
        gpu_free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
        if asked.plan_gpu in CARDS:
            gpu_free = CARDS[asked.plan_gpu][0] << 30
        elif asked.plan_gpu is not None:
            gpu_free = parse_bytes("--plan_gpu", asked.plan_gpu)
    except ValueError as error:
        names = f"; or one of {', '.join(CARDS)}" if "--plan_gpu" in str(error) else ""
        raise UserError(f"{error}{names}") from error
    process = Part("process", process_bytes(), "measured", "Python, PyTorch and other libraries")
    with blamed_on(name):
        model = outline(config, wanted, **trusted)
        weights, format = weights_part(Path(name), config, model, wanted.format)

    def plan(of: Outline, experts: Part) -> tuple[list[Part], list[Part]]:
        threads = max(1, runtime.threads // job.ranks)
        return make_plan(of, wanted, experts, process, threads, gpu_free)

    host, on_gpu = plan(model, weights)
    memories = {"host memory": add_up(host, free)}
    if gpu_free is not None:
        memories["GPU memory"] = add_up(on_gpu, gpu_free)
    speed = speed_of(options, model, wanted, format, weights.nbytes, runtime, gpu_free)
    fits = all(memory["spare"] >= 0 for memory in memories.values())
    modes: list[Mode] = []
    if job.size > 1:
        share = str(experts.experts_cpu_share)
        modes = modes_of(job, model, wanted, format, weights, speed.rates, plan, share, free, gpu_free)
        fits = any(mode.fits for mode in modes)
    if asked.plan_json:
        said = {"model": asdict(model), "run": asdict(wanted), "speed": asdict(speed), "fits": fits}
        said |= {"host": memories["host memory"], "gpu": memories.get("GPU memory")}
        said |= {"job": asdict(job), "modes": [asdict(mode) for mode in modes]}
        print(json.dumps(said, indent=2))
    else:
        print(describe(model, wanted, memories, speed))
        if modes:
            print("", describe_modes(job, modes), sep="\n")
    return 0 if fits else 1


def process_bytes() -> int:
    """Resident bytes of this process once PyTorch has loaded what a training step uses of it."""
    x = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    heads = functional.silu(x @ x).view(1, 64, 4, 16).transpose(1, 2)
    out = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    functional.cross_entropy(out.float().reshape(-1, 16), torch.zeros(256, dtype=torch.long)).backward()  # type: ignore[no-untyped-call]
    torch.optim.AdamW([x]).step()
    return resident()
