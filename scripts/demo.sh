#!/usr/bin/env bash
# Builds Clutch, starts a cluster in ./clutch-data on embedded defaults, stores something real in it and lists it.
# The cluster goes on in the foreground; Ctrl-C stops it. With `--once` it is stopped when all is shown.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
cargo build --release --package clutch-cli
clutch=target/release/clutch
dir=${CLUTCH_DIR:-clutch-data}
export CLUTCH_REGISTRY=${CLUTCH_REGISTRY:-127.0.0.1:7400}

"$clutch" up --dir "$dir" --listen "${CLUTCH_REGISTRY%%,*}" &
cluster=$!
# TERM, because a Ctrl-C has reached the cluster already and a second one would mean impatience.
trap 'kill -TERM "$cluster" 2>/dev/null; wait "$cluster"' EXIT
"$clutch" status --wait 60
kill -0 "$cluster" || { echo "demo: the cluster did not start; something else answers at $CLUTCH_REGISTRY" >&2; exit 1; }
"$clutch" fs mkdir -p /demo
"$clutch" fs put -r docs /demo
"$clutch" fs put README.md /demo
"$clutch" fs ls -l /demo
"$clutch" fs tree /demo
"$clutch" fs cat /demo/README.md | cmp - README.md && echo "README.md came back as it was"
"$clutch" fsck
"$clutch" log replay --all --verify
if [ "${1:-}" = --once ]; then
  trap - EXIT
  kill -TERM "$cluster"
  wait "$cluster"
else
  echo "The cluster runs; in another terminal: export CLUTCH_REGISTRY=$CLUTCH_REGISTRY; $PWD/$clutch fs ls /demo"
  wait "$cluster"
fi
