"""Data of a run: what is read, held-out rows, rows of long texts; every refusal names file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kt_moe.cli.data import check_columns, cut, cut_rows, digest, documents, hold_out, load_data
from kt_moe.cli.terminal import UserError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [*load_data(str(path))["train"]]


def test_jsonl_keeps_order_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "one", "id": 7}\n\n{"text": "zwei\\u2028é", "id": 8}\r\n')
    assert rows(path) == [{"text": "one", "id": 7}, {"text": "zwei\u2028é", "id": 8}]


def test_json_parquet_and_directories(tmp_path: Path) -> None:
    texts = [{"text": text} for text in ("a", "b", "c")]
    write(tmp_path / "d.json", json.dumps(texts))
    assert rows(tmp_path / "d.json") == texts
    datasets.Dataset.from_list(texts).to_parquet(str(tmp_path / "d.parquet"))
    assert rows(tmp_path / "d.parquet") == texts
    for folder, suffix in (("lines", "jsonl"), ("split", "jsonl"), ("plain", "txt")):
        (tmp_path / folder).mkdir()
        names = ("train", "test") if folder == "split" else ("1", "2")
        for number, name in enumerate(names):
            line = (
                json.dumps(texts[number]) if suffix == "jsonl" else f"{texts[number]['text']}\n\nx\n\n\n\ny"
            )
            write(tmp_path / folder / f"{name}.{suffix}", line + "\n")
    assert rows(tmp_path / "lines") == texts[:2]
    assert {name: [*part] for name, part in load_data(str(tmp_path / "split")).items()} == {
        "train": texts[:1],
        "test": texts[1:2],
    }
    assert [row["text"] for row in rows(tmp_path / "plain")] == ["a\n\nx", "y", "b\n\nx", "y"]


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
    assert documents(content) == wanted
    assert [row["text"] for row in rows(write(tmp_path / "d.txt", content))] == wanted


def test_long_lines_need_no_more_memory_than_they_have(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", "".join(json.dumps({"text": c * (21 << 20)}) + "\n" for c in "ab"))
    assert [len(row["text"]) for row in rows(path)] == [21 << 20] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"text": "fine"}\n\n{"text": }\n', "d.jsonl, line 3 is no JSON object"),
        ("d.jsonl", b'{"text": "fine"}\n["text"]\n', "d.jsonl, line 2 is no JSON object"),
        ("d.txt", b"a\nb\xff", "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        load_data(str(path))
    assert f"--dataset_name {path} cannot be read: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("content", ["", "\n \n\n\n"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(UserError, match=r"has no rows|cannot be read"):
        check_columns("sft", load_data(str(write(tmp_path / name, content)))["train"], name)


def test_what_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"d\.jsonl cannot be read: FileNotFoundError: "):
        load_data(str(tmp_path / "d.jsonl"))
    with pytest.raises(UserError, match="EmptyDatasetError: The directory at"):
        load_data(str(tmp_path))
    with pytest.raises(UserError, match=r"d\.csv: wanted one of \.jsonl, \.json, \.parquet, \.txt"):
        load_data(str(write(tmp_path / "d.csv", "text\na\n")))
    for name in ("a.txt", "b.jsonl"):
        write(tmp_path / name, "{}")
    with pytest.raises(UserError, match="files of 2 kinds"):
        load_data(str(tmp_path))


def test_a_row_without_what_others_have(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    with pytest.raises(UserError, match="some rows have no messages, others have"):
        check_columns("sft", load_data(str(path))["train"], "d.jsonl")


texts = st.lists(st.text(max_size=6), min_size=1, max_size=40)


@given(texts, st.floats(0.01, 1, exclude_max=True), st.integers(0, 5), st.randoms())
@settings(max_examples=25)
def test_split_is_a_partition_that_order_does_not_change(
    items: list[str], fraction: float, seed: int, random: Any
) -> None:
    def split(some: list[str]) -> list[list[str]]:
        return [
            list(part["text"])
            for part in hold_out(datasets.Dataset.from_dict({"text": some}), fraction, seed)
        ]

    if len(set(items)) < 2:
        with pytest.raises(UserError, match="single document"):
            split(items)
        return
    train, held_out = split(items)
    assert sorted([*train, *held_out]) == sorted(items)
    assert not set(train) & set(held_out)
    assert train
    assert held_out
    assert set(split(random.sample(items, len(items)))[1]) == set(held_out)


def test_split_follows_fraction_and_seed() -> None:
    rows = datasets.Dataset.from_dict({"text": [str(i) for i in range(100)]})
    held_out = [list(hold_out(rows, 0.1, seed)[1]["text"]) for seed in range(3)]
    assert [len(part) for part in held_out] == [10, 10, 10]
    assert held_out[0] != held_out[1] != held_out[2]


@given(st.lists(st.integers(), max_size=200), st.integers(1, 50))
def test_cut_loses_nothing_and_is_even(tokens: list[int], length: int) -> None:
    pieces = [tokens[piece] for piece in cut(len(tokens), length)]
    assert [t for piece in pieces for t in piece] == tokens
    assert len(pieces) == -(-len(tokens) // length)
    sizes = {len(piece) for piece in pieces}
    assert max(sizes, default=0) <= length
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


def test_rows_of_long_documents_do_not_mix_them() -> None:
    ids = [[97, 98, 99, 100, 0], [120, 121, 0], [0]]
    tokens = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "text": ["abcd", "xy", ""]})
    found = cut_rows(tokens, 4)
    assert found.column_names == ["input_ids", "labels"]
    assert found["input_ids"] == found["labels"] == [[97, 98], [99, 100, 0], [120, 121, 0]]


def test_digest_follows_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "d.txt", "a")
    first = digest(str(path))
    assert first == digest(str(tmp_path)) != ["someone/data"] == digest("someone/data")
    write(path, "b")
    assert digest(str(path)) != first
