#!/usr/bin/env python3
"""Logits and LoRA gradients of `weightcast model forward`, beside those of transformers and PEFT.

    forward.py --binary weightcast --model tests/data/tiny-llama --work DIR [--smollm2 SmolLM2-135M-Instruct.Q4_1.gguf]

Models: tiny-llama (bf16), SmolLM2-135M (Q4_1, which transformers reads with the package gguf), and small random Mistral
(sliding window shorter than the sequence), Qwen2, Qwen3 and GPT-2 models that are made here in f32. Each is computed
unquantized without an adapter, unquantized with one, over NF4, and over NF4 with double quantization. The reference is a plain
transformers model in f32 with eager attention. Its linear weights are replaced by what bitsandbytes' quantize_4bit and
dequantize_4bit make of them; bitsandbytes' CPU library puts about 1 in 1,000 doubly quantized statistics one code away from
the nearest, so with double quantization the statistics are rounded here, over bitsandbytes' own map. The adapter is PEFT's, of
rank 8 on all linear layers, with seeded random A and B.

Bounds: logits within 1e-4 (largest difference / largest value), the gradient of every matrix within 1e-3 (norm of the
difference / norm), the loss within 1e-5. A case counts only if what it is about shows: adapter, quantization and sliding window
have to move the reference's logits by 100 times the bound. One line per case, then `N passed, N failed`.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

import torch
import transformers
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, quantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

LOGITS, GRADIENTS, LOSS = 1e-4, 1e-3, 1e-5
FORMS = {"f32": [], "nf4": ["--quantize", "nf4"], "nf4-double": ["--quantize", "nf4", "--double"]}
RANK = 8

SMALL = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1}
WINDOW = 12
MADE = {
    "mistral": lambda: transformers.MistralConfig(**SMALL, head_dim=16, sliding_window=WINDOW),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=32),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=3, n_head=4, n_positions=128,
                                            initializer_range=0.1, bos_token_id=0, eos_token_id=0),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make(name, directory):
    """A random model of a family, with norms and biases that are not 1 and 0."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(MADE[name](), dtype=torch.float32)
    generator = seeded(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)


def convert(path, directory):
    """Saves what transformers itself makes of a GGUF file, in f32."""
    options = {"gguf_file": path.name, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options)
    # Nothing of it is quantized any more, and transformers' loader does not say so.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if not all(tensor.dtype == torch.float32 for tensor in weights.values()):
        raise ValueError(f"{path}: transformers left weights that are not f32")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(weights)
    plain.save_pretrained(directory)


def load(path):
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


def doubly_quantized(absmax):
    """Statistics as double quantization leaves them: each rounded to the nearest of 256 values over a group of 256. The mean
    is rounded once: one ulp of it decides about a few codes of a large matrix, which moves logits by more than the bound."""
    offset = absmax.double().mean().float()
    groups = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % 256)).view(-1, 256)
    scale = groups.abs().amax(1, keepdim=True)
    table = create_dynamic_map()
    codes = torch.bucketize(groups * (1 / scale), (table[1:] + table[:-1]) / 2)
    return (table[codes] * scale).flatten()[: absmax.numel()] + offset


def quantize(model, double):
    """Replaces the weights of linear layers, the head's excepted, by what they are after NF4. The number of them."""
    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, Conv1D)) or module is model.get_output_embeddings():
            continue
        # As one row: blocks run on from row to row, but bitsandbytes' dequantize_4bit on CPUs starts every row of a matrix
        # with a new one, which is wrong where the length of rows is no multiple of 64.
        codes, state = quantize_4bit(module.weight.data.flatten(), blocksize=64, quant_type="nf4")
        if double:
            state.absmax = doubly_quantized(state.absmax.flatten())
        module.weight.data = dequantize_4bit(codes, state).view(module.weight.shape)
        count += 1
    return count


