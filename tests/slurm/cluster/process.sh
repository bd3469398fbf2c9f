#!/bin/bash
# Sourced by node.sh and down.sh: is a process alive? A dead one that nobody reaps is not.
alive() {
  local state
  state=$(sed -n 's/^State:[^A-Za-z]*\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null)
  [ -n "$state" ] && [ "$state" != Z ] && [ "$state" != X ]
}
gone() { # PID: within five seconds
  for _ in $(seq 100); do
    alive "$1" || return 0
    sleep .05
  done
  return 1
}
