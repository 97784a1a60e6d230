"""The input rule of the golden vectors (tests/data/golden), which the tests repeat in Rust, and a writer of safetensors."""

import os

import numpy as np
import torch
from safetensors.torch import save_file


def weights(count, factor=1.0, first=0):
    """Values first .. first + count of the rule, rounded to bf16, times a power of two; f32."""
    i = np.arange(first, first + count, dtype=np.uint32)
    u = i * np.uint32(2654435761) + np.uint32(12345)
    u ^= u >> np.uint32(15)
    u *= np.uint32(0x2C1B3C6D)
    u ^= u >> np.uint32(12)
    u *= np.uint32(0x297A2D39)
    u ^= u >> np.uint32(15)
    power = (2.0 ** -((i // 64) % 7).astype(np.float64)).astype(np.float32)
    x = ((u >> np.uint32(8)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)) * np.float32(0.1) * power
    return torch.from_numpy(x).to(torch.bfloat16).float() * factor


def codes(count, bits, first=0):
    """`count` codes of `bits` bits, from the same mixing function."""
    i = np.arange(first, first + count, dtype=np.uint32)
    u = i * np.uint32(2654435761) + np.uint32(12345)
    u ^= u >> np.uint32(15)
    u *= np.uint32(0x2C1B3C6D)
    u ^= u >> np.uint32(12)
    return torch.from_numpy((u >> np.uint32(32 - bits)).astype(np.int32))


def save(tensors, path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    os.chmod(path, 0o644)
