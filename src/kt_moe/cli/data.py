"""The data of a run: files for `--dataset_name`, held-out rows, what becomes of long texts.

Files are read by `datasets`. Knows nothing of models or training.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.utils.sha import sha_fileobj

from kt_moe.cli.terminal import UserError

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
# Columns that a command wants, by its ways; sft also takes texts alone.
_WANTED = {
    "sft": ("messages", "conversations", "prompt completion"),
    "dpo": ("chosen rejected",),
    "kto": ("prompt completion label", "chosen rejected"),
    "reward": ("chosen rejected",),
    "grpo": ("prompt",),
    "rloo": ("prompt",),
}


def load_data(path: str, **options: Any) -> Any:
    """A `datasets.DatasetDict` of a file, a directory of files of one kind, or a data set on the hub.

    .jsonl, .json, .parquet   rows, as `datasets` reads them
    .txt                      documents end in a form feed; in a file without form feeds in two blank lines

    options: of `datasets.load_dataset`.

    Raises:
        UserError: no such data, or some that cannot be read.
    """
    kinds = {_BUILDERS[file.suffix] for file in _files(path) if file.suffix in _BUILDERS}
    if not kinds and Path(path).is_file():
        raise UserError(f"--dataset_name {path}: wanted one of {', '.join(_BUILDERS)}")
    if len(kinds) > 1:
        raise UserError(f"--dataset_name {path} has files of {len(kinds)} kinds, wanted one of them")
    if kinds == {"text"}:
        options["sample_by"] = "document"
    if kind := _BUILDERS.get(Path(path).suffix):
        options["data_files"] = {"train": [path]}
    try:
        found = load_dataset(kind or path, **options)
    except (DatasetsError, ValueError, OSError, StopIteration) as error:
        why: BaseException = error
        while why.__cause__ is not None:
            why = why.__cause__
        said = _broken_line(path) or f"{type(why).__name__}: {why}"
        raise UserError(f"--dataset_name {path} cannot be read: {said}") from error
    if kinds != {"text"}:
        return found
    return found.map(
        lambda b: {"text": [part for text in b["text"] for part in documents(text)]}, batched=True
    )


def _files(name: str) -> list[Path]:
    """Of a directory, or one file; none where it is a name on the hub."""
    path = Path(name)
    return [file for file in sorted(path.rglob("*")) if file.is_file()] or [path] * path.is_file()


def _broken_line(name: str) -> str:
    """The first line of .jsonl files that is no JSON object; "" if all are."""
    for file in (file for file in _files(name) if file.suffix == ".jsonl"):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                with suppress(ValueError):
                    if not line.strip() or isinstance(json.loads(line), dict):
                        continue
                return f"{file}, line {number} is no JSON object"
    return ""


def digest(name: str) -> list[str]:
    """SHA-256 of each of a data set's files, hexadecimal; its name where it is on the hub."""

    def of(file: Path) -> str:
        with file.open("rb") as stream:
            return sha_fileobj(stream).hex()

    return [of(file) for file in _files(name)] or [name]


def documents(text: str) -> list[str]:
    """The documents of a .txt file."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    pattern = r"\f" if "\f" in text else r"\n(?:[ \t]*\n){2,}"
    return [part.strip("\n") for part in re.split(pattern, text) if part.strip()]


def check_columns(command: str, rows: Any, where: str, text_field: str = "text") -> None:
    """Refuse data that the command, TRL's, cannot use; what is tokenised already is left to TRL.

    Raises:
        UserError: it has no rows, lacks a column, or has one in only a part of its rows.
    """
    first = next(iter(rows), None)
    if first is None:
        raise UserError(f"{where} has no rows")
    ways = [*([text_field] if command == "sft" else []), *_WANTED[command]]
    tokenised = any(name.endswith("_ids") for name in first)
    if not tokenised and not any({*way.split()} <= {*first} for way in ways):
        wanted = " or ".join("+".join(way.split()) for way in ways)
        raise UserError(f"{where} has the columns {', '.join(sorted(first))}; {command} wants {wanted}")
    whole = {*first} & {"prompt", *" ".join(ways).split()} if isinstance(rows, Dataset) else {}  # no stream
    if lacking := {name for name in whole if rows.data.column(name).null_count}:
        raise UserError(f"{where}: some rows have no {min(lacking)}, others have: files do not mix kinds")


def hold_out(rows: Any, fraction: float, seed: int, text_field: str = "text") -> tuple[Any, Any]:
    """Hold out about `fraction` of the rows, at least one.

    Which ones follows from their contents and the seed, not from their order, and copies of a row lie on the
    same side: nothing held out is trained on.

    Returns:
        (training, held-out), each in the order of `rows`.

    Raises:
        UserError: fewer than two different rows, or no such fraction.
    """
    if not 0.0 < fraction < 1.0:
        raise UserError(f"--eval_fraction is {fraction}, wanted more than 0 and less than 1")
    name = next((name for name in (text_field, "messages") if name in rows.column_names), None)
    items = rows[name] if name else rows
    keys = [hashlib.sha256(f"{seed}\n{json.dumps(item, default=str)}".encode()).hexdigest() for item in items]
    ranked = sorted({*keys})
    if len(ranked) < 2:
        raise UserError("the data is a single document, none can be held out: pass --eval_strategy no")
    out = {*ranked[: min(max(1, round(fraction * len(ranked))), len(ranked) - 1)]}
    parts = ([n for n, key in enumerate(keys) if (key in out) == side] for side in (False, True))
    training, held_out = (rows.select(part) for part in parts)
    return training, held_out


def cut(tokens: int, length: int) -> list[slice]:
    """The fewest pieces of at most `length` of a document's tokens, of nearly equal size.

    Equal pieces leave no short last row whose tokens would be predicted from little context.
    """
    pieces = -(-tokens // length)
    edges = [tokens * i // pieces for i in range(pieces + 1)] if pieces else []
    return [slice(*pair) for pair in pairwise(edges)]


def cut_rows(rows: Any, length: int) -> Any:
    """Rows of at most `length` tokens from rows with "input_ids" and "labels"; no row mixes documents."""

    def pieces(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        found: dict[str, list[list[int]]] = {
            name: [row[part] for row in column for part in cut(len(row), length)]
            for name, column in batch.items()
        }
        # A single token predicts nothing.
        return {name: [row for row in column if len(row) > 1] for name, column in found.items()}

    return rows.select_columns(["input_ids", "labels"]).map(pieces, batched=True)


def losses_by_length(rows: Any, length: int, mode: str) -> str:
    """What `length` takes away from rows with "input_ids" and "labels", for people; empty: nothing.

    mode: "keep_start" or "keep_end", as TRL's truncation_mode.
    """
    kept = slice(None, length) if mode == "keep_start" else slice(-length, None)
    longer = lost = nothing = 0
    for row in rows.select_columns(["input_ids", "labels"]):
        if len(row["input_ids"]) > length:
            longer, lost = longer + 1, lost + len(row["input_ids"]) - length
            nothing += all(label == -100 for label in row["labels"][kept])
    if not longer:
        return ""
    return (
        f", {longer:,} of them longer than {length} tokens: they lose {lost:,} tokens, and {nothing:,} of "
        "them all that is to be learnt (--long_text cut, or --packing --packing_strategy bfd_split, keeps it)"
    )
