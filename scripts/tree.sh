#!/usr/bin/env bash
# Stores a real tree of at least 20,000 files and 300 MB, fetches it again and compares bytes, modes, times and
# links. Prints rates beside `cp -r` of the same tree with a sync. The tree is the sources of our dependencies,
# doubled if they are too few, or the directory given as first argument.
set -euo pipefail
cd "$(dirname "$0")/.."
clutch=$PWD/target/release/clutch
[ -x "$clutch" ] || cargo build --release --package clutch-cli
work=$(mktemp -d)
cluster=
trap '[ -z "$cluster" ] || kill -TERM "$cluster" 2>/dev/null; wait; rm -rf "$work"' EXIT

source=$work/tree
mkdir "$source"
if [ $# -gt 0 ]; then
  cp -a "$1" "$source/given"
else
  copies=0
  while [ "$(find "$source" -type f | wc -l)" -lt 20000 ] || [ "$(du -sm --apparent-size "$source" | cut -f1)" -lt 300 ]; do
    copies=$((copies + 1))
    mkdir "$source/copy$copies"
    cp -a "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/. "$source/copy$copies/"
  done
fi
# Links and odd modes and times, which source trees have few of.
ln -s ../nowhere "$source/dangling"
ln -s . "$source/self"
mkdir -m 700 "$source/private"
echo secret >"$source/private/file"
chmod 400 "$source/private/file"
touch -d 1999-12-31T23:59:59.123456789Z "$source/private/file" "$source/private"
files=$(find "$source" -type f | wc -l)
mb=$(du -sm --apparent-size "$source" | cut -f1)
echo "tree: $files files, $mb MB"

export CLUTCH_REGISTRY=127.0.0.1:${CLUTCH_TEST_PORT:-7431}
"$clutch" up --dir "$work/cluster" --listen "$CLUTCH_REGISTRY" 2>"$work/up.log" &
cluster=$!
"$clutch" status --wait 60 >/dev/null
kill -0 "$cluster" || { cat "$work/up.log" >&2; exit 1; }

seconds() { local start; start=$(date +%s.%N); "$@" >&2 || return; echo "$(date +%s.%N) $start" | awk '{print $1 - $2}'; }
rate() { echo "$1 $files $mb" | awk '{printf "%.1f s, %.0f files/s, %.1f MB/s\n", $1, $2 / $1, $3 / $1}'; }
copy_and_sync() { cp -r "$source" "$work/copy" && sync -f "$work/copy"; }
took=$(seconds copy_and_sync)
echo "cp -r and sync:    $(rate "$took")"
took=$(seconds "$clutch" fs put -r "$source" /tree)
echo "clutch fs put -r:  $(rate "$took")"
took=$(seconds "$clutch" fs get -r /tree "$work/back")
echo "clutch fs get -r:  $(rate "$took")"

diff -r --no-dereference "$source" "$work/back"
list() { (cd "$1" && find . -printf '%p %y %m %T@ %l\n' | sort); }
list "$source" >"$work/list-source"
list "$work/back" >"$work/list-back"
diff "$work/list-source" "$work/list-back"
"$clutch" fsck
kill -TERM "$cluster"
wait "$cluster"
cluster=
echo "identical: bytes, modes, times and links of $files files"
