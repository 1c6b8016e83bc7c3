"""What `--report` and `--sample` leave of a run: pictures, numbers, texts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kt_moe.cli.output import write_json
from kt_moe.cli.plot import History, plot_losses
from kt_moe.cli.routing import balances, routing_line
from kt_moe.cli.trainer import peak_memory
from kt_moe.routing_stats import plot_routing

if TYPE_CHECKING:
    from kt_moe.cli.train import Job


def write_report(job: Job, trainer: Any) -> None:
    """loss.png, metrics.json; of the routing, where it was not lost, routing.png and routing.safetensors."""
    directory, history = job.directory, History.from_log(trainer.state.log_history)
    name = Path(job.options.model.model_name_or_path).name
    plot_losses({"": history}, directory.curve, f"LoRA on {name}")
    routing = None if job.routing is None else job.routing.history
    found = {} if routing is None else balances(routing)
    if routing is not None and found:
        routing.save(directory.routing)
        plot_routing(routing.total(), directory.heat_map, f"Experts of {name} in training")
        job.say(f"routing        {routing_line(found)}: {directory.heat_map}")
    job.say(f"loss curve     {directory.curve}")
    used = {"tokens_per_second": job.clock.rate, "peak_memory_bytes": peak_memory()}
    even = {layer: asdict(balance) for layer, balance in found.items()}
    write_json(directory.metrics, {**history.to_dict(), **used, "routing": even})


def show_samples(job: Job, trainer: Any) -> None:
    """What the model writes after --sample, without its adapter and with it."""
    model, run = trainer.model, job.options.run
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    for when in ("before", "after"):
        with model.disable_adapter() if when == "before" else torch.no_grad():
            text = generate(
                model,
                tokenizer,
                run.sample or "",
                chat=job.chat,
                tokens=run.sample_tokens,
                seed=trainer.args.seed,
            )
        job.say(f"\n--- {run.sample!r} {when} training\n{text}")
    job.say("")


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: str, *, chat: bool, tokens: int, seed: int) -> str:
    """What the model writes after `prompt`: sampled at temperature 0.8, the same for the same seed.

    chat: put the prompt into the chat template as a user's message. Torch's random state is left as it was.
    """
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {k: v.to(model.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
            out = model.generate(**inputs, **sampling, max_new_tokens=tokens, pad_token_id=pad)
    finally:
        model.train(was_training)
    text: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
