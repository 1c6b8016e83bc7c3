"""Bytes of a training run by part. Pure arithmetic on an `Outline` and a `Run`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from kt_moe.cli.formats import QUANTISED, bias_bytes, projection_bytes
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.shapes import Activations, ExpertLayer, Outline
from kt_moe.gpu.layers import auto_memory
from kt_moe.lora_device import auto_moves

LORA_BYTES = 4  # of a number: LoRA is fp32
_ADAM_8BIT = 2 * (1 + 4 / 256)  # two moments of a byte, and an fp32 scale for 256 of them
_BLOCK_ROWS = 512  # most routes that share a packing: kBlockRows of src/cpp/moe/plan.h
_CACHE_PART = 512 << 10  # most that packed weights take of a thread's cache: kMostCacheBytes there
MMAP_THRESHOLD = 32 << 20  # the most glibc raises its threshold to by itself
_ENGINE_BYTES = 1 << 30  # of the GPU, the most that computing experts there takes beside their weights


@dataclass(frozen=True)
class Part:
    """One line of the plan.

    source: "computed" from shapes, "measured" on this machine, or "estimated" under the assumption in `note`.
    """

    name: str
    nbytes: int
    source: str
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """All parts, by the memory they lie in. Without a GPU everything is in host memory."""

    host: tuple[Part, ...]
    gpu: tuple[Part, ...] | None


def weights_bytes(layers: Iterable[ExpertLayer], format: str) -> int:
    """Of all experts, quantised to a format on loading, and their biases."""
    kind = QUANTISED[format]
    return sum(
        sum(projection_bytes(kind, x.experts, x.hidden, x.intermediate, x.gated).values()) + biases_bytes(x)
        for x in layers
    )


def biases_bytes(layer: ExpertLayer) -> int:
    """Of all experts; 0 where they have none."""
    return bias_bytes(layer.experts, layer.hidden, layer.intermediate, layer.gated) if layer.biases else 0


def lora_numbers(layer: ExpertLayer, run: Run) -> int:
    """LoRA parameters of a layer's experts."""
    outer = 1 if run.shared_outer else layer.experts
    return _targets(layer, run) * run.rank * (outer * layer.hidden + layer.experts * layer.intermediate)


def _targets(layer: ExpertLayer, run: Run) -> int:
    """How many of its projections have LoRA."""
    return sum(projection in run.projections for projection in layer.projections)


def optimizer_bytes(numbers: int, optimizer: str) -> int:
    """State of the optimizer: torch's AdamW keeps two moments in fp32 as the parameters are, SGD none."""
    return int(numbers * {"adamw": 2.0 * LORA_BYTES, "adamw-8bit": _ADAM_8BIT, "sgd": 0.0}[optimizer])


def saved_bytes(layer: ExpertLayer, run: Run) -> int:
    """G, U and the P of each LoRA pair, bf16, of every route of a layer."""
    ranks = _targets(layer, run) * run.rank
    inner = (len(layer.projections) - 1) * layer.intermediate
    return run.tokens * layer.topk * (inner + ranks) * 2


def scratch_bytes(layer: ExpertLayer, run: Run, threads: int, block: int = _BLOCK_ROWS) -> int:
    """Of a backward call: h, dG, dU, packed dG, dU; low-rank products; a block of tokens a thread.

    block: routes of the largest.
    """
    ranks = _targets(layer, run) * run.rank
    routes = run.tokens * layer.topk
    inner = 4 * (len(layer.projections) - 1) + 2
    blocks = threads * (min(block, _BLOCK_ROWS) * layer.hidden * 2 + _CACHE_PART)
    return routes * (inner * layer.intermediate + 4 * ranks) + blocks


def result_bytes(layer: ExpertLayer, run: Run) -> int:
    """Of a call: output and gradient of the hidden states, and both as the layer's inputs, bf16."""
    return 4 * run.tokens * layer.hidden * 2


def kept_bytes(layer: ExpertLayer, run: Run) -> int:
    """Of the result that a layer keeps of a checkpointed forward for the recomputation, bf16."""
    return run.tokens * layer.hidden * 2 if run.retain else 0


def lora_on_gpu(numbers: int, choice: str, free: int) -> bool:
    """Whether the experts' LoRA goes to a GPU with so many bytes free, as `kt_moe.lora_device` decides it."""
    return choice == "cuda" or (choice == "auto" and auto_moves(numbers, free))


def weights_on_gpu(weights: int, wanted: int | str, free: int) -> int:
    """Of expert weights on a GPU with so many bytes free, as `kt_moe.Gpu` takes them for its `memory`."""
    return auto_memory(weights, max(free, 0)) if isinstance(wanted, str) else min(weights, wanted)


def backward_bytes(saved: list[int], gradients: list[int], checkpointing: bool) -> int:
    """Most of what forward saved and of gradients that is alive at a time, in the order of the layers.

    Backward goes through the layers from the last: a layer's gradients appear while its saved tensors are
    still there, and take the place of those before. With checkpointing a layer's are saved only then.
    """
    alive = 0 if checkpointing else sum(saved)
    most, made = alive, 0
    for one, gradient in zip(reversed(saved), reversed(gradients), strict=True):
        made += gradient
        most = max(most, made + (one if checkpointing else alive))
        alive -= 0 if checkpointing else one
    return most


