"""Bytes of a training run by part. Arithmetic on an `Outline` and a `Run`."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from operator import add
from pathlib import Path
from typing import Any

from kt_moe import Checkpoint
from kt_moe.architectures import ExpertModule
from kt_moe.checkpoint import LayerInfo
from kt_moe.cli.formats import QUANTISED, bias_bytes, projection_bytes
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.outline import Outline
from kt_moe.cli.terminal import UserError
from kt_moe.gpu.layers import auto_memory
from kt_moe.lora_device import auto_moves

LORA_BYTES = 4  # of a number: LoRA is fp32
# State of an optimizer, bytes a number: AdamW's two moments, or of a byte each with a scale for 256 of them.
_STATE = {"adamw": 2.0 * LORA_BYTES, "adamw-8bit": 2 * (1 + 4 / 256), "sgd": 0.0}
_BLOCK_ROWS = 512  # most routes that share a packing: kBlockRows of src/cpp/moe/plan.h
_CACHE_PART = 512 << 10  # most that packed weights take of a thread's cache: kMostCacheBytes there
_ROUTE_BYTES = 3584  # of scratch for a route beside what its widths need, as measured with AMX and AVX-512
_ENGINE_BYTES = 1 << 30  # of the GPU, the most that computing experts there takes beside their weights


@dataclass(frozen=True)
class Part:
    """One line of the plan, computed from shapes unless `note` says that it is measured or estimated."""

    name: str
    nbytes: int
    note: str = ""


def weights_part(path: Path, config: Any, model: Outline, format: str | None) -> tuple[Part, str]:
    """The experts' line of the plan, and the format of most layers.

    format: None means as the directory's files have them; where there are none, as the config says.

    Raises:
        UserError: files that cannot be read, or that lack a layer.
    """
    if not (path.is_dir() and any(path.glob("*.safetensors"))):
        chosen, doubt = (format, "") if format else stored_format(config)
        note = f"{chosen}{doubt}, of the config's shapes: there are no weights here"
        return Part("expert weights", sum(weights_bytes(x, chosen) for x in model.layers), note), chosen
    try:
        checkpoint = Checkpoint(path)
        stored = [checkpoint.layer(layer.number) for layer in model.layers]
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    pairs = zip(model.layers, stored, strict=True)
    size = sum(weights_bytes(layer, format or info.format, info) for layer, info in pairs)
    chosen = format or stored[0].format
    return Part("expert weights", size, chosen), chosen


def stored_format(config: Any) -> tuple[str, str]:
    """In which format a model's experts come by its quantization_config, and a remark if that is assumed."""
    said = getattr(config, "quantization_config", None) or {}
    method = said.get("quant_method", "bf16")
    if method in ("bf16", "fp8", "mxfp4"):
        return method, ""
    if method not in ("gptq", "awq", "compressed-tensors", "modelopt"):
        return "bf16", f" (assumed: {method} is unknown)"
    eight = re.search(r'bits?": 8|"FP8"', json.dumps(said))
    return "int8" if eight else "int4", f" (assumed of {method})"


def weights_bytes(layer: ExpertModule, format: str, stored: LayerInfo | None = None) -> int:
    """Of a layer's experts and their biases: as they are stored, or quantised to a format on loading."""
    if stored is not None and stored.format == format:
        size = sum(stored.memory_bytes.values())
    else:
        size = sum(projection_bytes(QUANTISED[format], *shape_of(layer)).values())
    return size + (bias_bytes(*shape_of(layer)) if layer.has_bias else 0)


def shape_of(layer: ExpertModule) -> tuple[int, int, int, bool]:
    """E, H, I, and whether there is a gate."""
    return layer.num_experts, layer.hidden_size, layer.intermediate_size, layer.gated


def ranks(layer: ExpertModule, run: Run) -> int:
    """Of a layer's projections with LoRA together."""
    return run.rank * sum(layer.gated or projection != "gate" for projection in run.projections)


def lora_numbers(layer: ExpertModule, run: Run) -> int:
    """LoRA parameters of a layer's experts."""
    experts, hidden, intermediate, _ = shape_of(layer)
    return ranks(layer, run) * experts * (hidden + intermediate)


def saved_bytes(layer: ExpertModule, run: Run, topk: int) -> int:
    """G, U and the P of each LoRA pair, bf16, of every route of a layer."""
    inner = (2 if layer.gated else 1) * layer.intermediate_size
    return run.tokens * topk * (inner + ranks(layer, run)) * 2


def result_bytes(layer: ExpertModule, run: Run) -> int:
    """Of a layer's result, bf16."""
    return run.tokens * layer.hidden_size * 2


def scratch_bytes(layer: ExpertModule, run: Run, topk: int, threads: int) -> int:
    """Of a call: h, dG, dU, packed dG, dU; low-rank products; a block of tokens a thread; X, Y, dX and dY."""
    of_route = (10 if layer.gated else 6) * layer.intermediate_size + 4 * ranks(layer, run) + _ROUTE_BYTES
    blocks = threads * (_BLOCK_ROWS * layer.hidden_size * 2 + _CACHE_PART)
    return run.tokens * topk * of_route + blocks + 4 * result_bytes(layer, run)


