"""The C++ core. Internal: `kt_moe`'s public modules wrap everything here and document it.

Tensors are read and written in place through their data pointers; they must be contiguous and on the CPU.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

from torch import Tensor

LoraTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

__version__: str

def cpu_info() -> dict[str, Any]: ...
def kernel_flags() -> dict[str, list[str]]:
    """Of each kernel set, from the slowest: the flags of /proc/cpuinfo that it needs."""

def read_topology(root: str, cpus: list[int] | None = None) -> dict[str, Any]:
    """What `kt_moe.cpu_info` says of a machine, from /proc and /sys below `root`; as lists of CPUs besides:
    online, l2_sharing, l3_sharing. `cpus` is in place of the affinity mask.
    """

def probe_nodes() -> list[dict[str, Any]]:
    """For each node with memory, a few MiB placed there and touched by a thread bound to it.

    node, asked (mbind went well), bound (the thread was), pages, right (on the node), unknown (move_pages
    does not tell).
    """

def quantized_types() -> dict[str, dict[str, Any]]:
    """By format: scale, scale_rows, scale_cols, zero_points and global_scale (whether there is one) of
    weights that are quantised to it on loading.
    """

def matrix_bytes(
    rows: int, cols: int, format: str, scale: str, scale_rows: int, scale_cols: int, zero_points: bool,
    global_scale: bool,
) -> int:  # fmt: skip
    """Bytes of a matrix in memory: codes, scales, zero points and global scale.

    scale: type of a scale, which scale_rows x scale_cols share. scale_cols: 0 is all of them.

    Raises:
        ValueError: an unknown format or scale, or sizes that no matrix has.
    """

@final
class Runtime:
    def __init__(
        self, threads: int | None, shards: int | None, isa: str | None, nodes: list[int] | None
    ) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def shards(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def nodes(self) -> list[int]: ...
    @property
    def scratch_bytes(self) -> int: ...

@final
class Profile:
    """What a runtime's threads do, from construction to `stop`; the rest may be called after that."""

    def __init__(self, runtime: Runtime, most_spans: int) -> None: ...
    def stop(self) -> None: ...
    @property
    def stopped(self) -> bool: ...
    def calls(self) -> list[tuple[Any, ...]]:
        """The fields of `kt_moe.profiler.Call`."""
    def spans(self) -> list[tuple[Any, ...]]:
        """The fields of `kt_moe.profiler.Span`."""
    def totals(self) -> dict[str, list[tuple[int, float, int, int, int]]]:
        """stage -> for each thread: spans, seconds, flops, bytes local, bytes remote"""
    def directions(self) -> dict[str, tuple[int, float, float]]:
        """direction -> calls, seconds, seconds of all threads that spans cover"""
    @property
    def dropped(self) -> int: ...
    @property
    def dropped_calls(self) -> int: ...

@final
class ResultMemory:
    """Memory that holds anything, for `torch.frombuffer`; used again when it is garbage."""

    def __init__(self, runtime: Runtime, bytes: int) -> None: ...

@final
class Checkpoint:
    """Safetensors index of a file or a directory; see `kt_moe.Checkpoint`."""

    def __init__(self, path: str) -> None: ...
    @property
    def path(self) -> Path: ...
    @property
    def files(self) -> list[Path]: ...
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...], int, Path]]:
        """name -> (dtype, shape, bytes, file)"""
    @property
    def layers(self) -> list[int]: ...
    def layer(self, layer: int) -> dict[str, Any]:
        """num_experts, hidden_size, intermediate_size, dtype, layout ('per-expert' | 'fused'), nbytes"""
    def with_lists(
        self, lists: dict[int, tuple[str, bool, tuple[str, str, str], int, int, bool | None]]
    ) -> Checkpoint:
        """Fields of `kt_moe.checkpoint.ExpertList`"""

