"""Bytes of a training run by part. Arithmetic on an `Outline` and a `Run`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from operator import add

from kt_moe.architectures import ExpertModule
from kt_moe.cli.formats import QUANTISED, bias_bytes, projection_bytes
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.outline import Outline
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
    """One line of the plan.

    source: "computed" from shapes, "measured" on this machine, or "estimated" under the assumption in `note`.
    """

    name: str
    nbytes: int
    source: str = "computed"
    note: str = ""


def weights_bytes(layer: ExpertModule, format: str) -> int:
    """Of a layer's experts, quantised to a format on loading, and their biases."""
    return sum(projection_bytes(QUANTISED[format], *shape_of(layer)).values()) + biases_bytes(layer)


def biases_bytes(layer: ExpertModule) -> int:
    """Of a layer's experts; 0 where they have none."""
    return bias_bytes(*shape_of(layer)) if layer.has_bias else 0


def shape_of(layer: ExpertModule) -> tuple[int, int, int, bool]:
    """E, H, I, and whether there is a gate."""
    return layer.num_experts, layer.hidden_size, layer.intermediate_size, layer.gated


def ranks(layer: ExpertModule, run: Run) -> int:
    """Of a layer's projections with LoRA together."""
    return run.rank * sum(layer.gated or projection != "gate" for projection in run.projections)


def lora_numbers(layer: ExpertModule, run: Run) -> int:
    """LoRA parameters of a layer's experts."""
    experts, hidden, intermediate, _ = shape_of(layer)
    return ranks(layer, run) * ((1 if run.shared_outer else experts) * hidden + experts * intermediate)


def optimizer_bytes(numbers: int, optimizer: str) -> int:
    """State of the optimizer for so many parameters."""
    return int(numbers * _STATE[optimizer])


def saved_bytes(layer: ExpertModule, run: Run, topk: int) -> int:
    """G, U and the P of each LoRA pair, bf16, of every route of a layer."""
    inner = (2 if layer.gated else 1) * layer.intermediate_size
    return run.tokens * topk * (inner + ranks(layer, run)) * 2


def result_bytes(layer: ExpertModule, run: Run) -> int:
    """Of a layer's result, bf16."""
    return run.tokens * layer.hidden_size * 2


def scratch_bytes(layer: ExpertModule, run: Run, topk: int, threads: int) -> int:
    """Of a backward call: h, dG, dU, packed dG, dU; low-rank products; a block of tokens a thread."""
    of_route = (10 if layer.gated else 6) * layer.intermediate_size + 4 * ranks(layer, run) + _ROUTE_BYTES
    return run.tokens * topk * of_route + threads * (_BLOCK_ROWS * layer.hidden_size * 2 + _CACHE_PART)


def weights_on_gpu(weights: int, wanted: int | str, free: int) -> int:
    """Of expert weights on a GPU with so many bytes free, as `kt_moe.Gpu` takes them for its `memory`."""
    return auto_memory(weights, max(free, 0)) if isinstance(wanted, str) else min(weights, wanted)


def backward_bytes(saved: list[int], gradients: list[int], one_layer: bool) -> int:
    """Most of what forward saved and of gradients that is alive at a time, in the order of the layers.

    Backward goes through the layers from the last: a layer's gradients appear while its saved tensors are
    still there, and take the place of those before. one_layer: a layer's are saved only then.
    """
    alive = 0 if one_layer else sum(saved)
    most, made = alive, 0
    for one, gradient in zip(reversed(saved), reversed(gradients), strict=True):
        made += gradient
        most = max(most, made + (one if one_layer else alive))
        alive -= 0 if one_layer else one
    return most


def activation_bytes(model: Outline, checkpointing: bool) -> int:
    """Of the rest of the model at their peak, where forward ends and backward begins.

    Beside what is kept: the logits, their gradient in the model's dtype and the loss's in fp32 (twice that).
    """
    layers = sum(model.kept)
    if checkpointing:
        layers = len(model.kept) * model.boundary + max(model.kept, default=0)
    return layers + model.outside + 4 * model.logits


def heap_slack(model: Outline, checkpointing: bool) -> int:
    """What glibc keeps of freed tensors on the host: holes between the tensors that are alive.

    They came to about as much as the activations themselves, in runs of 1,000 to 4,000 tokens. Blocks from a
    threshold on are always given back: glibc raises it to 32 MiB by itself, unless the environment fixes it.
    """
    threshold = int(os.environ.get("MALLOC_MMAP_THRESHOLD_", 32 << 20))
    return activation_bytes(model, checkpointing) - 4 * model.logits if model.boundary < threshold else 0


