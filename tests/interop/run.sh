#!/usr/bin/env bash
# Reads our checkpoints with other people's tools: torch.distributed.checkpoint, safetensors, bitsandbytes.
#
#   tests/interop/run.sh            WEIGHTCAST=<binary> to test another one than target/{release,debug}/weightcast
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
exit $failed
