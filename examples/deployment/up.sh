#!/usr/bin/env bash
# Start a fleet on this machine for trying: a SuperLink with TLS that takes registered nodes only, and three SuperNodes.
#
#   up.sh                  start whatever is not running
#   up.sh node-1           start this one alone, for example after: kill -KILL "$(cat fleet/node-1/pid)"
#
# What it makes (certificates, keys, database, states) stays in the folder `fleet` and is used again;
# FLEET=/elsewhere up.sh uses another, FLEET_PORT=9543 other ports. Settings of a node: fleet/node-1/node.env.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
# shellcheck source=fleet.sh
. "$(dirname "${BASH_SOURCE[0]}")/fleet.sh"

# Three unequal devices: how much of its convolutions' weights each keeps, which part of the data it holds.
node_configs=(
  'partition-id=0 retention-conv=0.1'
  'partition-id=1 retention-conv=0.3 retention-linear=0.8'
  'partition-id=2 retention-conv=0.5'
)

make_superlink() {
  mkdir -p "$FLEET/superlink" "$FLEET/operator"
  "$here/certificates.sh" "$FLEET/ca"
  cp -p "$FLEET/ca/"{ca.crt,server.crt,server.key} "$FLEET/superlink/"
  echo "PORT=$port" >"$FLEET/superlink/superlink.env"
  printf '[superlink]\ndefault = "fleet"\n\n[superlink.fleet]\naddress = "127.0.0.1:%s"\nroot-certificates = "%s"\n' \
    "$port" "$FLEET/ca/ca.crt" >"$FLEET/operator/config.toml"
}

make_node() { # NAME
  local folder=$FLEET/$1 number=${1#node-}
  mkdir -p "$folder/state"
  cp -p "$FLEET/ca/ca.crt" "$folder/"
  [[ -e $folder/key ]] || ssh-keygen -q -t ecdsa -b 384 -N '' -C '' -f "$folder/key"
  [[ -e $folder/node.env ]] || printf "SUPERLINK='127.0.0.1:%s'\nRUNTIME_PORT=%s\nNODE_CONFIG='%s'\n" \
    "$port" $((port + 1 + number)) "${node_configs[number]}" >"$folder/node.env"
}

start() { # FOLDER SCRIPT
  nohup "$here/$2" "$1" >>"$1/log" 2>&1 </dev/null &
  echo $! >"$1/pid"
}

listening() { (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; }

start_superlink() {
  local folder=$FLEET/superlink
  alive "$folder" && return
  ! listening || fail "port $port is in use by something else; choose another with FLEET_PORT"
  make_superlink
  start "$folder" superlink.sh
  sleep 1
  until listening; do
    alive "$folder" || fail "the SuperLink does not start: $folder/log"
    sleep 0.2
  done
  echo "the SuperLink listens on 127.0.0.1:$port"
}

register() { # NAME
  local answer
  answer=$(operator_flwr supernode register "$FLEET/$1/key.pub" fleet --name "$1" 2>&1) ||
    [[ $answer == *'already in use'* ]] || fail "cannot register $1: $answer"
}

start_node() { # NAME
  local folder=$FLEET/$1
  alive "$folder" && return
  make_node "$1"
  register "$1"
  [[ ! -e $folder/log ]] || mv -f "$folder/log" "$folder/log.1"
  start "$folder" supernode.sh
}

# After a SIGKILL the SuperLink thinks for up to a minute that the node is still there, and turns a new process away.
wait_for_node() { # NAME
  local folder=$FLEET/$1 deadline=$((SECONDS + 180))
  until grep -qs "SuperNode ID" "$folder/log"; do
    ((SECONDS < deadline)) || fail "$1 does not come online: $folder/log"
    sleep 1
    alive "$folder" && continue
    echo "$1 was turned away; trying again in 10 seconds"
    sleep 10
    start "$folder" supernode.sh
  done
  echo "$1 is online: $(grep NODE_CONFIG "$folder/node.env")"
}

(($#)) || set -- "${members[@]}"
check_members "$@"
for member in "$@"; do
  if [[ $member == superlink ]]; then start_superlink; else start_node "$member"; fi
done
for member in "$@"; do
  [[ $member == superlink ]] || wait_for_node "$member"
done
