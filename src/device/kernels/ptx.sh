#!/usr/bin/env bash
# Compiles the kernels to PTX for compute capability 8.0 and later. Needs nvcc 13.0 (NVCC, or in PATH): PTX of a newer
# compiler is not taken by drivers of the 580 branch. The first line of the result names the source's SHA-256, which a
# test compares, so that source and PTX cannot drift apart.
set -euo pipefail
cd "$(dirname "$0")"
flags=(-ptx -arch=compute_80 -O3 -std=c++17 --fmad=false --ftz=false --prec-div=true --prec-sqrt=true)
"${NVCC:-nvcc}" "${flags[@]}" -o quantize.ptx.new quantize.cu
{
    echo "// source sha256: $(sha256sum quantize.cu | cut -d' ' -f1)"
    echo "// nvcc $("${NVCC:-nvcc}" --version | sed -n 's/.*release.*V//p') ${flags[*]}"
    cat quantize.ptx.new
} > quantize.ptx
rm quantize.ptx.new
