"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within `with`: a path beside `path` to write to; what is there in the end becomes `path`.

    After an exception it is deleted, and what `path` was stays.

    Raises:
        OSError: `path` is a directory, a device or a pipe.
    """
    path = path.resolve()  # a link stays, and what it leads to is replaced
    if path.exists() and not path.is_file():
        raise OSError(f"{str(path)!r} is there and no ordinary file, wanted one to replace")
    part = path.with_name(f".{path.name[:40]}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_png(figure: Any, path: Path) -> None:
    """Write a matplotlib figure; the file appears whole or not at all."""
    with replacing(path) as part:
        figure.savefig(part, format="png")


def check_writable(path: Path) -> None:
    """Check that `replacing` can write there.

    Raises:
        OSError: it could not; says why.
    """
    path = path.resolve()
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"path is {str(path)!r}, but there is no directory {str(folder)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"path is {str(path)!r}, which is a directory")
    if path.exists() and not path.is_file():
        raise OSError(f"path is {str(path)!r}, which is no ordinary file")
    try:
        os.stat(folder / f".{path.name}")  # as the file system takes it: not too long, encodable
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise OSError(f"path is {path!r}, which is no name for a file: {error}") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"path is {str(path)!r}, but in {str(folder)!r} no file can be written")
