#!/bin/sh
# Sees to what pip cannot install: require.sh NAME..., each of compiler, python, headers, doctest, clang, qemu.
# Where something is missing it runs apt-get if it may, and otherwise says what to install and stops.
# CXX (default g++) and BASE_PYTHON (default python3) name the programs to look at.
set -eu
CXX=${CXX:-g++}
BASE_PYTHON=${BASE_PYTHON:-python3}

has_compiler() { command -v "$CXX"; }
has_python() { "$BASE_PYTHON" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))'; }
has_headers() {
  "$BASE_PYTHON" -c 'import os, sysconfig as s; os.stat(os.path.join(s.get_path("include"), "Python.h"))'
}
has_doctest() { echo '#include <doctest/doctest.h>' | "$CXX" -E -x c++ -; }
has_clang() {
  echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' |
    clang++ -fsanitize=fuzzer,address,undefined -x c++ - -o /dev/null
}
has_qemu() { command -v qemu-system-x86_64 && command -v cpio && ! ldd "$(command -v busybox)"; }

apt_install() {
  command -v apt-get || return 1
  sudo=
  if [ "$(id -u)" != 0 ]; then
    sudo -n true || return 1
    sudo='sudo -n'
  fi
  $sudo apt-get update -qq || true
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

require() {  # name, what it is, packages
  name=$1 what=$2
  shift 2
  "has_$name" >/dev/null 2>&1 && return
  echo "$what is missing; trying apt-get install $*" >&2
  apt_install "$@" >/dev/null 2>&1 || true
  "has_$name" >/dev/null 2>&1 && return
  echo "error: $what is missing. On Debian or Ubuntu: apt-get install $*; for another program set CXX or BASE_PYTHON" >&2
  exit 1
}

for name in "$@"; do
  case $name in
    compiler) require compiler "the C++ compiler ($CXX)" g++ ;;
    python) require python "Python 3.11 or newer with venv ($BASE_PYTHON)" python3 python3-venv ;;
    headers) require headers "Python.h of $BASE_PYTHON" python3-dev ;;
    doctest) require doctest "doctest, which the C++ tests use," doctest-dev ;;
    clang)
      require clang "clang++ with libFuzzer and its sanitizers, which the fuzz targets use," \
        clang llvm-dev libclang-rt-dev
      ;;
    qemu) require qemu "QEMU for x86, or cpio or busybox, which \`make numa\` uses," qemu-system-x86 cpio busybox-static ;;
    *) echo "error: $0 knows no $name" >&2; exit 2 ;;
  esac
done
