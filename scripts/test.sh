#!/usr/bin/env bash
# Verifies everything and edits nothing: format, lints, layer table, purity, all tests, a real tree there and back.
# One build of RocksDB serves all of it, because everything is built in the release profile (assertions stay on).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
step() { echo "== $* ($(date +%T))"; }
step format
cargo fmt --all --check
step lints
cargo clippy --release --workspace --all-targets --quiet -- -D warnings
step layers
cargo xtask layers
step purity
cargo xtask purity
step demo
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
CLUTCH_DIR=$scratch/demo CLUTCH_REGISTRY=127.0.0.1:7439 scripts/demo.sh --once
step tree
scripts/tree.sh
step tests
cargo test --release --workspace --no-fail-fast
