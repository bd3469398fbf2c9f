#!/bin/bash
# down.sh DIR: end what up.sh started, by the process ids noted in DIR/run, and leave DIR/log.
set -u
here=$(cd "$(dirname "$0")" && pwd)
DIR=$(cd "$1" && pwd)
# shellcheck source=/dev/null # up.sh writes it
. "$DIR/env.sh"
# shellcheck source-path=SCRIPTDIR source=process.sh
. "$here/process.sh"
end() { # DAEMON
  local pid
  pid=$(cat "$DIR/run/$1.pid" 2>/dev/null) && alive "$pid" || return 0
  [ "$(cat "/proc/$pid/comm")" = "$1" ] || return 0 # another process got its number since
  kill -TERM "$pid"
  gone "$pid" || kill -KILL "$pid"
}
for i in $(seq "$LAB_NODES"); do "$here/node.sh" "$DIR" crash "n$i"; done
for daemon in slurmctld slurmdbd mariadbd munged; do end $daemon; done
[ "$LAB_NS" = 2 ] && ip link del "$LAB_BRIDGE" 2>/dev/null
cd "$DIR" && rm -rf run state spool mysql dev
