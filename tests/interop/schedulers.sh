#!/usr/bin/env bash
# Runs jobs under real schedulers: Slurm (munged, slurmctld, and a slurmd for each of two nodes), Open MPI's mpirun over ssh to two
# hosts, and sshd with a key of the test's own; and with clocks of hosts apart (libfaketime). The examples of docs/examples are run
# as they are.
#
#   tests/interop/schedulers.sh [slurm] [mpi] [ssh] [clock]     all by default
#                                   WEIGHTCAST=<binary> to test another one than target/{release,debug}/weightcast
#                                   KEEP=1 keeps the directory with all logs
#
# Debian: slurmctld slurmd slurm-client munge, openmpi-bin, openssh-server openssh-client, faketime. What is not installed is skipped.
# Needs python3 (3.11 or later), and 127.0.0.0/8 on the loopback interface. As root or not; not with a Slurm of the machine's own running
# as another user. All addresses are of loopback, as far as the tools let one say so.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
repository=$(cd "$here/../.." && pwd)
examples=$repository/docs/examples
model=$repository/tests/data/tiny-llama
data=$repository/tests/data/devils-dictionary.jsonl
PATH=$PATH:/usr/sbin:/sbin
passed=0 failed=0 skipped=0

binary() {
  local candidate
  for candidate in "${WEIGHTCAST:-}" "$repository/target/release/weightcast" "$repository/target/debug/weightcast"; do
    [ -n "$candidate" ] && [ -x "$candidate" ] && { echo "$candidate"; return; }
  done
  echo "no weightcast binary: cargo build first, or set WEIGHTCAST" >&2
  return 1
}

built=$(binary) || exit 1
work=$(mktemp -d "${TMPDIR:-/tmp}/weightcast-schedulers.XXXXXX")

# marked MARK: processes that have the mark, or a longer one, in their environment.
marked() { grep -lsazE "^WEIGHTCAST_TEST_MARK=$1(/|$)" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3; }

finish() {
  trap - EXIT INT TERM
  [ -e "$work/slurm/slurm.conf" ] && SLURM_CONF=$work/slurm/slurm.conf timeout 10 scancel --user="$(id -un)" 2>/dev/null
  local pass pids
  for pass in TERM KILL KILL; do
    # sshd and slurmstepd write over their environment; they are known by their own names for themselves.
    pids="$(marked "$work") $(cat "$work"/*/*.pid 2>/dev/null) $(pgrep -f "^slurmstepd.*$work" 2>/dev/null)"
    [ -n "${pids// /}" ] || break
    # shellcheck disable=SC2086
    kill -$pass $pids 2>/dev/null
    sleep 0.5
  done
  if [ "${KEEP:-0}" = 1 ]; then echo "kept: $work"; else rm -rf "$work"; fi
}
trap finish EXIT
trap 'exit 130' INT TERM

# A copy: a build that goes on meanwhile does not change what is tested.
mkdir -p "$work/bin" && cp "$built" "$work/bin/weightcast"
PATH=$work/bin:$PATH
export COORDINATOR_HOST=127.0.0.1 XDG_RUNTIME_DIR=$work/run RANKS_PER_NODE=2 PYTHONDONTWRITEBYTECODE=1
mkdir -m 700 "$XDG_RUNTIME_DIR"

pass() { passed=$((passed + 1)); echo "ok    $1"; }
skip() { skipped=$((skipped + 1)); echo "skip  $1: $2"; }
# fail NAME WHY [FILE]: the end of the file is what was said.
fail() {
  failed=$((failed + 1))
  echo "FAIL  $1: $2"
  if [ -n "${3:-}" ]; then grep -v ' INFO step ' "$3" 2>/dev/null | tail -n 25 | sed 's/^/        /'; fi
}

# within SECONDS COMMAND...: waits until it succeeds.
within() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.1
  done
}

# ports N: so many that are free, the first of which has a free one three further on.
ports() {
  python3 - "$1" <<'PYTHON'
import socket, sys
def bound(port):
    found = socket.socket(); found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); found.bind(("", port)); return found
