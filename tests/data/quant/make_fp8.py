"""Vectors of FP8 E4M3 made with torch 2.15 on CPU: `python make_fp8.py`."""

import torch
from rule import codes, save, weights

values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
scale = weights(1, first=5)
matrix = codes(150 * 200, 8).to(torch.uint8)
# NaN has no place in a weight; the 256 values cover it.
matrix[(matrix & 0x7F) == 0x7F] = 0
matrix = matrix.reshape(150, 200)
scale_inv = weights(4, first=100).reshape(2, 2)
spread = scale_inv.repeat_interleave(128, 0)[:150].repeat_interleave(128, 1)[:, :200]
save(
    {
        "values": values,
        "scale": scale,
        "scaled": values * scale,
        "matrix": matrix,
        "matrix_scale_inv": scale_inv,
        "matrix_dequantized": matrix.view(torch.float8_e4m3fn).float() * spread,
    },
    "fp8.safetensors",
)
