"""What the processes of a job tell each other beside collectives: their settings, and what ended one of them.

It goes through the job's key-value store, so that nobody waits for anybody.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

_PACKAGES = ("kt_moe", "torch", "transformers", "peft")
_DIFFER, _FAILED = "differ", "failed"  # keys of the store
_TIMEOUT = timedelta(seconds=30)  # of one request to the store
_compared: Counter[str] = Counter()
_PATIENCE = (10, 290)  # seconds until others are missed, and then until nobody waits for them any longer
_meetings = 0


def _store() -> Any:
    """Of torchrun or accelerate, where it is there before a process group is, or of the group; or None."""
    if not dist.is_available():
        return None
    c10d: Any = dist
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if of_launcher:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = c10d.TCPStore(address, port, is_master=False, timeout=_TIMEOUT)
    elif dist.is_initialized():
        store = c10d.distributed_c10d._get_default_store()
    else:
        return None
    return c10d.PrefixStore(f"kt_moe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def check_alike(what: str, settings: Mapping[str, Any]) -> None:
    """Compare settings with those of the other processes, if this is a job of several.

    The n-th call for `what` in a process is compared with the n-th of the process that came first. Versions
    of packages are compared too.

    what: that all have, as "experts".

    Raises:
        ValueError: they differ; names setting, ranks and values. Or another process found that its own do.
    """
    store = _store()
    if store is None:
        return
    _raise_told(store)
    number = _compared[what]
    _compared[what] += 1
    loaded = [sys.modules[name] for name in _PACKAGES if name in sys.modules]
    versions = {f"version of {module.__name__}": module.__version__ for module in loaded}
    own = {name: str(_ordered(value)) for name, value in (*versions.items(), *settings.items())}
    key = f"{what}/{number}"
    first, theirs = json.loads(store.compare_set(key, "", json.dumps([_rank(), own])))
    differing = differences({first: theirs, _rank(): own})
    if differing:
        text = f"the ranks of this job do not have the same {what}: {differing}"
        store.set(_DIFFER, text)
        raise ValueError(text)


def differences(said: Mapping[int, Mapping[str, Any]]) -> str:
    """What ranks say differently, in words, of what those say that say it; empty where they agree."""
    texts = []
    for name in dict.fromkeys(name for values in said.values() for name in values):
        ranks: dict[Any, list[str]] = {}
        for rank, values in said.items():
            if name in values:
                ranks.setdefault(values[name], []).append(str(rank))
        if len(ranks) > 1:
            each = [f"{value} on rank{'s' * (len(at) > 1)} {', '.join(at)}" for value, at in ranks.items()]
            texts.append(f"{name} is {' and '.join(each)}")
    return "; ".join(texts)


def check_told() -> None:
    """ValueError if another process has found that its settings differ, as `check_alike`."""
    store = _store()
    if store is not None:
        _raise_told(store)


def _raise_told(store: Any) -> None:
    if store.check([_DIFFER]):
        raise ValueError(store.get(_DIFFER).decode())


def meet_to_save() -> None:
    """Wait for all other processes to come here, before they bring together what each has a part of.

    Warns:
        UserWarning: after a while; names the ranks that are missing.

    Raises:
        RuntimeError: some did not come for minutes; names their ranks. This one then has not come either.
    """
    global _meetings
    store, size = _store(), dist.get_world_size()
    if store is None or size == 1:
        return
    _meetings += 1
    came, complete = f"came to {_meetings}", f"all came to {_meetings}"
    store.set(f"met/{_rank()}", str(_meetings))
    if store.add(came, 1) == size:
        store.set(complete, "")
    for seconds in _PATIENCE:
        with suppress(RuntimeError):  # by which every kind of store says that the time is over
            store.wait([complete], timedelta(seconds=seconds))
            return
        keys = {rank: f"met/{rank}" for rank in range(size)}
        late = [r for r, key in keys.items() if not store.check([key]) or int(store.get(key)) < _meetings]
        text = (
            f"rank {_rank()} saves parameters that are divided over processes, and waits for "
            f"rank{'s' * (len(late) > 1)} {', '.join(map(str, late))}: all processes have to call "
            "save_adapter, save_pretrained and Trainer.save_model"
        )
        if seconds != _PATIENCE[-1]:
            warnings.warn(text, stacklevel=2)
    store.add(came, -1)
    _meetings -= 1
    store.set(f"met/{_rank()}", str(_meetings))
    raise RuntimeError(text)


def _ordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else value


def files_text(files: Sequence[str | os.PathLike[str]]) -> str:
    """Names and sizes of files in one line; directories may differ between hosts."""
    sizes = [(os.path.basename(file), Path(file).stat().st_size) for file in sorted(files, key=str)]
    digest = hashlib.sha256(repr(sizes).encode()).hexdigest()[:8]
    return f"{len(sizes)} files of {sum(size for _, size in sizes):,} bytes ({digest})"


def tell_what_ends_this_process() -> None:
    """From now on an exception that nobody catches is told to the others, who find it with `failure`."""
    if getattr(sys.excepthook, "tells", False):
        return
    before = sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        if issubclass(kind, Exception):
            with suppress(Exception):  # the store may be gone, as its owner is
                _store().compare_set(_FAILED, "", f"rank {_rank()} failed: {kind.__name__}: {error}")
        before(kind, error, trace)

    hook.tells = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def failure() -> str:
    """What ended the first process of the job that failed, if it could tell; else empty."""
    with suppress(Exception):
        store = _store()
        if store is not None and store.check([_FAILED]):
            return str(store.get(_FAILED).decode())
    return ""
