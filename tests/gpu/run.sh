#!/usr/bin/env bash
# Everything that needs a GPU, in one call, without network: one line for each check with its figures, exit code 1 if any
# failed. Takes a release binary and, for NCCL, the library; makes what else it needs, and removes it.
#
#   WEIGHTCAST=path/to/weightcast [NCCL_LIBRARY=path/to/libnccl.so.2] [OUT=directory] [PARAMS=1B] bash tests/gpu/run.sh
#
# Without NCCL_LIBRARY it looks for libnccl.so.2 beside the binary, in tests/gpu/lib, and where the dynamic linker does.
# With OUT it writes checks.jsonl and each command's output there. 1B parameters are a model of 2 GB.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
binary=${WEIGHTCAST:-$here/../../target/release/weightcast}
params=${PARAMS:-1B}
work=$(mktemp -d "${TMPDIR:-/tmp}/weightcast-gpu.XXXXXX")
logs=${OUT:-$work/logs}
mkdir -p "$logs"
trap 'rm -rf "$work"' EXIT
export XDG_RUNTIME_DIR="$work/run"
mkdir -p "$XDG_RUNTIME_DIR"
failed=0
started=$SECONDS

# A result: its name, 0 or not, its figures in words.
result() {
    local word=ok
    if [ "$2" -ne 0 ]; then word=FAIL; failed=1; fi
    printf '%-4s %-34s %s\n' "$word" "$1" "$3"
    if [ -n "${OUT:-}" ]; then
        local text
        text=$(printf '%s' "$3" | tr '\n\t' '  ' | sed 's/\\/\\\\/g; s/"/\\"/g')
        printf '{"check": "%s", "ok": %s, "figures": "%s"}\n' "$1" "$([ "$word" = ok ] && echo true || echo false)" "$text" \
            >> "$OUT/checks.jsonl"
    fi
}

# Runs a command with a deadline in seconds, its output in files by this name; what overruns is killed.
run() {
    local name=$1 deadline=$2
    shift 2
    timeout -k 5 "$deadline" "$@" > "$logs/$name.out" 2> "$logs/$name.err"
}

# Why a command failed: its code and the end of what it said.
why() {
    echo "exit code $2: $(tail -n 3 "$logs/$1.err" | tr '\n' ' ')"
}

# The digests of a job's JSON as one; nothing when it has none.
digests() {
    local found
    found=$(sed -n '/"digests": {/,/}/p' "$logs/$1.out" | tr -d ' \n')
    if [ "${#found}" -gt 20 ]; then echo "$found" | sha256sum | cut -c1-16; fi
}

# The values of one key of a job's JSON.
values() { sed -n "s/^ *\"$2\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}$/\1/p" "$logs/$1.out" | sort -u | tr '\n' ' '; }

# A job whose digests must be those of the job `expected`; says on which devices and by what it was loaded.
same_digests() {
    local name=$1 expected=$2 deadline=$3 code found wanted
    shift 3
    run "$name" "$deadline" "$binary" launch --digests --json "$@"
    code=$?
    if [ $code -ne 0 ]; then result "$name" 1 "$(why "$name" $code)"; return; fi
    found=$(digests "$name")
    wanted=$(digests "$expected")
    [ -n "$found" ] && [ "$found" = "$wanted" ]
    result "$name" $? "digests $found, expected $wanted; on $(values "$name" device)by $(values "$name" backend)in $(values "$name" wall_s)s"
}

if [ ! -x "$binary" ]; then
    result binary 1 "no program at $binary: build it with cargo build --release, or name it in WEIGHTCAST"
    exit 1
fi

# (a) The GPU is there, and named.
run status 30 "$binary" status
gpu=$(sed -n 's/^devices *//p' "$logs/status.err" | head -n 1)
case "$gpu" in
    cuda:*) result "status names the GPU" 0 "$gpu" ;;
    *)
        result "status names the GPU" 1 "${gpu:-$(why status $?)}"
        echo "no GPU: nothing else can be checked on this machine"
        exit 1
        ;;
esac
model="$work/model"
run model-new 120 "$binary" model new --params "$params" "$model"
result "model new" $? "$params parameters, $(du -sm "$model" 2> /dev/null | cut -f1) MiB"
run plan 30 "$binary" plan --ranks 1 --model "$model" --quantize nf4 --double --device cuda
code=$?
grep -q 'on CUDA devices' "$logs/plan.err" && [ $code -eq 0 ]
result "plan counts device memory" $? "$(tail -n 1 "$logs/plan.out")"

# (b) Kernels: bytes, then rates.
run kernels 150 "$binary" bench quantize --device cuda
code=$?
if [ $code -eq 0 ]; then
    result "kernels equal the processor's" 0 "$(head -n 1 "$logs/kernels.out")"
    tail -n +2 "$logs/kernels.out" | sed 's/^/     /'
else
    result "kernels equal the processor's" 1 "$(why kernels $code)"
fi