@final
class Experts:
    @staticmethod
    def from_tensors(
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: str,
        format: str,
        runtime: Runtime,
        placement: str,
        popularity: list[float] | None,
    ) -> Experts: ...
    @staticmethod
    def from_checkpoint(
        checkpoint: Checkpoint,
        layer: int,
        activation: str,
        format: str,
        runtime: Runtime,
        cache_dir: str | None,
        paged: bool,
        shared_dir: str | None,
        progress: Callable[[int], object] | None,
        placement: str,
        popularity: list[float] | None,
        experts: tuple[int, int] | None = None,
    ) -> Experts: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def gated(self) -> bool: ...
    @property
    def activation(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def mapped(self) -> bool: ...
    @property
    def shared(self) -> bool: ...
    def verify(self) -> bool: ...
    @property
    def quantization_error(self) -> dict[str, float] | None: ...
    @property
    def shards(self) -> int: ...
    @property
    def placement(self) -> str: ...
    @property
    def refused(self) -> bool:
        """Whether the kernel refused to place the weights on the NUMA nodes of their shards."""
    def homes(self) -> list[int]:
        """A shard for each expert; empty if they are split."""
    def rebalance(self, popularity: list[float] | None) -> bool:
        """False where the kernel refused to move memory."""
    def routed(self, into: Tensor) -> None:
        """Write the routes of all forwards so far into an int64 tensor [E]."""
    def reset_routed(self) -> None: ...
    def page_nodes(self) -> list[list[int]]:
        """A row a shard: pages on the wanted nodes, elsewhere, unknown"""
    def weights_at(self) -> list[list[dict[str, Any]]]:
        """Where the weights lie, for as long as this object lives: for gate, up and down a dict for each
        slice of the intermediate dimension that has memory of its own (one: all of it), for a gate that there
        is not none.

        first, last: the slice. rows, cols: of the stored matrix. code: "bf16" | "int8" | "int4" | "e4m3" |
        "e2m1". scale: "none" | "f32" | "bf16" | "e8m0" | "e4m3". scale_rows, scale_cols: that share a scale,
        scale_cols at most cols. codes_bytes, scales_bytes, zeros_bytes, global_scale_bytes: of one expert's
        matrix. codes, scales, zeros, global_scale: an address for each expert, 0 where there is nothing.
        divides: whether scales are divided by the global scale.
        """
    def bias(self, projection: str, into: Tensor | None) -> bool:
        """Whether a projection has a bias; it is written into a bf16 tensor [E, rows] if one is given."""
    def dequantize(self, gate: Tensor | None, up: Tensor, down: Tensor) -> None:
        """Write the bf16 weights the kernels multiply by into three bf16 tensors."""

def count_routes(topk_ids: Tensor, num_experts: int) -> list[int]:
    """Entries of topk_ids by expert, and last those that are num_experts, "no route".

    ValueError names the first one that is not in [0, num_experts].
    """

def sort_routes(topk_ids: Tensor, num_experts: int, experts: Sequence[int], into: Tensor) -> None:
    """Sort the routes of some experts by expert in the order given, then by their place in topk_ids.

    Written into int32 of `into`: [T, K], the row of each entry, or -1 if it is none of these experts; then
    [rows], the place t * K + k of each row in topk_ids.
    """

def measure_ceilings(runtime: Runtime, seconds: float, read_bytes: int) -> dict[str, list[float]]:
    """Rates measured again and again, about `seconds` for each list.

    registers_one, registers_all: FLOP/s of the multiply-add alone, on one thread and on all. l1_*, l2_*: of
    the micro-kernel with operands in the L1 cache, or with A from half the L2. read_one, read_all: bytes/s
    read from `read_bytes` of memory.
    """

def forward(
    experts: Experts,
    hidden_states: Tensor,  # [T, H] bf16
    topk_ids: Tensor,  # [T, K] int32 | int64
    topk_weights: Tensor,  # [T, K] fp32
    lora: LoraTensors,  # gate_a, gate_b, up_a, up_b, down_a, down_b; fp32 | bf16
    scaling: tuple[float, float, float],  # gate, up, down
    dropout: float,
    seed: int,
    saved: Tensor | None,  # [routes, 2 I + ranks] bf16, written: G, U and the P of each LoRA; without G: I
    out: Tensor,  # [T, H] bf16 | fp32, written
) -> None: ...
def backward(
    experts: Experts,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    lora: LoraTensors,
    scaling: tuple[float, float, float],
    dropout: float,
    seed: int,
    saved: Tensor | None,  # what forward wrote, or None: recompute it
    grad_out: Tensor,  # [T, H] bf16
    grad_hidden: Tensor | None,  # [T, H] bf16 | fp32, written
    grad_weights: Tensor | None,  # [T, K] fp32, written
    grad_lora: LoraTensors,  # shapes of lora, fp32 | bf16 each, written
    clear_idle: bool = True,  # zero the rows of experts without routes in grad_lora; False: leave them alone
) -> None: ...
