#!/usr/bin/env python3
"""What we trained, in transformers and PEFT; and adapters that PEFT made, in our forward.

    trained.py --binary weightcast --model tests/data/tiny-llama --data tests/data/devils-dictionary.jsonl --work DIR

trained: a job of 12 steps (LoRA, rsLoRA, DoRA) on 2 ranks, exported; PEFT loads it beside transformers' base.
full: a job of 12 steps that trains all weights, on 2 ranks; transformers loads the model that `model export` wrote.
loaded: PEFT makes an adapter with seeded random A and B, and a magnitude that is not the first one, and saves it; we load it.
In all the logits of transformers (+ PEFT) and of `weightcast model forward` must agree within 1e-4 of the largest, and what
was trained must move them by at least 100 times that. One line per case, then `N passed, N failed`.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

BOUND = 1e-4
VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def run(*command):
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def base_model(arguments, path=None):
    return AutoModelForCausalLM.from_pretrained(path or arguments.model, dtype=torch.float32).eval()


def train(arguments, variant, directory):
    job = {
        "model": f'source = "{arguments.model.resolve()}"',
        "checkpoint": f'directory = "{directory / "run"}"',
        "train": f'type = "{"full" if variant == "full" else "qlora"}"\nsteps = 12\nbatch-size = 8\nmicro-batch-size = 2',
        "train.data": f'train = "{arguments.data.resolve()}"\nsequence-length = 32',
        "train.lora": f"r = 4\nrslora = {str(variant == 'rslora').lower()}\ndora = {str(variant == 'dora').lower()}",
        "train.optimizer": f"learning-rate = {0.001 if variant == 'full' else 0.02}",
    }
    path = directory / "job.toml"
    path.write_text("\n".join(f"[{section}]\n{text}" for section, text in job.items()))
    run(arguments.binary, "launch", "--nproc-per-node", 2, path)
    kind, output = ("model", "exported") if variant == "full" else ("adapter", "adapter")
    run(arguments.binary, kind, "export", "--checkpoint", directory / "run", "--output", directory / output)


def make(arguments, variant, directory):
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **VARIANTS[variant])
    model = get_peft_model(base_model(arguments), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    model.save_pretrained(directory / "adapter")


def compare(arguments, directory):
    """(relative difference, relative movement by what was trained)."""
    exported = directory / "exported"
    ids = torch.randint(2, 2000, (2, 40), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, directory / "ids.safetensors")
    model = ["--model", exported] if exported.exists() else ["--model", arguments.model, "--adapter", directory / "adapter"]
    run(arguments.binary, "model", "forward", *model, "--input", directory / "ids.safetensors", "--output",
        directory / "logits.safetensors")
    ours = load_file(directory / "logits.safetensors")["logits"]
    base = base_model(arguments)
    with torch.no_grad():
        without = base(ids).logits
        theirs = base_model(arguments, exported) if exported.exists() else PeftModel.from_pretrained(base, directory / "adapter")
        theirs = theirs.eval()(ids).logits
    scale = theirs.abs().max()
    return ((ours - theirs).abs().max() / scale).item(), ((theirs - without).abs().max() / scale).item()


def main():
    parser = argparse.ArgumentParser()
    for name in ("binary", "model", "data", "work"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    arguments.binary = arguments.binary.resolve()
    passed = failed = 0
    for kind, prepare, variants in (("trained", train, [*VARIANTS, "full"]), ("loaded", make, VARIANTS)):
        for variant in variants:
            directory = (arguments.work / f"{kind}-{variant}").resolve()
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            try:
                prepare(arguments, variant, directory)
                difference, moved = compare(arguments, directory)
            except subprocess.CalledProcessError as error:
                print(f"FAILED  {kind} {variant}: {error.cmd}: {error.stderr[-400:]}")
                failed += 1
                continue
            right = variant == "full"
            if not right:
                flags = json.loads((directory / "adapter/adapter_config.json").read_text())
                right = flags["use_rslora"] == (variant == "rslora") and flags["use_dora"] == (variant == "dora")
            good = difference <= BOUND and moved >= 100 * BOUND and right
            passed, failed = passed + good, failed + (not good)
            print(f"{'passed' if good else 'FAILED'}  {kind} {variant}: logits {difference:.1e}; training moves them by {moved:.1e}")
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
