# shellcheck shell=bash
# What up.sh, run.sh and down.sh share. FLEET is the folder of everything (default: fleet, beside the scripts);
# FLEET_PORT the SuperLink's port on loopback (default: 9443); the nodes use the ports after it.
umask 077
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${FLEET:=$here/fleet}"
export FLEET
FLEET=$(cd "$FLEET" && pwd)
export port=${FLEET_PORT:-9443}
members=(superlink node-0 node-1 node-2)

check_members() { # NAME ...
  local name
  for name in "$@"; do
    [[ " ${members[*]} " == *" $name "* ]] || fail "no such member of the fleet: $name; there are ${members[*]}"
  done
}

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# The operator's `flwr`: its settings name the SuperLink "fleet" and the CA that it trusts.
operator_flwr() {
  FLWR_HOME=$FLEET/operator FLWR_TELEMETRY_ENABLED=${FLWR_TELEMETRY_ENABLED:-0} FLWR_DISABLE_UPDATE_CHECK=1 flwr "$@"
}

# Is the process in FOLDER/pid there, and is it the one that was started for this folder?
alive() {
  [[ -s $1/pid ]] && [[ $(ps -ww -o args= -p "$(<"$1/pid")" 2>/dev/null) == *flower-super*"$1/"* ]]
}
