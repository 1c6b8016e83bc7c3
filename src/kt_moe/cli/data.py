"""The data of a run: files for `--dataset_name`, held-out rows, rows of long texts.

Files are read by `datasets`. Knows nothing of models or training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from kt_moe.cli.errors import UserError

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
# Columns that a command's data may have, each tuple one way; and what to call them.
_PAIRS = ("chosen", "rejected")
_WANTED: dict[str, tuple[str, list[tuple[str, ...]]]] = {
    "sft": (
        "text, messages, or prompt and completion",
        [("messages",), ("conversations",), ("prompt", "completion"), ("input_ids",), ("images",)],
    ),
    "dpo": ("prompt, chosen and rejected", [_PAIRS]),
    "reward": ("chosen and rejected", [_PAIRS]),
    "kto": ("prompt, completion and label", [("prompt", "completion", "label"), _PAIRS]),
    "grpo": ("prompt", [("prompt",)]),
    "rloo": ("prompt", [("prompt",)]),
}


def load_data(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """A `datasets.DatasetDict` of a file, a directory of files, or a data set on the hub.

    .jsonl, .json, .parquet   rows, as `datasets` reads them
    .txt                      documents end in a form feed; in a file without form feeds in two blank lines

    Raises:
        UserError: no such file, no rows, or rows that cannot be read; names file and line.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    check_exists(name)
    path = Path(name)
    if not path.exists():
        return load_dataset(name, name=config, streaming=streaming)
    files = local_files(path)
    kinds = {_BUILDERS[file.suffix] for file in files}
    if len(kinds) != 1:
        found = f"files of {len(kinds)} kinds" if kinds else "no file"
        raise UserError(f"--dataset_name {path}: {found}, wanted {', '.join(_BUILDERS)} of one kind")
    (kind,) = kinds
    texts = [] if kind == "parquet" else files
    for fault in (fault for file in texts for fault in _faults(file)):  # which `datasets` does not look for
        raise UserError(fault)
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    if path.is_file():
        options["data_files"] = {"train": [str(path)]}
    try:
        found = load_dataset(kind if path.is_file() else name, name=config, streaming=streaming, **options)
    except (DatasetsError, ValueError, OSError) as error:
        for fault in (fault for file in texts for fault in _faults(file, parse=True)):
            raise UserError(fault) from error
        why: BaseException = error
        while why.__cause__ is not None:
            why = why.__cause__
        raise UserError(f"{path}: {' '.join(str(why).split())[:300]}") from error
    if kind != "text":
        return found
    return found.map(
        lambda b: {"text": [part for text in b["text"] for part in documents(text)]}, batched=True
    )


def check_exists(name: str) -> None:
    """Refuse what is called like a file and is none; other names are those of data on the hub.

    Raises:
        UserError: no such file.
    """
    if Path(name).suffix in _BUILDERS and not Path(name).exists():
        raise UserError(f"--dataset_name: no such file: {name}")


def local_files(path: Path) -> list[Path]:
    """The data files of a path; none where it is a name on the hub."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in _BUILDERS)
    return [path] if path.is_file() and path.suffix in _BUILDERS else []


def digest(name: str) -> str:
    """SHA-256 of a data set's files, or of one file, hexadecimal; its name where it is on the hub."""
    path, found = Path(name), hashlib.sha256()
    if not path.exists():
        return name
    for file in local_files(path) or [path]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def check_columns(command: str, rows: Any, where: str, text_field: str = "text") -> None:
    """Refuse data that the command cannot use.

    Raises:
        UserError: it has no rows, other columns, or some in only a part of its rows.
    """
    names = rows.column_names
    if names is None:  # a stream that has not begun
        return
    wanted, ways = _WANTED[command]
    ways = [*ways, (text_field,)] if command == "sft" else ways
    way = next((way for way in ways if set(way) <= set(names)), None)
    if way is None:
        raise UserError(f"{where} has the columns {', '.join(names)}; kt-moe {command} wants {wanted}")
    if not hasattr(rows, "data"):  # another stream
        return
    if not len(rows):
        raise UserError(f"{where} has no rows")
    for name in way:
        if rows.data.column(name).null_count:
            row = next(number for number, value in enumerate(rows[name], start=1) if value is None)
            raise UserError(f"{where}: row {row} has no {name}, others have: files do not mix kinds")


