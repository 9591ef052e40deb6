#!/usr/bin/env bash
# Verifies everything and edits nothing: format, lints, layer table, purity, all tests, a real tree there and back.
# One build of RocksDB serves all of it, because everything is built in the release profile (assertions stay on).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh --tests
step() { echo "== $* ($(date +%T))"; }
step format
cargo fmt --all --check
step lints
cargo clippy --release --workspace --all-targets --quiet -- -D warnings
step layers
cargo xtask layers
step operations
cargo xtask operations
step tidy
cargo xtask tidy
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
step "hot paths"
cargo xtask instructions
step "planted bugs are found"
planted=(--release --package clutch-integration --package clutch-cli
    --features clutch-integration/mutants,clutch-cli/mutants)
cargo test "${planted[@]}" --test mutants --test shrinking
cargo test "${planted[@]}" --test tools -- planted_bugs
cargo test "${planted[@]}" --package clutch-blocks --package clutch-client --package clutch-client-maintenance --package clutch-log-store --package clutch-log-raft --package clutch-runtime --package clutch-server --package clutch-state-replica --lib --bins -- planted_bugs | tee "$scratch/units"
# As many as `Mutant::ALL` names; one test may be there for two.
[ "$(grep -c '^test .*::planted_bugs_are_found ... ok$' "$scratch/units")" = "$(grep -o '"units", "[^"]*"' proto/src/mutants.rs | sort -u | wc -l)" ]
step "another build replays the same states"
CLUTCH_BIN=target/release/clutch cargo test --release --package clutch-integration --features changed \
    --test golden_logs --test changed
step "simulation: fresh seeds"
target/release/clutch fuzz --seeds 1000 --jobs 2 --repeat-every 20 --require-faults 100 --out "$scratch"
step "simulation: fresh seeds, three members of each log"
target/release/clutch fuzz --replicas 3 --seeds 300 --jobs 2 --repeat-every 20 --require-faults 20 --out "$scratch"
step "simulation: fresh seeds on the raft engine"
target/release/clutch fuzz --engine raft --seeds 150 --jobs 2 --repeat-every 10 --require-faults 5 --out "$scratch"
step "simulation: the same traces in a debug build"
first=$(date +%s)
cargo run --release --quiet --package clutch-integration --example trace -- "$first" 40 >"$scratch/release"
cargo run --quiet --package clutch-integration --no-default-features --example trace -- "$first" 40 >"$scratch/debug"
diff "$scratch/release" "$scratch/debug"
step decoders
scripts/fuzz-decoders.sh 10
