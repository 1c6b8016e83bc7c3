"""What a plan needs to know of a model: shapes of the experts, bytes of the rest."""

from __future__ import annotations

from dataclasses import dataclass

from kt_moe.experts import PROJECTIONS


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of layer `number`: E, H, I, and the experts of a token, K.

    Attributes:
        activation: its name, as `kt_moe.Experts` takes it.
        biases: whether the projections have some.
        gated: whether there is a gate.
    """

    number: int
    experts: int
    hidden: int
    intermediate: int
    topk: int
    activation: str = "silu"
    biases: bool = False
    gated: bool = True

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections."""
        return PROJECTIONS if self.gated else PROJECTIONS[1:]


@dataclass(frozen=True)
class Activations:
    """Bytes of the rest of the model's tensors that a forward pass leaves behind.

    Attributes:
        layers: kept for backward by each decoder layer; not what the experts keep themselves.
        outside: kept for backward by embedding, last norm, head and loss.
        logits: the logits themselves, in the model's dtype.
        boundary: the hidden states between two layers.
    """

    layers: tuple[int, ...]
    outside: int
    logits: int
    boundary: int


@dataclass(frozen=True)
class Outline:
    """What memory and speed follow from.

    Attributes:
        rest_bytes: parameters and buffers beside the routed experts.
        rest_lora: numbers of LoRA parameters beside the experts'.
    """

    model_type: str
    layers: tuple[ExpertLayer, ...]
    rest_bytes: int
    rest_lora: int
    activations: Activations
