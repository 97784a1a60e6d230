#!/usr/bin/env python3
"""Our NF4 checkpoints, dequantized by bitsandbytes itself on the CPU.

    bnb.py --binary weightcast --model tests/data/tiny-llama --golden tests/data/golden --work DIR

Two references: bitsandbytes' own `quantize_4bit` of the same model, run here, and the files of `golden/tiny-llama-bnb-nf4` and
`-double`, which transformers saved. Compared are the stored codes, and what bitsandbytes makes of both files. Without double
quantization everything must be equal. With it, bitsandbytes' CPU library puts about 1 in 1,000 statistics one code away from
the midpoint rule, so a statistic may be one code away and a value may differ by what that is worth. The golden files were
saved after the model had run, which leaves bitsandbytes' statistics rounded to bf16 and transposed, and with double
quantization quantized a second time: there a wider bound holds. One line per case, then `N passed, N failed`.
"""

import argparse
import pathlib
import shutil
import sys

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from safetensors.torch import load_file

import shards

STATE = ".quant_state.bitsandbytes__nf4"
CASES = {"nf4": ([], "tiny-llama-bnb-nf4"), "nf4-double": (["--double"], "tiny-llama-bnb-nf4-double")}


def state_of(tensors, name):
    """bitsandbytes' own reading of a weight's state."""
    parts = {k: v for k, v in tensors.items() if k.startswith(name + ".")}
    return QuantState.from_dict(parts, device=torch.device("cpu"))


def dequantized(tensors, name):
    """The weight in f32, whatever type the file's state asks for, so that nothing is rounded away."""
    state = state_of(tensors, name)
    state.dtype = torch.float32
    return dequantize_4bit(tensors[name], quant_state=state), state


def bitsandbytes_tensors(source, names, nested):
    """What bitsandbytes makes of the model's weights here, under the names of a file."""
    made = {}
    for name in names:
        made[name], state = quantize_4bit(source[name], blocksize=64, quant_type="nf4", compress_statistics=nested)
        made.update({f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()})
    return made


def golden_tensors(path):
    """A golden file, with plain statistics as they were before bitsandbytes transposed them: f32, in the order of blocks."""
    tensors = load_file(path)
    for name in [n for n in tensors if n.endswith(".absmax") and tensors[n].dim() == 2]:
        tensors[name] = tensors[name].T.float().flatten()
    return tensors


def allowed(ours, state, name, twice):
    """How far each statistic may be from the reference's; 0 without double quantization."""
    if not state.nested:
        return torch.zeros(())
    codes, table = ours[name + ".absmax"].long(), ours[name + ".nested_quant_map"]
    # Index -1 of the roll is a jump across the table: the ends have one neighbour only.
    below, above = (table - table.roll(1)).clamp_min(0)[codes], (table.roll(-1) - table).clamp_min(0)[codes]
    group = ours[name + ".nested_absmax"].repeat_interleave(256)[: codes.numel()]
    # A few ulp: the table and the mean differ in the last bits between builds.
    apart = torch.maximum(below, above) * group + 1e-6 * (group + state.offset.abs())
    # Half the widest step of the map, 0.0073, and half an ulp of bf16, once more.
    return apart + (0.0073 * group + (group + state.offset.abs()) / 256 if twice else 0)


def compare(ours, reference, form, against):
    """(what was found, why it is not right or '')."""
    names = quantized(reference)
    if names != quantized(ours) or not names:
        return form, f"other tensors are quantized: {sorted(set(names) ^ set(quantized(ours)))[:3]}"
    wrong, most, values, differing, codes, off = [], 0.0, 0, 0, 0, 0
    for name in names:
        (a, state), (b, theirs) = dequantized(ours, name), dequantized(reference, name)
        if not torch.equal(ours[name], reference[name]):
            wrong.append(f"{name}: {int((ours[name] != reference[name]).sum())} packed bytes differ")
        if (state.shape, state.blocksize, state.nested) != (theirs.shape, theirs.blocksize, theirs.nested):
            wrong.append(f"{name}: another shape, block or nesting")
            continue
        limit = allowed(ours, state, name, against == "golden")
        far, limits = (a - b).abs(), limit.expand(a.numel() // 64).repeat_interleave(64).view(a.shape)
        if bool((far > limits).any()):
            wrong.append(f"{name}: a dequantized value is {far.max().item()} away")
        different = int((ours[name + ".absmax"] != reference[name + ".absmax"]).sum())
        codes, off = codes + ours[name + ".absmax"].numel(), off + different
        most, values, differing = max(most, far.max().item()), values + far.numel(), differing + int((far != 0).sum())
    return (f"{form:10} against {against:12}: {len(names)} weights, {values} values: {differing} differ, at most by {most:.3g}; "
            f"{off} of {codes} stored statistics differ"), "; ".join(wrong[:3])


def quantized(tensors):
    return sorted(n.removesuffix(STATE) for n in tensors if n.endswith(STATE))


def against_the_model(ours, source, form):
    """Every dequantized value is within half the widest gap of the codebook of the model's."""
    wrong, most = [], 0.0
    for name in quantized(ours):
        got, state = dequantized(ours, name)
        want = source[name].float()
        scale = want.flatten().unfold(0, state.blocksize, state.blocksize).abs().amax(1).repeat_interleave(state.blocksize)
        error = ((got - want).abs().flatten() / scale.clamp_min(1e-30)).max().item()
        most = max(most, error)
        # (-0.6962 - -1.0) / 2 = 0.1519; the statistic itself is off by less than 0.02 with double quantization.
        if error > 0.152 + (0.02 if state.nested else 0.0):
            wrong.append(f"{name}: {error}")
    return f"{form:10} largest error against the model, in units of the block's maximum: {most:.4f}", "; ".join(wrong[:3])


def main():
    parser = argparse.ArgumentParser()
    for option in ("--binary", "--model", "--golden", "--work"):
        parser.add_argument(option, required=True)
    args = parser.parse_args()
    passed = failed = 0
    source = {}
    for path in sorted(pathlib.Path(args.model).glob("*.safetensors")):
        source.update(load_file(path))
    shutil.rmtree(args.work, ignore_errors=True)
    for form, (options, directory) in CASES.items():
        root = pathlib.Path(args.work, form)
        shards.launch(args.binary, ["--model", args.model, "--quantize", "nf4", *options, "--checkpoint-dir", root, "--save"])
        (shard,) = shards.newest_step(root).glob("*.safetensors")
        ours = load_file(shard)
        theirs = bitsandbytes_tensors(source, quantized(ours), bool(options))
        golden = golden_tensors(pathlib.Path(args.golden, directory, "model.safetensors"))
        changed = {n: tensor.clone() for n, tensor in ours.items()}
        changed[quantized(ours)[0]][0, 0] ^= 1
        _, seen = compare(changed, theirs, form, "bitsandbytes")
        control = (f"{form:10} control, one code changed: seen as \"{seen}\"", "" if seen else "not seen")
        for what, why_not in (compare(ours, theirs, form, "bitsandbytes"), compare(ours, golden, form, "golden"),
                              against_the_model(ours, source, form), control):
            passed, failed = passed + (not why_not), failed + bool(why_not)
            print(f"{'FAILED' if why_not else 'ok':7}{what}{': ' + why_not if why_not else ''}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