while True:
    try:
        first = bound(0); third = bound(first.getsockname()[1] + 3); break
    except OSError:
        continue
rest = [bound(0) for _ in range(int(sys.argv[1]) - 1)]
print(*(held.getsockname()[1] for held in [first, *rest]))
PYTHON
}

lacks() { local tool; for tool in "$@"; do command -v "$tool" >/dev/null || { echo "$tool is not installed"; return 0; }; done; return 1; }

# start NAME COMMAND...: in the background, marked, saying what it says to a file. Sets `started`, `said`, `mark`.
start() {
  local name=$1
  shift
  said=$work/$name.out mark=$work/jobs/$name
  WEIGHTCAST_TEST_MARK=$mark "$@" >"$said" 2>&1 </dev/null &
  started=$!
}

# ended SECONDS: the code of what was started, or 999 if it goes on.
ended() {
  local end=$((SECONDS + $1))
  while kill -0 "$started" 2>/dev/null; do
    [ $SECONDS -lt $end ] || { code=999; return; }
    sleep 0.1
  done
  wait "$started"
  code=$?
}

nothing_left() { [ -z "$(marked "$work/jobs")" ]; }

# job_file NAME load|train: writes NAME.toml, whose checkpoints go to the directory NAME.
job_file() {
  printf '%s\n' "model.source = \"$model\"" 'quantization.format = "nf4"' 'load.placement = "shard"' \
    "checkpoint.directory = \"$work/$1\"" >"$work/$1.toml"
  if [ "$2" = load ]; then
    echo 'checkpoint.save = true' >>"$work/$1.toml"
  else
    cat >>"$work/$1.toml" <<TOML
checkpoint.resume = "auto"
[train]
steps = ${3:-100000}
batch-size = 8
micro-batch-size = 2
seed = 7
[train.data]
train = "$data"
sequence-length = 32
[train.lora]
r = 4
[train.checkpoint]
every-steps = ${4:-0}
every-minutes = 0
TOML
  fi
}

steps() { grep -c '"kind":"step"' "$work/$1/metrics/metrics.jsonl" 2>/dev/null || true; }
trains() { [ "$(steps "$1")" -ge "${2:-3}" ]; }
verified() { weightcast checkpoint verify --deep "$work/$1" >"$work/$1.verify" 2>&1; }

# rank_process RANK: the worker, not its nanny.
rank_process() {
  local pid
  for pid in $(marked "$mark"); do
    [ "$(tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | sed -n 2p)" = worker ] || continue
    grep -qsxz "RANK=$1" "/proc/$pid/environ" && { echo "$pid"; return; }
  done
}

# expect_contract NAME NODES KIND: after a program's ranks have ended with $code.
expect_contract() {
  local found
  if [ "$code" != 0 ]; then
    fail "$1" "exit code $code" "$said"
  elif found=$(python3 "$here/contract.py" check "$work/contract" "$2" "$3"); then
    pass "$1"
  else
    fail "$1" "$found" "$said"
  fi
}

# contract NAME NODES KIND COMMAND...: the command's ranks run contract.py.
contract() {
  local name=$1 nodes=$2 kind=$3
  shift 3
  rm -rf "$work/contract" && mkdir "$work/contract"
  start "contract-$passed-$failed" "$@"
  ended 60
  expect_contract "$name" "$nodes" "$kind"
}

# expect_end NAME CODE CHECKPOINTS: it has ended so, a checkpoint holds (where named), and no process is left.
expect_end() {
  if [ "$code" != "$2" ]; then
    fail "$1" "exit code $code, expected $2" "$said"
  elif [ -n "$3" ] && ! verified "$3"; then
    fail "$1" "no whole checkpoint: $(tail -n 3 "$work/$3.verify")" "$said"
  elif ! within 5 nothing_left; then
    fail "$1" "processes are left: $(marked "$work/jobs" | xargs -r ps -o pid=,args= -p | cut -c1-120)" "$said"
  else
    pass "$1"
  fi
}

# --- Slurm -------------------------------------------------------------------------------------------------------------------

