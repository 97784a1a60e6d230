#!/usr/bin/env python3
"""Tokens/s of a QLoRA step of SmolLM2-135M on CPU, beside transformers + PEFT + bitsandbytes on the same machine.

    train_speed.py --binary weightcast --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf --tokenizer tests/data/tiny-llama --work DIR
                   [--steps 6] [--rounds 3] [--batch 4] [--sequence 512] [--micro-batch 4] [--least 1.0]

Both train LoRA matrices of rank 8 on all linear layers over an NF4 base with double quantization, with AdamW and clipping, on
one process with the threads that it takes by itself. Ours is a job of one rank; its figures are those of metrics.jsonl. Theirs
is a bare loop without Trainer's overheads: load_in_4bit on CPU, prepare_model_for_kbit_training, forward, backward, clip, step.
Activation checkpointing is on in both, as both have it by default, and off in both. Theirs computes in f32, as ours does, and
in bf16 too. All of them see the same sequences in the same order, so the mean losses nearly agree; a job's sequences have one
target more each, the token that the next one starts with, and matrices A start from other random numbers. Runs are short and in
turn, each in a process of its own; of each the first two steps do not count. A line says the median over all counted steps.
Exit status 1 if ours with checkpointing is below `--least` times theirs with it in f32.

SmolLM2's GGUF file has no tokenizer that the job could read: the text is tokenized by another model's, whose numbers are below
SmolLM2's vocabulary. transformers does not quantize a GGUF file: it reads it once, and bitsandbytes quantizes what it saved.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import time

WARM_UP = 2
RANK, ALPHA, RATE = 8, 16, 2e-4
# (label, ours or theirs, compute type, checkpointing)
RUNS = [
    ("weightcast f32, checkpointing", "ours", "float32", True),
    ("peft f32, checkpointing", "theirs", "float32", True),
    ("weightcast f32, none", "ours", "float32", False),
    ("peft f32, none", "theirs", "float32", False),
    ("peft bf16, checkpointing", "theirs", "bfloat16", True),
    ("peft bf16, none", "theirs", "bfloat16", False),
]


def write_text(path, words):
    """One document of random English-like words, the same in every run."""
    chosen = random.Random(5)
    known = ["".join(chosen.choices("etaoinshrdlu", k=chosen.randint(2, 7))) for _ in range(300)]
    path.write_text(" ".join(chosen.choice(known) for _ in range(words)))


def sequences(text, tokenizer, length):
    from tokenizers import Tokenizer
    ids = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(text.read_text()).ids
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def ours(arguments, checkpointing, directory):
    """(tokens/s, losses) of the steps of a job."""
    job = directory.with_suffix(".toml")
    quoted = {name: json.dumps(str(getattr(arguments, name).resolve())) for name in ("smollm2", "tokenizer")}
    job.write_text(f"""