def hold_out(rows: Any, fraction: float, seed: int, text_field: str = "text") -> tuple[Any, Any]:
    """Hold out about `fraction` of the rows, at least one.

    Which ones follows from their contents and the seed, not from their order, and copies of a row lie on the
    same side: nothing held out is trained on.

    Returns:
        (training, held-out), each in the order of `rows`.

    Raises:
        UserError: fewer than two different rows.
    """
    name = next((name for name in (text_field, "messages") if name in rows.column_names), None)
    items = rows[name] if name else rows
    keys = [hashlib.sha256(f"{seed}\n{json.dumps(item, default=str)}".encode()).hexdigest() for item in items]
    ranked = sorted(set(keys))
    if len(ranked) < 2:
        raise UserError(
            "the data is a single document, so none can be held out: separate its documents (form feed or "
            "two blank lines in .txt, a line each in .jsonl), or pass --eval_fraction 0"
        )
    wanted = max(1, round(fraction * len(ranked)))
    out = set(ranked[: min(wanted, len(ranked) - 1)])
    parts = ([n for n, key in enumerate(keys) if (key in out) == side] for side in (False, True))
    training, held_out = (rows.select(part) for part in parts)
    return training, held_out


def cut(tokens: Sequence[int], length: int) -> list[list[int]]:
    """Cut one document's tokens into the fewest pieces of at most `length`, of nearly equal size.

    Equal pieces leave no short last row whose tokens would be predicted from little context.
    """
    pieces = -(-len(tokens) // length)
    edges = [len(tokens) * i // pieces for i in range(pieces + 1)] if pieces else [0]
    return [list(tokens[a:b]) for a, b in pairwise(edges)]


def cut_texts(rows: Any, tokenizer: Any, length: int, text_field: str = "text") -> Any:
    """Rows of at most `length` tokens ("input_ids") from rows of text; no row mixes documents.

    Every document ends with the end-of-sequence token, unless the tokenizer has none.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def pieces(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # verbose=False: no warning of documents longer than the model's context, they are cut right after
        ids = (tokenizer(text, verbose=False)["input_ids"] + end for text in batch[text_field])
        found = [piece for document in ids for piece in cut(document, length)]
        return {"input_ids": [piece for piece in found if len(piece) > 1]}  # one token predicts nothing

    said = {"desc": "Cutting into rows"} if hasattr(rows, "__len__") else {}  # streams show no progress
    return rows.map(pieces, batched=True, remove_columns=rows.column_names, **said)


def documents(text: str) -> list[str]:
    """The documents of a .txt file."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    pattern = r"\f" if "\f" in text else r"\n(?:[ \t]*\n){2,}"
    return [part.strip("\n") for part in re.split(pattern, text) if part.strip()]


def _faults(file: Path, parse: bool = False) -> Iterator[str]:
    """What is wrong with the lines of a file of text. parse: whether those of .jsonl are JSON, too."""
    blank = True
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig").strip()
                blank = blank and not text
                if parse and file.suffix == ".jsonl" and not isinstance(json.loads(text or "{}"), dict):
                    yield f"{file}:{number}: not an object"
            except UnicodeDecodeError as error:
                yield f"{file}:{number}: not UTF-8 (byte {line[error.start]:#04x})"
            except (ValueError, RecursionError) as problem:  # ValueError also for a number of too many digits
                yield f"{file}:{number}: not JSON: {problem}"
    if blank:
        yield f"{file} has no rows"