def with_adapter(model, directory):
    """Puts an adapter with random matrices on all linear layers and saves it."""
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM",
                        fan_in_fan_out=model.config.model_type == "gpt2")
    model = get_peft_model(model, config).eval()
    generator = seeded(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                std = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.05
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    if not directory.exists():
        model.save_pretrained(directory)
    return model


def reference(model, ids, adapter):
    """Logits, and with an adapter its directory's tensors' gradients and the loss."""
    if adapter is None:
        with torch.no_grad():
            return model(ids, use_cache=False).logits, None, {}
    model = with_adapter(model, adapter)
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    gradients = {name.replace(".default.", "."): parameter.grad
                 for name, parameter in model.named_parameters() if parameter.requires_grad}
    return output.logits.detach(), output.loss.item(), gradients


def ours(arguments, path, form, adapter, tokens, work):
    output = work / "results.safetensors"
    output.unlink(missing_ok=True)
    command = [str(arguments.binary), "model", "forward", "--json", "--model", str(path), *FORMS[form],
               "--input", str(tokens), "--output", str(output)]
    if adapter is not None:
        command += ["--adapter", str(adapter), "--gradients"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if ran.returncode != 0:
        raise RuntimeError(f"exit code {ran.returncode}: {ran.stderr.strip()}")
    json.loads(ran.stdout)
    return load_file(output)


def apart(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare(found, logits, loss, gradients):
    """(the figures, why they are not right or '')."""
    faults = []
    if found["logits"].shape != logits.shape or found["logits"].dtype != torch.float32:
        return "", f"logits of another shape or type: {found['logits'].dtype} {list(found['logits'].shape)}"
    figure = apart(found["logits"], logits)
    text = f"logits {figure:.1e}"
    # Written so that a NaN fails.
    if not figure <= LOGITS:
        faults.append("logits")
    if loss is None:
        return text, ", ".join(faults)
    figure = abs(found["loss"].item() - loss) / loss
    text += f", loss {loss:.4f} {figure:.1e}"
    if not figure <= LOSS:
        faults.append("loss")
    names = set(found) - {"logits", "loss"}
    if names != set(gradients):
        return text, f"other gradients: {sorted(names ^ set(gradients))[:3]}"
    figures = {name: ((found[name] - expected).norm() / expected.norm()).item() for name, expected in gradients.items()}
    worst = max(figures, key=lambda name: figures[name] if figures[name] == figures[name] else float("inf"))
    short = worst.removeprefix("base_model.model.").removesuffix(".weight")
    text += f", {len(figures)} gradients, median {sorted(figures.values())[len(figures) // 2]:.1e}, "
    text += f"largest {figures[worst]:.1e} ({short})"
    wrong = [name for name, figure in figures.items() if not figure <= GRADIENTS]
    if wrong:
        faults.append(f"{len(wrong)} gradients")
    return text, ", ".join(faults)


def model_cases(arguments, name, source, shape, work):
    """Yields (case, figures, fault) of the model at `source`."""
    work.mkdir(parents=True)
    path = source
    if source.suffix == ".gguf":
        path = work / "model"
        convert(source, path)
    vocab = load(path).config.vocab_size
    ids = torch.randint(0, vocab, shape, generator=seeded(4))
    tokens, adapter = work / "tokens.safetensors", work / "adapter"
    save_file({"input_ids": ids}, tokens)
    plain = adapted = None
    for form, lora in [("f32", None), ("f32", adapter), ("nf4", adapter), ("nf4-double", adapter)]:
        case = f"{name} {form}{' lora' if lora else ''}"
        try:
            model = load(path)
            quantized = quantize(model, form == "nf4-double") if form != "f32" else 0
            logits, loss, gradients = reference(model, ids, lora)
            moved, what = 1.0, ""
            if form != "f32":
                moved, what = apart(logits, adapted), f"; {quantized} weights in NF4 move the logits by"
            elif lora:
                moved, what, adapted = apart(logits, plain), "; the adapter moves the logits by", logits
            else:
                plain = logits
            figures, fault = compare(ours(arguments, source, form, lora, tokens, work), logits, loss, gradients)
            if what:
                figures += f"{what} {moved:.1e}"
            if not moved > 100 * LOGITS:
                fault = "the reference does not show what the case is about"
            yield case, figures, fault
        except (RuntimeError, subprocess.TimeoutExpired, ValueError) as error:
            yield case, "", str(error)
    if name == "mistral":
        wide = load(path)
        wide.config.sliding_window = None
        with torch.no_grad():
            moved = apart(wide(ids, use_cache=False).logits, plain)
        fault = "" if moved > 100 * LOGITS else "the window changes nothing"
        yield f"{name} window", f"without its window of {WINDOW} the reference's logits move by {moved:.1e}", fault


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True, type=pathlib.Path)
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--smollm2", type=pathlib.Path)
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--only", help="one model")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    work = arguments.work
    shutil.rmtree(work, ignore_errors=True)
    models = [("tiny-llama", arguments.model, (2, 64))]
    if arguments.smollm2:
        models.append(("smollm2-135m", arguments.smollm2, (2, 96)))
    for name in MADE:
        if arguments.only in (None, name):
            make(name, work / "models" / name)
        models.append((name, work / "models" / name, (3, 48)))
    passed = failed = 0
    for name, path, shape in models:
        if arguments.only not in (None, name):
            continue
        for case, figures, fault in model_cases(arguments, name, path, shape, work / name):
            print(f"{'FAILED' if fault else 'passed'}  {case}: {figures}{': ' + fault if fault else ''}", flush=True)
            passed, failed = passed + (not fault), failed + bool(fault)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
