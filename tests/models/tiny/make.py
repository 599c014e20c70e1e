#!/usr/bin/env python3
"""Write model.onnx: the smallest real image classifier, to show that any folder of this form works.

    pip install -r requirements.txt
    python3 make.py
    worker golden .

The mean of each colour channel goes through a fixed 3 x 3 linear layer: a frame is red, green or blue by its
strongest channel. The mean and deviation of model.toml are undone inside, so a wrong normalisation shows.
"""

from pathlib import Path

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper, save

WIDTH, HEIGHT = 32, 48
# As in model.toml.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
# Each class scores its own channel against the two others, channel values in 0..1.
CONTRAST = np.array([[8, -4, -4], [-4, 8, -4], [-4, -4, 8]], np.float32)

# logits = CONTRAST (DEVIATION x + MEAN), with x the normalised channel means.
weight = CONTRAST * DEVIATION
bias = CONTRAST @ MEAN

graph = helper.make_graph(
    [
        helper.make_node("GlobalAveragePool", ["pixels"], ["means"]),
        helper.make_node("Flatten", ["means"], ["channels"], axis=1),
        helper.make_node("Gemm", ["channels", "weight", "bias"], ["scores"], transB=1),
    ],
    "tiny",
    [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, HEIGHT, WIDTH])],
    [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])],
    [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
checker.check_model(model, full_check=True)
save(model, Path(__file__).parent / "model.onnx")
