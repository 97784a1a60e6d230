#!/usr/bin/env bash
# Type-checks the feature `cuda` without a CUDA toolkit: candle's build finds a stand-in nvcc. Errors of types are found as
# with the real one; nothing is linked.
set -euo pipefail
cd "$(dirname "$0")/../.."
stand_in="$PWD/tests/cuda-check"
export PATH="$stand_in:$PATH" NVCC="$stand_in/nvcc" CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=13000
cargo check --lib --features cuda