def make_plan(
    model: Outline, run: Run, weights: Part, process: Part, threads: int, gpu: int | None
) -> tuple[list[Part], list[Part]]:
    """Parts in host memory and in the GPU's.

    gpu: free bytes of the GPU that the rest of the model is on; None: there is none, all is in host memory.
    """
    layers, free = model.layers, (gpu or 0) - model.rest_bytes
    numbers = [lora_numbers(layer, run) for layer in layers]
    together, gradients = sum(numbers), [LORA_BYTES * n for n in numbers]
    results = [result_bytes(layer, run) if run.retain else 0 for layer in layers]
    kept = [saved_bytes(layer, run, model.topk) for layer in layers]
    kept = list(map(add, kept, results)) if gpu is None else kept
    lora = [
        Part("LoRA of the experts", together * LORA_BYTES, note=f"{together:,} parameters"),
        Part("its optimizer state", optimizer_bytes(together, run.optimizer), note=run.optimizer),
    ]
    choice = run.lora_device
    lora_on_gpu = gpu is not None and (choice == "cuda" or (choice == "auto" and auto_moves(together, free)))
    # What one side has of a layer's LoRA and the other needs, and the gradients that come back; of matrices
    # that experts share, each expert's.
    copied = 2 * LORA_BYTES * max(lora_numbers(layer, replace(run, shared_outer=False)) for layer in layers)
    copies = Part("a layer's LoRA and gradients", copied, note="copies")
    scratch = max(scratch_bytes(layer, run, model.topk, threads) for layer in layers)
    # A call's: output and gradient of the hidden states, and both as the layer's inputs.
    widest = 4 * max(result_bytes(layer, run) for layer in layers)
    most = backward_bytes(kept, [0] * len(kept) if lora_on_gpu else gradients, run.one_layer)
    saved = "saved for backward" if lora_on_gpu else "saved for backward, LoRA gradients"
    note = "G, U, P of a route" + (", one layer at a time" if run.one_layer else "")
    routes = "about 10 I + 3,600 bytes a route, and a block a thread"
    host = [
        process,
        weights,
        *([] if lora_on_gpu else lora),
        Part(saved, most, note=note if lora_on_gpu else f"{note}; they share memory"),
        Part("scratch of a layer call", scratch, "estimated", routes),
        Part("results of a layer call", widest),
    ]
    rest = _rest(model, run)
    if gpu is None:
        return [*host, *([copies] if run.shared_outer else []), *rest, *_slack(model, run)], []
    if run.retain:
        rest.insert(0, Part("results of the experts", sum(results), note="kept for recomputations"))
    if lora_on_gpu:
        host.append(copies)
        rest = [*lora, Part("gradients of it", sum(gradients)), *rest]
    else:
        # What a forward has sent to the GPU, and its backward sends again.
        again = 2 * (max(numbers) if run.one_layer else together)
        host.append(Part("LoRA for backward", again, note="bf16, page-locked"))
        rest.insert(0, copies)
    if there := weights_on_gpu(weights.nbytes, run.gpu_memory, free):
        source = "estimated" if run.gpu_memory == "auto" else "computed"
        copy = Part("expert weights on the GPU", there, source, "copies; --experts_gpu_memory bounds them")
        rest = [copy, *rest, Part("computing experts", _ENGINE_BYTES, "estimated", "at most")]
    return host, rest


def _slack(model: Outline, run: Run) -> list[Part]:
    holes = "holes that malloc keeps; MALLOC_MMAP_THRESHOLD_=1048576 avoids them"
    slack = heap_slack(model, run.checkpointing)
    return [Part("slack of the heap", slack, "estimated", holes)] if slack else []


def _rest(model: Outline, run: Run) -> list[Part]:
    parts = [Part("the rest of the model", model.rest_bytes, note="bf16: attention, router, ...")]
    if model.rest_lora:
        size = 2 * LORA_BYTES * model.rest_lora + optimizer_bytes(model.rest_lora, run.optimizer)
        note = f"{model.rest_lora:,} parameters, fp32"
        parts.append(Part("its LoRA, gradients, optimizer state", size, note=note))
    peak = activation_bytes(model, run.checkpointing)
    note = "what autograd keeps, attention fused; 4 x logits"
    return [*parts, Part("its activations", peak, "estimated", note)]
