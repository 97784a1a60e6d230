"""Vectors of AWQ's GEMM layout: `python make_awq.py AUTOAWQ`, the root of autoawq 0.2.9's source.

`packing_utils.py` is run as it is; `from_linear` of the GEMM linear is taken out of its file, because that imports GPU
kernels."""

import ast
import runpy
import sys
import types

import torch
from rule import codes, save, weights

root = sys.argv[1]
utils = runpy.run_path(f"{root}/awq/utils/packing_utils.py")
path = f"{root}/awq/modules/linear/gemm.py"
found = [n for n in ast.walk(ast.parse(open(path).read())) if isinstance(n, ast.FunctionDef) and n.name == "from_linear"]
found[0].decorator_list = []
scope = {"torch": torch, "get_best_device": lambda: "cpu"}
exec(compile(ast.Module(found[:1], []), path, "exec"), scope)


class Linear:
    """The fields that `from_linear` sets."""

    def __init__(self, w_bit, group_size, *_):
        self.w_bit, self.group_size = w_bit, group_size


tensors = {}


def case(name, inputs, outputs, group):
    groups = inputs // group
    q = codes(inputs * outputs, 4).reshape(inputs, outputs)
    zeros = codes(groups * outputs, 4, first=777).reshape(groups, outputs)
    scales = (weights(groups * outputs).reshape(groups, outputs).abs() + 2.0**-10).half()
    g_idx = torch.arange(inputs) // group
    w = (scales.float()[g_idx] * (q - zeros[g_idx])).t().contiguous()
    linear = types.SimpleNamespace(
        in_features=inputs, out_features=outputs, bias=None, weight=torch.nn.Parameter(w, requires_grad=False)
    )
    Linear.in_features, Linear.out_features = inputs, outputs
    packed = scope["from_linear"](Linear, linear, 4, group, scales=scales.float(), zeros=zeros)
    dequantized = utils["dequantize_gemm"](packed.qweight, packed.qzeros, scales, 4, group)
    assert torch.equal(dequantized, (scales[g_idx] * (q - zeros[g_idx])))
    tensors.update(
        {
            f"{name}.codes": q.to(torch.uint8),
            f"{name}.zeros": zeros.to(torch.uint8),
            f"{name}.qweight": packed.qweight,
            f"{name}.qzeros": packed.qzeros,
            f"{name}.scales": scales,
            f"{name}.dequantized": dequantized,
        }
    )


case("g32", 96, 64, 32)
case("g128", 128, 32, 128)
save(tensors, "awq.safetensors")
