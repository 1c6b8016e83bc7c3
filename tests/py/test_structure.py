"""The shape of the house: what includes what, what objects export, what files say about a machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPP = ROOT / "src" / "cpp"
FLOORS = ("base", "cpu", "kernels", "gemm", "moe", "weights", "bindings")
KERNEL_FOLDERS = sorted(folder.name for folder in (CPP / "kernels").iterdir() if folder.is_dir())
ISAS = [name for name in KERNEL_FOLDERS if name != "generic"]  # which holds headers that every set compiles

# Only the C spellings: <cmath> or <cstdint> would bring inline overloads along.
C_HEADERS = {
    f"<{name}.h" for name in ("assert", "float", "limits", "math", "stdbool", "stddef", "stdint", "string")
}
ISA_MAY_INCLUDE = {'"kernels/kernel_set.h', "<immintrin.h", *C_HEADERS}
SYSTEM_LIBRARIES = {"libc", "libm", "libstdc++", "libgcc_s", "libpthread", "ld-linux-x86-64"}


def includes(path: Path) -> list[tuple[str, str]]:
    """(bracket, header) of every include in the file; bracket is '<' or '"'."""
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def cpp_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in {".h", ".cpp"})


def upward_includes(source_dir: Path) -> list[str]:
    """Includes of a floor above the file's own, or by a path that does not start at a floor."""
    found = []
    for height, floor in enumerate(FLOORS):
        for path in cpp_files(source_dir / floor):
            for bracket, header in includes(path):
                if bracket == '"' and header.split("/")[0] not in FLOORS[: height + 1]:
                    found.append(f"{path.relative_to(source_dir)}: {header}")
    return found


def foreign_includes(isa_dir: Path) -> list[str]:
    """Includes that a file compiled with -m flags must not have.

    Headers of the ISA folders obey the same rule, so a set may use its own or those of a set it extends.
    """
    return [
        f"{path.name}: {header}"
        for path in cpp_files(isa_dir)
        for bracket, header in includes(path)
        if bracket + header not in ISA_MAY_INCLUDE and not is_isa_header(header)
    ]


def is_isa_header(header: str) -> bool:
    return header.startswith(tuple(f"kernels/{folder}/" for folder in KERNEL_FOLDERS))


def leaked_symbols(objects: Iterable[Path], isa: str) -> list[str]:
    """Weak symbols outside namespace kt::<isa>: the linker may keep this copy of them for every caller."""
    # An Itanium mangled name of that namespace, perhaps of a local, a guard or a vtable in it.
    own = re.compile(rf"_Z(Z|GV|T[VIS])?N[rVKRO]*2kt{len(isa)}{isa}")
    found = []
    for path in objects:
        for line in run("nm", path).splitlines():
            kind, name = line.split()[-2:]
            if kind in "WVuw" and not own.match(name):
                found.append(f"{path.name}: {run('c++filt', name).strip()}")
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def isa_objects(build: Path, isa: str) -> list[Path]:
    return sorted((build / "CMakeFiles" / f"kt_isa_{isa}.dir").rglob("*.o"))


def up_to_date(build: Path) -> bool:
    """Whether the build directory holds an object for every kernel source, none older than the sources."""
    sources = [path for isa in ISAS for path in cpp_files(CPP / "kernels" / isa) if path.suffix == ".cpp"]
    objects = [path for isa in ISAS for path in isa_objects(build, isa)]
    headers = [*cpp_files(CPP / "kernels"), CPP / "base" / "code_type.h", ROOT / "CMakeLists.txt"]
    newest = max(path.stat().st_mtime for path in sources + headers)
    return len(objects) == len(sources) and all(path.stat().st_mtime >= newest for path in objects)


@pytest.fixture(scope="module")
def cpp_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CMake build directory with the kernels' objects: that of `make test` if current, else a new one."""
    build = Path(os.environ.get("KT_MOE_CPP_BUILD", ROOT / "build" / "cpp"))
    if up_to_date(build):
        return build
    build = tmp_path_factory.mktemp("cpp")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    assert cmake, "no cmake beside this Python or on PATH, and build/cpp has no current objects"
    run(cmake, "-S", ROOT, "-B", build, f"-DPython_EXECUTABLE={sys.executable}")
    run(cmake, "--build", build, "--target", *(f"kt_isa_{isa}" for isa in ISAS))
    return build