# Two nodes whose names are addresses of loopback, each with a slurmd on this machine. Processes are tracked so that Slurm can kill what
# is left of a step, as with control groups on a real node.
slurm_starts() {
  local place=$work/slurm controller first second user node
  mkdir -p "$place/state" "$place/spool-127.20.90.1" "$place/spool-127.20.90.2"
  read -r controller first second < <(ports 3)
  user=$(id -un)
  head -c 128 /dev/urandom >"$place/munge.key" && chmod 600 "$place/munge.key"
  : >"$place/gpu0" && for node in 1 2 3 4 5 6 7; do : >"$place/gpu$node"; done
  echo "Name=gpu File=$place/gpu[0-7]" >"$place/gres.conf"
  cat >"$place/slurm.conf" <<CONF
ClusterName=interop
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$place/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool-%n
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd-%n.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd-%n.log
SchedulerParameters=sched_interval=2,bf_interval=2
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny
GresTypes=gpu
NodeName=127.20.90.[1-2] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[$first,$second] CPUs=64 RealMemory=1000 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES State=UP
CONF
  export SLURM_CONF=$place/slurm.conf
  munged --force --key-file="$place/munge.key" --socket="$place/munge.sock" --pid-file="$place/munged.pid" \
    --log-file="$place/munged.log" --seed-file="$place/munged.seed" --num-threads=2 2>"$place/munged.out" || return 1
  WEIGHTCAST_TEST_MARK=$work/slurm slurmctld -f "$SLURM_CONF" -D >"$place/slurmctld.out" 2>&1 &
  for node in 127.20.90.1 127.20.90.2; do
    WEIGHTCAST_TEST_MARK=$work/slurm slurmd -f "$SLURM_CONF" -N $node -D >"$place/slurmd-$node.out" 2>&1 &
  done
  within 20 both_idle
}

both_idle() { [ "$(sinfo -h -N -o '%N %t' 2>/dev/null | grep -c ' idle$')" = 2 ]; }
field() { scontrol -o show job "$job" 2>/dev/null | grep -oE "(^| )$1=[^ ]*" | head -n 1 | cut -d= -f2; }
in_state() { [[ " $* " == *" $(field JobState) "* ]]; }

# submit NAME: the example as it is, on two nodes. Sets `job` beside what start sets.
submit() {
  local port
  read -r port < <(ports 1)
  said=$work/$1.out mark=$work/jobs/$1
  job=$(WEIGHTCAST_TEST_MARK=$mark WEIGHTCAST_PORT=$port STATE_DIRECTORY=$work/state-$1 sbatch --parsable --nodes=2 \
    --chdir="$work" --output="$said" --open-mode=append "$examples/slurm.sbatch" "$work/$1.toml") || echo "sbatch failed" >"$said"
}

# batch_ended SECONDS: sets `code`, the batch script's, when Slurm is done with the job; 999 if it is not.
batch_ended() {
  code=999
  within "$1" in_state COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL && within 40 both_idle && code=$(field ExitCode | cut -d: -f1)
}

