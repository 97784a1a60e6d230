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

weightcast coordinator --ranks $ranks --listen "0.0.0.0:$port" --insecure --state-dir "$state" "$job" &
coordinator=$!
until [ -s "$state/token" ]; do
  kill -0 $coordinator 2>/dev/null || { wait $coordinator; exit; }
  sleep 0.2
done

mpirun ${MPIRUN_FLAGS:-} --hostfile "$hosts" --map-by "ppr:$per_host:node" -np $ranks \
  weightcast launch --coordinator "$here:$port" --token-file "$state/token"
launched=$?
wait $coordinator
coordinated=$?
[ $coordinated = 0 ] && exit $launched
exit $coordinated
