"""Blocks of GGUF by gguf's own Python code: what it packs, and what it makes of blocks; see README.md."""

import numpy
from gguf import GGMLQuantizationType as Type
from gguf import quants
import torch

import rule

ROWS, COLUMNS = 4, 512
PACKED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
# The type, bytes of a block of 256, and where its f16 factors are.
BLOCKS = [("Q2_K", 84, [80, 82]), ("Q3_K", 110, [108]), ("Q4_K", 144, [0, 2]), ("Q5_K", 176, [0, 2]), ("Q6_K", 210, [208])]


def main():
    weights = rule.weights(ROWS * COLUMNS).numpy().reshape(ROWS, COLUMNS)
    tensors = {}
    for name in PACKED:
        packed = quants.quantize(weights, Type[name])
        tensors[f"{name}.packed"] = packed
        tensors[f"{name}.dequantized"] = quants.dequantize(packed, Type[name])
    # gguf packs no K-quants: blocks of mixed bytes with small factors, which every type accepts.
    for name, size, factors in BLOCKS:
        count = ROWS * COLUMNS // 256
        blocks = numpy.array([(i * 2654435761 >> 11) & 0xFF for i in range(count * size)], dtype=numpy.uint8).reshape(count, size)
        for place in factors:
            values = numpy.linspace(0.001, 0.02, count, dtype=numpy.float16)
            blocks[:, place : place + 2] = values.view(numpy.uint8).reshape(count, 2)
        packed = blocks.reshape(ROWS, -1)
        tensors[f"{name}.blocks"] = packed
        tensors[f"{name}.dequantized"] = quants.dequantize(packed, Type[name])
    tensors["weights"] = weights
    rule.save({name: torch.from_numpy(numpy.array(values)) for name, values in tensors.items()}, "gguf.safetensors")


main()
