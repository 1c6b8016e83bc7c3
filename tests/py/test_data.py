"""Documents of `kt-moe finetune`: reading, splitting, cutting; every refusal names file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kt_moe.cli.data import Documents, cut, read_documents, split_documents, to_rows
from kt_moe.cli.errors import UserError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_jsonl_text_keeps_order_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "one", "id": 7}\n\n{"text": "zwei\\u2028é"}\r\n')
    assert read_documents(path) == Documents("text", ["one", "zwei\u2028é"])


def test_jsonl_messages_keep_role_and_content(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "?", "name": "x"}, {"role": "assistant", "content": ""}]
    path = write(tmp_path / "d.jsonl", json.dumps({"messages": turns}))
    wanted = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
    assert read_documents(path) == Documents("messages", [wanted])


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("a\n\nb\n\n\nc\n", ["a\n\nb", "c"]),
        ("a\r\n\r\n \r\nb", ["a", "b"]),
        ("a\n\n\nb\n\fc\n\f\n", ["a\n\n\nb", "c"]),  # a form feed anywhere, and blank lines mean nothing
        ("\ufeffa", ["a"]),
    ],
)
def test_txt_documents(tmp_path: Path, content: str, wanted: list[str]) -> None:
    assert read_documents(write(tmp_path / "d.txt", content)).items == wanted


BAD_LINES: dict[str, Any] = {
    "not JSON": b'{"text": }',
    "not JSON: Exceeds the limit": b'{"text": ' + b"9" * 5000 + b"}",
    "not an object": b'["text"]',
    "only the keys ['prompt']": b'{"prompt": "a"}',
    "it has both": b'{"text": "a", "messages": []}',
    '"text" is a int': b'{"text": 3}',
    '"text" is empty': b'{"text": " "}',
    "not a list of messages": b'{"messages": "hello"}',
    'messages[0] lacks a "role" or "content"': b'{"messages": [{"role": "user"}]}',
    "lone surrogate": b'{"text": "\\ud800"}',
    "not UTF-8 (byte 0xff)": b'{"text": "\xff"}',
    'has "messages", the lines before have "text"': b'{"messages": [{"role": "user", "content": "a"}]}',
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_bad_line_is_named(tmp_path: Path, message: str) -> None:
    path = write(tmp_path / "d.jsonl", b'{"text": "fine"}\n\n' + BAD_LINES[message] + b'\n{"text": "fine"}\n')
    with pytest.raises(UserError) as error:
        read_documents(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
@pytest.mark.parametrize("content", ["", "\n \n\n\n"])
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(UserError, match="holds no documents"):
        read_documents(write(tmp_path / name, content))


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends in \.jsonl or \.txt"):
        read_documents(tmp_path / "d.csv")
    with pytest.raises(UserError, match="No such file"):
        read_documents(tmp_path / "d.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        read_documents(tmp_path / "folder.txt")


texts = st.lists(st.text(max_size=6), min_size=1, max_size=40)


@given(texts, st.floats(0, 1, exclude_max=True), st.integers(0, 5), st.randoms())
def test_split_is_a_partition_that_order_does_not_change(
    items: list[str], fraction: float, seed: int, random: Any
) -> None:
    if fraction > 0 and len(set(items)) < 2:
        with pytest.raises(UserError, match="single document"):
            split_documents(Documents("text", items), fraction, seed)
        return
    train, held_out = split_documents(Documents("text", items), fraction, seed)
    assert sorted([*train.items, *held_out.items]) == sorted(items)
    assert not set(train.items) & set(held_out.items)
    assert len(train) > 0
    assert (len(held_out) > 0) == (fraction > 0)
    shuffled = random.sample(items, len(items))
    assert set(split_documents(Documents("text", shuffled), fraction, seed)[1].items) == set(held_out.items)


def test_split_follows_fraction_and_seed() -> None:
    documents = Documents("text", [str(i) for i in range(100)])
    held_out = [split_documents(documents, 0.1, seed)[1].items for seed in range(3)]
    assert [len(part) for part in held_out] == [10, 10, 10]
    assert held_out[0] != held_out[1] != held_out[2]


@given(st.lists(st.integers(), max_size=200), st.integers(1, 50))
def test_cut_loses_nothing_and_is_even(tokens: list[int], length: int) -> None:
    pieces = cut(tokens, length)
    assert [t for piece in pieces for t in piece] == tokens
    assert len(pieces) == -(-len(tokens) // length)
    sizes = {len(piece) for piece in pieces}
    assert max(sizes, default=0) <= length
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


class Letters:
    """A tokenizer: a letter a token."""

    eos_token_id = 0

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_rows_end_documents_and_do_not_mix_them() -> None:
    rows = to_rows(Documents("text", ["abcd", "xy", ""]), Letters(), 4)
    assert rows == [{"input_ids": ids} for ids in ([97, 98], [99, 100, 0], [120, 121, 0])]
    turns = [{"role": "user", "content": "hi"}]
    assert to_rows(Documents("messages", [turns]), Letters(), 4) == [{"messages": turns}]


def test_digest_follows_the_documents() -> None:
    one, other = Documents("text", ["a", "b"]), Documents("text", ["b", "a"])
    assert one.digest() == Documents("text", ["a", "b"]).digest() != other.digest()
