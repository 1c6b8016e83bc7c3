"""Experts that transformers does not let others compute, computed by kt_moe all the same.

`kt_moe.computation.UNMARKED` says how they have their weights. Here is what transformers'
`use_experts_implementation` would have done to their classes: a forward that leaves the experts to kt_moe
where these are kt_moe's, and is transformers' own elsewhere. Blocks that do more to experts than to give them
tokens, ids and routing weights get such a forward too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from kt_moe.computation import UNMARKED, transformers_class
from kt_moe.hf.experts import is_kt_experts, kt_moe_experts_forward

Forward = Callable[..., Any]


def mark_at_construction(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """A hook on the registration of every module: experts in `UNMARKED` get what transformers' mark gives."""
    if module is None:
        return
    mark(parent, module)
    if isinstance(parent, PreTrainedModel) and (config := getattr(parent, "config", None)) is not None:
        for experts in module.modules():
            if transformers_class(experts) in UNMARKED and not hasattr(experts, "config"):
                experts.config = config


def mark(block: nn.Module, experts: nn.Module) -> None:
    """Have the classes of a block and of its experts leave to kt_moe what is kt_moe's; nothing for others."""
    if transformers_class(experts) in UNMARKED:
        _dispatch(type(experts), lambda own: own, kt_moe_experts_forward)
        if (forward := _BLOCKS.get(transformers_class(block))) is not None:
            _dispatch(type(block), _experts_in, forward)


def _dispatch(cls: Any, experts_of: Callable[[Any], nn.Module], ours: Forward) -> None:
    """Give a class a forward that is `ours` where `experts_of` an instance are computed by kt_moe."""
    theirs = cls.__dict__["forward"]
    if getattr(theirs, "is_kt_moe", False):
        return

    @functools.wraps(theirs)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (ours if is_kt_experts(experts_of(self)) else theirs)(self, *args, **kwargs)

    forward.is_kt_moe = True  # type: ignore[attr-defined]
    cls.forward = forward


def _experts_in(block: Any) -> nn.Module:
    experts: nn.Module = block.experts
    return experts.get_base_layer() if isinstance(experts, BaseTunerLayer) else experts


def _llama4(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """[..., H] -> [T, H] and the router's logits [T, E].

    A score scales the input of an expert, not its output: every routed token is a token of its own here, with
    a routing weight of 1. Experts make 0 of the inputs that transformers gives them beside, which are 0, and
    no gradient.
    """
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden_states)
    scores, ids = torch.topk(scores, self.top_k, dim=1)
    rows = (hidden_states[:, None] * scores[..., None]).flatten(0, 1)
    routed = self.experts(rows, ids.reshape(-1, 1), torch.ones(len(rows), 1, device=rows.device))
    return self.shared_expert(hidden_states) + routed.view(*ids.shape, -1).sum(1), logits


def _longcat_flash(self: Any, hidden_states: Tensor) -> Tensor:
    """[..., H] -> [..., H]; experts of higher numbers than those with weights are the identity."""
    x = hidden_states.view(-1, hidden_states.shape[-1])
    _, weights, ids = self.router(hidden_states)
    first_identity = self.config.n_routed_experts
    is_identity = ids >= first_identity
    routed = self.experts(x, ids.masked_fill(is_identity, first_identity), weights)
    kept = x * weights.masked_fill(~is_identity, 0.0).sum(1, keepdim=True)
    out: Tensor = (routed + kept).to(x.dtype)
    return out.view(hidden_states.shape)


_BLOCKS: dict[tuple[str, str], Forward] = {
    ("llama4", "Llama4TextMoe"): _llama4,
    ("longcat_flash", "LongcatFlashMoE"): _longcat_flash,
}
