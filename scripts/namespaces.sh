#!/bin/sh
# Runs a command in a network of its own with nine hosts in it, for trials in which the network fails. Needs root, or rights to make
# namespaces, and the programs ip and nft.
#
#   scripts/namespaces.sh sh -c 'scripts/three.sh DIR PORT && target/release/examples/failover DIR PORT 30 1 kill,pause,cut'
#
# The command sees hosts 10.98.0.1 to 10.98.0.9 as network namespaces node1 to node9, in which scripts/three.sh starts the nodes
# (CLUTCH_NAMESPACES says so), and is itself a tenth one. Nothing outside is touched, and everything goes when the command has ended.
set -eu

[ $# -gt 0 ] || {
    echo "usage: $0 COMMAND [ARGUMENT...]" >&2
    exit 2
}
for program in ip nft unshare; do
    command -v $program >/dev/null || {
        echo "$0: the program $program is missing (Debian: iproute2, nftables, util-linux)" >&2
        exit 1
    }
done
if [ -z "${CLUTCH_NAMESPACES:-}" ]; then
    # A process namespace, too: its end takes along what was left running in it.
    CLUTCH_NAMESPACES=node exec unshare --net --mount --pid --fork --mount-proc "$0" "$@"
fi

mkdir -p /run/netns
mount -t tmpfs none /run/netns
ip link set lo up
ip link add hub type bridge
ip link set hub up
ip address add 10.98.0.254/24 dev hub
for n in 1 2 3 4 5 6 7 8 9; do
    host=$CLUTCH_NAMESPACES$n
    ip netns add "$host"
    ip link add "to$n" type veth peer name eth0 netns "$host"
    ip link set "to$n" master hub up
    ip -n "$host" address add "10.98.0.$n/24" dev eth0
    ip -n "$host" link set eth0 up
    ip -n "$host" link set lo up
done
"$@"
