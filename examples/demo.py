#!/usr/bin/env python3
"""The demo: fine-tune examples/tiny-qwen3-moe, which knows Python code, on prose about Python.

The prose is the language reference in `pydoc_data.topics`, which every CPython ships: one document a topic.
Topics repeat each other ("compound" contains "if", "for" and "with"), so of such a family only the longest is
kept; then at most one held-out line in a hundred is also trained on. Takes a few minutes on two cores, and
everything lands in out/demo.

    python examples/demo.py
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

# Read when torch is imported. Torch's threads then sleep while they wait for each other, and do not spin: a
# tenth slower on idle cores, several times as fast beside other work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "tiny-qwen3-moe"
PROMPT = 'The "with" statement is used to'

# Rank and learning rate suit a model this small; large models want the defaults.
OPTIONS = [
    *("--rank", "16", "--lora_alpha", "32", "--lr", "2e-3", "--targets", "attention,experts"),
    *("--epochs", "3", "--batch-size", "4", "--seq-len", "256", "--eval-fraction", "0.15"),
]  # fmt: skip


def distinct_topics(topics: dict[str, str]) -> dict[str, str]:
    """The topics, longest first, of whose lines less than a tenth stand in a longer one that is kept."""
    kept, seen = {}, set()
    for topic in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        lines = {line.strip() for line in topics[topic].splitlines() if len(line.strip()) > 30}
        if len(lines & seen) < 0.1 * len(lines):
            kept[topic] = topics[topic]
            seen |= lines
    return kept


def write_topics(path: Path) -> Path:
    """Write the language reference as .jsonl, a topic a line."""
    from pydoc_data.topics import topics

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"topic": t, "text": text}) + "\n" for t, text in distinct_topics(topics).items()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def command(data: Path, output: Path) -> list[str]:
    """The arguments of `kt-moe` for one run of the demo."""
    return ["finetune", "--model", str(MODEL), "--data", str(data), "--output", str(output), *OPTIONS]


def main() -> int:
    """Run it; the exit status."""
    from kt_moe.cli import main as kt_moe

    out = Path("out/demo")
    arguments = [*command(write_topics(out / "topics.jsonl"), out / "run"), "--sample", PROMPT, "--overwrite"]
    print(f"$ kt-moe {shlex.join(arguments)}\n", flush=True)
    return kt_moe(arguments)


if __name__ == "__main__":
    sys.exit(main())
