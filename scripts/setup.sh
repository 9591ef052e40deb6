#!/usr/bin/env bash
# Installs what a build needs and this machine lacks: a C++ compiler and libclang (for RocksDB), with `--tests` also valgrind
# (to count instructions) and strace (to record what a power cut would leave), and checks for the Rust toolchain and, with `--tests`, for
# room. Changes nothing where all is there.
set -euo pipefail
cd "$(dirname "$0")/.."

need=()
command -v c++ >/dev/null || need+=(build-essential)
command -v clang >/dev/null || need+=(clang)
if [ "${1:-}" = --tests ]; then
  command -v valgrind >/dev/null || need+=(valgrind)
  command -v strace >/dev/null || need+=(strace)
fi
ls /usr/lib/llvm-*/lib/libclang*.so* /usr/lib/*/libclang*.so* >/dev/null 2>&1 || need+=(libclang-dev)
if [ ${#need[@]} -gt 0 ]; then
  if ! command -v apt-get >/dev/null; then
    echo "setup: please install a C++ compiler, clang, libclang's development files (and for the tests valgrind and strace), then try again" >&2
    exit 1
  fi
  as_root=""
  [ "$(id -u)" = 0 ] || as_root=sudo
  echo "setup: installing ${need[*]}" >&2
  $as_root apt-get update -qq >&2
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${need[@]}" >&2
fi
if ! command -v cargo >/dev/null; then
  echo "setup: please install Rust (rustup) first: the version is in rust-toolchain.toml" >&2
  exit 1
fi
# A node takes no blocks while its disk is nearly full: better said here than by a test in the middle.
if [ "${1:-}" = --tests ]; then
  build=target/.
  [ -e "$build" ] || build=.
  for place in "${TMPDIR:-/tmp}" "$build"; do
    free=$(df --output=avail --block-size=1G "$place" | tail -n 1)
    if [ "$free" -lt 8 ]; then
      echo "setup: the tests need 8 GiB of room in $place, $free GiB are there: make room, or set TMPDIR to another disk" >&2
      exit 1
    fi
  done
fi
