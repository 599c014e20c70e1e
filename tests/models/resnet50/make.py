#!/usr/bin/env python3
"""Write a model folder with a ResNet-50 (He et al. 2016, table 1; stride in the 3 x 3 convolution, batch
normalisation folded away) whose weights are random: it costs what a real one costs, 4.1 GFLOP an image, and knows
nothing. For the benchmark.

    pip install -r ../tiny/requirements.txt
    python3 make.py FOLDER
    worker golden FOLDER
"""

import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper, save

CLASSES = 7
random = np.random.default_rng(50)
nodes, weights = [], []


def add(kind, inputs, **attributes):
    output = f"{kind}_{len(nodes)}"
    nodes.append(helper.make_node(kind, inputs, [output], **attributes))
    return output


def constant(values):
    name = f"w_{len(weights)}"
    weights.append(numpy_helper.from_array(values.astype(np.float32), name))
    return name


def convolve(x, before, after, size, stride=1):
    fan_in = before * size * size
    kernel = random.normal(0, np.sqrt(1 / fan_in), (after, before, size, size))
    padding = [size // 2] * 4
    inputs = [x, constant(kernel), constant(np.zeros(after))]
    return add("Conv", inputs, kernel_shape=[size, size], strides=[stride, stride], pads=padding)


def bottleneck(x, before, width, stride):
    after = 4 * width
    shortcut = x if before == after and stride == 1 else convolve(x, before, after, 1, stride)
    x = add("Relu", [convolve(x, before, width, 1)])
    x = add("Relu", [convolve(x, width, width, 3, stride)])
    return add("Relu", [add("Add", [convolve(x, width, after, 1), shortcut])]), after


x = add("Relu", [convolve("image", 3, 64, 7, 2)])
x = add("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
channels = 64
for width, blocks, stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
    for block in range(blocks):
        x, channels = bottleneck(x, channels, width, stride if block == 0 else 1)
x = add("Flatten", [add("GlobalAveragePool", [x])], axis=1)
last = [x, constant(random.normal(0, 0.01, (CLASSES, channels))), constant(np.zeros(CLASSES))]
nodes.append(helper.make_node("Gemm", last, ["logits"], transB=1))

graph = helper.make_graph(
    nodes,
    "resnet50",
    [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 224, 224])],
    [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])],
    weights,
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
checker.check_model(model, full_check=True)
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
save(model, folder / "model.onnx")
classes = "".join(f'\n[[class]]\ncode = "class-{n}"\ndisplay = "Class {n}"\n' for n in range(CLASSES))
(folder / "model.toml").write_text(
    f"""name = "resnet50"
version = "1"
title = "ResNet-50 with random weights"
licence = "Apache-2.0"

[input]
name = "image"
width = 224
height = 224
mean = [0.485, 0.456, 0.406]
deviation = [0.229, 0.224, 0.225]

[output]
logits = "logits"
{classes}
[[indicator]]
id = "malignancy"
code = "malignancy-suspicion"
display = "Suspicion of malignancy"
classes = ["class-0"]
threshold = 0.5
referral = true
"""
)
