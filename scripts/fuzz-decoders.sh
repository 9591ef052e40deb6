#!/usr/bin/env bash
# Runs every fuzz target in `fuzz/` for a while, from the seeds of the golden files. Needs a nightly compiler, which it
# asks rustup for, and cargo-fuzz, which it installs, where they are missing.
#
#   scripts/fuzz-decoders.sh [SECONDS_PER_TARGET] [TARGET...]
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-20}
shift || true
export RUSTUP_TOOLCHAIN=nightly
rustc --version >/dev/null 2>&1 || rustup toolchain install nightly --profile minimal
cargo fuzz --version >/dev/null 2>&1 || cargo install --locked --quiet cargo-fuzz
# The nightly compiler builds into a directory of its own: RUSTFLAGS of cargo-fuzz replace the workspace's.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$(realpath -m target)/fuzz}
corpus=$CARGO_TARGET_DIR/corpus
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(ls fuzz/fuzz_targets | sed 's/\.rs$//')
cargo run --release --quiet --manifest-path fuzz/Cargo.toml --bin seeds -- docs/formats/golden "$corpus"
# One build with address sanitizer and assertions for all targets.
cargo fuzz build
for target in "${targets[@]}"; do
  echo "== fuzz $target for $seconds s"
  mkdir -p "$corpus/$target" "$CARGO_TARGET_DIR/artifacts/$target"
  log=$CARGO_TARGET_DIR/$target.log
  # Worlds that are torn down in the middle leave tasks behind: leaks are not what is looked for.
  if ! "$CARGO_TARGET_DIR/x86_64-unknown-linux-gnu/release/$target" "$corpus/$target" -max_total_time="$seconds" \
    -max_len=65536 -rss_limit_mb=4096 -detect_leaks=0 -artifact_prefix="$CARGO_TARGET_DIR/artifacts/$target/" \
    >"$log" 2>&1; then
    tail -60 "$log"
    echo "fuzz $target: a finding; its input is in $CARGO_TARGET_DIR/artifacts/$target" >&2
    exit 1
  fi
  grep -E "^Done" "$log" || true
done
echo "all targets ran without a finding"
