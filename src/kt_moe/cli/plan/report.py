"""A plan for people, from its JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kt_moe.cli.terminal import ranges_text, size_text, table


def describe(found: dict[str, Any]) -> str:
    """Model, memory by part, whether it fits, speed, and ways to share the experts out."""
    model, run = found["model"], found["run"]
    layer = model["layers"][0]
    how = ", gradient checkpointing" * run["checkpointing"] + ", experts retained" * run["retain"]
    lines = [
        f"model  {model['model_type']}: layers {ranges_text(x['number'] for x in model['layers'])} with "
        f"{layer['num_experts']} experts each, hidden {layer['hidden_size']}, intermediate "
        f"{layer['intermediate_size']}, {model['topk']} experts a token",
        f"run    {run['batch']} x {run['sequence']} tokens, LoRA rank {run['rank']} in fp32 on "
        f"{', '.join((*run['projections'], *run['modules']))}, {run['optimizer']}{how}",
    ]
    for title, memory in (("host memory", found["host"]), ("GPU memory", found["gpu"])):
        if memory is not None:
            rows = [[part["name"], size_text(part["nbytes"]), part["note"]] for part in memory["parts"]]
            rows += [["together", size_text(memory["nbytes"]), ""]]
            rows += [["available", size_text(memory["available"]), ""]]
            verdict = "it fits, with {} to spare" if memory["spare"] >= 0 else "IT DOES NOT FIT, by {}"
            lines += ["", title, *_indented(rows), f"  {verdict.format(size_text(abs(memory['spare'])))}"]
    if any(memory and memory["spare"] < 0 for memory in (found["host"], found["gpu"])):
        more = ", --gradient_checkpointing" * (not run["checkpointing"])
        more += ", a smaller --gpu-memory" * bool(found["gpu"] and found["gpu"]["spare"] < 0)
        lines += ["", f"what takes less: a smaller --batch-size, --seq-len or --rank, --format int4{more}"]
    lines += ["", *_speed(found["speed"])]
    if found["modes"]:
        lines += ["", *_modes(found)]
    return "\n".join(lines)


def _speed(speed: dict[str, Any]) -> Iterator[str]:
    memory, rates = speed["memory"], speed["rates"]
    where = f"with {size_text(memory)} of them on the GPU" if memory else "on the CPU alone"
    yield f"speed of the experts, predicted, {where}"
    for source in dict.fromkeys(speed["sources"].values()):
        names = [name for name, other in speed["sources"].items() if other == source and rates[name]]
        used = [f"{name}={rates[name]:.3g}" for name in names if memory or name.startswith("cpu")]
        if used:
            yield f"  {source}: {', '.join(used)}"
    rows = [["routing", "GPU", "CPU", "link", "GPU", "CPU", "step", "bound by", "at most"]]
    for p in speed["predictions"]:
        places = [f"{p['gpu_experts']} experts", f"{p['cpu_experts']} experts"]
        times = [f"{p[name]:.3f} s" for name in ("link", "gpu", "cpu", "seconds")]
        rate = p["tokens_per_second"]
        most = f"{rate:,.{0 if rate >= 10 else 2}f} tokens/s"
        rows.append([p["routing"], *places, *times, p["bound"], most])
    yield from _indented(rows)
    rest = "loss and optimizer" if rates["rest_seconds"] else "attention and all else"
    yield f"  experts of a layer; times of a step's experts; {rest} come on top"


def _modes(found: dict[str, Any]) -> Iterator[str]:
    job = found["job"]
    rows = [["expert_parallel", "a host has", "a GPU has", "host sends", "experts", "network", "at most"]]
    for mode in found["modes"]:
        sizes = [size_text(mode[name]) for name in ("host", "gpu", "network")]
        times = [f"{mode['experts']:.3g} s", f"{mode['exchange']:.3g} s"]
        name = f'"{mode["name"]}"' + ("" if mode["fits"] else ": DOES NOT FIT")
        rows.append([name, *sizes, *times, f"{mode['tokens_per_second']:,.0f} tokens/s"])
    network = f"{job['network'] / 1e9:g} GB/s"
    yield f"{job['hosts']} x {job['ranks']} ranks of such a run, whose hosts send and receive {network} each"
    yield from _indented(rows)
    yield "  memory; bytes of a step to other hosts; seconds of a step's experts, then of the network;"
    yield "  routing is even; attention and all else come on top"


def _indented(rows: list[list[str]]) -> Iterator[str]:
    """A table whose columns end together where they have numbers: all but the first and words in the last."""
    words = range(2, 3) if len(rows[0]) == 3 else range(0)
    right = [column for column in range(1, len(rows[0])) if column not in words]
    return (f"  {line}" for line in table(rows, right=right).splitlines())
