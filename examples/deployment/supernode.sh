#!/usr/bin/env bash
# Run one SuperNode, which plays one agent, in the foreground; SIGTERM ends it cleanly.
#
#   supernode.sh FOLDER
#
# All that belongs to it lies in the folder:
#   key        secret, made on the device: ssh-keygen -t ecdsa -b 384 -N '' -C '' -f FOLDER/key
#   key.pub    goes to the operator, who registers it: flwr supernode register key.pub fleet
#   ca.crt     from certificates.sh; tells the true SuperLink from others
#   node.env   three lines, in quotes as a shell (and systemd) reads them:
#                SUPERLINK='relay.example.org:9443'
#                RUNTIME_PORT=9094        a free port on loopback, for the node's own processes
#                NODE_CONFIG='partition-id=0 retention-conv=0.3'      without state-dir: it is set below
#   state/     the agent's state: its scores. Secret; the node goes on from it after a restart
set -euo pipefail
umask 077

case ${1:---help} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
cd "$1"
folder=$PWD
# shellcheck source=/dev/null
. ./node.env

export FLWR_HOME=$folder/flwr FLWR_TELEMETRY_ENABLED=${FLWR_TELEMETRY_ENABLED:-0} FLWR_DISABLE_UPDATE_CHECK=1
# seconds between looks for a message to play; Flower's own 1 is a second lost in every exchange
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=${FLWR_SUPEREXEC_TASK_POLL_INTERVAL:-0.2}
exec flower-supernode --superlink "$SUPERLINK" --root-certificates "$folder/ca.crt" \
  --auth-supernode-private-key "$folder/key" --host 127.0.0.1 --port "${RUNTIME_PORT:-9094}" \
  --node-config "state-dir=\"$folder/state\" $NODE_CONFIG"
