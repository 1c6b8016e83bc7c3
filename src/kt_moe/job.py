"""What the processes of a job tell each other beside collectives: their settings, and what ended one of them.

It goes through the job's key-value store, so that nobody waits for anybody.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
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
_PATIENCE = (10.0, 290.0)  # seconds until others are missed, and then until nobody waits for them any longer
_meetings: Counter[str] = Counter()


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


def meet_to_load(timeout: timedelta | None) -> None:
    """Wait for all other processes to come here, before they divide experts among them. See `_meet`.

    timeout: of what follows; None: half an hour.
    """
    seconds = 1800.0 if timeout is None else timeout.total_seconds()
    _meet("load", ("loads experts", "load the model"), (_PATIENCE[0], seconds))


def meet_to_save() -> None:
    """Wait for all other processes to come here, before they bring together what each has a part of.

    See `_meet`.
    """
    calls = "call save_adapter, save_pretrained and Trainer.save_model"
    _meet("save", ("saves parameters", calls), _PATIENCE)


def _meet(why: str, words: tuple[str, str], patience: tuple[float, float]) -> None:
    """Wait for all other processes to come here.

    words: what this process does with what is divided, and what all have to do.
    patience: seconds until a warning, and from there until an error.

    Warns:
        UserWarning: after a while; names the ranks that are missing.

    Raises:
        ValueError: another process found that settings differ.
        RuntimeError: another process failed, and told so. Or some did not come for long; names their ranks.
            This one then has not come either.
    """
    store, size = _store(), dist.get_world_size()
    if store is None or size == 1:
        return
    _meetings[why] += 1
    number = _meetings[why]
    came, complete = f"came to {why} {number}", f"all came to {why} {number}"
    keys = {rank: f"met to {why}/{rank}" for rank in range(size)}
    store.set(keys[_rank()], str(number))
    if store.add(came, 1) == size:
        store.set(complete, "")
    for seconds in patience:
        if _is_set(store, complete, seconds):
            return
        late = [r for r, key in keys.items() if not store.check([key]) or int(store.get(key)) < number]
        text = (
            f"rank {_rank()} {words[0]} that are divided over processes, and waits for "
            f"rank{'s' * (len(late) > 1)} {', '.join(map(str, late))}: all processes have to {words[1]}"
        )
        if seconds != patience[-1]:
            warnings.warn(text, stacklevel=3)
    store.add(came, -1)
    _meetings[why] -= 1
    store.set(keys[_rank()], str(number - 1))
    raise RuntimeError(text)


def _is_set(store: Any, key: str, seconds: float) -> bool:
    """Whether a key is set within so many seconds. Raises what another process tells meanwhile."""
    end, pause = time.monotonic() + seconds, 0.001
    while not store.check([key]):  # its `wait` would tell nothing, and print a warning where the time is over
        _raise_told(store)
        if store.check([_FAILED]):
            raise RuntimeError(store.get(_FAILED).decode())
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    return True


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
