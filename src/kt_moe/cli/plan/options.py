"""The run that is planned, from the options of a training command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kt_moe.cli.described import split_targets
from kt_moe.cli.terminal import UserError
from kt_moe.experts import PROJECTIONS
from kt_moe.gpu import parse_bytes

# Rows of a forward pass for each row of a batch, by command: those of pairs go through the model together.
_ROWS = {"sft": 1, "dpo": 2, "kto": 1, "reward": 2}


@dataclass(frozen=True)
class Run:
    """The training run to plan.

    Attributes:
        batch, sequence: rows of a forward pass, and tokens of a row.
        rank: of every LoRA pair.
        projections: of the experts that get LoRA.
        modules: others that do, by the names `--lora_target_modules` takes.
        format: of the experts in memory; None: as they are stored.
        optimizer: "adamw", "adamw-8bit" or "sgd", of what it keeps.
        checkpointing: gradient checkpointing: a layer's activations are computed again in backward.
        retain: not its experts: what they save and their results are kept from forward.
        gpu_memory: bytes of the GPU for expert weights; "auto": what the run will take; 0: none.
        cpu_share: of the routes, see `kt_moe.gpu.plan.cut_by_share`; None: what ends soonest.
        lora_device: where the experts' LoRA lies: "auto", "cpu" or "cuda".
    """

    batch: int
    sequence: int
    rank: int
    projections: tuple[str, ...]
    modules: tuple[str, ...]
    format: str | None
    optimizer: str
    checkpointing: bool
    retain: bool = False
    gpu_memory: int | str = "auto"
    cpu_share: float | None = None
    lora_device: str = "auto"

    @property
    def tokens(self) -> int:
        """Of a forward pass."""
        return self.batch * self.sequence

    @property
    def one_layer(self) -> bool:
        """Whether what experts save is there for one layer at a time, as backward computes it again."""
        return self.checkpointing and not self.retain

    @classmethod
    def from_options(cls, options: Any) -> Run:
        """From `kt_moe.cli.train.Options`, of whose experts `to_config` raised nothing.

        Raises:
            UserError: a command or options that no plan is made for.
        """
        training, model, experts = options.training, options.model, options.experts
        names = split_targets(model.lora_target_modules)
        for refused, why in (
            (options.command not in _ROWS, f"{options.command}, which also generates text"),
            (not model.use_peft, "--use_peft false: a plan is that of LoRA"),
            (model.load_in_4bit, "--load_in_4bit: it has the layers beside the experts in bf16"),
            (model.load_in_8bit, "--load_in_8bit: it has the layers beside the experts in bf16"),
            (not names or names == ["all-linear"], "LoRA without --lora_target_modules by name"),
        ):
            if refused:
                raise UserError(f"no plan is made for {why}")
        of_experts = {name: {"experts", name, f"experts.{name}_proj"} for name in PROJECTIONS}
        optim = str(getattr(training.optim, "value", training.optim))
        memory, said = experts.experts_gpu_memory, str(experts.experts_cpu_share)
        share = None if said == "auto" else float(said)
        cpu_alone = experts.experts_gpu == "off" or share == 1.0
        return cls(
            training.per_device_train_batch_size * _ROWS[options.command],
            getattr(training, "max_length", None) or 1024,
            model.lora_r,
            tuple(name for name, ways in of_experts.items() if ways & set(names or ())),
            tuple(sorted(set(names or ()).difference(*of_experts.values()))),
            None if experts.experts_format == "as-stored" else experts.experts_format,
            "sgd" if "sgd" in optim else "adamw-8bit" if "8bit" in optim else "adamw",
            training.gradient_checkpointing,
            experts.experts_checkpoint_experts == "retain",
            0 if cpu_alone else memory if memory == "auto" else parse_bytes("gpu_memory", memory),
            share,
            experts.experts_lora_device,
        )
