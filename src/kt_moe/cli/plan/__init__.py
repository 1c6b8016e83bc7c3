"""`kt-moe plan`: the memory a training run will take, whether this machine has it, and its speed at most."""

from __future__ import annotations

import argparse
import json
import os

from kt_moe.cli.errors import UserError
from kt_moe.cli.plan.options import Run, add_arguments
from kt_moe.host_memory import free_memory, resident

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0 if the run fits this machine, 1 if not.

    Raises:
        UserError: no such model, an architecture that the core cannot compute, or wrong options.
    """
    wanted = Run.from_args(args)
    try:
        from kt_moe.cli import train  # (all that a run imports, for its memory)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install 'kt_moe[train]'") from error
    with train.quiet():
        return _plan(args, wanted)


def _plan(args: argparse.Namespace, wanted: Run) -> int:
    import torch

    from kt_moe import Runtime
    from kt_moe.cli.described import blamed_on, read_config
    from kt_moe.cli.plan import memory, report
    from kt_moe.cli.plan.gpu_speed import speed_of
    from kt_moe.cli.plan.measure import measure, process_bytes
    from kt_moe.cli.plan.outline import outline
    from kt_moe.cli.plan.weights import weights_part

    try:
        runtime = Runtime(args.threads)
    except ValueError as error:  # KT_MOE_ISA and its kin
        raise UserError(str(error)) from error
    process = memory.Part("process", process_bytes(), "measured", "Python, PyTorch and other libraries")
    available = free_memory() + resident("RssAnon")  # the run will not be beside this process
    config = read_config(str(args.model))
    with blamed_on(args.model):
        model = outline(config, wanted)
        weights, format = weights_part(args.model, config, model, wanted.format)
    layer = model.layers[0]
    speed = None if args.no_measure else measure(layer, wanted, format, runtime, free_memory())
    if speed is None:
        note = "about 10 I bytes a route, and a block of tokens a thread"
        size = memory.scratch_bytes(layer, wanted, runtime.threads)
        scratch = memory.Part("scratch of a layer call", size, "estimated", note)
    else:
        scratch = memory.Part("scratch of a layer call", speed.scratch, "measured", "scaled to all tokens")
    device = None if args.gpu in ("auto", "off") else args.gpu
    gpu_available = torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    set_by_user = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    threshold = int(set_by_user) if set_by_user.isdecimal() else memory.MMAP_THRESHOLD
    plan = memory.make_plan(
        model, wanted, weights=weights, process=process, scratch=scratch,
        gpu=gpu_available, mmap_threshold=threshold,
    )  # fmt: skip
    with_gpu = speed_of(args, model, wanted, format, weights.nbytes, runtime, gpu_available)
    answer = report.Answer(model, wanted, plan, available, gpu_available, speed, with_gpu)
    print(json.dumps(report.to_dict(answer), indent=2) if args.json else report.describe(answer))
    return 0 if answer.fits else 1
