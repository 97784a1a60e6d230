#!/usr/bin/env python3
"""Weights in other tools' formats, both ways.

    formats.py --binary weightcast --model tests/data/tiny-llama --work DIR

written: `model convert` writes a model for bitsandbytes (4-bit, with and without double quantization, int8), HQQ, MLX, and plain
again. transformers with bitsandbytes loads ours and must give the logits of its own quantization of the same model; PEFT trains
a step on ours; hqq's HQQLinear and MLX dequantize ours to the values that `model forward` computes with.
read: what transformers with bitsandbytes has quantized and saved, what hqq and MLX have quantized, is read as it is: `model
forward` gives the logits of a float model that holds the weights which the tool itself dequantizes.
written gguf (gguf_files.py): gguf-py reads our GGUF files, with its own blocks' bytes; transformers loads them.
interrupted: a conversion killed at some moments and started again ends with the bytes of one that was not.
One line per case, then `N passed, N failed`.
"""

import argparse
import hashlib
import json
import logging
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import bitsandbytes.functional as functional
import mlx.core as mx
import numpy
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import gguf_files

try:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
except ImportError:
    HQQLinear = None

IDS = torch.arange(1, 65).reshape(2, 32) * 7 % 256
FAILED = []
PASSED = []


def case(name, found, limit, unit="largest difference of a logit, relative"):
    ok = found <= limit
    (PASSED if ok else FAILED).append(name)
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {found:.2e} (at most {limit:.0e}; {unit})", flush=True)


def run(binary, *arguments):
    done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise AssertionError(f"{arguments[:2]}: exit {done.returncode}: {done.stderr.strip()}")
    return done


def float_model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def ours(binary, model, work, *flags):
    """The logits that we compute of a model directory."""
    work.mkdir(parents=True, exist_ok=True)
    tokens, output = work / "tokens.safetensors", work / "logits.safetensors"
    save_file({"input_ids": IDS}, tokens)
    output.unlink(missing_ok=True)
    run(binary, "model", "forward", "--model", model, "--input", tokens, "--output", output, *flags)
    return load_file(output)["logits"]


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def convert(binary, model, output, *flags):
    shutil.rmtree(output, ignore_errors=True)
    run(binary, "model", "convert", model, "--output", output, *flags)
    return output


