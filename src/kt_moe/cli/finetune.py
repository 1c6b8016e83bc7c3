"""`kt-moe finetune`: from a model directory and a file of documents to a LoRA adapter."""

from __future__ import annotations

import argparse
import hashlib
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_moe.cli.data import Documents, read_documents, split_documents, to_rows
from kt_moe.cli.errors import UserError
from kt_moe.cli.options import GPU_OPTIONS, Settings, check_together, refuse_without_gpu
from kt_moe.cli.output import RunDirectory, finished_log, write_json
from kt_moe.cli.plot import History, plot_losses

if TYPE_CHECKING:
    from kt_moe.cli.progress import Progress
    from kt_moe.cli.trainer import Rows
    from kt_moe.routing_stats import RoutingHistory

INTERRUPTED = 130  # exit status of a command ended by SIGINT


def run(args: argparse.Namespace) -> int:
    """Carry out the command; the exit status.

    Raises:
        UserError: bad input, named in one line. Cheap checks come first: options, output, data, model.
    """
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    check_together(args)
    refuse_without_gpu(args)
    if args.gpu not in ("auto", "off", "cuda", "cuda:0"):
        number = args.gpu.partition(":")[2]
        raise UserError(f"--gpu {args.gpu}: training uses the first GPU, set CUDA_VISIBLE_DEVICES={number}")
    settings, directory = Settings.from_args(args), RunDirectory(args.output)
    directory.check(resume=args.resume, overwrite=args.overwrite)
    if settings.popularity is not None and directory.root.resolve() in Path(settings.popularity).parents:
        raise UserError(f"--popularity {args.popularity} lies in --output, which this run replaces: copy it")
    documents = read_documents(args.data)
    if settings.assistant_only_loss and documents.kind != "messages":
        raise UserError('--assistant-only-loss wants data with "messages"')
    parts = split_documents(documents, settings.eval_fraction, settings.seed)

    try:
        import kt_moe.adapters  # noqa: F401  (before anything slow: it needs what is optional)
        from kt_moe.cli.quiet import quiet
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install 'kt_moe[train]'") from error
    with quiet():
        return _Job(args, settings, directory, documents).run(*parts)


def _digest(popularity: str | None) -> str | None:
    if popularity is None:
        return None
    file = Path(popularity)
    if file.exists() and not file.is_file():
        raise UserError(f"--popularity {file} is no ordinary file")
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--popularity {file}: {error}") from error


