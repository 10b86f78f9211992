#!/usr/bin/env bash
# Run an app on the fleet that up.sh started, follow its log, and exit 0 only if it ended well (`flwr run` always does).
#
#   run.sh                                               the quickstart with three agents
#   run.sh --run-config 'num-rounds=20'                  any options of `flwr run`
#   run.sh --run-config 'resume="runs/20260131-141500-quickstart"'   go on with a run that broke off
#   APP=../my-app run.sh                                 another app
#
# Ctrl-C ends the following, not the run: FLWR_HOME=fleet/operator flwr stop RUN_ID fleet
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
# shellcheck source=fleet.sh
. "$(dirname "${BASH_SOURCE[0]}")/fleet.sh"

field() { # NAME: its first value in the JSON on standard input
  sed -n "/\"$1\":/{s/.*\"$1\": *\"\{0,1\}\([^\",]*\).*/\1/p;q;}"
}

app=${APP:-$here/../quickstart}
answer=$(operator_flwr run "$app" fleet --format json --run-config 'num-agents=3 topology="ring" num-rounds=6' "$@") ||
  fail "Flower refuses the run: $answer"
run=$(field run-id <<<"$answer")
[[ $run ]] || fail "Flower refuses the run: $answer"
echo "run $run"
operator_flwr log "$run" fleet --stream || true # the status says how it ended
status='' failures=0
until [[ $status == finished* ]]; do
  answer=$(operator_flwr ls fleet --run-id "$run" --format json) || true # it exits 0 when there is no answer, too
  status=$(field status <<<"$answer")
  [[ $status ]] || ((++failures < 5)) || fail "the SuperLink does not answer: $answer"
  sleep 1
done
echo "run $run: $status; run records: $FLEET/superlink/runs"
[[ $status == finished:completed ]]
