#!/usr/bin/env python3
"""Checkpoints of MLX's affine format beside `mlx.core.quantize` of the same weights, byte for byte.

    mlx_affine.py --binary weightcast --model tests/data/tiny-llama --work DIR

For every number of bits and every group size that fits the model's rows, quantized while loading on 1 and 3 ranks: the packed
words, scales and biases, put together from the shards, must be those of mlx on the CPU, and what is not quantized must be as
it was. One line per case, then `N passed, N failed`.
"""

import argparse
import json
import pathlib
import shutil
import sys

import mlx.core as mx
import numpy as np

import shards

# (bits, group size, ranks)
CASES = [(bits, group, ranks) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64) for ranks in ((1, 3) if group == 64 else (3,))]
JOB = """
model.source = {model}
checkpoint = {{ directory = {root}, save = true }}
quantization = {{ format = "mlx", bits = {bits}, block = {group} }}
"""


def raw(array):
    """The bytes of an mlx array; numpy has no bf16, so those pass as u16."""
    viewed = array.view(mx.uint16) if array.dtype in (mx.bfloat16, mx.float16) else array
    return np.array(viewed).tobytes()


def compare(ours, weights, bits, group):
    """(number of quantized tensors, what is wrong or '')."""
    quantized = [name for name in ours if name.removesuffix("weight") + "scales" in ours]
    for name, weight in weights.items():
        if name not in quantized:
            if ours[name].data != raw(weight):
                return len(quantized), f"{name}: not as it was"
            continue
        module = name.removesuffix(".weight")
        expected = mx.quantize(weight, group_size=group, bits=bits)
        for part, array in zip(("weight", "scales", "biases"), expected):
            found = ours[f"{module}.{part}"]
            if found.shape != tuple(array.shape) or found.data != raw(array):
                return len(quantized), f"{module}.{part}: other bytes than mlx's"
    return len(quantized), ""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--work", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    mx.set_default_device(mx.cpu)
    weights = {}
    for path in sorted(arguments.model.glob("*.safetensors")):
        weights.update(mx.load(str(path)))
    passed = failed = 0
    for bits, group, ranks in CASES:
        root = arguments.work / f"{bits}-{group}-{ranks}"
        job = root.with_suffix(".toml")
        quoted = {"model": json.dumps(str(arguments.model.resolve())), "root": json.dumps(str(root.resolve()))}
        job.write_text(JOB.format(bits=bits, group=group, **quoted))
        shards.launch(arguments.binary, ["--nproc-per-node", ranks, job])
        count, wrong = compare(shards.assemble(shards.newest_step(root)), weights, bits, group)
        if count == 0:
            wrong = "nothing is quantized"
        passed, failed = passed + (not wrong), failed + bool(wrong)
        print(f"{'FAIL' if wrong else 'ok  '} {bits} bits, groups of {group}, {ranks} ranks: {wrong or f'{count} matrices equal'}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