slurm() {
  local why run="$here/contract.py rank $work/contract" began
  if why=$(lacks slurmctld slurmd srun sbatch scontrol munged); then skip Slurm "$why"; return; fi
  if ! slurm_starts; then
    fail "Slurm starts" "its nodes are not idle: $(sinfo -N 2>&1)" "$work/slurm/slurmctld.out"
    return
  fi
  # shellcheck disable=SC2086
  {
    contract "srun, a launcher on each of two nodes" 2,2 node srun -N2 --ntasks-per-node=1 weightcast launch --nproc-per-node 2 $run
    contract "srun, a launcher for each rank" 2,2 rank srun -N2 --ntasks-per-node=2 weightcast launch $run
    contract "srun, ranks dealt out cyclically" 2,2 rank srun -N2 --ntasks-per-node=2 -m cyclic weightcast launch $run
    contract "srun, nodes of unequal size" 2,1 rank srun -N2 -n3 --ntasks-per-node=2 weightcast launch $run
    contract "srun, a step smaller than its allocation" 2 rank salloc -Q -N2 --ntasks-per-node=2 srun -N1 -n2 weightcast launch $run
    contract "salloc without srun: this launcher alone" 2 node salloc -Q -N2 weightcast launch --nproc-per-node 2 $run
  }
  # shellcheck disable=SC2086
  slurm_shared $run
  start slurm-code srun -N2 --ntasks-per-node=1 weightcast launch --nproc-per-node 2 --no-python bash -c 'exit $((RANK == 3 ? 42 : 0))'
  ended 60
  expect_end "srun passes on a rank's exit code" 42 ""

  slurm_worker
  job_file slurm-load load
  submit slurm-load
  batch_ended 90
  expect_end "slurm.sbatch: NF4 on 2 nodes of 2 ranks, committed and verified" 0 slurm-load
  slurm_cancel
  slurm_requeue

  # It listens for IPv4 alone: the ranks give up, and the coordinator, which nobody has called, is told to end.
  job_file slurm-lost load
  WEIGHTCAST_JOIN_TIMEOUT=5 COORDINATOR_HOST='[::1]' submit slurm-lost
  batch_ended 60
  in_state FAILED || code="$code, in state $(field JobState)"
  expect_end "slurm.sbatch: ranks that do not reach the coordinator end the job, which is not started again" 69 ""

  job_file slurm-kill train
  submit slurm-kill
  within 60 trains slurm-kill || fail "slurm.sbatch trains" "no step" "$said"
  began=$SECONDS
  kill -KILL "$(rank_process 3)" 2>/dev/null
  batch_ended 30
  expect_end "slurm.sbatch: a rank killed ends all after $((SECONDS - began)) s" 137 ""
}

# slurm_shared PROGRAM...: two jobs whose first node is the same.
slurm_shared() {
  local first first_said
  start slurm-first srun -N2 --ntasks-per-node=1 weightcast launch --no-python bash -c "touch $work/first; sleep 5"
  first=$started first_said=$said
  within 30 test -e "$work/first"
  contract "srun, two jobs at once on the same nodes" 2,2 node srun -N2 --ntasks-per-node=1 weightcast launch --nproc-per-node 2 "$@"
  started=$first said=$first_said
  ended 30
  expect_end "srun, the other of the two jobs" 0 ""
}

# Ranks without launchers: their places from SLURM_* alone.
slurm_worker() {
  local port coordinator
  read -r port < <(ports 1)
  job_file slurm-worker load
  start slurm-coordinator weightcast coordinator --ranks 4 --listen "127.0.0.1:$port" --state-dir "$work/state-worker" "$work/slurm-worker.toml"
  coordinator=$started
  within 20 test -s "$work/state-worker/token"
  export WEIGHTCAST_COORDINATOR=127.0.0.1:$port WEIGHTCAST_TOKEN_FILE=$work/state-worker/token
  start slurm-worker srun -N2 --ntasks-per-node=2 -m cyclic weightcast worker
  unset WEIGHTCAST_COORDINATOR WEIGHTCAST_TOKEN_FILE
  ended 60
  [ "$code" = 0 ] || kill -TERM "$coordinator" 2>/dev/null
  expect_end "srun weightcast worker: NF4 on 2 nodes of 2 ranks" 0 slurm-worker
}

slurm_cancel() {
  job_file slurm-cancel train
  submit slurm-cancel
  within 60 trains slurm-cancel || fail "slurm.sbatch trains" "no step" "$said"
  scancel "$job"
  # Slurm's code of a cancelled job is none; what the ranks and the coordinator ended with was said.
  batch_ended 45
  in_state CANCELLED && grep -q 'ended by SIGTERM with exit code 75' "$said" && code=75
  expect_end "slurm.sbatch: scancel leaves a checkpoint, and no new start" 75 slurm-cancel
}

