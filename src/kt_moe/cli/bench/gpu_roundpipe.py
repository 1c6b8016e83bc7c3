"""RoundPipe 0.1.1 (https://github.com/ITcarrot/RoundPipe) on the same model, for `kt-moe bench --step`.

It keeps all weights in page-locked memory, copies layer after layer to the GPU, keeps hidden states of the
layers on the host, computes a layer again in backward, and updates on the CPU. What differs from kt_moe here:
LoRA is bf16 on the GPU with fp32 copies for its optimizer; that runs while the next step does, which so uses
parameters one update older; a step is two microbatches where there are two rows. Its ready-made wrapper of
Qwen3-MoE calls transformers by arguments that transformers 5 has dropped, so the layers are listed here.
"""

from __future__ import annotations

import sys
from typing import Any

import roundpipe  # type: ignore[import-not-found,unused-ignore]
import torch
from torch import Tensor, nn

from kt_moe.cli.bench.data import make_weights
from kt_moe.cli.bench.gpu_model import next_token_loss, torch_model, with_compiled_attention
from kt_moe.cli.bench.gpu_options import GpuSettings
from kt_moe.cli.bench.gpu_step import LEARNING_RATE

_State = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden states, cosines, sines, ids


class _First(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens, self.rotary_emb = model.embed_tokens, model.rotary_emb

    def forward(self, ids: Tensor) -> _State:
        hidden = self.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        cosines, sines = self.rotary_emb(hidden, positions)
        return hidden, cosines, sines, ids


class _Middle(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, state: _State) -> _State:
        hidden, cosines, sines, ids = state
        return self.layer(hidden, position_embeddings=(cosines, sines)), cosines, sines, ids


class _Last(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm, self.lm_head = model.model.norm, model.lm_head

    def forward(self, state: _State) -> Tensor:
        hidden, _, _, ids = state
        return next_token_loss(self.norm(hidden), self.lm_head.weight, ids)


def as_layers(model: Any) -> nn.Sequential:
    """The model as RoundPipe wants it: ids [B, S] in, the loss out."""
    return nn.Sequential(_First(model.model), *map(_Middle, model.model.layers), _Last(model))


class RoundPipeTrainer:
    """RoundPipe's training loop, as its documentation has it."""

    def __init__(self, settings: GpuSettings) -> None:
        weights = make_weights(settings.shape, settings.seed)
        model = torch_model(
            weights, settings, torch.device("cpu"), torch.bfloat16, pin=settings.device == "cuda"
        )
        if settings.compile:
            with_compiled_attention(model)
        self._pipe = roundpipe.RoundPipe(as_layers(model), optim_dtype=torch.float32, name="qwen3_moe")
        trained = list(self._pipe.optim_parameters())
        try:  # its own is compiled now
            self._adam: Any = roundpipe.optim.Adam(
                trained, lr=LEARNING_RATE, weight_decay=0.01, decoupled_weight_decay=True
            )
        except (RuntimeError, OSError) as error:
            print(f"roundpipe.optim.Adam does not compile, torch's AdamW instead: {error}", file=sys.stderr)
            self._adam = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

    def step(self, ids: Tensor) -> float:
        config = roundpipe.RoundPipeRunConfig(num_microbatch=min(2, len(ids)))
        loss = self._pipe.forward_backward(input_args=(ids,), run_config=config)
        self._pipe.step(self._update)  # at once: the update runs beside the next step
        return float(loss)

    def _update(self) -> None:
        self._adam.step()
        self._adam.zero_grad()
