#!/bin/sh
# Whether the trial with real processes finds anything: nodes with a planted bug, which it must find.
#
#   scripts/control.sh DIR PORT
#
# It builds what it needs: nodes into which bugs can be planted (and leaves the ordinary binary in target/release behind it), and the
# trial. DIR must not be there yet; it and the hosts of scripts/namespaces.sh are used. Exit code 1 when a bug is not found.
set -eu

[ $# -eq 2 ] || {
    echo "usage: $0 DIR PORT" >&2
    exit 2
}
dir=$1
port=$2
[ ! -e "$dir" ] || {
    echo "$0: $dir is there already" >&2
    exit 1
}
cd "$(dirname "$0")/.."
mkdir -p "$dir"
cargo build --release --quiet -p clutch-integration --example failover
cp target/release/examples/failover "$dir/failover"
cargo build --release --quiet -p clutch-integration -p clutch-cli --bins \
    --features clutch-integration/mutants,clutch-cli/mutants
cp target/release/clutch "$dir/clutch"
cargo build --release --quiet -p clutch-cli

# One planted bug under a fault: what the trial must say.
planted() {
    bug=$1 rounds=$2 fault=$3
    out=$dir/$bug.out
    # The trial itself is left as it is.
    CLUTCH_BIN=$dir/clutch CLUTCH_PLANT=$bug scripts/namespaces.sh sh -c "
        scripts/three.sh $dir/$bug $port >/dev/null && env -u CLUTCH_PLANT $dir/failover $dir/$bug $port $rounds 1 $fault
        scripts/three.sh $dir/$bug $port stop" >"$out" 2>&1 || true
    if grep -q "^VIOLATION linearizability" "$out"; then
        echo "$bug under $fault: found, $(grep -c '^VIOLATION' "$out") violations"
    else
        echo "$bug under $fault: NOT FOUND, see $out"
        missed=1
    fi
}

missed=0
# A leader that is cut off from the others answers reads without asking them; a follower answers what it has.
planted ReadWithoutQuorum 6 cut
planted FollowerReadsAtOnce 3 kill
exit $missed