slurm_requeue() {
  local steps
  job_file slurm-requeue train
  submit slurm-requeue
  within 60 trains slurm-requeue || fail "slurm.sbatch trains" "no step" "$said"
  scancel --signal=TERM "$job"
  if ! within 60 requeued; then
    fail "slurm.sbatch: SIGTERM to the steps starts the job again" "$(scontrol -o show job "$job" | cut -c1-200)" "$said"
    scancel "$job"
    return
  fi
  verified slurm-requeue || fail "slurm.sbatch: a checkpoint before the new start" "$(tail -n 3 "$work/slurm-requeue.verify")" "$said"
  steps=$(steps slurm-requeue)
  within 60 trains slurm-requeue $((steps + 3)) || fail "slurm.sbatch trains again" "no step" "$said"
  scancel "$job"
  batch_ended 45
  code=$(resumed slurm-requeue)
  expect_end "slurm.sbatch: SIGTERM to the steps starts the job again, which resumes" "no step twice" slurm-requeue
}

requeued() { [ "$(field Restarts)" = 1 ]; }

# resumed NAME: whether the steps of a run that was started again are each there once, from 1 on.
resumed() {
  python3 - "$work/$1/metrics/metrics.jsonl" <<'PYTHON'
import json, sys
steps = [line["step"] for line in map(json.loads, open(sys.argv[1])) if line["kind"] == "step"]
print("no step twice" if steps == list(range(1, len(steps) + 1)) else f"steps {steps}")
PYTHON
}

# --- ssh, and Open MPI over it -------------------------------------------------------------------------------------------------

# sshd on two addresses of loopback, which are two hosts to all who call them.
sshd_starts() {
  local place=$work/ssh port
  [ -e "$place/config" ] && return
  mkdir "$place"
  read -r port < <(ports 1)
  ssh-keygen -q -t ed25519 -N '' -f "$place/host" && ssh-keygen -q -t ed25519 -N '' -f "$place/key" || return 1
  cp "$place/key.pub" "$place/authorized"
  cat >"$place/sshd_config" <<CONF
Port $port
ListenAddress 127.20.91.1
ListenAddress 127.20.91.2
HostKey $place/host
AuthorizedKeysFile $place/authorized
PidFile $place/sshd.pid
PasswordAuthentication no
UsePAM no
StrictModes no
SetEnv PATH=$PATH WEIGHTCAST_TEST_MARK=$work/jobs/ssh XDG_RUNTIME_DIR=$XDG_RUNTIME_DIR PYTHONDONTWRITEBYTECODE=1
CONF
  cat >"$place/config" <<CONF
Host node-a
  HostName 127.20.91.1
Host node-b
  HostName 127.20.91.2
Host *
  Port $port
  IdentityFile $place/key
  IdentitiesOnly yes
  UserKnownHostsFile $place/known
  StrictHostKeyChecking accept-new
  BatchMode yes
  LogLevel ERROR
CONF
  # Only root's sshd can give a terminal; without one, ranks outlive an ssh that was killed.
  remote="ssh -F $place/config"
  [ "$(id -u)" != 0 ] || remote="ssh -tt -F $place/config"
  # Where root's sshd keeps its unprivileged half.
  [ "$(id -u)" != 0 ] || mkdir -p /run/sshd
  "$(command -v sshd)" -f "$place/sshd_config" -E "$place/sshd.log" || return 1
  within 10 ssh -F "$place/config" node-a true && within 10 ssh -F "$place/config" node-b true
}

# example NAME SCRIPT HOSTS: two ranks on each host of the file; marked as what sshd starts.
example() {
  local port
  read -r port < <(ports 1)
  said=$work/$1.out mark=$work/jobs
  WEIGHTCAST_TEST_MARK=$work/jobs/ssh WEIGHTCAST_PORT=$port STATE_DIRECTORY=$work/state-$1 REMOTE_SHELL="$remote" \
    bash "$examples/$2" "$work/$1.toml" "$3" 2 >"$said" 2>&1 </dev/null &
  started=$!
}

