#!/usr/bin/env bash
# End what up.sh started; states, keys and records stay in the folder.
#
#   down.sh                everything
#   down.sh node-1         this one alone, cleanly: the SuperLink knows at once that it has left
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
# shellcheck source=fleet.sh
. "$(dirname "${BASH_SOURCE[0]}")/fleet.sh"

end() { # NAME
  local folder=$FLEET/$1 signal
  [[ -s $folder/pid ]] || return 0
  for signal in TERM KILL; do
    alive "$folder" && kill -"$signal" "$(<"$folder/pid")"
    for _ in {1..100}; do
      alive "$folder" || { rm -f "$folder/pid" && echo "$1 has ended" && return; }
      sleep 0.1
    done
  done
  fail "$1 does not end: process $(<"$folder/pid")"
}

(($#)) || set -- node-0 node-1 node-2 superlink
check_members "$@"
for member in "$@"; do
  end "$member"
done