BNB = {
    "bnb-nf4": ([], dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "bnb-nf4 double": (["--double"], dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
    "bnb-int8": ([], dict(load_in_8bit=True)),
}


def their_quantization(model, options):
    if "load_in_4bit" in options:
        options = {**options, "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32).eval()


def written_for_bitsandbytes(binary, model, work):
    for name, (flags, options) in BNB.items():
        output = convert(binary, model, work / name.replace(" ", "-"), "--to", name.split()[0], "--dtype", "float32", *flags)
        loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
        case(f"written {name}: transformers loads it", relative(logits(loaded), logits(their_quantization(model, options))), 1e-3)
        if "load_in_4bit" not in options:
            continue
        trained = get_peft_model(prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False),
                                 LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
        optimizer = torch.optim.AdamW((p for p in trained.parameters() if p.requires_grad), lr=1e-2)
        losses = []
        for _ in range(2):
            loss = trained(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        case(f"written {name}: PEFT trains a step", losses[1] - losses[0], 0.0, f"loss {losses[0]:.4f} to {losses[1]:.4f}")


def with_weights(model, weights):
    """The float model at `model` with other weights."""
    loaded = float_model(model)
    state = loaded.state_dict()
    for name, weight in weights.items():
        assert state[name].shape == weight.shape, name
        state[name].copy_(weight)
    return loaded


def dequantized_bnb(directory):
    """What bitsandbytes' own functions make of a saved model."""
    tensors = load_file(directory / "model.safetensors")
    weights = {}
    for name in [name for name in tensors if ".quant_state.bitsandbytes__" in name]:
        base = name.split(".quant_state")[0]
        parts = {key: value for key, value in tensors.items() if key.startswith(base + ".")}
        state = functional.QuantState.from_dict({key[len(base) - 6:]: value for key, value in parts.items()}, device=torch.device("cpu"))
        weights[base] = functional.dequantize_4bit(tensors[base], state).float()
    for name in [name for name in tensors if name.endswith(".SCB")]:
        base = name[:-4] + ".weight"
        weights[base] = tensors[base].float() * tensors[name].float()[:, None] / 127
    return weights


def read_from_bitsandbytes(binary, model, work):
    for name, (_, options) in BNB.items():
        saved = work / ("saved-" + name.replace(" ", "-"))
        shutil.rmtree(saved, ignore_errors=True)
        their_quantization(model, options).save_pretrained(saved)
        if name == "bnb-nf4":
            # bitsandbytes 0.50 saves a model that has run on a processor with bf16 dot products with its statistics as bf16
            # and transposed; what it saves elsewhere is f32 in order.
            tensors = load_file(saved / "model.safetensors")
            if any(key.endswith(".absmax") and value.dtype == torch.bfloat16 for key, value in tensors.items()):
                fixed = {key: value.float().t().contiguous().flatten() if key.endswith(".absmax") else value for key, value in tensors.items()}
                save_file(fixed, saved / "model.safetensors", {"format": "pt"})
        expected = logits(with_weights(model, dequantized_bnb(saved)))
        case(f"read {name} of transformers", relative(ours(binary, saved, work / "forward"), expected), 1e-4)


def plain(model, work, binary):
    """The model in one file of f32."""
    output = work / "plain"
    if not output.exists():
        convert(binary, model, output, "--to", "hf", "--dtype", "float32", "--max-shard-bytes", str(1 << 30))
    return output


def mlx_both_ways(binary, model, work):
    source = plain(model, work, binary)
    for bits in (4, 3, 8):
        output = convert(binary, model, work / f"mlx-{bits}", "--to", "mlx", "--bits", bits, "--block", 32, "--dtype", "float32")
        tensors, weights = mx.load(str(output / "model.safetensors")), {}
        for name in [name for name in tensors if name.endswith(".scales")]:
            base = name[:-7]
            values = mx.dequantize(tensors[base + ".weight"], tensors[name], tensors[base + ".biases"], group_size=32, bits=bits)
            weights[base + ".weight"] = torch.tensor(numpy.array(values))
        case(f"written mlx {bits} bits: MLX dequantizes it", relative(ours(binary, output, work / "forward"), logits(with_weights(model, weights))), 1e-4)
        theirs = work / f"mlx-{bits}-theirs"
        shutil.rmtree(theirs, ignore_errors=True)
        shutil.copytree(source, theirs)
        state = mx.load(str(source / "model.safetensors"))
        made, values = {}, {}
        for name, value in state.items():
            if name.endswith("_proj.weight"):
                parts = mx.quantize(value, group_size=32, bits=bits)
                made.update(zip((name, name[:-6] + "scales", name[:-6] + "biases"), parts))
                values[name] = torch.tensor(numpy.array(mx.dequantize(*parts, group_size=32, bits=bits)))
            else:
                made[name] = value
        mx.save_safetensors(str(theirs / "model.safetensors"), made, {"format": "mlx"})
        config = json.loads((theirs / "config.json").read_text())
        config["quantization"] = config["quantization_config"] = {"group_size": 32, "bits": bits, "mode": "affine"}
        (theirs / "config.json").write_text(json.dumps(config))
        case(f"read mlx {bits} bits of MLX", relative(ours(binary, theirs, work / "forward"), logits(with_weights(model, values))), 1e-4)


def hqq_layer(tensors, module):
    layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
    layer.load_state_dict({key[len(module) + 1:]: value for key, value in tensors.items() if key.startswith(module + ".")})
    return layer


def hqq_both_ways(binary, model, work):
    if HQQLinear is None:
        print("skip hqq: the package is not installed")
        return
    source = plain(model, work, binary)
    for bits, axis in ((8, 1), (4, 1), (4, 0), (3, 1), (2, 1)):
        flags = ["--bits", bits, "--axis", axis, "--block", 64, "--dtype", "float32"]
        output = convert(binary, model, work / f"hqq-{bits}-{axis}", "--to", "hqq", *flags)
        tensors = load_file(output / "model.safetensors")
        modules = [name[:-4] for name in tensors if name.endswith(".W_q")]
        weights = {f"{module}.weight": hqq_layer(tensors, module).dequantize().float() for module in modules}
        case(f"written hqq {bits} bits, axis {axis}: hqq dequantizes it", relative(ours(binary, output, work / "forward"), logits(with_weights(model, weights))), 1e-4)
        theirs = work / f"hqq-{bits}-{axis}-theirs"
        shutil.rmtree(theirs, ignore_errors=True)
        shutil.copytree(source, theirs)
        made, values = {}, {}
        quant = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
        for name, value in load_file(source / "model.safetensors").items():
            if not name.endswith("_proj.weight"):
                made[name] = value
                continue
            linear = torch.nn.Linear(value.shape[1], value.shape[0], bias=False)
            linear.weight.data = value
            layer = HQQLinear(linear, quant, compute_dtype=torch.float32, device="cpu")
            state = {f"{name[:-7]}.{key}": part for key, part in layer.state_dict().items()}
            made.update({key: part.contiguous() for key, part in state.items() if isinstance(part, torch.Tensor)})
            values[name] = layer.dequantize().float()
            ours_part = tensors[name[:-6] + "W_q"]
            if not torch.equal(ours_part, layer.state_dict()["W_q"]):
                different = (ours_part != layer.state_dict()["W_q"]).float().mean().item()
                print(f"     {name}: {different:.1e} of the packed words differ from hqq's")
        save_file(made, theirs / "model.safetensors", {"format": "pt"})
        config = json.loads((theirs / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "hqq"}
        (theirs / "config.json").write_text(json.dumps(config))
        case(f"read hqq {bits} bits, axis {axis} of hqq", relative(ours(binary, theirs, work / "forward"), logits(with_weights(model, values))), 1e-4)


def plain_again(binary, model, work):
    quantized = convert(binary, model, work / "once", "--to", "bnb-nf4", "--dtype", "float32")
    again = convert(binary, quantized, work / "again", "--to", "hf", "--dtype", "float32")
    case("plain again: transformers loads what bnb-nf4 stands for", relative(logits(float_model(again)), ours(binary, quantized, work / "forward")), 1e-5)


def written_for_llama_cpp(binary, model, work):
    def ours_of(file):
        tokens, output = work / "gguf-tokens.safetensors", work / "gguf-logits.safetensors"
        save_file({"input_ids": gguf_files.IDS}, tokens)
        output.unlink(missing_ok=True)
        run(binary, "model", "forward", "--model", file, "--input", tokens, "--output", output)
        return load_file(output)["logits"]

    gguf_files.written(binary, model, work / "gguf", case, ours_of)


def digest(directory):
    found = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def interrupted(binary, model, work):
    flags = ["--to", "bnb-nf4", "--double", "--max-shard-bytes", str(20_000)]
    whole = work / "whole"
    start = time.monotonic()
    convert(binary, model, whole, *flags)
    took = time.monotonic() - start
    chance, kills, output = random.Random(3), 0, work / "killed"
    shutil.rmtree(output, ignore_errors=True)
    kept = 0
    while not output.exists():
        command = [binary, "model", "convert", model, "--output", output, "--json", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            printed, _ = process.communicate(timeout=took * chance.uniform(0.2, 0.4) if kills < 12 else 60)
            kept = json.loads(printed)["kept_files"]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
    same = digest(whole) == digest(output)
    case(f"interrupted {kills} times, {kept} files kept: the same bytes", 0.0 if same and kills and kept else 1.0, 0.0, "0 for equal")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    for part in (written_for_bitsandbytes, read_from_bitsandbytes, mlx_both_ways, hqq_both_ways, plain_again, written_for_llama_cpp, interrupted):
        part(arguments.binary, arguments.model, arguments.work)
    print(f"{len(PASSED)} passed, {len(FAILED)} failed")
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