# whole_jobs NAME SCRIPT HOSTS: what is to be seen of every example.
whole_jobs() {
  local name=$1 script=$2 hosts=$3 began
  job_file "$name-load" load
  example "$name-load" "$script" "$hosts"
  ended 90
  expect_end "$script: NF4 on 2 hosts of 2 ranks, committed and verified" 0 "$name-load"

  job_file "$name-term" train
  example "$name-term" "$script" "$hosts"
  within 60 trains "$name-term" || fail "$script trains" "no step" "$said"
  kill -TERM $started
  ended 45
  expect_end "$script: SIGTERM leaves a checkpoint and 75" 75 "$name-term"

  job_file "$name-kill" train
  example "$name-kill" "$script" "$hosts"
  within 60 trains "$name-kill" || fail "$script trains" "no step" "$said"
  began=$SECONDS
  kill -KILL "$(rank_process 3)" 2>/dev/null
  ended 30
  expect_end "$script: a rank killed ends all after $((SECONDS - began)) s" 137 ""
}

mpi() {
  local why port run="$here/contract.py rank $work/contract"
  if why=$(lacks mpirun); then skip "Open MPI" "$why"; return; fi
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_oob_tcp_if_include=lo OMPI_MCA_orte_tmpdir_base=$work
  # shellcheck disable=SC2086
  {
    contract "mpirun -n 4 --host localhost:4" 4 rank mpirun -n 4 --host localhost:4 weightcast launch $run
    contract "mpirun --map-by ppr:2:node --oversubscribe" 2 rank mpirun -n 2 --map-by ppr:2:node --oversubscribe weightcast launch $run
  }
  start mpi-code mpirun -n 2 --host localhost:2 weightcast launch --no-python bash -c 'exit $((RANK == 1 ? 42 : 0))'
  ended 60
  expect_end "mpirun passes on a rank's exit code" 42 ""

  if why=$(lacks sshd ssh ssh-keygen); then skip "Open MPI on two hosts" "$why"; return; fi
  if ! sshd_starts; then fail "sshd starts" "no answer" "$work/ssh/sshd.log"; return; fi
  export OMPI_MCA_plm_rsh_agent="ssh -F $work/ssh/config"
  printf 'node-a slots=2\nnode-b slots=2\n' >"$work/hosts-mpi"
  read -r port < <(ports 1)
  # shellcheck disable=SC2086
  contract "mpirun over ssh, two hosts of two ranks" 2,2 rank mpirun --hostfile "$work/hosts-mpi" --map-by ppr:2:node -np 4 \
    weightcast launch --rdzv-endpoint "127.0.0.1:$port" $run
  start mpi-nowhere mpirun --hostfile "$work/hosts-mpi" --map-by ppr:2:node -np 4 weightcast launch $run
  ended 30
  grep -q -- '--rdzv-endpoint' "$said" || code="$code, without naming --rdzv-endpoint"
  expect_end "mpirun over ssh: where to meet cannot be known, which is said" 78 ""
  whole_jobs mpi mpirun.sh "$work/hosts-mpi"
}

ssh_hosts() {
  local why port run="$here/contract.py rank $work/contract"
  if why=$(lacks sshd ssh ssh-keygen); then skip ssh "$why"; return; fi
  if ! sshd_starts; then fail "sshd starts" "no answer" "$work/ssh/sshd.log"; return; fi
  printf '127.20.91.1\n\n127.20.91.2\n' >"$work/hosts-ssh"
  read -r port < <(ports 1)
  contract "ssh to two hosts" 2,2 node bash -c "for node in 1 2; do
      $remote 127.20.91.\$node weightcast launch --nnodes 2 --node-rank \$((node - 1)) --nproc-per-node 2 \
        --rdzv-endpoint 127.20.91.1:$port $run </dev/null & launchers+=(\$!)
    done; for launcher in \${launchers[@]}; do wait \$launcher || exit; done"
  whole_jobs ssh ssh-hosts.sh "$work/hosts-ssh"

  # Nobody listens there: the launchers cannot be started, and nobody will come.
  echo 127.20.91.3 >"$work/hosts-none"
  job_file ssh-none load
  example ssh-none ssh-hosts.sh "$work/hosts-none"
  ended 30
  expect_end "ssh-hosts.sh: hosts out of reach end the job with ssh's code" 255 ""
  [ "$(id -u)" = 0 ] || { skip "ssh that is killed" "sshd of another user than root gives no terminal"; return; }
  job_file ssh-lost train
  example ssh-lost ssh-hosts.sh "$work/hosts-ssh"
  within 60 trains ssh-lost || fail "ssh-hosts.sh trains" "no step" "$said"
  # By their parent: what they have started on the hosts has the same mark.
  kill -KILL "$(pgrep -P $started -f 127.20.91.2)" 2>/dev/null
  ended 30
  # 137 is the ssh's own, 129 that of ranks that hear of the lost terminal.
  case $code in 129 | 137) code="an end" ;; esac
  expect_end "ssh-hosts.sh: an ssh that is killed ends the job everywhere" "an end" ""
}

