#!/bin/sh
# Three nodes of a cluster as processes on 127.0.0.1, for trials and tests.
#
#   scripts/three.sh DIR PORT            start them on PORT, PORT+1 and PORT+2, wait until they serve, and print how to reach them
#   scripts/three.sh DIR PORT start N    start node N again, also one that was made by clutch cluster join --dir DIR/nN
#   scripts/three.sh DIR PORT stop       stop those that run
#
# 4 shards, 8 disks, policy 4+2. What each node says is in DIR/nN/out, its process in DIR/nN/pid. CLUTCH_BIN names another binary than
# the one that was built here. Under scripts/namespaces.sh each node runs on a host of its own, and all listen on PORT.
set -eu

usage() {
    echo "usage: $0 DIR PORT [start N | stop]" >&2
    exit 2
}

[ $# -eq 2 ] || [ $# -eq 3 ] || [ $# -eq 4 ] || usage
dir=$1
port=$2
case $port in
'' | *[!0-9]*) usage ;;
esac
clutch=${CLUTCH_BIN:-$(dirname "$0")/../target/release/clutch}
[ -x "$clutch" ] || {
    echo "$0: $clutch is not there; build it: cargo build --release -p clutch-cli" >&2
    exit 1
}

# Where node N is, and what runs a command there.
address() {
    if [ -n "${CLUTCH_NAMESPACES:-}" ]; then echo "10.98.0.$1:$port"; else echo "127.0.0.1:$((port + $1 - 1))"; fi
}
there() {
    if [ -n "${CLUTCH_NAMESPACES:-}" ]; then echo "ip netns exec $CLUTCH_NAMESPACES$1"; fi
}
registry=$(address 1),$(address 2),$(address 3)

# Whether the process is there and is this node: one that has ended and that nobody has waited for has no command line, and the number
# may be another's by now.
runs() {
    [ -f "$dir/n$1/pid" ] || return 1
    { tr '\0' ' ' <"/proc/$(cat "$dir/n$1/pid")/cmdline"; } 2>/dev/null | grep -qF -- "$dir/n$1/node.toml"
}

start() {
    if runs "$1"; then
        echo "$0: node $1 runs already (process $(cat "$dir/n$1/pid"))" >&2
        return 0
    fi
    # In a session of its own: what ends this shell does not end the node.
    setsid $(there "$1") "$clutch" node --config "$dir/n$1/node.toml" >>"$dir/n$1/out" 2>&1 </dev/null &
    echo $! >"$dir/n$1/pid"
}

case ${3:-} in
'')
    if [ ! -d "$dir/n1" ]; then
        "$clutch" cluster init --dir "$dir" --node "$(address 1)" --node "$(address 2)" --node "$(address 3)" \
            --shards 4 --disks 8 --policy 4+2 >&2
    fi
    for n in 1 2 3; do start $n; done
    # All three, not just most of them, and all disks.
    tries=0
    until CLUTCH_REGISTRY=$registry "$clutch" status --wait 20 >"$dir/status" 2>&1 &&
        grep -q '^everything serves$' "$dir/status" && grep -q '^block services: 8,' "$dir/status"; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] && sleep 0.2 && continue
        cat "$dir/status" >&2
        for n in 1 2 3; do
            echo "--- node $n:" >&2
            tail -n 5 "$dir/n$n/out" >&2
        done
        exit 1
    done
    # Shards hear of new disks every two seconds: what is written before may lie on those of two nodes alone.
    sleep 3
    echo "export CLUTCH_REGISTRY=$registry"
    ;;
start)
    case ${4:-} in
    [1-9]) if [ -f "$dir/n$4/node.toml" ]; then start "$4"; else usage; fi ;;
    *) usage ;;
    esac
    ;;
stop)
    for n in 1 2 3 4 5 6 7 8 9; do
        if runs $n; then kill "$(cat "$dir/n$n/pid")"; fi
    done
    ;;
*) usage ;;
esac
