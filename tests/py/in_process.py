"""A stand-in for `bench.remote.Remote` whose object is in this process, so that tests can change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kt_moe.cli.bench.remote import RemoteError


class InProcess:
    """What `make(*args)` gives; as in Remote, an error is a RemoteError."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        self._make, self._object = (make, args), None

    def __enter__(self) -> InProcess:
        make, args = self._make
        self._object = self._ask(make, *args)
        return self

    def __exit__(self, *exception: object) -> None:
        self._object = None

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *args: self._ask(getattr(self._object, method), *args)

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:
            raise RemoteError(f"{type(error).__name__}: {error}") from error
