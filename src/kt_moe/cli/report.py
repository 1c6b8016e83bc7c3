"""What `--report` and `--sample` leave of a run: pictures, numbers, texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, pipeline

from kt_moe.cli.output import ROUTING, write_json
from kt_moe.cli.trainer import peak_memory
from kt_moe.files import save_png
from kt_moe.routing_stats import Balance, RoutingHistory, plot_routing

if TYPE_CHECKING:
    from kt_moe.cli.job import Job

Curves = dict[str, list[tuple[int, float]]]  # (step, loss) by name
_ROWS = 100  # of a run's routing history, about


class RoutingWatch(TrainerCallback):  # type: ignore[misc]
    """Counts the routes of training steps, not those of evaluation; its history goes into checkpoints.

    checkpoint: the one that a run resumes from, with its history.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        # A checkpoint may have none: the process may have ended between the two.
        file = None if checkpoint is None else checkpoint / ROUTING
        self.history: Any = RoutingHistory.load(file) if file is not None and file.exists() else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.history = self.history or RoutingHistory(math.ceil(state.max_steps / _ROWS))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.history.begin(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.history.end(model, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.history.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / ROUTING)


def losses_of(log: list[dict[str, Any]]) -> Curves:
    """Losses in nats a token from `trainer.state.log_history`: "train" and "held_out"."""
    keys = {"train": "loss", "held_out": "eval_loss"}
    return {
        name: [(entry["step"], entry[key]) for entry in log if key in entry] for name, key in keys.items()
    }


def plot_losses(runs: Mapping[str, Curves], path: Path, title: str) -> None:
    """Draw training loss (pale) and held-out loss of each run into a PNG.

    runs: a name for the legend, "" for none, and its losses.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, (run, curves) in enumerate(runs.items()):
        # Of two curves that agree, the later one lies inside the earlier one.
        look: dict[str, Any] = {"color": f"C{index}", "linewidth": 1.5 * (len(runs) - index)}
        for name, more in (("train", {"alpha": 0.4}), ("held_out", {"marker": "o"})):
            steps, losses = ([point[at] for point in curves[name]] for at in (0, 1))
            axes.plot(steps, losses, **look, **more, label=f"{run} {name}".strip().replace("_", " "))
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_png(figure, path)


def write_report(job: Job, trainer: Any) -> None:
    """loss.png, metrics.json; of the routing, where it was not lost, routing.png and routing.safetensors."""
    directory, losses = job.directory, losses_of(trainer.state.log_history)
    name = Path(job.options.model.model_name_or_path).name
    plot_losses({"": losses}, directory.curve, f"LoRA on {name}")
    job.say(f"loss curve     {directory.curve}")
    history = job.routing.history if job.routing else None
    total = history.total() if history else {}
    balance = {layer: Balance.of(counts) for layer, counts in total.items()}
    if history and total:
        history.save(directory.routing)
        plot_routing(total, directory.heat_map, f"Experts of {name} in training")
        job.say(f"routing        {directory.heat_map}")
    used = {"tokens_per_second": job.clock.rate, "peak_memory_bytes": peak_memory()}
    routing = {layer: asdict(of_it) for layer, of_it in balance.items()}
    write_json(directory.metrics, {**losses, **used, "routing": routing})


def show_samples(job: Job, trainer: Any) -> None:
    """What the model writes after --sample, without its adapter and with it, the same for the same seed.

    Where the data are conversations, the prompt is put into the chat template as a user's message.
    """
    said, model, tokenizer = job.options.run.sample, trainer.model.eval(), trainer.processing_class
    prompt: Any = [{"role": "user", "content": said}] if job.chat else said
    options = {"max_new_tokens": 80, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    write = pipeline("text-generation", model=model, tokenizer=getattr(tokenizer, "tokenizer", tokenizer))

    def show(when: str) -> None:
        torch.manual_seed(trainer.args.seed)
        (written,) = write(prompt, return_full_text=False, **options)
        job.say(f"\n--- {said!r} {when} training\n{written['generated_text']}")

    with model.disable_adapter():
        show("before")
    show("after")
    job.say("")