def test_floors_include_only_what_is_below_them() -> None:
    assert {p.name for p in CPP.iterdir() if p.is_dir()} == set(FLOORS)
    assert upward_includes(CPP) == []


def test_an_upward_include_is_found(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "pool.h").write_text(
        '#include "base/view.h"\n#include "gemm/gemm.h"\n#include "pool_impl.h"\n'
    )
    assert upward_includes(tmp_path) == ["cpu/pool.h: gemm/gemm.h", "cpu/pool.h: pool_impl.h"]


@pytest.mark.parametrize("folder", KERNEL_FOLDERS)
def test_kernels_include_only_the_table_and_c_headers(folder: str) -> None:
    assert foreign_includes(CPP / "kernels" / folder) == []


def test_only_kernels_include_headers_of_an_isa() -> None:
    outside = [path for path in cpp_files(CPP) if path.parent.name not in KERNEL_FOLDERS]
    assert [path.name for path in outside for _, header in includes(path) if is_isa_header(header)] == []


def test_a_foreign_include_is_found(tmp_path: Path) -> None:
    (tmp_path / "gemm.cpp").write_text(
        '#include <immintrin.h>\n#include <vector>\n  # include "base/view.h"\n'
    )
    assert foreign_includes(tmp_path) == ["gemm.cpp: vector", "gemm.cpp: base/view.h"]


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_leak_no_weak_symbols(cpp_build: Path, isa: str) -> None:
    objects = isa_objects(cpp_build, isa)
    assert objects
    assert leaked_symbols(objects, isa) == []


def test_a_leaked_weak_symbol_is_found(tmp_path: Path) -> None:
    source, planted = tmp_path / "gemm.cpp", tmp_path / "gemm.o"
    source.write_text("""
        namespace kt { inline int shared(int x) { return x + 1; } }
        namespace kt::avx512 {
        template <class T> T own(T x) { return x + 2; }
        template <class T> struct Box { static T value(); };
        }
        template <class T> int outside() { return sizeof(T); }
        namespace kt::avx2 { inline int sibling(int x) { return x; } }
        int (*table[])(int) = {kt::shared, kt::avx512::own<int>, kt::avx2::sibling};
        int (*sizes)() = outside<kt::avx512::Box<int>>;
    """)
    run(os.environ.get("CXX", "g++"), "-std=c++20", "-c", source, "-o", planted)
    found = [line.removeprefix("gemm.o: ") for line in leaked_symbols([planted], "avx512")]
    assert sorted(found) == [
        "int outside<kt::avx512::Box<int> >()",
        "kt::avx2::sibling(int)",
        "kt::shared(int)",
    ]


def test_the_extension_needs_only_the_system_libraries() -> None:
    from kt_moe import _core

    needed = re.findall(r"\(NEEDED\).*\[(.+?)\.so[^\]]*\]", run("readelf", "-dW", _core.__file__))
    assert "libc" in needed
    assert set(needed) <= SYSTEM_LIBRARIES


def repository_files() -> list[Path]:
    """What git tracks; in an unpacked source archive, the source folders and the files at the top."""
    if (ROOT / ".git").exists():
        return [ROOT / name for name in run("git", "-C", ROOT, "ls-files", "-z").split("\0") if name]
    folders = ("src", "tests", "third_party", "tools", "docs", "examples")
    return [*ROOT.glob("*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]


def test_no_file_names_a_home_directory_or_a_path_outside() -> None:
    # Spelled so that this file does not match itself.
    forbidden = re.compile(rf"/(?:home|Users)/\w|/roo[t]/|\.\./share[d]\b|{re.escape(str(Path.home()))}/")
    binary = {".safetensors", ".png", ".so", ".pyc"}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in repository_files()
        if path.is_file() and path.suffix not in binary
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if forbidden.search(line)
    ]
    assert found == []