class _Job:
    """One run, past the checks that need neither torch nor the model."""

    def __init__(
        self, args: argparse.Namespace, settings: Settings, directory: RunDirectory, documents: Documents
    ) -> None:
        self.args, self.settings, self.directory = args, settings, directory
        self.chat = documents.kind == "messages"
        self.record = {
            **settings.to_dict(),
            "data_sha256": documents.digest(),
            "popularity_sha256": _digest(settings.popularity),
        }

    def run(self, training: Documents, held_out: Documents) -> int:
        """Load, train, write; the exit status."""
        from kt_moe.adapters import load_adapter
        from kt_moe.cli.model import load_tokenizer
        from kt_moe.cli.routing import load_history
        from kt_moe.cli.trainer import Rows

        checkpoint = self.directory.resume(self.record) if self.args.resume else None
        log = None if checkpoint is None else finished_log(checkpoint)
        if log is not None and self.directory.adapter.exists():
            _say(f"the run is complete: {self.directory.adapter}")
            return 0
        tokenizer = load_tokenizer(Path(self.settings.model))
        rows = Rows(*(to_rows(part, tokenizer, self.settings.seq_len) for part in (training, held_out)))
        if not rows.train:
            raise UserError(f"{self.args.data}: no training document has two tokens or more")
        if self.chat and tokenizer.chat_template is None:
            raise UserError(
                f'--data has "messages", but the tokenizer of {self.settings.model} has no chat template'
            )
        model = self._load_model()
        _say(f"train     {_describe(training, rows.train)}\nheld out  {_describe(held_out, rows.held_out)}")
        _say(f"model     {_describe_model(model)}")
        if checkpoint is not None:
            _say(f"resuming  from {checkpoint}")
        if log is None:
            return self._train(model, tokenizer, rows, checkpoint)
        assert checkpoint is not None
        load_adapter(model, str(checkpoint))  # training was complete, but not what follows it
        self._finish(model, tokenizer, History.from_log(log), load_history(checkpoint), None)
        return 0

    def _load_model(self) -> Any:
        import torch

        from kt_moe.cli.model import add_lora, load_base_model
        from kt_moe.cli.routing import read_popularity, share_out

        s, threads = self.settings, self.args.threads
        if threads is not None:
            torch.set_num_threads(threads)
        popularity = None if s.popularity is None else read_popularity(Path(s.popularity))
        base = load_base_model(
            Path(s.model),
            threads=threads,
            format=s.format,
            cache_dir=self.args.cache_dir,
            placement=s.placement,
            checkpoint_experts=self.args.checkpoint_experts,
            **{name: getattr(self.args, name) for name in GPU_OPTIONS},
        )
        if popularity is not None:
            share_out(base, popularity)
        return add_lora(
            base, rank=s.rank, alpha=s.alpha, dropout=s.dropout, targets=s.targets, seed=s.seed,
            shared_outer=s.shared_outer,
        )  # fmt: skip

    def _train(self, model: Any, tokenizer: Any, rows: Rows, checkpoint: Path | None) -> int:
        import torch
        from jinja2 import TemplateError

        from kt_moe.cli.progress import Progress, StopOnSignal
        from kt_moe.cli.routing import RoutingWatch
        from kt_moe.cli.trainer import build_trainer

        progress, stop, routing = Progress(), StopOnSignal(), RoutingWatch(checkpoint)
        try:
            trainer = build_trainer(
                model, tokenizer, rows, self.settings, self.directory.checkpoints,
                save_every=self.args.save_every, gradient_checkpointing=self.args.gradient_checkpointing,
                resumed=checkpoint is not None, callbacks=[progress, stop, routing],
            )  # fmt: skip
        except (ValueError, RuntimeError, TemplateError) as error:
            if not self.chat:
                raise
            raise UserError(f"{self.args.data}: a conversation does not fit the template: {error}") from error
        if checkpoint is None:
            self.directory.start(self.record)
        try:
            with stop:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except KeyboardInterrupt:
            stop.requested = True
        except torch.OutOfMemoryError as error:
            advice = "lower --batch-size, --seq-len or --gpu-memory, or pass --gradient-checkpointing"
            raise UserError(f"out of GPU memory: {advice}") from error
        finally:
            progress.close()
        if stop.requested and trainer.state.global_step < trainer.state.max_steps:
            return self._interrupted()
        losses = History.from_log(trainer.state.log_history)
        self._finish(trainer.model, tokenizer, losses, routing.history, progress)
        return 0

    def _interrupted(self) -> int:
        checkpoint = self.directory.last_checkpoint()
        if checkpoint is None:
            _say("stopped before the first checkpoint; nothing to resume from, start again with --overwrite")
            return INTERRUPTED
        command = [a for a in self.args.command_line if a not in ("--overwrite", "--resume")] + ["--resume"]
        _say(f"stopped; the last checkpoint is {checkpoint}\nresume with: kt-moe {shlex.join(command)}")
        return INTERRUPTED

    def _finish(
        self,
        model: Any,
        tokenizer: Any,
        history: History,
        routing: RoutingHistory | None,
        progress: Progress | None,
    ) -> None:
        """Pictures and numbers first, the adapter last: where it lies, the run is complete.

        routing: None where it got lost. progress: None where this process did not train.
        """
        from kt_moe.adapters import save_adapter
        from kt_moe.cli.progress import memory_line, peak_memory
        from kt_moe.cli.routing import balances, routing_line
        from kt_moe.routing_stats import plot_routing

        directory, speed = self.directory, None if progress is None else progress.tokens_per_second
        name = Path(self.settings.model).name
        plot_losses({"": history}, directory.curve, f"LoRA on {name}")
        balance = {} if routing is None else balances(routing)
        if routing is not None and balance:
            routing.save(directory.routing)
            plot_routing(routing.total(), directory.heat_map, f"Experts of {name} in training")
        used = {"tokens_per_second": speed, "peak_memory_bytes": peak_memory()}
        even = {layer: asdict(found) for layer, found in balance.items()}
        write_json(directory.metrics, {**history.to_dict(), **used, "routing": even, "settings": self.record})
        save_adapter(model, directory.root)
        self._show_samples(model, tokenizer)
        _say("")
        if history.held_out:
            (_, before), (_, after) = history.held_out[0], history.held_out[-1]
            _say(f"held-out loss  {before:.4f} before, {after:.4f} after")
        if speed is not None:
            _say(f"speed          {speed:.0f} tokens/s, {memory_line()}")
        if balance:
            _say(f"routing        {routing_line(balance)}: {directory.heat_map}")
        _say(f"adapter        {directory.adapter}\nloss curve     {directory.curve}")

    def _show_samples(self, model: Any, tokenizer: Any) -> None:
        if self.args.sample is None:
            return
        from kt_moe.cli.model import generate

        def sample() -> str:
            return generate(
                model, tokenizer, self.args.sample,
                chat=self.chat, tokens=self.args.sample_tokens, seed=self.settings.seed,
            )  # fmt: skip

        with model.disable_adapter():
            before = sample()
        for when, text in (("before", before), ("after", sample())):
            _say(f"\n--- {self.args.sample!r} {when} training\n{text}")


def _describe(documents: Documents, rows: list[dict[str, Any]]) -> str:
    tokens = sum(len(row.get("input_ids", ())) for row in rows)
    return f"{len(documents)} documents" + (f" ({len(rows)} rows, {tokens} tokens)" if tokens else "")


def _describe_model(model: Any) -> str:
    from kt_moe.hf import KtExperts

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    runtime = next(m.experts.runtime for m in model.modules() if isinstance(m, KtExperts))
    experts = f"experts on the CPU ({runtime.isa}, threads: {runtime.threads})"
    return f"{model.config.model_type} on {model.device}, {experts}, {trained:,} LoRA parameters"


def _say(text: str) -> None:
    print(text, flush=True)
