#!/usr/bin/env python3
"""Write an int8 version of model.onnx (QDQ, per channel), calibrated on training images.

    python3 quantise.py --data DIR --cache DIR --network ../model.onnx --out int8.onnx
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import data
from pixels import program
from train import squashed

IMAGES = 256  # of HAM10000 and ISIC 2017, by lot


class Images(CalibrationDataReader):
    """One squashed image after the other."""

    def __init__(self, splits, side):
        random = np.random.default_rng(0)
        chosen = [s.images[i] for s in splits for i in random.choice(len(s.images), IMAGES // len(splits), replace=False)]
        self.images = iter(chosen)
        self.side = side

    def get_next(self):
        image = next(self.images, None)
        return None if image is None else {"image": squashed([image], self.side).numpy().astype(np.float32) / 255}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--network", type=Path, required=True)
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", type=Path, help="the worker's program [default: the one in target]")
    given = parser.parse_args()
    lesions, _ = data.load(given.data, given.cache, "train", program(given.worker))
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(given.network), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(given.out),
            Images(lesions, given.side),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )


if __name__ == "__main__":
    main()
