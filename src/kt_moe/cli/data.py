"""Documents: read from a file, split into training and held-out, cut into rows of tokens.

Owns the file formats `kt-moe finetune --data` takes. Knows nothing of models or training.

.jsonl   one JSON object a line: {"text": "..."} or {"messages": [{"role": "...", "content": "..."}, ...]};
         the whole file is of one kind; blank lines are skipped; other keys are ignored.
.txt     a form feed ends a document; in a file without form feeds two or more blank lines do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kt_moe.cli.errors import UserError

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Documents:
    """The documents of one file, all of one kind.

    kind: "text" (each is a str) or "messages" (each is a list of {"role", "content"}).
    """

    kind: str
    items: Sequence[str | Messages]

    def __len__(self) -> int:
        return len(self.items)

    def digest(self) -> str:
        """SHA-256 of the documents in their order, hexadecimal."""
        return _hash(json.dumps(list(self.items)))


def read_documents(path: Path) -> Documents:
    """Read a .jsonl or .txt file.

    Raises:
        UserError: no such file, another suffix, no documents; not UTF-8, malformed or mixed content, which
            names file and line.
    """
    readers = {".jsonl": _parse_jsonl, ".txt": _parse_txt}
    if path.suffix not in readers:
        raise UserError(f"--data is {path}, wanted a file that ends in {' or '.join(readers)}")
    documents = readers[path.suffix](path, _read_utf8(path))
    if not documents.items:
        raise UserError(f"{path} holds no documents")
    return documents


def split_documents(documents: Documents, fraction: float, seed: int) -> tuple[Documents, Documents]:
    """Hold out about `fraction` of the documents, at least one where fraction > 0.

    Which ones follows from the documents' contents and the seed, not from their order, and copies of a
    document lie on the same side: nothing held out is trained on.

    Returns:
        (training, held-out), each in the file's order.

    Raises:
        UserError: fraction > 0 and fewer than two different documents.
    """
    if fraction == 0:
        return documents, Documents(documents.kind, [])
    keys = [_hash(f"{seed}\n{json.dumps(item)}") for item in documents.items]
    ranked = sorted(set(keys))
    if len(ranked) < 2:
        raise UserError(
            "the data is a single document, so none can be held out: separate its documents (form feed or "
            "two blank lines in .txt, a line each in .jsonl), or pass --eval-fraction 0"
        )
    wanted = max(1, round(fraction * len(ranked)))
    held_out = set(ranked[: min(wanted, len(ranked) - 1)])
    pairs = list(zip(keys, documents.items, strict=True))
    return (
        Documents(documents.kind, [item for key, item in pairs if key not in held_out]),
        Documents(documents.kind, [item for key, item in pairs if key in held_out]),
    )


def cut(tokens: Sequence[int], length: int) -> list[list[int]]:
    """Cut one document's tokens into the fewest pieces of at most `length`, of nearly equal size.

    Equal pieces leave no short last row whose tokens would be predicted from little context.
    """
    pieces = -(-len(tokens) // length)
    edges = [len(tokens) * i // pieces for i in range(pieces + 1)] if pieces else [0]
    return [list(tokens[a:b]) for a, b in pairwise(edges)]


def to_rows(documents: Documents, tokenizer: Any, seq_len: int) -> list[dict[str, Any]]:
    """What TRL's SFTTrainer takes, a dictionary a row.

    Text is tokenized here, ended by the end-of-sequence token and cut into rows of at most seq_len tokens
    ("input_ids"); no row mixes documents. Conversations stay "messages": TRL applies the chat template and
    truncates.
    """
    if documents.kind == "messages":
        return [{"messages": item} for item in documents.items]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = (piece for item in documents.items for piece in cut(_encode(tokenizer, item) + end, seq_len))
    return [{"input_ids": piece} for piece in rows if len(piece) > 1]  # one token predicts nothing


def _encode(tokenizer: Any, text: Any) -> list[int]:
    # verbose=False: no warning of documents longer than the model's context, they are cut right after
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x})") from None
    except OSError as error:
        raise UserError(f"--data: cannot read {path}: {error.strerror}") from None


def _parse_txt(path: Path, text: str) -> Documents:
    text = text.replace("\r\n", "\n")
    pattern = r"\f" if "\f" in text else r"\n(?:[ \t]*\n){2,}"
    return Documents("text", [part.strip("\n") for part in re.split(pattern, text) if part.strip()])


def _parse_jsonl(path: Path, text: str) -> Documents:
    kind, items = "", []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        found, item = _parse_record(where, line)
        kind = kind or found
        if found != kind:
            raise UserError(f'{where}: has "{found}", the lines before have "{kind}"; files do not mix them')
        items.append(item)
    return Documents(kind, items)


def _parse_record(where: str, line: str) -> tuple[str, str | Messages]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of too many digits
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f'{where}: not an object with "text" or "messages"')
    kinds = [key for key in ("text", "messages") if key in record]
    if len(kinds) != 1:
        found = "both" if kinds else f"only the keys {sorted(record)}"
        raise UserError(f'{where}: wanted one of "text" and "messages", it has {found}')
    value = record[kinds[0]]
    return (kinds[0], _check_text(where, value) if kinds[0] == "text" else _check_messages(where, value))


def _check_text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f'{where}: "text" is a {type(value).__name__}, wanted a string')
    if not value.strip():
        raise UserError(f'{where}: "text" is empty')
    return _check_unicode(where, value)


def _check_messages(where: str, value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise UserError(f'{where}: "messages" is not a list of messages, or empty')
    for index, message in enumerate(value):
        values = [message.get(k) for k in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(v, str) for v in values):
            raise UserError(f'{where}: messages[{index}] lacks a "role" or "content" that is a string')
    return [{key: _check_unicode(where, m[key]) for key in ("role", "content")} for m in value]


def _check_unicode(where: str, value: str) -> str:
    # "\\ud800" is legal JSON, but half a surrogate pair is no character and tokenizers refuse it
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: lone surrogate {value[error.start]!r}") from None
    return value


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
