"""The time of a step with and without an attack, by hand: python3 tests/attack/measure.py target/release/weightcast PAIRS [STEPS]

Runs of two ranks in turn, without and with somebody who opens connections and says nothing, garbage or half of HTTP/2's
preface, a hundred times a second (as fast as one thread can with RATE=0 in the environment). Prints the median time of a step of each run, the ratio of each pair and the median of the ratios.
"""

import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
JOB = """
model.source = "{root}/tests/data/tiny-llama"
checkpoint.directory = "{name}"
[train]
steps = {steps}
batch-size = 8
micro-batch-size = 2
seed = 7
[train.data]
train = "{root}/tests/data/devils-dictionary.jsonl"
sequence-length = 64
[train.lora]
r = 4
[train.checkpoint]
every-minutes = 0
"""
STEPS = int(sys.argv[3]) if len(sys.argv) > 3 else 200
RATE = float(os.environ.get("RATE", "100"))
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def attack(address, stop, count):
    host, port = address.rsplit(":", 1)
    kept = []
    said = [b"", b"garbage" * 100, PREFACE, PREFACE[:5]]
    while not stop.is_set():
        try:
            stranger = socket.create_connection((host, int(port)), timeout=1)
            stranger.sendall(said[count[0] % len(said)])
            kept.append(stranger)
            count[0] += 1
            if RATE:
                time.sleep(1 / RATE)
        except OSError:
            time.sleep(0.01)
        if len(kept) > 300:
            kept.pop(0).close()


def run(program, name, attacked, place):
    (place / f"{name}.toml").write_text(JOB.format(root=ROOT, name=name, steps=STEPS))
    environment = os.environ | {"XDG_RUNTIME_DIR": str(place / f"run-{name}")}
    with open(place / f"{name}.log", "w") as log:
        arguments = [program, "launch", "--nproc-per-node", "2", f"{name}.toml"]
        job = subprocess.Popen(arguments, cwd=place, env=environment, stdout=log, stderr=log)
        stop, count = threading.Event(), [0]
        if attacked:
            found = []
            while not found and job.poll() is None:
                found = list((place / f"run-{name}").glob("weightcast/*/run.json"))
                time.sleep(0.02)
            address = json.loads(found[0].read_text())["coordinator"]
            thread = threading.Thread(target=attack, args=(address, stop, count))
            thread.start()
        code = job.wait()
        stop.set()
        if attacked:
            thread.join()
    assert code == 0, (place / f"{name}.log").read_text()
    lines = (place / name / "metrics" / "metrics.jsonl").read_text().splitlines()
    rates = [record["tokens_per_second"] for record in map(json.loads, lines) if record["kind"] == "step"]
    return 1 / statistics.median(rates[STEPS // 10 :]), count[0]


def main():
    program, pairs = str(pathlib.Path(sys.argv[1]).resolve()), int(sys.argv[2])
    ratios = []
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        for pair in range(pairs):
            quiet, _ = run(program, f"quiet-{pair}", False, place)
            loud, strangers = run(program, f"loud-{pair}", True, place)
            ratios.append(loud / quiet)
            print(f"pair {pair}: {quiet * 1e6:.2f} and {loud * 1e6:.2f} us a token, ratio {loud / quiet:.3f}, "
                  f"{strangers} connections")
    print(f"median of the ratios {statistics.median(ratios):.3f}")


main()
