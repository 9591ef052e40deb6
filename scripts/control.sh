#!/bin/sh
# Whether the trial with real processes finds anything: nodes with a planted bug, which it must find.
#
#   scripts/control.sh DIR PORT
#
# It builds what it needs: nodes into which bugs can be planted (and leaves the ordinary binary in target/release behind it), and the
# trial. DIR must not be there yet; it and the hosts of scripts/namespaces.sh are used. Exit code 1 when a bug is not found, or one where
# none is planted, and when a trial did not come to its end.
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
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
cd "$(dirname "$0")/.."
cargo build --release --quiet -p clutch-integration --example failover
cp target/release/examples/failover "$dir/failover"
cargo build --release --quiet -p clutch-integration -p clutch-cli --bins \
    --features clutch-integration/mutants,clutch-cli/mutants
cp target/release/clutch "$dir/clutch"
cargo build --release --quiet -p clutch-cli

# Runs the trial with a planted bug, or without one (none), under a fault; what it said is in $out.
trial() {
    bug=$1 rounds=$2 fault=$3 seed=$4
    out=$dir/$bug-$seed.out
    plant="CLUTCH_PLANT=$bug"
    [ "$bug" != none ] || plant=
    # The trial itself is left as it is.
    env CLUTCH_BIN="$dir/clutch" $plant scripts/namespaces.sh sh -c "
        scripts/three.sh $dir/$bug-$seed $port >/dev/null &&
            env -u CLUTCH_PLANT $dir/failover $dir/$bug-$seed $port $rounds $seed $fault
        scripts/three.sh $dir/$bug-$seed $port stop" >"$out" 2>&1 || true
    if ! grep -q "operations, .* requests" "$out"; then
        echo "$bug under $fault: the trial did not come to its end, see $out"
        missed=1
        return 1
    fi
}

# It takes chance: who reads must meet what was written elsewhere within a second or two.
planted() {
    for turn in 1 2 3 4; do
        trial "$@" "$turn" || return 0
        if grep -q "^VIOLATION linearizability" "$out"; then
            echo "$bug under $fault: found in trial $turn, $(grep -c '^VIOLATION' "$out") violations"
            return 0
        fi
    done
    echo "$bug under $fault: NOT FOUND in $turn trials, see $out"
    missed=1
}

missed=0
if trial none 4 cut 1; then
    if grep -q "^VIOLATION" "$out"; then
        echo "without a planted bug: violations, see $out"
        missed=1
    else
        echo "without a planted bug: none is found"
    fi
fi
# A leader that is cut off from the others answers reads without asking them; a follower answers what it has.
planted ReadWithoutQuorum 6 cut
planted FollowerReadsAtOnce 3 kill
exit $missed
