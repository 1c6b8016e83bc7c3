"""`--dry_run` and `kt-moe plan`: the memory a run will take, whether it is there, and its speed at most."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kt_moe import Runtime
from kt_moe.cli import finetune, train
from kt_moe.cli.described import blamed_on, read_config
from kt_moe.cli.errors import UserError
from kt_moe.cli.plan import memory, report
from kt_moe.cli.plan.gpu_speed import speed_of
from kt_moe.cli.plan.measure import measure as measure_layer
from kt_moe.cli.plan.measure import process_bytes
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.outline import outline
from kt_moe.cli.plan.weights import weights_part
from kt_moe.gpu import parse_bytes
from kt_moe.host_memory import free_memory, resident

_SHORT = {"--json": "--plan_json", "--no-measure": "--no_plan_measure", "--rates": "--experts_gpu_rates"}
_ABOUT = "kt-moe plan MODEL ...: the model comes first, or anywhere as --model MODEL."


def run(argv: Sequence[str]) -> int:
    """`kt-moe plan MODEL ...`: the plan of `kt-moe finetune --model MODEL ...`, without data or output.

    Raises:
        UserError: bad input, named in one line.
    """
    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model")
    with train.quiet():
        return dry_run(finetune.parse(words, "plan", _SHORT, _ABOUT))


def dry_run(options: train.Options) -> int:
    """Print the plan of a run; 0 if it fits, 1 if not.

    Raises:
        UserError: no such model, an architecture that the core cannot compute, or wrong options.
    """
    asked, experts = options.plan, options.experts
    name = options.model.model_name_or_path
    if not name:
        raise UserError("--model_name_or_path is missing: a directory, a config.json, or a name on the hub")
    trusted = {"trust_remote_code": options.training.trust_remote_code}
    config = read_config(name, revision=options.model.model_revision, **trusted)
    try:
        replace(experts, experts_gpu_rates=None).to_config()  # refuses what a run would
        wanted = Run.from_options(options)
        train.check_experts(options)
        experts.rates()
        runtime = Runtime(experts.experts_threads)
        described = {
            name: parse_bytes(f"--{name}", value)
            for name in ("plan_host_memory", "plan_gpu")
            if (value := getattr(asked, name)) is not None
        }
    except ValueError as error:
        raise UserError(str(error)) from error
    process = memory.Part("process", process_bytes(), "measured", "Python, PyTorch and other libraries")
    available = free_memory() + resident("RssAnon")  # the run will not be beside this process
    gpu_available = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    available = described.get("plan_host_memory", available)
    gpu_available = described.get("plan_gpu", gpu_available)
    with blamed_on(name):
        model = outline(config, wanted, **trusted)
        weights, format = weights_part(Path(name), config, model, wanted.format)
    layer = model.layers[0]
    speed = measure_layer(layer, wanted, format, runtime, free_memory()) if asked.plan_measure else None
    if speed is None:
        note = "about 10 I bytes a route, and a block of tokens a thread"
        size = memory.scratch_bytes(layer, wanted, runtime.threads)
        scratch = memory.Part("scratch of a layer call", size, "estimated", note)
    else:
        scratch = memory.Part("scratch of a layer call", speed.scratch, "measured", "scaled to all tokens")
    set_by_user = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    threshold = int(set_by_user) if set_by_user.isdecimal() else memory.MMAP_THRESHOLD
    plan = memory.make_plan(
        model, wanted, weights=weights, process=process, scratch=scratch,
        gpu=gpu_available, mmap_threshold=threshold,
    )  # fmt: skip
    with_gpu = speed_of(options, model, wanted, format, weights.nbytes, runtime, gpu_available)
    host = report.Memory("host memory", plan.host, available)
    gpu = None
    if plan.gpu is not None and gpu_available is not None:
        gpu = report.Memory("GPU memory", plan.gpu, gpu_available)
    answer = report.Answer(model, wanted, host, gpu, speed, with_gpu)
    print(json.dumps(report.to_dict(answer), indent=2) if asked.plan_json else report.describe(answer))
    return 0 if answer.fits else 1