# --- clocks of hosts apart --------------------------------------------------------------------------------------------------------

# fake CLOCK: sets the words before a command in which the time of day is off by what the file says (`+1h`), also when that changes.
# Monotonic clocks and the times of files, which a host has from its kernel and its file server, are not.
fake() {
  faked=(env "LD_PRELOAD=$faketime" "FAKETIME_TIMESTAMP_FILE=$work/clock-$1" FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1
    NO_FAKE_STAT=1)
}

# set_clock NAME OFFSET
set_clock() { echo "$2" >"$work/clock-$1.new" && mv "$work/clock-$1.new" "$work/clock-$1"; }

coordinator_starts() {
  fake coordinator
  WEIGHTCAST_TEST_MARK=$work/jobs/$1 "${faked[@]}" weightcast coordinator --ranks 4 --listen "127.0.0.1:$port" \
    --state-dir "$work/state-$1" "$work/$1.toml" >>"$work/$1.coordinator" 2>&1 </dev/null &
  coordinator=$!
}

# skewed NAME COORDINATOR FIRST SECOND: a job of a coordinator and two launchers of two ranks, each with its clock. The coordinator is
# what `started` and `said` mean.
skewed() {
  local name=$1 node
  read -r port < <(ports 1)
  set_clock coordinator "$2"; set_clock 1 "$3"; set_clock 2 "$4"
  coordinator_starts "$name"
  within 20 test -s "$work/state-$name/token" || return
  for node in 1 2; do
    fake $node
    WEIGHTCAST_TEST_MARK=$work/jobs/$name "${faked[@]}" weightcast launch --nnodes 2 --node-rank $((node - 1)) --nproc-per-node 2 \
      --rdzv-endpoint "127.0.0.1:$((port + 3))" --coordinator "127.0.0.1:$port" --token-file "$work/state-$name/token" \
      >"$work/$name.launcher-$node" 2>&1 </dev/null &
  done
  started=$coordinator said=$work/$name.coordinator mark=$work/jobs/$name
}

# saved NAME: what `weightcast save` says, by a coordinator that has the job; `step`, the step that it names.
saved() {
  timeout 15 weightcast save --json --coordinator "127.0.0.1:$port" --token-file "$work/state-$1/token" >"$work/$1.save" 2>&1 || return
  step=$(grep -oE '"step": ?[0-9]+' "$work/$1.save" | grep -oE '[0-9]+$')
}

# losses NAME: step and loss, as written.
losses() {
  python3 - "$work/$1/metrics/metrics.jsonl" <<'PYTHON'
import json, sys
print([(line["step"], line["loss"]) for line in map(json.loads, open(sys.argv[1])) if line["kind"] == "step"])
PYTHON
}

# clock_jobs NAME COORDINATOR FIRST SECOND: loads, trains, is told to end, resumes with other clocks, and has the losses of the job
# whose clocks agree.
clock_jobs() {
  local name=$1
  job_file "$name" train 40
  skewed "$name" "$2" "$3" "$4"
  within 60 trains "$name" 5
  kill -TERM "$coordinator"
  ended 45
  expect_end "clocks $2 (coordinator), $3, $4: SIGTERM leaves a checkpoint and 75" 75 "$name"
  # Another job of the same directory, with the clocks of the ranks exchanged.
  rm -rf "$work/state-$name"
  skewed "$name" "$3" "$4" "$2"
  ended 90
  [ "$code" != 0 ] || [ "$(losses "$name")" = "$(losses clock-agree)" ] || code="0, with other losses than clocks that agree"
  expect_end "clocks $3 (coordinator), $4, $2: it resumes, with the losses of clocks that agree" 0 "$name"
}

