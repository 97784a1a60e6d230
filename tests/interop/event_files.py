"""TensorBoard's EventAccumulator reads the scalars of a run's event files, and they are those of its metrics.jsonl.

usage: event_files.py DIRECTORY   (where a run wrote metrics.jsonl and events.out.tfevents.*; also after resumes)
"""

import json
import math
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEP = {
    "train/loss": "loss",
    "train/learning_rate": "learning_rate",
    "train/grad_norm": "gradient_norm",
    "train/tokens_per_second": "tokens_per_second",
    "train/epoch": "epoch",
}
EVALUATION = {"eval/loss": "loss", "eval/perplexity": "perplexity"}


def f32(value):
    """The number as the event file can hold it; null stands for one that is not finite."""
    return math.nan if value is None else struct.unpack("<f", struct.pack("<f", value))[0]


def main():
    directory = Path(sys.argv[1])
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    compared = 0
    for kind, tags in (("step", STEP), ("evaluation", EVALUATION)):
        records = [line for line in lines if line["kind"] == kind]
        for tag, key in tags.items():
            expected = [(record["step"], f32(record[key])) for record in records]
            found = [(event.step, event.value) for event in events.Scalars(tag)] if records else []
            same = len(expected) == len(found) and all(
                e[0] == f[0] and (e[1] == f[1] or not (math.isfinite(e[1]) or math.isfinite(f[1])))
                for e, f in zip(expected, found)
            )
            if not same:
                sys.exit(f"{tag}: metrics.jsonl says {expected}, TensorBoard reads {found}")
            compared += len(found)
    if compared == 0:
        sys.exit(f"{directory}: no scalar to compare")
    print(f"ok: TensorBoard reads {compared} scalars of {len(lines)} records as metrics.jsonl has them")


main()
