"""Settings of a training with kt-kernel (`kt_*`, `ACCELERATE_KT_*`), as kt_moe takes them.

docs/migrate-from-kt-kernel.md has the table for people.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from kt_moe.hf.quantizer import KtMoeConfig

_ENVIRONMENT = "ACCELERATE_KT_"
_NOT_OURS = "config is a KTConfig, which also has LoRA's settings: give its .experts, a kt_moe.KtMoeConfig"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
_BACKENDS = {
    "auto": "as-stored", "amxbf16": "as-stored", "bf16": "as-stored", "fp8": "as-stored",
    "amxfp8": "as-stored", "rawint4": "as-stored", "amxint4_kgroup": "as-stored", "mxfp4": "as-stored",
    "amxint8": "int8", "int8": "int8", "amxint4": "int4",
}  # fmt: skip


@dataclass(frozen=True)
class KTConfig:
    """What a training with kt-kernel was set to, for kt_moe.

        settings = kt_moe.KTConfig.from_file("accelerate_kt.yaml")
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=settings.experts)
        model = peft.get_peft_model(model, settings.lora_config(["q_proj", "v_proj", "experts"]))

    Attributes:
        experts: how experts are held and computed.
        lora: rank, alpha and dropout by their names in `peft.LoraConfig`; those that were set.
        not_needed: names that were set and do nothing here, with the reason: they steer how kt-kernel works.
    """

    experts: KtMoeConfig
    lora: Mapping[str, float] = field(default_factory=dict)
    not_needed: Mapping[str, str] = field(default_factory=dict)

    def lora_config(self, target_modules: str | Sequence[str], **options: Any) -> Any:
        """A `peft.LoraConfig` of these settings.

        Args:
            target_modules: as PEFT takes them; "experts" are the routed experts.
            options: others of `peft.LoraConfig`; they go before the settings. Where a rank is given, here or
                by the settings, and no lora_alpha, it is twice the rank, as kt-kernel has it. Where neither
                is, both are PEFT's defaults, 8.
        """
        from peft import LoraConfig

        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        given: dict[str, Any] = {**self.lora, **options}
        if "r" in given:
            given.setdefault("lora_alpha", 2 * given["r"])
        return LoraConfig(target_modules=targets, **given)

    @property
    def quant_method(self) -> str:
        """TypeError: it was given where its `experts` are wanted, as `quantization_config`."""
        raise TypeError(_NOT_OURS)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> KTConfig:
        """From kt-kernel's names (`kt_num_threads`, ...), options of `KtMoeConfig`, or both.

        Args:
            settings: None as a value is not set. Those under "kt_config", if there is such a key, as in files
                of accelerate.

        Raises:
            TypeError: it is no mapping.
            ValueError: an unknown name, with the nearest known one; a value of a wrong type or out of range;
                a setting that kt_moe cannot follow, with what to do; two settings for one option.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"settings is a {type(settings).__name__}, wanted a mapping")
        nested = settings.get("kt_config")
        if nested is None and "use_kt" in settings:
            raise ValueError(
                "use_kt is an option of LLaMA-Factory, wanted kt-kernel's settings, which are kt_config "
                "in the file for accelerate launch --config_file"
            )
        if nested is not None and not isinstance(nested, Mapping):
            raise ValueError(f"kt_config is {nested!r}, wanted names and values")
        given = {k: v for k, v in (settings if nested is None else nested).items() if v is not None}
        if wrong := [name for name in given if not isinstance(name, str)]:
            raise ValueError(f"{wrong[0]!r} is no name of a setting")
        if not _bool("enabled", given.pop("enabled", True)):
            raise ValueError("enabled is false: these settings turn kt-kernel off")
        options: dict[str, Any] = {}
        lora: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for name, value in _joined(given).items():
            if name in _REFUSED:
                off, text = _REFUSED[name]
                if value not in (off, 0) and str(value).strip().lower() not in (*_FALSE, str(off)):
                    raise ValueError(f"{name} is {value!r}, {text}")
            elif name in _NOT_NEEDED:
                reasons[name] = _NOT_NEEDED[name]
            elif name in _LORA:
                ours, kind = _LORA[name]
                lora[ours] = kind(name, value)
            else:
                for option, setting in _option(name, value).items():
                    if options.setdefault(option, setting) != setting:
                        raise ValueError(f"{name} is {value!r}, and {option} is {options[option]!r} already")
        made = options.get("format", "as-stored")
        if given.get("kt_weight_lifecycle") == "ephemeral" and made != "as-stored":
            if options.get("cache_dir") is None:
                raise ValueError(
                    f"kt_weight_lifecycle is 'ephemeral', wanted cache_dir beside it: {made} experts stay in "
                    "files of their own, which kt_moe packs there"
                )
            options["paged"] = False
        return cls(KtMoeConfig(**options), lora, reasons)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> KTConfig:
        """From a JSON or YAML file, such as accelerate's. Errors are those of `from_dict`, with the path.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is neither JSON nor YAML, or no mapping.
        """
        try:
            found = _parsed(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}") from None
        if not isinstance(found, Mapping):
            raise ValueError(f"{path} holds a {type(found).__name__}, wanted names and values")
        try:
            return cls.from_dict(found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_env(cls, environment: Mapping[str, str] | None = None) -> KTConfig:
        """From ACCELERATE_KT_NUM_THREADS and so on, and KT_NUM_THREADS.

        Args:
            environment: variables; None: those of the process.

        Raises:
            ValueError: as `from_dict`; the message has the variable's name.
        """
        variables = os.environ if environment is None else environment
        settings: dict[str, Any] = {}
        for variable, text in variables.items():
            if variable.startswith(_ENVIRONMENT) and text.strip():
                name = "kt_" + variable.removeprefix(_ENVIRONMENT).lower()
                settings["enabled" if name == "kt_enabled" else name] = text
        threads = variables.get("KT_NUM_THREADS", "").strip()
        if threads and settings.setdefault("kt_num_threads", threads) != threads:
            raise ValueError(
                f"KT_NUM_THREADS is {threads}, {_ENVIRONMENT}NUM_THREADS {settings['kt_num_threads']}"
            )
        try:
            return cls.from_dict(settings)
        except ValueError as error:
            text = str(error)
            for name in sorted(settings, key=len, reverse=True):
                text = text.replace(name, _ENVIRONMENT + name.removeprefix("kt_").upper())
            raise ValueError(text) from None


def checked_config(config: KtMoeConfig | None) -> KtMoeConfig:
    """The config, or the default. TypeError if it is something else."""
    if isinstance(config, KTConfig):
        raise TypeError(_NOT_OURS)
    config = KtMoeConfig() if config is None else config
    if not isinstance(config, KtMoeConfig):
        raise TypeError(f"config is a {type(config).__name__}, wanted kt_moe.KtMoeConfig or None")
    return config


def _parsed(text: str) -> Any:
    """JSON, whose numbers are not all YAML's, or YAML."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def _number(name: str, value: Any) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name} is {value!r}, wanted a whole number from 1")
    return number


def _real(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}, wanted a number")
    return number


def _probability(name: str, value: Any) -> float:
    if not 0.0 <= (number := _real(name, value)) < 1.0:
        raise ValueError(f"{name} is {value!r}, wanted a probability in [0, 1)")
    return number


def _bool(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in (*_TRUE, *_FALSE):
        raise ValueError(f"{name} is {value!r}, wanted true or false")
    return text in _TRUE


_LORA: dict[str, tuple[str, Callable[[str, Any], float]]] = {
    "kt_lora_rank": ("r", _number),
    "kt_lora_alpha": ("lora_alpha", _real),
    "kt_lora_dropout": ("lora_dropout", _probability),
}
_OF_THE_CHECKPOINT = "the model's own checkpoint, which holds attention and experts, is what kt_moe loads"
# A value that means "off" besides false and 0, and what to do instead of others.
_REFUSED: dict[str, tuple[Any, str]] = {
    "kt_weight_path": ("", f"has no counterpart: {_OF_THE_CHECKPOINT}; leave it out, and convert with "
                           'KtMoeConfig(format="int8")'),
    "kt_non_expert_weight_path": ("", f"has no counterpart: {_OF_THE_CHECKPOINT}"),
    "kt_expert_checkpoint_path": ("", f"has no counterpart: {_OF_THE_CHECKPOINT}"),
    "kt_num_gpu_experts": ("0", "has no counterpart: gpu_memory says how much of the GPU is for experts, and "
                                "which ones are there follows from the routes"),
    "kt_train_mode": ("lora", "wanted \"lora\": kt_moe's experts are frozen"),
    "kt_full_weight_grad": ("false", "wanted false: kt_moe's experts are frozen"),
    "kt_use_lora_experts": ("false", "has no counterpart: kt_moe adds no experts of its own"),
    "kt_wrap_fn": ("", "has no counterpart: see kt_moe.wrap"),
    "kt_wrap_kwargs": ({}, "has no counterpart: see kt_moe.wrap"),
}  # fmt: skip
_NOT_NEEDED = {
    "kt_max_cache_depth": "what backward needs is kept by autograd, for as many forwards as there are",
    "kt_model_max_length": "scratch follows the tokens of a call",
    "kt_share_backward_bb": "there is one copy of the weights for forward and backward",
    "kt_share_cache_pool": "what backward needs is kept by autograd",
    "kt_force_fused_expert_lora": "LoRA is always computed with the experts",
    "kt_skip_expert_loading": "torch never loads the experts",
    "kt_lora_expert_num": "kt-kernel heeds it with kt_use_lora_experts alone",
    "kt_lora_expert_intermediate_size": "kt-kernel heeds it with kt_use_lora_experts alone",
    "kt_checkpoint_files": "transformers hands them over",
    "kt_sharded_metadata": "the index is read from the files",
    "kt_omp_num_threads": "kt_moe has threads of its own; OMP_NUM_THREADS sets torch's",
}
_OLD = {
    *_LORA, *_REFUSED, *_NOT_NEEDED, "kt_num_threads", "kt_tp_enabled", "kt_threadpool_count", "kt_backend",
    "kt_expert_weight_format", "kt_weight_lifecycle", "kt_activation_policy",
}  # fmt: skip


def _joined(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by name, those two that mean one thing only together as one."""
    settings = dict(given)
    enabled = settings.pop("kt_tp_enabled", None)
    count = settings.get("kt_threadpool_count")
    if enabled is not None:
        on = _bool("kt_tp_enabled", enabled)
        settings["kt_threadpool_count"] = (1 if count is None else count) if on else 1
    elif count is not None:
        settings["kt_threadpool_count"] = 1  # kt-kernel heeds it with kt_tp_enabled alone
    return settings


def _option(name: str, value: Any) -> dict[str, Any]:
    """A setting as options of `KtMoeConfig`."""
    if name == "kt_num_threads":
        return {"threads": _number(name, value)}
    if name == "kt_threadpool_count":
        return {"shards": _number(name, value)}
    if name in ("kt_backend", "kt_expert_weight_format"):
        backend = str(value).strip().lower()
        if (plain := backend.removesuffix("_skiplora")) != backend and plain in _BACKENDS:
            raise ValueError(
                f"{name} is {value!r}, wanted {plain}: LoRA is on experts only where target_modules has them"
            )
        if backend not in _BACKENDS:
            raise ValueError(f"{name} is {value!r}, wanted one of {', '.join(_BACKENDS)}")
        return {"format": _BACKENDS[backend]}
    if name == "kt_weight_lifecycle":
        if value not in ("persistent", "ephemeral"):
            raise ValueError(f"{name} is {value!r}, wanted persistent or ephemeral")
        return {"paged": value == "ephemeral"}
    if name == "kt_activation_policy":
        return _activation_policy(name, value)
    ours = [option for option in KtMoeConfig().to_dict() if option != "quant_method"]
    if name not in ours:
        near = difflib.get_close_matches(name, [*_OLD, *ours], n=1, cutoff=0.5)
        raise ValueError(f"{name} is unknown" + (f", nearest is {near[0]}" if near else ""))
    return {name: value}


def _activation_policy(name: str, value: Any) -> dict[str, Any]:
    """Of what CPU and GPU keep for backward; with gpu "recompute" a checkpointed layer runs twice."""
    try:
        policy = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        policy = None
    if (
        not isinstance(policy, Mapping)
        or not policy
        or not policy.keys() <= {"cpu", "gpu"}
        or any(kept not in ("retain", "recompute") for kept in policy.values())
    ):
        raise ValueError(f'{name} is {value!r}, wanted "cpu", "gpu" or both, each "retain" or "recompute"')
    again = policy.get("cpu") == "recompute"
    kept = not again and policy.get("gpu") == "recompute"
    return {"recompute": again, "checkpoint_experts": "retain" if kept else "recompute"}
