"""Vectors of mlx 0.32.4 on CPU (`pip install 'mlx[cpu]' numpy torch safetensors`): `python make_mlx.py`.

The dtypes are those of the weights; scales and biases have the same. bf16 arrays travel as f32, which holds them exactly."""

import sys

import mlx.core as mx
import numpy as np

sys.path.insert(0, ".")
