#!/usr/bin/env python3
"""Adapters between us, PEFT and transformers.

    adapters.py --binary weightcast --model tests/data/tiny-llama --work DIR

merge: PEFT makes an adapter (LoRA, rsLoRA, DoRA, both; on Llama and on GPT-2) with seeded random A, B and magnitude and saves
it; we merge it; transformers loads our model, whose weights and logits must be those of PEFT's own `merge_and_unload`, and its
logits those of PEFT with the adapter beside the base.
export: a training checkpoint, written here after docs/FORMAT.md, is exported; PEFT loads the files, whose tensors must be the
checkpoint's bit for bit and whose logits those of PEFT with the same tensors set by hand.
One line per case, then `N passed, N failed`.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import shards

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
}
IDS = torch.arange(1, 33).reshape(2, 16) * 7 % 256


def base_model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def randomize(model, seed):
    """A, B and magnitude as after some training: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        elif "lora_magnitude_vector" in name:
            parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=generator)


def make_adapter(base, targets, options, output):
    model = get_peft_model(base_model(base), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, **options))
    randomize(model, 3)
    model.save_pretrained(output)
    return model.eval()


def run(binary, *arguments):
    done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise AssertionError(f"{arguments[:2]}: exit {done.returncode}: {done.stderr.strip()}")
    return done


def largest(one, other):
    return (one - other).abs().max().item()


def merge_case(binary, base, targets, options, work):
    adapter, output = work / "adapter", work / "merged"
    reference = make_adapter(base, targets, options, adapter)
    dynamic = logits(reference)
    # The base is found from adapter_config.json.
    run(binary, "adapter", "merge", "--adapter", adapter, "--output", output, "--dtype", "float32", "--shard-size", "1MB")
    ours = base_model(output)
    merged = reference.merge_and_unload()
    expected, found = merged.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    weights = max(largest(expected[name], found[name]) for name in expected)
    theirs, mine = logits(merged), logits(ours)
    change = largest(dynamic, logits(base_model(base)))
    assert change > 0.05, f"the adapter changes the logits by {change} only"
    assert weights < 1e-6, f"weights differ by {weights}"
    assert largest(theirs, mine) < 1e-4, f"logits differ by {largest(theirs, mine)}"
    assert largest(dynamic, mine) < 1e-3, f"logits differ from the adapter beside the base by {largest(dynamic, mine)}"
    return f"weights within {weights:.1e}, logits within {largest(theirs, mine):.1e} of merge_and_unload, " \
           f"{largest(dynamic, mine):.1e} of the adapter beside the base (which changes them by {change:.2f})"


def crc32c_table():
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


CRC32C = crc32c_table()


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def write_checkpoint(root, step, tensors, training):
    """A checkpoint of one rank, after docs/FORMAT.md."""
    directory = root / f"step-{step:09}"
    directory.mkdir(parents=True)
    header, data, saved = {}, b"", []
    for name, tensor in tensors.items():
        values = tensor.contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % BLOCK)
    start = len(text) + 8
    file = len(text).to_bytes(8, "little") + text + data
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        digest = shards.digest(data[first:last])
        chunk = {"file": 0, "range": [start + first, start + last], "at": 0, "digest": digest}
        saved.append({"fqn": name, "shape": entry["shape"], "encoding": {"kind": "plain", "dtype": "F32"}, "sharded": False,
                      "nested_offset": None, "digest": digest,
                      "parts": [{"part": "weight", "name": name, "dtype": "F32", "shape": entry["shape"], "chunks": [chunk]}]})
    table = b"".join(crc32c(file[at:at + BLOCK]).to_bytes(4, "little") for at in range(0, len(file), BLOCK))
    name = "shard-00001-model-00001-of-00001.safetensors"
    (directory / name).write_bytes(file)
    (directory / f"{name}.crc32c").write_bytes(table)
    manifest = {
        "weightcast_manifest": 1, "step": step, "attempt": 1, "generation": 1, "world": 1, "placement": "shard",
        "model": "tiny-llama", "config_json": None, "trainer": {"step": step, "training": training},
        "files": [{"name": name, "rank": 0, "bytes": len(file),
                   "digest_table": {"bytes": len(table), "crc32c": crc32c(table)}}],
        "tensors": saved, "aliases": [],
    }
    body = json.dumps(manifest, indent=1)[:-2].encode() + b","
    digest = hashlib.sha256(body).hexdigest()
    (directory / "manifest.json").write_bytes(body + f'\n "digest": "sha256:{digest}"\n}}\n'.encode())


BLOCK = 4096


def export_case(binary, base, targets, options, work):
    adapter, root, output = work / "adapter", work / "checkpoints", work / "exported"
    reference = make_adapter(base, targets, options, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    moments = {f"optimizer.exp_avg.{name}": torch.ones_like(tensor) for name, tensor in tensors.items()}
    training = {
        "recipe": {}, "adapter": config, "base_model": str(base), "base_digest": "", "data_digest": "", "samples": 8,
        "tokens": 128, "best": {"step": 3, "loss": 0}, "evaluations_since_best": 1, "last_evaluation": 5,
    }
    write_checkpoint(root, 3, tensors | moments, training)
    write_checkpoint(root, 5, {name: tensor + 1 for name, tensor in tensors.items()} | moments, training)
    run(binary, "adapter", "export", "--checkpoint", root, "--step", "best", "--output", output)
    exported = load_file(output / "adapter_model.safetensors")
    assert exported.keys() == tensors.keys(), exported.keys() ^ tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors), "tensors differ"
    text, theirs = ((path / "adapter_config.json").read_text() for path in (output, adapter))
    assert text == theirs, "adapter_config.json differs from PEFT's"
    loaded = PeftModel.from_pretrained(base_model(base), output).eval()
    difference = largest(logits(loaded), logits(reference))
    assert difference == 0, f"logits differ by {difference}"
    return f"{len(tensors)} tensors equal, adapter_config.json equal byte for byte, logits equal"


def main():
    parser = argparse.ArgumentParser()
    for flag in ("--binary", "--model", "--work"):
        parser.add_argument(flag, required=True, type=pathlib.Path)
    flags = parser.parse_args()
    shutil.rmtree(flags.work, ignore_errors=True)
    flags.work.mkdir(parents=True)
    llama, gpt2 = flags.model.resolve(), flags.work / "gpt2"
    torch.manual_seed(1)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=256, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(gpt2)
    passed = failed = 0
    for family, base, targets in (("llama", llama, "all-linear"), ("gpt2", gpt2, ["c_attn", "c_proj", "c_fc"])):
        for variant, options in VARIANTS.items():
            for case in (merge_case, export_case):
                name = f"{case.__name__.removesuffix('_case')} {variant} on {family}"
                work = flags.work / name.replace(" ", "-")
                work.mkdir()
                try:
                    print(f"{name}: {case(flags.binary.resolve(), base, targets, options, work)}", flush=True)
                    passed += 1
                except (AssertionError, OSError, KeyError, ValueError) as error:
                    print(f"{name}: FAILED: {error}", flush=True)
                    failed += 1
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
