#!/usr/bin/env bash
# Run the SuperLink in the foreground; SIGTERM ends it cleanly.
#
#   superlink.sh FOLDER
#
# All that belongs to it lies in the folder:
#   ca.crt server.crt server.key   from certificates.sh
#   superlink.env                  HOST and PORT to listen on (127.0.0.1 and 9443 where it says nothing)
#   state.db                       its database: registered nodes, runs, messages under way
#   runs/                          the run records, the checkpoints in them included
set -euo pipefail
umask 077

case ${1:---help} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
cd "$1"
folder=$PWD HOST=127.0.0.1 PORT=9443
# shellcheck source=/dev/null
[[ ! -e superlink.env ]] || . ./superlink.env

export FLWR_HOME=$folder/flwr FLWR_TELEMETRY_ENABLED=${FLWR_TELEMETRY_ENABLED:-0} FLWR_DISABLE_UPDATE_CHECK=1
# seconds between looks for a message to play; Flower's own 1 is a second lost in every exchange
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=${FLWR_SUPEREXEC_TASK_POLL_INTERVAL:-0.2}
# Without --database all is in memory, and a restart forgets who is registered.
# Runtime installation is off: what an app needs must be installed, and no run may install over it.
exec flower-superlink --host "$HOST" --port "$PORT" --enable-supernode-auth --disable-runtime-dependency-installation \
  --ssl-ca-certfile "$folder/ca.crt" --ssl-certfile "$folder/server.crt" --ssl-keyfile "$folder/server.key" \
  --database "$folder/state.db"
