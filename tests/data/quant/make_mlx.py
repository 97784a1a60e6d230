"""Vectors of mlx 0.32.4 on CPU (`pip install 'mlx[cpu]' torch safetensors`): `python make_mlx.py`."""

import mlx.core as mx
import numpy as np
import torch
from rule import save, weights

DTYPES = {"f32": (mx.float32, torch.float32), "bf16": (mx.bfloat16, torch.bfloat16), "f16": (mx.float16, torch.float16)}
tensors = {}


def back(array, dtype):
    """As a torch tensor of the same type; f32 holds bf16 and f16 exactly."""
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(dtype)


def case(name, values, bits, group, dtype):
    kind, torch_kind = DTYPES[dtype]
    packed, scales, biases = mx.quantize(mx.array(values.numpy()).astype(kind), group_size=group, bits=bits)
    tensors[f"{name}.packed"] = torch.from_numpy(np.array(packed).view(np.int32))
    tensors[f"{name}.scales"] = back(scales, torch_kind)
    tensors[f"{name}.biases"] = back(biases, torch_kind)
    if group == 64:
        dequantized = mx.dequantize(packed, scales, biases, group_size=group, bits=bits)
        tensors[f"{name}.dequantized"] = back(dequantized, torch_kind)


w = weights(6 * 256).reshape(6, 256)
for bits in (2, 3, 4, 5, 6, 8):
    for group in (32, 64, 128):
        case(f"b{bits}-g{group}-f32", w, bits, group, "f32")
for dtype in ("bf16", "f16"):
    for bits in (3, 4, 8):
        case(f"b{bits}-g64-{dtype}", w, bits, 64, dtype)
# A tiny range, a constant group, a negative one, zeros, and values all above or below zero.
special = weights(8 * 64).reshape(8, 64)
special[0] *= 2.0**-20
special[1] = 0.25
special[2] = -0.25
special[3] = 0.0
special[4] += 1.0
special[5] -= 1.0
for bits in (4, 8):
    case(f"special-b{bits}-g64-f32", special, bits, 64, "f32")
save(tensors, "mlx.safetensors")
