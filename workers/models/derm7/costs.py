#!/usr/bin/env python3
"""What each output of the network costs: the whole of it against the same network cut off before one of its outputs.

    pip install -r requirements.txt onnx==1.23.2
    python3 costs.py [--model DIR] [--minutes N]

One thread, one image, decoding and resizing left out. The networks take turns, in blocks of which each gives the median of its
runs, so that what else the machine does hits all alike; the difference is that of blocks of the same turn.
"""

import argparse
import tempfile
import time
import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

FOLDER = Path(__file__).parent
BLOCK = 25  # runs


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def block(network, given):
    """Milliseconds of processor time, the median of a block."""
    times = []
    for _ in range(BLOCK):
        start = time.process_time()
        network.run(None, given)
        times.append(time.process_time() - start)
    return 1000 * float(np.median(times))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help="the model's folder [default: this one]")
    parser.add_argument("--minutes", type=float, default=2)
    given = parser.parse_args()
    description = tomllib.loads((given.model / "model.toml").read_text())
    name, size = description["input"]["name"], (description["input"]["height"], description["input"]["width"])
    file = given.model / "model.onnx"
    outputs = [o.name for o in session(file).get_outputs()]
    networks = {"all": session(file)}
    with tempfile.TemporaryDirectory() as folder:
        for output in outputs if len(outputs) > 1 else []:
            cut = Path(folder) / f"without-{output}.onnx"
            onnx.utils.extract_model(str(file), str(cut), [name], [o for o in outputs if o != output])
            networks[output] = session(cut)
    image = {name: np.random.default_rng(0).random((1, 3, *size), np.float32)}
    rows, end = [], time.monotonic() + 60 * given.minutes
    while time.monotonic() < end:
        rows.append([block(network, image) for network in networks.values()])
    times = np.array(rows)
    print(f"{len(rows)} turns of {BLOCK} runs each")
    print(f"all outputs: {np.median(times[:, 0]):.2f} ms")
    for column, output in enumerate(list(networks)[1:], 1):
        costs = times[:, 0] - times[:, column]
        low, middle, high = np.percentile(costs, [25, 50, 75])
        print(f"{output}: {middle:.2f} ms ({low:.2f} to {high:.2f} in the middle half of the turns)")


if __name__ == "__main__":
    main()