model.source = {quoted["smollm2"]}
load.device = "cpu"
quantization = {{ format = "nf4", double = true }}
checkpoint.directory = {json.dumps(str(directory))}
[train]
type = "qlora"
steps = {arguments.steps}
batch-size = {arguments.batch}
micro-batch-size = {arguments.micro_batch}
activation-checkpointing = {str(checkpointing).lower()}
tokenizer = {quoted["tokenizer"]}
[train.data]
train = {json.dumps(str(arguments.work / "text.txt"))}
sequence-length = {arguments.sequence}
shuffle = false
[train.lora]
r = {RANK}
alpha = {ALPHA}
[train.optimizer]
learning-rate = {RATE}
schedule = "constant"
[train.checkpoint]
every-minutes = 0
""")
    ran = subprocess.run([str(arguments.binary), "launch", "--nproc-per-node", "1", str(job)], capture_output=True, text=True,
                         timeout=arguments.timeout)
    if ran.returncode != 0:
        raise SystemExit(f"weightcast: exit code {ran.returncode}: {ran.stderr.strip()}")
    lines = (directory / "metrics" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    if [record["step"] for record in records] != list(range(1, arguments.steps + 1)):
        raise SystemExit(f"{directory}: expected {arguments.steps} steps in metrics.jsonl, found {len(records)}")
    return [record["tokens_per_second"] for record in records], [record["loss"] for record in records]


def theirs(arguments, dtype, checkpointing):
    """The same of PEFT, in a process of its own."""
    command = [sys.executable, __file__, "--theirs", dtype, *(["--checkpointing"] if checkpointing else [])]
    for name in ("binary", "smollm2", "tokenizer", "work", "steps", "batch", "sequence"):
        command += [f"--{name}", str(getattr(arguments, name))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout)
    if ran.returncode != 0:
        raise SystemExit(f"peft: exit code {ran.returncode}: {ran.stderr.strip()[-2000:]}")
    found = json.loads(ran.stdout.splitlines()[-1])
    return found["tokens_per_second"], found["losses"]


def train_theirs(arguments):
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, arguments.theirs)
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                   bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.work / "smollm2", dtype=dtype,
                                                              quantization_config=quantization, device_map={"": "cpu"})
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=arguments.checkpointing)
    model.config.use_cache = False
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    rows = sequences(arguments.work / "text.txt", arguments.tokenizer, arguments.sequence)
    tokens_per_second, losses = [], []
    for step in range(arguments.steps):
        batch = torch.tensor([rows[(step * arguments.batch + row) % len(rows)] for row in range(arguments.batch)])
        started = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens_per_second.append(batch.numel() / (time.perf_counter() - started))
    print(json.dumps({"tokens_per_second": tokens_per_second, "losses": losses}))


def convert(arguments):
    """SmolLM2 as transformers reads it from GGUF, saved in f32."""
    import forward
    forward.convert(arguments.smollm2, arguments.work / "smollm2")


def measure(arguments):
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    convert(arguments)
    # The tokenizer makes 2 tokens or more of a word; the text is as long as all steps need.
    write_text(arguments.work / "text.txt", arguments.steps * arguments.batch * arguments.sequence)
    counted = {label: [] for label, *_ in RUNS}
    losses = {}
    for number in range(arguments.rounds):
        for label, who, dtype, checkpointing in RUNS:
            if who == "ours":
                found = ours(arguments, checkpointing, arguments.work / f"ours-{number}-{'on' if checkpointing else 'off'}")
            else:
                found = theirs(arguments, dtype, checkpointing)
            counted[label] += found[0][WARM_UP:]
            losses[label] = statistics.mean(found[1])
            print(f"  round {number + 1}  {label}: {statistics.median(found[0][WARM_UP:]):.1f} tokens/s", flush=True)
    medians = {label: statistics.median(values) for label, values in counted.items()}
    print(f"{os.cpu_count()} processors, {arguments.batch} x {arguments.sequence} tokens a step, {arguments.rounds} rounds of "
          f"{arguments.steps} steps, the first {WARM_UP} of each not counted")
    for label, median in medians.items():
        values = counted[label]
        print(f"{label:<32} {median:8.1f} tokens/s ({min(values):.1f} to {max(values):.1f}), mean loss {losses[label]:.4f}")
    ratios = []
    for dtype in ("f32", "bf16"):
        for checkpointing in ("checkpointing", "none"):
            ratio = medians[f"weightcast f32, {checkpointing}"] / medians[f"peft {dtype}, {checkpointing}"]
            ratios.append(ratio)
            print(f"ratio to peft {dtype}, activation {'checkpointing' if checkpointing != 'none' else 'kept'}: {ratio:.2f}")
    return 0 if ratios[0] >= arguments.least else 1


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True, type=pathlib.Path)
    parser.add_argument("--smollm2", required=True, type=pathlib.Path)
    parser.add_argument("--tokenizer", required=True, type=pathlib.Path)
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--least", type=float, default=1.0)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one run")
    parser.add_argument("--theirs", choices=["float32", "bfloat16"], help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    if arguments.theirs:
        return train_theirs(arguments)
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps: expected more than {WARM_UP}")
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
