#!/bin/bash
# A job under Open MPI: mpirun starts one launcher for each rank, and each knows its place from OMPI_*.
#
#   docs/examples/mpirun.sh job.toml hosts RANKS_PER_HOST
#
# Run on the first host of the host file. The model, the checkpoint directory and the state directory must be seen by all hosts.
set -u

job=$1 hosts=$2 per_host=$3
here=${COORDINATOR_HOST:-$(hostname)}
port=${WEIGHTCAST_PORT:-29400}
state=${STATE_DIRECTORY:-$PWD/weightcast-state}
ranks=$(($(grep -c '[^[:space:]]' "$hosts") * per_host))

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

weightcast coordinator --ranks $ranks --listen "0.0.0.0:$port" --insecure --state-dir "$state" "$job" &
coordinator=$!
until [ -s "$state/token" ]; do
  kill -0 $coordinator 2>/dev/null || { await $coordinator; exit; }
  sleep 0.2
done

# In a session of its own, because mpirun gives its processes one second after a signal, and Ctrl-C is for a whole session.
setsid mpirun ${MPIRUN_FLAGS:-} --hostfile "$hosts" --map-by "ppr:$per_host:node" -np $ranks \
  weightcast launch --coordinator "$here:$port" --token-file "$state/token" </dev/null &
await $!
launched=$?
# Launchers that failed may leave a coordinator that waits for their ranks.
[ $launched = 0 ] || kill -TERM $coordinator 2>/dev/null
await $coordinator
coordinated=$?
# What a rank failed with is its launcher's code. 0 and 75 hold where the coordinator knows of nothing worse.
[ $launched = 0 ] || [ $launched = 75 ] || exit $launched
[ $coordinated = 0 ] && exit $launched
exit $coordinated
