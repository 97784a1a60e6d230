"""Vectors of GPTQ: packed by auto-gptq 0.7.1, v2 and dequantized by gptqmodel 7.7, all on CPU.

`python make_gptq.py AUTO_GPTQ GPTQMODEL`: the roots of both packages' sources. Neither imports without a GPU or without
many other packages, so the functions are taken out of their files: `pack` of auto-gptq's QuantLinear, and gptqmodel's
`dequantize_weight`."""

import ast
import math
import sys
import types

import numpy as np
import torch
from rule import codes, save, weights

AUTO_GPTQ, GPTQMODEL = sys.argv[1:3]


def take(path, names, scope):
    """Runs the named functions of a file, methods too, in `scope`."""
    found = [n for n in ast.walk(ast.parse(open(path).read())) if isinstance(n, ast.FunctionDef) and n.name in names]
    for function in found:
        function.decorator_list = []
        for argument in function.args.args + function.args.kwonlyargs:
            argument.annotation = None
        function.returns = None
    exec(compile(ast.Module(found, []), path, "exec"), scope)
    return scope


fake_transformers = types.SimpleNamespace(pytorch_utils=types.SimpleNamespace(Conv1D=type("Conv1D", (), {})))
auto = take(
    f"{AUTO_GPTQ}/auto_gptq/nn_modules/qlinear/qlinear_cuda.py",
    {"pack"},
    {"torch": torch, "np": np, "math": math, "nn": torch.nn, "transformers": fake_transformers},
)
model = take(
    f"{GPTQMODEL}/gptqmodel/nn_modules/qlinear/__init__.py",
    {"dequantize_weight", "_dequantize_from_codes"},
    {
        "t": torch,
        "torch": torch,
        "_torch_right_shift": torch.bitwise_right_shift,
        "_torch_left_shift": torch.bitwise_left_shift,
    },
)


class Dequantizer:
    """The fields that gptqmodel's methods read, with the shifts that its modules make for themselves."""

    planar = False
    dequantize_weight = model["dequantize_weight"]
    _dequantize_from_codes = model["_dequantize_from_codes"]

    def _init_wf_unsqueeze_buffers(self):
        pass

    def __init__(self, bits, qweight, qzeros, scales, g_idx):
        self.bits, self.maxq, self.pack_factor = bits, 2**bits - 1, 32 // bits
        self.qweight, self.qzeros, self.scales, self.g_idx = qweight, qzeros, scales, g_idx
        self.in_features = len(g_idx)
        self.dequant_dtype = torch.int16 if bits == 8 else torch.int8
        if bits == 3:
            wf = torch.tensor(
                [
                    [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0],
                    [0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31],
                    [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0],
                ],
                dtype=torch.int32,
            ).reshape(1, 3, 12)
            self.wf_unsqueeze_zero, self.wf_unsqueeze_neg_one = wf.unsqueeze(0), wf.unsqueeze(-1)
        else:
            wf = torch.tensor(list(range(0, 32, bits)), dtype=torch.int32).unsqueeze(0)
            self.wf_unsqueeze_zero, self.wf_unsqueeze_neg_one = wf.unsqueeze(0), wf.unsqueeze(-1)


def stream(values, bits):
    """Independent of both: codes of each row as a little-endian stream of bits, as i32 words."""
    planes = (values.numpy()[..., None].astype(np.uint8) >> np.arange(bits)) & 1
    packed = np.packbits(planes.reshape(values.shape[0], -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32))


tensors = {}


def case(name, bits, inputs, outputs, group, act_order=False, lowest_zero=1):
    groups = math.ceil(inputs / group)
    q = codes(inputs * outputs, bits).reshape(inputs, outputs)
    zeros = codes(groups * outputs, bits, first=777).reshape(groups, outputs).clamp(min=lowest_zero)
    scales = (weights(groups * outputs).reshape(groups, outputs).abs() + 2.0**-10).half()
    g_idx = torch.arange(inputs, dtype=torch.int32) // group
    if act_order:
        g_idx = g_idx[torch.argsort(codes(inputs, 16), stable=True)]
    # What auto-gptq packs is computed from weights; these give the codes back.
    w = (scales.float()[g_idx.long()] * (q - zeros[g_idx.long()])).t().contiguous()
    self = types.SimpleNamespace(bits=bits, infeatures=inputs, g_idx=None)
    linear = types.SimpleNamespace(weight=torch.nn.Parameter(w, requires_grad=False), bias=None)
    auto["pack"](self, linear, scales.float().t(), zeros.float().t(), g_idx)
    v2 = stream(zeros, bits)
    v1 = self.qzeros
    assert torch.equal(self.qweight, stream(q.t(), bits).t()), "auto-gptq packs a stream of bits"
    assert torch.equal(v1, stream((zeros - 1) % 2**bits, bits)) or lowest_zero == 0
    dequantized = Dequantizer(bits, self.qweight, v2, scales, g_idx).dequantize_weight()
    tensors.update(
        {
            f"{name}.codes": q.to(torch.uint8),
            f"{name}.zeros": zeros.to(torch.uint8),
            f"{name}.qweight": self.qweight,
            f"{name}.qzeros_v1": v1,
            f"{name}.qzeros_v2": v2,
            f"{name}.scales": scales,
            f"{name}.g_idx": g_idx,
            f"{name}.dequantized": dequantized,
        }
    )


for bits in (2, 3, 4, 8):
    case(f"b{bits}-g32", bits, 96, 64, 32)
    case(f"b{bits}-g32-act", bits, 64, 32, 32, act_order=True)
case("b4-g128", 4, 128, 32, 128)
case("b4-g64-ragged", 4, 96, 32, 64)
save(tensors, "gptq.safetensors")
