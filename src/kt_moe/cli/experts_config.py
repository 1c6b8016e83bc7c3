"""`ExpertsConfig`: the options of `kt_moe.KtMoeConfig` for TRL's parser, each as `--experts_NAME`.

The names, defaults, choices and explanations are taken from `KtMoeConfig` itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import yaml  # type: ignore[import-untyped]

from kt_moe.gpu import Rates
from kt_moe.hf import KtMoeConfig

_PREFIX = "experts_"
_LEFT_OUT = ("rest", "unknown")  # TRL's --load_in_4bit and --load_in_8bit are about the rest


class _Experts:
    """What `ExpertsConfig` can do."""

    _argument_group_name = "experts (kt_moe)"
    experts_gpu_rates: Any

    def to_config(self, rest: Any = None) -> KtMoeConfig:
        """The `KtMoeConfig` of these options.

        rest: how transformers quantises the other layers.

        Raises:
            ValueError: an option out of range; names it.
        """
        options = {name.removeprefix(_PREFIX): value for name, value in vars(self).items()}
        for name in ("gpu_memory", "cpu_share"):  # text or a number
            options[name] = yaml.safe_load(str(options[name]))
        return KtMoeConfig(**options | {"gpu_rates": self.rates()}, rest=rest)

    def rates(self) -> dict[str, float] | None:
        """What --experts_gpu_rates says, "link=55e9,gpu_flops=4e14" or a mapping of YAML; None: nothing.

        Raises:
            ValueError: none of `kt_moe.Rates`, or a number that these refuse.
        """
        given = self.experts_gpu_rates or {}
        try:
            pairs = (
                [pair.split("=") for pair in given.split(",")] if isinstance(given, str) else given.items()
            )
            found = {name.strip(): float(value) for name, value in pairs}
            Rates(**dict.fromkeys((rate.name for rate in dataclasses.fields(Rates)), 1.0) | found)
        except (TypeError, ValueError) as error:
            raise ValueError(f"--experts_gpu_rates {given}: {error}; wanted link=55e9 and the like") from None
        return found or None


def _kind(hint: Any) -> Any:
    """A type that the parser knows; text stands for what may be text or a number."""
    kinds = get_args(hint) or (hint,)
    if bool in kinds:
        return bool
    if Sequence[int] in kinds:
        return list[int] | None
    return int | None if int in kinds and str not in kinds else str | None


def _fields() -> list[Any]:
    """Name, type and field of each option, whose help is what the docstring of `KtMoeConfig` says."""
    section = inspect.cleandoc(KtMoeConfig.__doc__ or "").split("Args:\n")[1].split("\n\n")[0]
    texts = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE))
    hints, fields = get_type_hints(KtMoeConfig.__init__), []
    for name, parameter in inspect.signature(KtMoeConfig).parameters.items():
        if name not in _LEFT_OUT:
            about = {"help": " ".join(texts[name].split()).replace("%", "%%")}
            field = dataclasses.field(default=parameter.default, metadata=about)
            fields.append((_PREFIX + name, _kind(hints[name]), field))
    return fields


ExpertsConfig: Any = dataclasses.make_dataclass(
    "ExpertsConfig", _fields(), bases=(_Experts,), namespace={"__module__": __name__}
)
ExpertsConfig.__doc__ = "How kt_moe holds and computes the experts: `KtMoeConfig`'s options."
