#!/usr/bin/env bash
# Verifies everything and edits nothing: format, lints, layer table, purity, all tests. One build of RocksDB
# serves all of it, because everything is built in the release profile (assertions stay on).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
cargo fmt --all --check
cargo clippy --release --workspace --all-targets --quiet -- -D warnings
cargo test --release --workspace --no-fail-fast
