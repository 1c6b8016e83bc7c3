"""`kt_moe.KTConfig`: settings of kt-kernel, each followed, known not to be needed, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model

import kt_moe
from kt_moe.hf import kt_config

KTConfig = kt_moe.KTConfig
DOCS = Path(__file__).parents[2] / "docs/migrate-from-kt-kernel.md"


def options(settings: dict) -> dict:
    """What differs from the defaults of `KtMoeConfig`."""
    default = kt_moe.KtMoeConfig().to_dict()
    return {k: v for k, v in KTConfig.from_dict(settings).experts.to_dict().items() if v != default[k]}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"kt_num_threads": 8}, {"threads": 8}),
        ({"kt_num_threads": "8"}, {"threads": 8}),
        ({"kt_tp_enabled": True, "kt_threadpool_count": 2}, {"shards": 2}),
        ({"kt_tp_enabled": "true"}, {"shards": 1}),
        ({"kt_tp_enabled": False, "kt_threadpool_count": 2}, {"shards": 1}),
        ({"kt_threadpool_count": 2}, {"shards": 1}),
        ({"kt_backend": "AMXINT8"}, {"format": "int8"}),
        ({"kt_backend": "AMXINT4"}, {"format": "int4"}),
        ({"kt_backend": "AMXBF16", "kt_expert_weight_format": "bf16"}, {}),
        ({"kt_backend": "AMXINT4_KGroup"}, {}),
        ({"kt_backend": "AMXFP8", "kt_expert_weight_format": "fp8"}, {}),
        ({"kt_weight_lifecycle": "ephemeral"}, {"paged": True}),
        (
            {"kt_backend": "INT8", "kt_weight_lifecycle": "ephemeral", "cache_dir": "packed"},
            {"format": "int8", "cache_dir": "packed"},
        ),
        ({"kt_activation_policy": {"cpu": "recompute", "gpu": "recompute"}}, {"recompute": True}),
        ({"kt_activation_policy": {"cpu": "retain", "gpu": "retain"}}, {}),
        ({"kt_activation_policy": {"cpu": "recompute"}}, {"recompute": True}),
        ({"kt_activation_policy": {"cpu": "retain"}}, {}),
        ({"kt_activation_policy": {"gpu": "recompute"}}, {"checkpoint_experts": "retain"}),
        ({"kt_activation_policy": '{"cpu": "retain", "gpu": "recompute"}'}, {"checkpoint_experts": "retain"}),
        ({"gpu_memory": "6GiB", "kt_num_threads": 4}, {"gpu_memory": "6GiB", "threads": 4}),
        ({"kt_config": {"enabled": True, "kt_num_threads": 3}, "mixed_precision": "bf16"}, {"threads": 3}),
        ({"kt_num_threads": None, "kt_weight_path": None}, {}),
        ({"kt_num_gpu_experts": 0.0, "kt_train_mode": "lora", "kt_use_lora_experts": "False"}, {}),
        ({"enabled": "true", "kt_wrap_kwargs": "{}"}, {}),
    ],
)
def test_settings_are_followed(settings, expected):
    assert options(settings) == expected


def test_lora():
    found = KTConfig.from_dict({"kt_lora_rank": 8, "kt_lora_dropout": "0.1"})
    assert found.lora == {"r": 8, "lora_dropout": 0.1}
    config = found.lora_config(["experts"])
    assert (config.r, config.lora_alpha) == (8, 16)
    config = found.lora_config(["experts"], r=32)
    assert (config.r, config.lora_alpha) == (32, 64)
    config = KTConfig.from_dict({"kt_lora_alpha": 5}).lora_config(["experts"], r=32)
    assert (config.r, config.lora_alpha) == (32, 5)
    config = KTConfig.from_dict({}).lora_config(["experts"])
    assert (config.r, config.lora_alpha) == (8, 8)  # PEFT's
    config = found.lora_config(["q_proj", "experts"], bias="none", lora_alpha=4)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 4, 0.1)
    assert config.target_modules == {"q_proj", "experts"}
    assert KTConfig.from_dict({}).lora == {}
    assert found.lora_config("all-linear").target_modules == "all-linear"


def test_what_is_not_needed_is_said():
    found = KTConfig.from_dict({"kt_max_cache_depth": 2, "kt_share_backward_bb": True})
    assert set(found.not_needed) == {"kt_max_cache_depth", "kt_share_backward_bb"}
    found = KTConfig.from_dict({"kt_use_lora_experts": False, "kt_lora_expert_num": 2})
    assert set(found.not_needed) == {"kt_lora_expert_num"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kt_num_thread": 8}, "kt_num_thread is unknown, nearest is kt_num_threads"),
        ({"gpu_memry": 8}, "gpu_memry is unknown, nearest is gpu_memory"),
        ({"xyz": 8}, "xyz is unknown$"),
        ({"kt_num_threads": 0}, "kt_num_threads is 0, wanted a whole number from 1"),
        ({"kt_num_threads": True}, "kt_num_threads is True, wanted a whole number"),
        ({"kt_num_threads": 1.5}, "kt_num_threads is 1.5"),
        ({"kt_num_threads": 8, "threads": 4}, "threads is 4, and threads is 8 already"),
        ({"kt_backend": "AMXINT8", "kt_expert_weight_format": "bf16"}, "format is 'int8' already"),
        ({"kt_backend": "CUDA"}, "kt_backend is 'CUDA', wanted one of auto"),
        ({"kt_backend": "AMXINT8_SkipLoRA"}, "kt_backend is 'AMXINT8_SkipLoRA', wanted amxint8: LoRA is on"),
        ({"use_kt": True, "lora_rank": 8}, "use_kt is an option of LLaMA-Factory, wanted kt-kernel's"),
        (
            {"kt_use_lora_experts": True, "kt_lora_expert_num": 2},
            "experts is True, has no counter",
        ),
        ({"kt_tp_enabled": "maybe"}, "kt_tp_enabled is 'maybe', wanted true or false"),
        ({"kt_weight_path": "/experts"}, "kt_weight_path is '/experts', has no counterpart"),
        ({"kt_num_gpu_experts": 4}, "gpu_memory says how much"),
        ({"kt_train_mode": "full"}, "kt_train_mode is 'full', wanted \"lora\""),
        ({"kt_full_weight_grad": True}, "experts are frozen"),
        ({"kt_backend": "INT8", "kt_weight_lifecycle": "ephemeral"}, "wanted cache_dir beside it"),
        ({"kt_weight_lifecycle": "short"}, "wanted persistent or ephemeral"),
        ({"kt_activation_policy": {}}, 'wanted "cpu", "gpu" or both'),
        ({"kt_activation_policy": {"cpu": "retain", "tpu": "retain"}}, 'wanted "cpu", "gpu" or both'),
        ({"kt_activation_policy": "retain"}, 'wanted "cpu", "gpu" or both'),
        ({"kt_lora_rank": "many"}, "kt_lora_rank is 'many', wanted a whole number"),
        ({"kt_lora_alpha": []}, r"kt_lora_alpha is \[\], wanted a number"),
        ({"enabled": False}, "enabled is false"),
        ({"kt_config": [1]}, r"kt_config is \[1\], wanted names and values"),
        ({1: 2}, "1 is no name of a setting"),
        ({"kt_activation_policy": {"cpu": [1], "gpu": "retain"}}, 'wanted "cpu", "gpu" or both'),
        ({"kt_activation_policy": "5"}, 'wanted "cpu", "gpu" or both'),
        ({"kt_activation_policy": "[" * 100_000}, 'wanted "cpu", "gpu" or both'),
        ({"kt_lora_alpha": float("nan")}, "kt_lora_alpha is nan, wanted a number"),
        ({"kt_lora_dropout": 5}, "kt_lora_dropout is 5, wanted a probability"),
        ({"recompute": "no"}, "recompute is 'no', wanted True or False"),
        ({"gpu_memory": "lots"}, "gpu_memory is 'lots'"),
    ],
)
def test_refusals(settings, says):
    with pytest.raises(ValueError, match=says):
        KTConfig.from_dict(settings)


def test_where_its_experts_are_wanted_it_says_so(tmp_path):
    """In every place that takes a KtMoeConfig."""
    settings = KTConfig.from_dict({})
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    for load in (
        lambda: kt_moe.wrap(model, settings),
        lambda: kt_moe.load_model(tmp_path, settings),
        lambda: kt_moe.device_map(tmp_path, settings),
        lambda: type(model).from_pretrained(tmp_path, quantization_config=settings),
    ):
        with pytest.raises(
            TypeError, match=r"config is a KTConfig, .* give its .experts, a kt_moe.KtMoeConfig"
        ):
            load()


def test_no_mapping():
    with pytest.raises(TypeError, match="settings is a list"):
        KTConfig.from_dict([])


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_files(suffix, tmp_path):
    path = tmp_path / f"settings.{suffix}"
    text = {"json": json.dumps({"kt_num_threads": 5}), "yaml": "kt_config:\n  kt_num_threads: 5\n"}[suffix]
    path.write_text(text)
    assert KTConfig.from_file(path).experts.threads == 5
    path.write_text('{"gpu_memory": 1e10, \t"cpu_share": 1e-1}')
    assert KTConfig.from_file(path).experts.cpu_share == 0.1
    for text in ("[" * 5000, "x: 2024-13-45", "x: " + "9" * 5000):
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            KTConfig.from_file(path)
    path.write_text("{[")
    with pytest.raises(ValueError, match="is neither JSON nor YAML"):
        KTConfig.from_file(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        KTConfig.from_file(path)
    path.write_text('{"kt_threads": 5}')
    with pytest.raises(ValueError, match=re.escape(str(path)) + ": kt_threads is unknown"):
        KTConfig.from_file(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is neither JSON nor YAML"):
        KTConfig.from_file(path)


def test_environment(monkeypatch):
    variables = {"ACCELERATE_KT_NUM_THREADS": "6", "ACCELERATE_KT_TP_ENABLED": "1", "HOME": "/",
                 "ACCELERATE_KT_THREADPOOL_COUNT": "2", "ACCELERATE_KT_BACKEND": ""}  # fmt: skip
    found = KTConfig.from_env(variables).experts
    assert (found.threads, found.shards, found.format) == (6, 2, "as-stored")
    assert KTConfig.from_env({"KT_NUM_THREADS": "3"}).experts.threads == 3
    with pytest.raises(ValueError, match="KT_NUM_THREADS is 3, ACCELERATE_KT_NUM_THREADS 6"):
        KTConfig.from_env({**variables, "KT_NUM_THREADS": "3"})
    with pytest.raises(ValueError, match="ACCELERATE_KT_NUM_THREDS is unknown"):
        KTConfig.from_env({"ACCELERATE_KT_NUM_THREDS": "6"})
    monkeypatch.setenv("ACCELERATE_KT_NUM_THREADS", "7")
    assert KTConfig.from_env().experts.threads == 7


def test_threads_of_kt_kernel_are_ours(monkeypatch):
    monkeypatch.delenv("KT_MOE_THREADS", raising=False)
    monkeypatch.setenv("KT_NUM_THREADS", "2")
    assert kt_moe.Runtime().threads == 2
    assert kt_moe.Runtime(threads=1).threads == 1
    monkeypatch.setenv("KT_MOE_THREADS", "2")
    assert kt_moe.Runtime().threads == 2
    monkeypatch.setenv("KT_MOE_THREADS", "1")
    with pytest.raises(ValueError, match="KT_NUM_THREADS is 2 and KT_MOE_THREADS is 1"):
        kt_moe.Runtime()
    monkeypatch.setenv("KT_NUM_THREADS", "two")
    with pytest.raises(ValueError, match="KT_NUM_THREADS is 'two', wanted a whole number"):
        kt_moe.Runtime(threads=None)


def test_the_document_has_every_name():
    text = DOCS.read_text()
    missing = [name for name in kt_config._OLD if f"`{name}`" not in text]
    assert not missing


_VALUES = st.one_of(
    st.booleans(),
    st.integers(-3, 9),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.none(), max_size=1),
    st.dictionaries(
        st.sampled_from(["cpu", "gpu", "x"]), st.sampled_from(["retain", "recompute", 1]), max_size=3
    ),
)


@given(name=st.sampled_from(sorted(kt_config._OLD)), value=_VALUES)
def test_any_value_is_followed_or_refused_by_name(name, value):
    message = name
    try:
        KTConfig.from_dict({name: value})
    except ValueError as error:
        message = str(error)
    assert re.search(rf"{name}|threads|shards", message)
