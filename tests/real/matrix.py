#!/usr/bin/env python3
"""Runs the main job on models in every combination of format, ranks and ranks of the resume, and prints a table.

    matrix.py --binary weightcast --work DIR --model NAME=PATH ...

A row is ok if the job ended well, every tensor's digest is that of the first row of the model and format, and, for a load of
unquantized safetensors, the digests are those of the file's own bytes, computed here. `checkpoint verify --deep` must hold for
each checkpoint, and with one bit changed neither it nor a resume may pass. The last line is `N passed, N failed`.
"""

import argparse
import json
import pathlib
import shutil
import struct
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "interop"))
import shards  # noqa: E402

FORMATS = {"nf4-double": ["--quantize", "nf4", "--double"], "none": []}
RANKS, RESUMES = (1, 2, 4), (1, 2, 3, 4, 8)
# Seconds for one job.
LIMIT = 300


def run(binary, *arguments):
    """(seconds, the job's JSON result or None, why it failed or '')."""
    start = time.monotonic()
    try:
        result, why = shards.launch(binary, arguments, LIMIT), ""
    except (RuntimeError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        result, why = None, str(error)[-600:]
    return time.monotonic() - start, result, why


def difference(digests, expected):
    """Why two sets of digests are not the same, or ''."""
    if not digests:
        return "no digests"
    other = sorted(n for n in digests.keys() | expected.keys() if digests.get(n) != expected.get(n))
    return f"{len(other)} tensors differ, {other[0]} first" if other else ""


def file_digests(path):
    """The digest of every weight of a model directory's one safetensors file; None for anything else."""
    path = pathlib.Path(path, "model.safetensors")
    if not path.exists():
        return None
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    table, data = json.loads(raw[8 : 8 + length]), memoryview(raw)[8 + length :]
    table.pop("__metadata__", None)
    # 0, 1, 2, ...: a buffer that the architecture makes, and no weight. It is neither loaded nor kept.
    return {name: shards.digest(data[slice(*entry["data_offsets"])]) for name, entry in table.items()
            if not name.endswith("embeddings.position_ids")}


def verify(binary, root):
    """Why `checkpoint verify --deep`, which reads every byte, does not hold, or ''."""
    done = subprocess.run([binary, "checkpoint", "verify", "--deep", str(root)], capture_output=True, text=True, timeout=LIMIT)
    return "" if done.returncode == 0 else f"exit {done.returncode}: {(done.stderr or done.stdout).strip()[-400:]}"


class Table:
    """Prints rows as they come and counts them."""

    def __init__(self):
        self.passed = self.failed = 0
        print(f"{'model':13} {'format':10} {'ranks':>5} {'resume':>6} {'seconds':>7} {'read bytes':>11}  ok", flush=True)

    def row(self, case, seconds, result, why):
        self.passed, self.failed = self.passed + (not why), self.failed + bool(why)
        read = sum(load["storage_bytes"] for load in result["loads"]) if result else ""
        model, form, ranks, resume = case
        print(f"{model:13} {form:10} {ranks:>5} {resume:>6} {seconds:>7.2f} {read:>11}  {'NO: ' + why if why else 'yes'}",
              flush=True)


def one_model(args, table, name, path):
    """Every row of one model."""
    for form, options in FORMATS.items():
        expected = file_digests(path) if form == "none" else None
        for ranks in RANKS:
            root = args.work / f"{name}-{form}-{ranks}"
            seconds, result, why = run(args.binary, "--nproc-per-node", ranks, "--model", path, *options, "--checkpoint-dir",
                                       root, "--save", "--digests")
            if result:
                expected = expected or result["digests"]
                why = difference(result["digests"], expected) or ("" if result["checkpoint"] else "nothing committed")
            table.row((name, form, ranks, "-"), seconds, result, why)
            if why:
                continue
            start = time.monotonic()
            why = verify(args.binary, root)
            table.row((name, form, ranks, "verify"), time.monotonic() - start, None, why)
            for resume in RESUMES:
                seconds, result, why = run(args.binary, "--nproc-per-node", resume, "--checkpoint-dir", root, "--resume",
                                           "must", "--digests")
                why = why or difference(result["digests"], expected)
                table.row((name, form, ranks, resume), seconds, result, why)
            if ranks == RANKS[-1]:
                table.row((name, form, ranks, "damage"), 0.0, None, damaged(args.binary, root))
            shutil.rmtree(root)


def damaged(binary, root):
    """Changes one bit of the last shard: neither a verification nor a resume may pass. Why one did, or ''."""
    path = max(shards.newest_step(root).glob("*.safetensors"))
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    _, resumed, why = run(binary, "--nproc-per-node", 3, "--checkpoint-dir", root, "--resume", "must", "--digests")
    if resumed:
        return "resumed from a damaged shard"
    if path.name not in why:
        return f"the error does not name the file: {why}"
    return "" if verify(binary, root) else "a damaged shard was verified"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=PATH")
    args = parser.parse_args()
    table = Table()
    for model in args.model:
        one_model(args, table, *model.split("=", 1))
    print(f"{table.passed} passed, {table.failed} failed")
    return table.failed != 0


if __name__ == "__main__":
    sys.exit(main())
