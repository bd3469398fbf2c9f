#!/bin/bash
# hold.sh DIR: a cluster for as long as standard input stays open; says "up" when it runs, or why it
# does not. Whoever holds the other end may be killed in any way: the cluster and DIR go with it.
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
timeout 90 "$here/up.sh" "$1" >"$1/up.log" 2>&1 </dev/null
started=$?
trap '' PIPE # the listener may be gone already
if [ $started = 0 ]; then echo up 2>/dev/null; else tail -n 20 "$1/up.log" "$1"/log/*; fi
exec >/dev/null 2>&1
cat
"$here/down.sh" "$1"
rm -rf "$1"
