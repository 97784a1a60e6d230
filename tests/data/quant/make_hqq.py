"""Vectors of hqq 0.2.8.post1 on CPU: `python make_hqq.py`, with hqq's source on PYTHONPATH (its GPU parts are not needed)."""

import sys
import types

# hqq prints a coloured warning; nothing else of that package is used.
sys.modules.setdefault("termcolor", types.SimpleNamespace(colored=lambda text, *_: text))

import torch
from hqq.core.quantize import Quantizer
from rule import save, weights

torch.set_num_threads(1)
tensors = {}


def case(name, values, bits, group, axis, optimize=True, round_zero=None):
    round_zero = (bits == 4) if round_zero is None else round_zero
    packed, meta = Quantizer.quantize(
        values, nbits=bits, group_size=group, axis=axis, optimize=optimize, round_zero=round_zero, device="cpu"
    )
    meta["compute_dtype"] = torch.float32
    tensors[f"{name}.packed"] = packed
    tensors[f"{name}.scale"] = meta["scale"].flatten()
    tensors[f"{name}.zero"] = meta["zero"].flatten()
    if name.endswith("axis1") and group == 64:
        tensors[f"{name}.dequantized"] = Quantizer.dequantize(packed, meta)


w = weights(64 * 96).reshape(64, 96)
for axis in (1, 0):
    for bits in (8, 4, 3, 2, 1):
        case(f"b{bits}-g64-axis{axis}", w, bits, 64, axis)
    for group in (8, 12, 96, 128, 256, 1024, 6144):
        case(f"b4-g{group}-axis{axis}", w, 4, group, axis) if group < 6144 else case(
            f"b8-g{group}-axis{axis}", w, 8, group, axis
        )
    # Errors above 0.17 reach the shrinking operator's power.
    case(f"large-b2-g64-axis{axis}", weights(64 * 96, 64.0).reshape(64, 96), 2, 64, axis)
    case(f"large-b4-g64-axis{axis}", weights(64 * 96, 256.0).reshape(64, 96), 4, 64, axis, round_zero=False)
    case(f"plain-b4-g64-axis{axis}", w, 4, 64, axis, optimize=False)
# Ranges of at most 1e-4 keep scale 1; a range whose scale would exceed 2e4; a constant group; a group of zeros.
special = weights(8 * 64).reshape(8, 64)
special[0] *= 2.0**-10
special[1] *= 2.0**-8
special[2] = 0.25
special[3] = 0.0
special[4] += 1.0
for bits in (8, 4):
    case(f"special-b{bits}-g64-axis1", special, bits, 64, 1)
save(tensors, "hqq.safetensors")
