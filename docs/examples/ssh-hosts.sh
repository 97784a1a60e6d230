#!/bin/bash
# A job over ssh, without a scheduler: a launcher on each host of a file, by key, without a password.
#
#   docs/examples/ssh-hosts.sh job.toml hosts RANKS_PER_HOST
#
# Run on a host that all others reach. A launcher whose ssh ends is told so by its closed terminal (-tt) and ends its ranks. The
# model, the checkpoint directory and the state directory must be seen by all hosts.
set -u

job=$1 per_host=$3
mapfile -t hosts < <(grep '[^[:space:]]' "$2")
nodes=${#hosts[@]}
here=${COORDINATOR_HOST:-$(hostname)}
port=${WEIGHTCAST_PORT:-29400}
state=${STATE_DIRECTORY:-$PWD/weightcast-state}
remote=${REMOTE_SHELL:-ssh -tt}

coordinator=
# A signal to this script is one to the job: the coordinator has the ranks save what is not saved, and all end with 75.
signalled=
trap 'signalled=1; kill -TERM $coordinator 2>/dev/null' TERM INT HUP

# await PROCESS: its exit code, although a signal interrupts bash's wait.
await() {
  local code
  while signalled=; wait "$1"; code=$?; [ -n "$signalled" ]; do :; done
  return $code
}

weightcast coordinator --ranks $((nodes * per_host)) --listen "0.0.0.0:$port" --insecure --state-dir "$state" "$job" &
coordinator=$!
until [ -s "$state/token" ]; do
  kill -0 $coordinator 2>/dev/null || { await $coordinator; exit; }
  sleep 0.2
done

launchers=()
for node in "${!hosts[@]}"; do
  $remote "${hosts[$node]}" weightcast launch --nnodes "$nodes" --node-rank "$node" --nproc-per-node "$per_host" \
    --coordinator "$here:$port" --token-file "$state/token" </dev/null &
  launchers+=($!)
done
launched=0
for _ in "${launchers[@]}"; do
  while signalled=; wait -n "${launchers[@]}"; code=$?; [ -n "$signalled" ]; do :; done
  [ $code = 0 ] && continue
  # Nobody starts it again, so its ranks need not be waited for: the others save, and all end.
  [ $launched = 0 ] && launched=$code
  kill -TERM $coordinator 2>/dev/null
done
await $coordinator
coordinated=$?
# What a rank failed with is its launcher's code. 0 and 75 hold where the coordinator knows of nothing worse.
[ $launched = 0 ] || [ $launched = 75 ] || exit $launched
[ $coordinated = 0 ] && exit $launched
exit $coordinated
