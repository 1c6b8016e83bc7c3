"""What `--report` and `--sample` leave of a run: pictures, numbers, texts."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kt_moe.cli.output import ROUTING, write_json
from kt_moe.cli.plot import losses_of, plot_losses
from kt_moe.cli.trainer import peak_memory
from kt_moe.routing_stats import Balance, RoutingHistory, plot_routing

if TYPE_CHECKING:
    from kt_moe.cli.job import Job

_ROWS = 100  # of a run's routing history, about
_SAMPLE_TOKENS = 80


class RoutingWatch(TrainerCallback):  # type: ignore[misc]
    """Counts the routes of training steps, not those of evaluation; its history goes into checkpoints.

    checkpoint: the one that a run resumes from, with its history.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        self.history: RoutingHistory | None = None
        # A checkpoint may have none: the process may have ended between the two.
        if checkpoint is not None and (file := checkpoint / ROUTING).exists():
            self.history = RoutingHistory.load(file)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.history is None:
            self.history = RoutingHistory(math.ceil(state.max_steps / _ROWS))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        assert self.history is not None
        self.history.begin(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        assert self.history is not None
        self.history.end(model, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.history is not None
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.history.save(folder / ROUTING)


def write_report(job: Job, trainer: Any) -> None:
    """loss.png, metrics.json; of the routing, where it was not lost, routing.png and routing.safetensors."""
    directory, losses = job.directory, losses_of(trainer.state.log_history)
    name = Path(job.options.model.model_name_or_path).name
    plot_losses({"": losses}, directory.curve, f"LoRA on {name}")
    history = None if job.routing is None else job.routing.history
    total = {} if history is None else history.total()
    found = {layer: Balance.of(counts) for layer, counts in total.items()}
    if history is not None and found:
        history.save(directory.routing)
        plot_routing(total, directory.heat_map, f"Experts of {name} in training")
        layer, worst = max(found.items(), key=lambda item: item[1].imbalance)
        said = f"busiest expert {worst.imbalance:.1f} times the mean ({layer})"
        idle = sum(balance.idle for balance in found.values())
        job.say(f"routing        {said}, {idle} never chosen: {directory.heat_map}")
    job.say(f"loss curve     {directory.curve}")
    used = {"tokens_per_second": job.clock.rate, "peak_memory_bytes": peak_memory()}
    even = {layer: asdict(balance) for layer, balance in found.items()}
    write_json(directory.metrics, {**losses, **used, "routing": even})


def show_samples(job: Job, trainer: Any) -> None:
    """What the model writes after --sample, without its adapter and with it."""
    model = trainer.model.eval()
    with model.disable_adapter():
        before = generate(job, trainer)
    for when, text in (("before", before), ("after", generate(job, trainer))):
        job.say(f"\n--- {job.options.run.sample!r} {when} training\n{text}")
    job.say("")


@torch.no_grad()
def generate(job: Job, trainer: Any) -> str:
    """What the model writes after --sample, at temperature 0.8, the same for the same seed.

    Where the data are conversations, it is put into the chat template as a user's message.
    """
    model, prompt = trainer.model, job.options.run.sample
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if job.chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not job.chat).to(model.device)
    inputs.pop("token_type_ids", None)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "pad_token_id": pad}
    torch.manual_seed(trainer.args.seed)
    out = model.generate(**inputs, **sampling, max_new_tokens=_SAMPLE_TOKENS)
    text: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