def weights_on_gpu(model: Outline, run: Run, weights: int, gpu: int | None) -> int:
    """Of expert weights on a GPU with so many bytes free, as `kt_moe.Gpu` takes them for its `memory`."""
    if gpu is None:
        return 0
    if isinstance(run.gpu_memory, str):
        return auto_memory(weights, max(gpu - model.rest_bytes, 0))
    return min(weights, run.gpu_memory)


def backward_bytes(saved: list[int], gradients: list[int], one_layer: bool) -> int:
    """Most of what forward saved and of gradients that is alive at a time, layers being much alike.

    Backward goes through the layers from the last: a layer's gradients appear while its saved tensors are
    still there, and take the place of those before. one_layer: a layer's are saved only then.
    """
    in_the_first = max(saved) + sum(gradients)
    return in_the_first if one_layer else max(sum(saved) + max(gradients), in_the_first)


def activation_bytes(model: Outline, checkpointing: bool) -> int:
    """Of the rest of the model at their peak, where forward ends and backward begins.

    Beside what is kept: the logits, their gradient in the model's dtype and the loss's in fp32 (twice that).
    """
    layers = sum(model.kept)
    if checkpointing:
        layers = len(model.kept) * model.boundary + max(model.kept, default=0)
    return layers + model.outside + 4 * model.logits


def make_plan(
    model: Outline, run: Run, weights: Part, process: Part, threads: int, gpu: int | None
) -> tuple[list[Part], list[Part]]:
    """Parts in host memory and in the GPU's.

    gpu: free bytes of the GPU that the rest of the model is on; None: there is none, all is in host memory.
    """
    layers = model.layers
    numbers = [lora_numbers(layer, run) for layer in layers]
    together, gradients = sum(numbers), [LORA_BYTES * n for n in numbers]
    auto = run.lora_device == "auto" and gpu is not None and auto_moves(together, gpu - model.rest_bytes)
    on_gpu = gpu is not None and (auto or run.lora_device == "cuda")  # LoRA of the experts
    saved = [saved_bytes(layer, run, model.topk) for layer in layers]
    results = [result_bytes(layer, run) if run.retain else 0 for layer in layers]
    saved = saved if gpu is not None else [*map(add, saved, results)]
    most = backward_bytes(saved, [0] * len(layers) if on_gpu else gradients, run.one_layer)
    peak = activation_bytes(model, run.checkpointing)
    of_rest = int((2 * LORA_BYTES + _STATE[run.optimizer]) * model.rest_lora)
    lora = [
        Part("LoRA of the experts", together * LORA_BYTES, f"{together:,} parameters"),
        Part("its optimizer state", int(together * _STATE[run.optimizer]), run.optimizer),
    ]
    one = ", one layer at a time" if run.one_layer else ""
    host = [
        process,
        weights,
        Part("saved for backward, LoRA gradients", most, f"G, U, P of a route{one}; they share memory"),
        Part(
            "scratch of a layer call",
            max(scratch_bytes(layer, run, model.topk, threads) for layer in layers),
            "estimated: about 10 I + 3,600 bytes a route, and a block a thread",
        ),
    ]
    rest = [
        Part("the rest of the model", model.rest_bytes, "bf16: attention, router, ..."),
        Part("its LoRA, gradients, optimizer state", of_rest, f"{model.rest_lora:,} parameters, fp32"),
        Part("its activations", peak, "estimated: what autograd keeps, attention fused; 4 x logits"),
    ]
    if gpu is None:
        # In runs of 1,000 to 4,000 tokens they came to about as much as the activations without logits.
        holes = 0 if "MALLOC_MMAP_THRESHOLD_" in os.environ else peak - 4 * model.logits
        why = "estimated: holes that malloc keeps; MALLOC_MMAP_THRESHOLD_=1048576 avoids them"
        host += [*lora, *rest, Part("slack of the heap", holes, why)]
        rest = []
    else:
        with_lora, without = (rest, host) if on_gpu else (host, rest)
        with_lora += lora
        # What one side has of a layer's LoRA and the other needs, and the gradients that come back.
        without.append(Part("a layer's LoRA and gradients", 2 * max(gradients), "copies"))
        # What a forward has sent to the GPU, and its backward sends again.
        again = 0 if on_gpu else 2 * (max(numbers) if run.one_layer else together)
        host.append(Part("LoRA for backward", again, "bf16, page-locked"))
        there = weights_on_gpu(model, run, weights.nbytes, gpu)
        rest += [
            Part("gradients of it", sum(gradients) if on_gpu else 0),
            Part("results of the experts", sum(results), "kept for recomputations"),
            Part("expert weights on the GPU", there, "copies; --experts_gpu_memory bounds them"),
            Part("computing experts", _ENGINE_BYTES if there else 0, "estimated: at most"),
        ]
    return [part for part in host if part.nbytes], [part for part in rest if part.nbytes]
