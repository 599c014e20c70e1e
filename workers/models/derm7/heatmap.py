#!/usr/bin/env python3
"""Write heatmap.png: a sample image, and the heat map of its first class over it, as a worker computes it.

    pip install -r requirements.txt
    cargo build --release -p dermflow-workers
    python3 heatmap.py
"""

import sys

sys.dont_write_bytecode = True

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from evaluate import FOLDER, Model  # noqa: E402
from pixels import decoded  # noqa: E402

SAMPLE = FOLDER.parent.parent.parent / "tests" / "images" / "isic2017-mel.jpg"  # CC0 1.0
SIDE = 224
# Viridis at every eighth from 0 to 1, as in workers/src/heat.rs.
VIRIDIS = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"]

model = Model(FOLDER, threads=1)
output = model.description["output"]
logits, places = model.run([output["logits"], output["activation"]], [SAMPLE])
first = model.conditions[model.probabilities(logits)[0].argmax()]
heat = np.exp(places[0] - model.log_prior[:, None, None])
heat = (heat / heat.sum(0))[first]
grown = np.asarray(Image.fromarray(heat.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
steps = np.array([[int(colour[k : k + 2], 16) for k in (0, 2, 4)] for colour in VIRIDIS], float)
at = np.linspace(0, 1, len(steps))
colours = np.stack([np.interp(grown, at, steps[:, channel]) for channel in range(3)], axis=-1)
small = next(decoded(model.worker, [SAMPLE], (SIDE, SIDE))).astype(float)
both = np.concatenate([small, (small + colours) / 2], axis=1).round().astype(np.uint8)
Image.fromarray(both).quantize(256).save(FOLDER / "heatmap.png", optimize=True)
