#!/usr/bin/env python3
"""Our checkpoints, read by torch.distributed.checkpoint on other numbers of ranks, bit for bit.

    dcp.py --binary weightcast --model tests/data/tiny-llama --work DIR

Writes checkpoints with the binary on 1, 3 and 4 ranks, plain and quantized; puts the expected tensors together without torch
and without our code (shards.py); starts 1, 2 and 3 torch processes that load each checkpoint whole and as DTensors, into
memory that was filled with a pattern. One line per case, then `N passed, N failed`. Exit status 1 if any failed.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

import shards

FORMATS = {"plain": [], "nf4": ["--quantize", "nf4"], "nf4-double": ["--quantize", "nf4", "--double"],
           "int8": ["--quantize", "int8"]}
WRITERS, READERS = (1, 3, 4), (1, 2, 3)
# Fills a destination before a load, so that a byte that nobody wrote is seen.
PATTERN = 0xA5
# Seconds: for all readers of one world size together, and for one collective.
READERS_LIMIT, COLLECTIVE_LIMIT = 420, 60


class Tally:
    """Prints one line per case and counts."""

    def __init__(self):
        self.passed = self.failed = 0

    def line(self, what, why_not):
        self.passed, self.failed = self.passed + (not why_not), self.failed + bool(why_not)
        print(f"{'FAILED' if why_not else 'ok':7}{what}{': ' + why_not if why_not else ''}", flush=True)


def write_checkpoint(args, form, ranks, source):
    """A checkpoint of the binary; (name, what it should hold, why it is wrong or '')."""
    name = f"{form}-{ranks}"
    root = args.work / name
    told = shards.launch(args.binary, ["--nproc-per-node", ranks, "--model", args.model, *FORMATS[form],
                                       "--checkpoint-dir", root, "--save", "--digests"])["digests"]
    whole = shards.assemble(shards.newest_step(root))
    wrong = []
    if form == "plain":
        same = {n for n in source if n in whole and vars(source[n]) == vars(whole[n])}
        wrong += [f"{n} is not the model's" for n in sorted(set(source) ^ set(whole) | (set(source) - same))]
        whole = source  # The readers' comparison is with the model's own file.
    else:
        plain = {n for n in source if n in whole and whole[n].dtype == source[n].dtype}
        wrong += [f"{n} is not the model's" for n in sorted(plain) if vars(source[n]) != vars(whole[n])]
        wrong += [] if len(plain) < len(source) else ["nothing is quantized"]
        wrong += [f"{n} is missing" for n in sorted(set(source) - set(whole))]
    ours = shards.logical_digests(whole)
    wrong += [f"digest of {n}: {told.get(n)}, by hand {ours.get(n)}" for n in sorted(told.keys() | ours.keys())
              if told.get(n) != ours.get(n)]
    store_expected(args.work / f"{name}.expected", whole)
    return name, whole, "; ".join(wrong[:3])


def store_expected(stem, tensors):
    """`stem`.json and `stem`.bin, for the readers."""
    table, at = {}, 0
    with open(f"{stem}.bin", "wb") as out:
        for name, tensor in tensors.items():
            table[name] = [tensor.dtype, tensor.shape, at, len(tensor.data)]
            at += out.write(tensor.data)
    pathlib.Path(f"{stem}.json").write_text(json.dumps(table))


def damaged_copy(args, name):
    """A copy of a checkpoint with one bit of its last shard changed: the readers must see the difference."""
    step = args.work / "control" / "step-000000000"
    shutil.copytree(shards.newest_step(args.work / name), step)
    path = max(step.glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    for end in ("json", "bin"):
        shutil.copy(args.work / f"{name}.expected.{end}", args.work / f"control.expected.{end}")


def run_readers(args, world, names):
    """Starts `world` readers for all checkpoints; per (name, how) the reason that it is not equal, or ''."""
    meeting = args.work / f"meeting-{world}"
    base = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    command = [sys.executable, __file__, "--work", str(args.work), "--meeting", str(meeting), "--read", *names]
    logs = [open(args.work / f"reader-{world}-{rank}.log", "w+") for rank in range(world)]
    ranks = [subprocess.Popen(command, env={**base, "RANK": str(rank)}, stdout=logs[rank], stderr=subprocess.STDOUT)
             for rank in range(world)]
    verdicts = {}
    try:
        for process in ranks:
            process.wait(timeout=READERS_LIMIT)
    except subprocess.TimeoutExpired:
        print(f"readers of world {world} did not end in {READERS_LIMIT} s")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for rank, log in enumerate(logs):
        log.seek(0)
        text = log.read()
        log.close()
        said = [json.loads(line[8:]) for line in text.splitlines() if line.startswith("VERDICT ")]
        if ranks[rank].returncode != 0:
            print(f"rank {rank} of {world} ended with {ranks[rank].returncode}:\n{text[-3000:]}")
        for name, how, why in said:
            verdicts.setdefault((name, how), []).append(why)
    return {case: next(filter(None, whys), "" if len(whys) == world else f"{len(whys)} of {world} ranks said so")
            for case, whys in verdicts.items()}


def drive(args):
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    tally, held = Tally(), {}
    source = shards.read_model(args.model)
    for form in FORMATS:
        for ranks in WRITERS:
            name, whole, why_not = write_checkpoint(args, form, ranks, source)
            held[name] = f"{len(whole)} tensors {sum(len(t.data) for t in whole.values())} bytes"
            tally.line(f"{form:10} written on {ranks}, by safetensors: {held[name]}, {len(source)} digests", why_not)
    damaged_copy(args, "plain-3")
    for world in READERS:
        verdicts = run_readers(args, world, [*held, "control"])
        for name in held:
            form, _, ranks = name.rpartition("-")
            for how in ("whole", "DTensor"):
                why = verdicts.get((name, how), "no verdict")
                tally.line(f"{form:10} written on {ranks}, by DCP on {world}, {how:7}: {held[name]}", why)
        seen = verdicts.get(("control", "whole"), "")
        tally.line(f"control    one bit changed, by DCP on {world}: seen as \"{seen}\"", "" if "differs" in seen else "not seen")
    print(f"{tally.passed} passed, {tally.failed} failed")
    return tally.failed != 0


def read(args):
    """One reader process: a verdict per checkpoint and way of loading."""
    import datetime

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{args.meeting}", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=COLLECTIVE_LIMIT))
    mesh = init_device_mesh("cpu", (world,))
    for name in args.read:
        stem = args.work / f"{name}.expected"
        raw = bytearray(pathlib.Path(f"{stem}.bin").read_bytes())
        table = json.loads(pathlib.Path(f"{stem}.json").read_text())
        step = shards.newest_step(args.work / name)
        for how in ("whole", "DTensor"):
            try:
                why = load_and_compare(torch, step, table, raw, mesh if how == "DTensor" else None)
            except Exception as error:  # A verdict like any other: every failure of a load is reported by case.
                why = f"{type(error).__name__}: {error}"[:400]
            print("VERDICT " + json.dumps([name, how, why]), flush=True)
    dist.destroy_process_group()


def load_and_compare(torch, step, table, raw, mesh):
    """Loads all of one checkpoint into patterned memory; why it is not equal, or ''."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.tensor import DTensor, Replicate, Shard, empty

    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8, "I8": torch.int8}
    target = {}
    for name, (dtype, shape, _, _) in table.items():
        if mesh is None:
            target[name] = torch.empty(shape, dtype=types[dtype])
        else:
            cut = [Shard(0)] if shape else [Replicate()]
            target[name] = empty(*shape, dtype=types[dtype], device_mesh=mesh, placements=cut)
        as_bytes(torch, local_of(target[name])).fill_(PATTERN)
    dcp.load(target, storage_reader=HuggingFaceStorageReader(str(step)))
    rows = 0
    for name, (dtype, shape, at, size) in table.items():
        got = as_bytes(torch, local_of(target[name]))
        if isinstance(target[name], DTensor) and shape:
            # torch cuts dim 0 into runs of ceil(rows / world).
            run, row = -(-shape[0] // mesh.size()), size // shape[0]
            first = min(run * dist.get_rank(), shape[0]) * row
            at, size = at + first, min(run * row, size - first)
            rows += size
        want = torch.frombuffer(raw, dtype=torch.uint8, count=size, offset=at) if size else torch.empty(0, dtype=torch.uint8)
        if got.numel() != size:
            return f"{name} has {got.numel()} bytes here, not {size}"
        if not torch.equal(got, want):
            return f"{name} differs in {int((got != want).sum())} of {size} bytes"
    if mesh is not None:
        total = torch.tensor(rows)
        dist.all_reduce(total)
        if int(total) != sum(size for _, shape, _, size in table.values() if shape):
            return f"the ranks compared {int(total)} bytes together"
    return ""


def local_of(tensor):
    """The part of a tensor that is here."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def as_bytes(torch, tensor):
    """A flat view of a contiguous tensor's bytes."""
    return tensor.reshape(-1).view(torch.uint8)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary")
    parser.add_argument("--model")
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--meeting")
    parser.add_argument("--read", nargs="+")
    args = parser.parse_args()
    return read(args) if args.read else drive(args)


if __name__ == "__main__":
    sys.exit(main())