# (c) Loads: equal digests, then rates beside the page-locked copy.
nf4=(--nproc-per-node 1 --model "$model" --quantize nf4 --double)
plain=(--nproc-per-node 1 --model "$model")
run host-nf4 120 "$binary" launch --digests --json "${nf4[@]}" --device cpu
result "load nf4-double to the host" $? "digests $(digests host-nf4)"
run host-bf16 120 "$binary" launch --digests --json "${plain[@]}" --device cpu
result "load bf16 to the host" $? "digests $(digests host-bf16)"
same_digests cuda-nf4 host-nf4 120 "${nf4[@]}" --device cuda
same_digests cuda-bf16 host-bf16 120 "${plain[@]}" --device cuda
run bench-load 200 "$binary" bench load --directory "$model" --ranks 1 --reader-threads 8 --device cuda
code=$?
if [ $code -eq 0 ]; then
    result "load beside the page-locked copy" 0 "$(head -n 1 "$logs/bench-load.out")"
    tail -n +2 "$logs/bench-load.out" | sed 's/^/     /'
else
    result "load beside the page-locked copy" 1 "$(why bench-load $code)"
fi

# (d) A checkpoint from the card, and back to card and host.
checkpoints="$work/checkpoints"
same_digests card-saves host-nf4 120 "${nf4[@]}" --device cuda --checkpoint-dir "$checkpoints" --save
run verify 120 "$binary" checkpoint verify --deep "$checkpoints"
result "checkpoint verifies" $? "$(tail -n 1 "$logs/verify.out")"
same_digests resume-to-card host-nf4 120 --nproc-per-node 1 --device cuda --checkpoint-dir "$checkpoints" --resume must
same_digests resume-to-host host-nf4 120 --nproc-per-node 2 --device cpu --checkpoint-dir "$checkpoints" --resume must
same_digests two-ranks-share-by-tcp host-nf4 120 --nproc-per-node 2 --model "$model" --quantize nf4 --double \
    --device cuda --share-devices --backend tcp

# (e) NCCL: one rank, then two processes on one card, in two ways. NCCL may refuse that; it may not hang.
for place in "${NCCL_LIBRARY:-}" "$(dirname "$binary")/libnccl.so.2" "$here/lib/libnccl.so.2"; do
    if [ -n "$place" ] && [ -e "$place" ]; then export NCCL_LIBRARY="$place"; break; fi
done
export NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 NCCL_DEBUG=WARN
run nccl-one 90 "$binary" bench nccl
code=$?
if [ $code -eq 0 ]; then
    result "NCCL with one rank" 0 "$(tail -n 1 "$logs/nccl-one.out")"
else
    result "NCCL with one rank" 1 "$(why nccl-one $code)"
fi
two=(--nproc-per-node 2 --model "$model" --quantize nf4 --double --device cuda --share-devices --backend nccl)
# Sockets between two processes take milliseconds a call: large pieces, so that there are few.
printf '[load]\nchunk-bytes = 33554432\n' > "$work/large.toml"
same_digests nccl-two-host-ids host-nf4 150 "${two[@]}" "$work/large.toml"
NCCL_MULTI_RANK_GPU_ENABLE=1 same_digests nccl-two-multi-rank host-nf4 150 "${two[@]}" "$work/large.toml"

# (f) Training on the card, by a binary built with the feature cuda: the losses of the processor, killed and resumed too.
data=$here/../data
train() {
    printf '%s\n' "model.source = \"$data/tiny-llama\"" "load.device = \"$2\"" "checkpoint.directory = \"$work/$1\"" \
        '[train]' "steps = $3" 'batch-size = 4' 'seed = 7' '[train.data]' "train = \"$data/devils-dictionary.jsonl\"" \
        'sequence-length = 128' '[train.optimizer]' 'schedule = "constant"' '[train.checkpoint]' 'every-minutes = 0' 'every-steps = 5' > "$work/$1.toml"
    run "$1" 200 "$binary" launch --nproc-per-node 1 "$work/$1.toml"
}
losses() { sed -n 's/.*"kind":"step".*"loss":\([0-9.]*\).*/\1/p' "$work/$1/metrics/metrics.jsonl" 2> /dev/null; }
rate() { sed -n 's/.*"tokens_per_second":\([0-9.]*\).*/\1/p' "$work/$1/metrics/metrics.jsonl" | sort -n | tail -n 1; }
train train-host cpu 10
result "training on the host" $? "$(losses train-host | wc -l) steps, $(rate train-host) tokens/s at best"
train train-card cuda 10
code=$?
if [ $code -eq 0 ]; then
    worst=$(paste <(losses train-host) <(losses train-card) | awk '{ d = ($1 - $2) / $1; if (d < 0) d = -d; if (d > worst) worst = d; n++ }
        END { printf "%.1e of %d", worst, n }')
    awk -v worst="${worst%% *}" -v n="${worst##* }" 'BEGIN { exit !(worst < 1e-3 && n == 10) }'
    result "training on the card" $? "largest difference of a loss $worst, $(rate train-card) tokens/s at best"
else
    result "training on the card" 1 "$(why train-card $code)"
fi
# The first half, then the whole by the same directory: the step that is resumed after is exact.
train train-resumed cuda 5 && train train-resumed cuda 10
code=$?
if [ $code -eq 0 ]; then
    [ "$(losses train-resumed | tail -n 5)" = "$(losses train-card | tail -n 5)" ]
    result "resumed on the card" $? "last loss $(losses train-resumed | tail -n 1), expected $(losses train-card | tail -n 1)"
else
    result "resumed on the card" 1 "$(why train-resumed $code)"
fi

echo "$((SECONDS - started)) s in all"
exit $failed
