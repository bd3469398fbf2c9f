#!/bin/bash
# node.sh DIR VERB NODE
#   start           boot the node, if it is down, and start its slurmd
#   crash           power cut: slurmd and every process of a job on the node vanish
#   unplug, plug    take the node's network away, give it back (NS=2)
#   limit RATE      slow the node's network down, as in 200mbit (NS=2)
#   exec CMD...     run a command on the node
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
DIR=$(cd "$1" && pwd) verb=$2 node=$3
shift 3
# shellcheck source=/dev/null # up.sh writes it
. "$DIR/env.sh"
# shellcheck source-path=SCRIPTDIR source=process.sh
. "$here/process.sh"
holder_file=$DIR/run/node.$node.pid
cable=${LAB_BRIDGE}v${node#n}

first_process() { # of the node; nothing when it is down
  local holder
  holder=$(cat "$holder_file" 2>/dev/null) && alive "$holder" || return 0
  tr -d ' ' <"/proc/$holder/task/$holder/children"
}
inside() {
  local what=(-m -u -p)
  [ "$LAB_NS" != 2 ] || what+=(-n)
  nsenter -t "$(first_process)" "${what[@]}" -- "$@"
}
boot() {
  local what=(--uts --mount --pid)
  [ "$LAB_NS" != 2 ] || what+=(--net)
  rm -f "$DIR/run/node.$node.up"
  # shellcheck disable=SC2016 # the inner shell expands them
  setsid unshare "${what[@]}" --fork --kill-child --mount-proc bash -c '
    hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts; : >"$2/run/node.$1.up"
    while :; do sleep 600 & wait $!; done' node "$node" "$DIR" >"$DIR/log/node.$node.out" 2>&1 </dev/null &
  echo $! >"$holder_file"
  for _ in $(seq 250); do
    [ -e "$DIR/run/node.$node.up" ] && break
    sleep .02
  done
  [ -e "$DIR/run/node.$node.up" ] || { echo "$node did not boot within 5 s" >&2 && exit 1; }
  if [ "$LAB_NS" = 2 ]; then
    ip link del "$cable" 2>/dev/null || true # of a crashed node, which the kernel removes in its own time
    ip link add "$cable" type veth peer name eth0 netns "$(first_process)"
    ip link set "$cable" master "$LAB_BRIDGE" up
    inside ip link set lo up
    inside ip addr add "$LAB_NET.${node#n}/24" dev eth0
    inside ip link set eth0 up
  fi
}

case $verb in
  start)
    mkdir -p "$DIR/spool/$node"
    [ -n "$(first_process)" ] || boot
    inside slurmd -N "$node"
    ;;
  crash)
    pid=$(first_process)
    [ -z "$pid" ] || { kill -KILL "$pid" && gone "$pid"; }
    ;;
  unplug) ip link set "$cable" down ;;
  plug) ip link set "$cable" up ;;
  limit) tc qdisc replace dev "$cable" root tbf rate "$1" burst 128kb latency 50ms ;;
  exec) inside "$@" ;;
  *) echo "node.sh: unknown verb $verb" >&2 && exit 2 ;;
esac