def activation_bytes(a: Activations, checkpointing: bool) -> int:
    """Of the rest of the model at their peak, where forward ends and backward begins.

    Beside what is kept: the logits, their gradient in the model's dtype and the loss's in fp32 (twice that).
    """
    layers = sum(a.layers)
    if checkpointing:
        layers = len(a.layers) * a.boundary + max(a.layers, default=0)
    return layers + a.outside + 4 * a.logits


def make_plan(
    model: Outline,
    run: Run,
    *,
    weights: Part,
    process: Part,
    scratch: Part,
    gpu: int | None,
    mmap_threshold: int = MMAP_THRESHOLD,
) -> Plan:
    """Put the parts together.

    gpu: free bytes of the GPU that the rest of the model is on; None: there is none.
    mmap_threshold: from so many bytes on malloc maps a block by itself.
    """
    numbers = [lora_numbers(layer, run) for layer in model.layers]
    gradients, together = [LORA_BYTES * n for n in numbers], sum(numbers)
    saved = [saved_bytes(layer, run) for layer in model.layers]
    results = [kept_bytes(layer, run) for layer in model.layers]
    one_layer = run.checkpointing and not run.retain
    note = "G, U, P of a route" + (", one layer at a time" if one_layer else "")
    shared = "saved for backward, LoRA gradients"
    lora = (
        Part("LoRA of the experts", together * LORA_BYTES, "computed", f"{together:,} parameters"),
        Part("its optimizer state", optimizer_bytes(together, run.optimizer), "computed", run.optimizer),
    )
    widest = max(result_bytes(layer, run) for layer in model.layers)
    call = (scratch, Part("results of a layer call", widest, "computed"))
    rest = _rest(model, run)
    # What one side has of a layer's LoRA and the other needs, and the gradients that come back; of matrices
    # that experts share, each expert's.
    widest = max(lora_numbers(layer, replace(run, shared_outer=False)) for layer in model.layers)
    copies = Part("a layer's LoRA and gradients", 2 * widest * LORA_BYTES, "computed", "copies")
    if gpu is None:
        kept = [one + result for one, result in zip(saved, results, strict=True)]
        note += (", results" if any(results) else "") + "; they share memory"
        most = Part(shared, backward_bytes(kept, gradients, one_layer), "computed", note)
        slack = heap_slack(model.activations, run.checkpointing, mmap_threshold)
        holes = "holes that malloc keeps; MALLOC_MMAP_THRESHOLD_=1048576 avoids them"
        heap = (Part("slack of the heap", slack, "estimated", holes),) if slack else ()
        outer = (copies,) if run.shared_outer else ()
        return Plan((process, weights, *lora, most, *call, *outer, *rest, *heap), None)

    free = gpu - model.rest_bytes
    on_gpu = list(rest)
    if run.retain:
        on_gpu = [Part("results of the experts", sum(results), "computed", "kept for recomputations"), *rest]
    if lora_on_gpu(together, run.lora_device, free):
        alone = backward_bytes(saved, [0] * len(saved), one_layer)
        host: tuple[Part, ...] = (
            process, weights, Part("saved for backward", alone, "computed", note), *call, copies,
        )  # fmt: skip
        on_gpu = [*lora, Part("gradients of it", sum(gradients), "computed"), *on_gpu]
    else:
        size = backward_bytes(saved, gradients, one_layer)
        most = Part(shared, size, "computed", f"{note}; they share memory")
        # What a forward has sent to the GPU, and its backward sends again.
        again = 2 * (max(numbers) if one_layer else together)
        sent = Part("LoRA for backward", again, "computed", "bf16, page-locked")
        host = (process, weights, *lora, most, sent, *call)
        on_gpu.insert(0, copies)
    if there := weights_on_gpu(weights.nbytes, run.gpu_memory, free):
        source = "estimated" if run.gpu_memory == "auto" else "computed"
        copy = Part("expert weights on the GPU", there, source, "copies; --experts_gpu_memory bounds them")
        on_gpu = [copy, *on_gpu, Part("computing experts", _ENGINE_BYTES, "estimated", "at most")]
    return Plan(host, tuple(on_gpu))


def _rest(model: Outline, run: Run) -> tuple[Part, ...]:
    parts = [Part("the rest of the model", model.rest_bytes, "computed", "bf16: attention, router, ...")]
    if model.rest_lora:
        size = 2 * LORA_BYTES * model.rest_lora + optimizer_bytes(model.rest_lora, run.optimizer)
        note = f"{model.rest_lora:,} parameters, fp32"
        parts.append(Part("its LoRA, gradients, optimizer state", size, "computed", note))
    peak = activation_bytes(model.activations, run.checkpointing)
    note = "what autograd keeps, attention fused; 4 x logits"
    parts.append(Part("its activations", peak, "estimated", note))
    return tuple(parts)


def heap_slack(a: Activations, checkpointing: bool, threshold: int) -> int:
    """What glibc keeps of freed tensors on the host: holes between the tensors that are alive.

    threshold: blocks of so many bytes and more are always given back. Below it the holes came to about
    as much as the activations themselves, in runs of 1,000 to 4,000 tokens.
    """
    kept = activation_bytes(a, checkpointing) - 4 * a.logits
    return kept if a.boundary < threshold else 0
