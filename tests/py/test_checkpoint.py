"""kt_moe.Checkpoint on files that the safetensors package writes, and on files nobody should write."""

from __future__ import annotations

import json
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kt_moe import Checkpoint, Experts
from kt_moe.checkpoint import LayerInfo, TensorInfo

E, H, I = 4, 16, 8  # noqa: E741


def per_expert(layer: int, names: tuple[str, str, str], block: str = "mlp") -> dict[str, Tensor]:
    root = f"model.layers.{layer}.{block}.experts"
    return {
        f"{root}.{e}.{name}.weight": torch.randn((H, I) if name == names[2] else (I, H), dtype=torch.bfloat16)
        for e in range(E)
        for name in names
    }


def qwen(layer: int = 0) -> dict[str, Tensor]:
    return per_expert(layer, ("gate_proj", "up_proj", "down_proj"))


def fused(layer: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    root = f"model.layers.{layer}.mlp.experts"
    return {
        f"{root}.gate_up_proj": torch.randn(E, 2 * I, H, dtype=dtype),
        f"{root}.down_proj": torch.randn(E, H, I, dtype=dtype),
    }


def save_sharded(
    folder: Path, shards: dict[str, dict[str, Tensor]], index: str = "model.safetensors.index.json"
) -> None:
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_file_lists_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(
        {
            "weight": torch.zeros(3, 5, dtype=torch.bfloat16),
            "scalar": torch.tensor(1.0),
            "empty": torch.zeros(0, 7, dtype=torch.int64),
            "fp8": torch.zeros(4, dtype=torch.float8_e4m3fn),
        },
        path,
        metadata={"format": "pt"},
    )
    checkpoint = Checkpoint(path)
    assert checkpoint.path == path
    assert checkpoint.files == [path]
    assert dict(checkpoint.tensors) == {
        "empty": TensorInfo("I64", (0, 7), 0, path),
        "fp8": TensorInfo("F8_E4M3", (4,), 4, path),
        "scalar": TensorInfo("F32", (), 4, path),
        "weight": TensorInfo("BF16", (3, 5), 30, path),
    }
    assert checkpoint.layers == []
    with pytest.raises(TypeError):
        checkpoint.tensors["new"] = checkpoint.tensors["fp8"]  # type: ignore[index]


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "other.safetensors.index.json"])
def test_a_sharded_directory_is_one_model(tmp_path: Path, index: str) -> None:
    shards = {
        "model-1.safetensors": qwen(0),
        "model-2.safetensors": fused(1) | {"lm_head.weight": torch.ones(2)},
    }
    save_sharded(tmp_path, shards, index)
    save_file({"left.over": torch.ones(1)}, tmp_path / "old.safetensors")
    checkpoint = Checkpoint(str(tmp_path))
    assert checkpoint.files == [tmp_path / file for file in shards]
    assert set(checkpoint.tensors) == {name for tensors in shards.values() for name in tensors}
    assert checkpoint.tensors["lm_head.weight"].file == tmp_path / "model-2.safetensors"
    assert checkpoint.layers == [0, 1]
    nbytes = E * 3 * H * I * 2
    memory = {p: nbytes // 3 for p in ("gate", "up", "down")}
    for layer, layout in enumerate(("per-expert", "fused")):
        assert checkpoint.layer(layer) == LayerInfo(
            num_experts=E, hidden_size=H, intermediate_size=I, dtype="BF16", layout=layout, nbytes=nbytes,
            format="bf16", scale_type="none", scale_rows=1, scale_cols=0, zero_points=False,
            global_scale=False, gated=True, biases=False, mappable=True, memory_bytes=memory,
        )  # fmt: skip
    assert repr(checkpoint) == (
        f"Checkpoint({str(tmp_path)!r}: 2 files, {3 * E + 3} tensors, 0.0 MB, experts in 2 layers)"
    )


def test_a_directory_without_index_is_all_its_files(tmp_path: Path) -> None:
    save_file(qwen(0), tmp_path / "a.safetensors")
    save_file(per_expert(1, ("w1", "w3", "w2"), "block_sparse_moe"), tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.layers == [0, 1]
    assert checkpoint.layer(1).layout == "per-expert"
    save_file(qwen(0), tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"c\.safetensors.*is also in.*a\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")]
)
def test_expert_dtypes(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    save_file(fused(2, dtype), tmp_path / "m.safetensors")
    info = Checkpoint(tmp_path).layer(2)
    assert (info.dtype, info.nbytes) == (name, E * 3 * H * I * dtype.itemsize)


def test_a_layer_that_is_not_there_and_one_that_is_incomplete(tmp_path: Path) -> None:
    tensors = qwen(0) | qwen(5)
    missing = "model.layers.5.mlp.experts.2.up_proj.weight"
    del tensors[missing]
    save_file(tensors, tmp_path / "m.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.layers == [0, 5]
    assert checkpoint.layer(0).num_experts == E
    with pytest.raises(ValueError, match=rf"layer 5.*{missing}.*is missing"):
        checkpoint.layer(5)
    with pytest.raises(ValueError, match="no experts in layer 3; layers with experts: 0, 5"):
        checkpoint.layer(3)


def test_experts_that_disagree_are_named(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    save_file(qwen() | {name: torch.zeros(I, H, dtype=torch.bfloat16)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=rf'{name}" has shape \[8, 16\], wanted \[16, 8\]'):
        Checkpoint(tmp_path).layer(0)
    save_file(qwen() | {name: torch.zeros(H, I)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=rf'{name}" is F32, the layer\'s first is BF16'):
        Checkpoint(tmp_path).layer(0)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"0.gate_proj.weight_scale_inv": torch.ones(1)}, 'up_proj.weight_scale_inv" is missing'),
        ({"gate_up_proj_blocks": torch.ones(1)}, "stored in two layouts; .*gate_up_proj_blocks"),
        ({"gate_up_proj_bias": torch.ones(1)}, "stored in two layouts; .*gate_up_proj_bias"),
        ({"0.gate_proj.weight_scale_2": torch.ones(1)}, 'up_proj.weight_scale_2" is missing'),
        ({"gate_up_proj_weight_scale_2": torch.ones(1)}, "NVFP4 of fused experts: not supported"),
        ({"0.fc1.weight": torch.ones(1)}, "an unknown expert layout"),
    ],
)
def test_mixed_formats_are_listed_but_not_read(tmp_path: Path, extra: dict[str, Tensor], says: str) -> None:
    root = "model.layers.0.mlp.experts."
    save_file(qwen() | {root + name: t for name, t in extra.items()}, tmp_path / "m.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.layers == [0]
    with pytest.raises(ValueError, match=says):
        checkpoint.layer(0)


HOSTILE = {
    "empty": (b"", "0 bytes long"),
    "no header": (struct.pack("<Q", 2), "header length is 2, but only 0 bytes follow"),
    "header beyond the file": (struct.pack("<Q", 3) + b"{}", "header length is 3, but only 2 bytes follow"),
    "huge header": (struct.pack("<Q", 2**64 - 1) + b"{}", "wanted at most 100000000"),
    "not JSON": (struct.pack("<Q", 5) + b"{nope", "not JSON"),
    "a pickle": (b"\x80\x02}q\x00.padding....", "header length"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_name_the_file(tmp_path: Path, kind: str) -> None:
    content, says = HOSTILE[kind]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"m\.safetensors.*{says}"):
        Checkpoint(path)


def tensor(begin: int, end: int, shape: tuple[int, ...] = (4,), dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": tensor(0, 9)}, "within the 8 bytes"),
        ({"a": tensor(-4, 0)}, "wanted non-negative integers"),
        ({"a": tensor(0, 4), "b": tensor(2, 6)}, 'tensors "a" and "b" overlap'),
        ({"a": tensor(0, 4)}, "end at byte 4 of 8"),
        ({"a": tensor(0, 8, dtype="F32")}, "takes 16"),
        ({"a": tensor(0, 8, dtype="F7")}, 'dtype "F7" is unknown'),
        ({"a": tensor(0, 8, (2**62, 2**62))}, "overflows"),
        (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{}}', 'duplicate key "a"'),
        ({"__metadata__": {"n": 1}, "a": tensor(0, 8, (8,))}, "__metadata__"),
        (b'{"a":' + b"[" * 100_000, "is an array, wanted an object"),
    ],
)
def test_hostile_headers_name_the_fault(tmp_path: Path, header: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Checkpoint(write_raw(tmp_path / "m.safetensors", header, bytes(8)))


def test_a_truncated_download_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(qwen(), path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"m\.safetensors"):
        Checkpoint(path)


@pytest.mark.parametrize("where", ["directory", "index"])
@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("directory", ValueError, "not a regular file"),
        ("fifo", ValueError, "not a regular file"),
        ("device", ValueError, "not a regular file"),
        ("loop", OSError, "symbolic links"),
        ("dangling", FileNotFoundError, "cannot open"),
        ("growing", ValueError, "end at byte 4 of 8"),
    ],
)
def test_what_is_no_safetensors_file_by_name_of_one(
    tmp_path: Path, where: str, kind: str, error: type[Exception], says: str
) -> None:
    path = tmp_path / "m.safetensors"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "growing":
        write_raw(path, {"a": tensor(0, 4)}, bytes(8))
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path, "dangling": "gone"}[kind])
    if where == "index":
        index = {"weight_map": {"a": path.name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=rf"m\.safetensors.*{says}"):
        Checkpoint(tmp_path)


def test_a_download_cache_of_links_is_a_model(tmp_path: Path) -> None:
    """The layout of huggingface_hub: snapshots of links to blobs beside them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_sharded(blobs, {"m.safetensors": qwen()})
    for number, name in enumerate(["m.safetensors", "model.safetensors.index.json"]):
        (blobs / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert Checkpoint(snapshot).layers == [0]


@pytest.mark.parametrize("change", ["shortened", "grown", "replaced", "touched", "removed"])
def test_a_file_that_changes_after_it_was_indexed_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file(qwen(), path)
    checkpoint = Checkpoint(path)
    says, error = "m.safetensors.*the file has changed since its header was read: its ", ValueError
    if change == "shortened":
        os.truncate(path, path.stat().st_size - 1)
        says += "size is"
    elif change == "grown":
        with path.open("ab") as file:
            file.write(b"x")
        says += "size is"
    elif change == "replaced":
        shutil.copy2(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
        says += "inode is"
    elif change == "touched":
        os.utime(path, ns=(0, 0))
        says += "time of modification in nanoseconds is 0, wanted"
    else:
        path.unlink()
        says, error = "m.safetensors", FileNotFoundError
    with pytest.raises(error, match=says):
        Experts.from_checkpoint(checkpoint, 0)


@pytest.mark.parametrize("escape", ["../m.safetensors", "/etc/hostname", "x/../../m.safetensors", ""])
def test_an_index_may_not_leave_its_directory(tmp_path: Path, escape: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": escape}}))
    with pytest.raises(ValueError, match=r'tensor "a" is in .*, wanted a file in the index\'s directory'):
        Checkpoint(folder)


def test_what_the_index_names_must_be_there(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"m-1.safetensors": {"a": torch.ones(1)}, "m-2.safetensors": {"b": torch.ones(1)}})
    save_file({"c": torch.ones(1)}, tmp_path / "m-2.safetensors")
    with pytest.raises(ValueError, match=r'tensor "b" is not in .*m-2\.safetensors'):
        Checkpoint(tmp_path)
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"m-2\.safetensors"):
        Checkpoint(tmp_path)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        Checkpoint(tmp_path)
    with pytest.raises(ValueError, match="not a regular file"):
        Checkpoint("/dev/null")
    with pytest.raises(ValueError, match="NUL"):
        Checkpoint("a\0b")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="not a regular file"):
        Checkpoint(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        Checkpoint(tmp_path / "loop")
    for wrong in (None, 7, b"bytes"):
        with pytest.raises(TypeError):
            Checkpoint(wrong)  # type: ignore[arg-type]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_an_os_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(1)}, path)
    path.chmod(0)
    with pytest.raises(OSError, match="Permission denied"):
        Checkpoint(path)


def test_names_that_are_not_utf8_work(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "plain.safetensors").rename(folder / "m.safetensors")
    assert Checkpoint(folder).files == [folder / "m.safetensors"]
    (folder / "m.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="5 bytes long"):
        Checkpoint(folder)


def test_several_threads_may_read_one_checkpoint(tmp_path: Path) -> None:
    save_file({**qwen(0), **fused(1)}, tmp_path / "m.safetensors")
    checkpoint = Checkpoint(tmp_path)
    expected = [checkpoint.layer(n) for n in (0, 1)]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: [checkpoint.layer(n) for n in (0, 1)], range(200)):
            assert found == expected