clocks() {
  local candidate faked=() port coordinator step first
  faketime=
  for candidate in /usr/lib/*/faketime/libfaketimeMT.so.1 /usr/lib*/faketime/libfaketimeMT.so.1; do
    [ -e "$candidate" ] && faketime=$candidate
  done
  if [ -z "$faketime" ]; then skip "clocks apart" "libfaketime is not installed"; return; fi
  set_clock test -2d
  fake test
  if [ "$("${faked[@]}" date +%Y%m%d)" != "$(date -d '-2 days' +%Y%m%d)" ]; then
    skip "clocks apart" "libfaketime does not move the time of day here"
    return
  fi
  job_file clock-agree train 40
  skewed clock-agree +0 +0 +0
  ended 90
  expect_end "clocks that agree: 40 steps" 0 ""
  clock_jobs clock-hours +0 +1h -1h
  clock_jobs clock-days -2d +2d +0

  job_file clock-jumps train 40
  skewed clock-jumps +0 +0 +0
  within 60 trains clock-jumps 5
  set_clock coordinator -2d; set_clock 1 +1h
  within 60 trains clock-jumps 12
  set_clock coordinator +2d; set_clock 1 -1h; set_clock 2 -2d
  ended 90
  [ "$code" != 0 ] || [ "$(losses clock-jumps)" = "$(losses clock-agree)" ] || code="0, with other losses than clocks that agree"
  expect_end "clocks that jump by hours and days while ranks train" 0 clock-jumps

  # A coordinator that is started again on a host whose clock is behind.
  job_file clock-save train
  skewed clock-save +0 +0 +0
  within 60 trains clock-save 3
  saved clock-save || fail "weightcast save" "$(cat "$work/clock-save.save")"
  first=$step
  kill -KILL "$coordinator"
  wait "$coordinator" 2>/dev/null
  # What libfaketime removes at a process's own end.
  rm -f "/dev/shm/faketime_shm_$coordinator" "/dev/shm/sem.faketime_sem_$coordinator"
  set_clock coordinator -1h
  coordinator_starts clock-save
  started=$coordinator
  within 20 trains clock-save $((first + 20))
  if ! saved clock-save; then
    fail "save by a coordinator started again, an hour behind" "it did not come back within 15 s: $(tail -n 2 "$work/clock-save.save")" "$said"
  elif [ "$step" -le "$first" ]; then
    fail "save by a coordinator started again, an hour behind" "it names step $step, which was saved before: $first" "$said"
  else
    pass "save by a coordinator started again, an hour behind"
  fi
  # The clock of a running coordinator is set back.
  set_clock coordinator -2d
  first=$(steps clock-save)
  within 20 trains clock-save $((first + 20))
  if ! saved clock-save; then
    fail "save after the coordinator's clock was set back" "it did not come back within 15 s: $(tail -n 2 "$work/clock-save.save")" "$said"
  elif [ "$step" -le "$first" ]; then
    fail "save after the coordinator's clock was set back" "it names step $step, but the ranks were at $first before" "$said"
  else
    pass "save after the coordinator's clock was set back"
  fi
  kill -TERM "$coordinator"
  ended 45
  expect_end "the job ends with a checkpoint and 75" 75 clock-save
}

# --- what was asked for -----------------------------------------------------------------------------------------------------------

for part in "${@:-all}"; do
  case $part in
    all) slurm; mpi; ssh_hosts; clocks ;;
    slurm | mpi) "$part" ;;
    ssh) ssh_hosts ;;
    clock) clocks ;;
    *) echo "unknown part $part: slurm, mpi, ssh or clock" >&2; exit 2 ;;
  esac
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
