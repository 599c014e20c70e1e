#!/usr/bin/env python3
"""Write expected.json: what derm7 makes of every image of this folder: whether it shows skin, how it was taken, the
probabilities by class code, and the share of the image that is lesion; all between 0 and 1. And the same without the
share, as ../parity/expected.csv, for the images of that folder.

    pip install -r ../../workers/models/derm7/requirements.txt
    cargo build --release -p dermflow-workers
    python3 expected.py
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PARITY = FOLDER.parent / "parity"
DERM7 = FOLDER.parent.parent / "workers" / "models" / "derm7"
sys.path.insert(0, str(DERM7))
sys.dont_write_bytecode = True

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from evaluate import Model, outline_of  # noqa: E402

model = Model(DERM7, threads=1)
outputs = [model.description["output"][name] for name in ("logits", "modality", "lesion")]


def images(folder):
    return sorted(f for f in folder.iterdir() if f.suffix in (".jpg", ".png"))


def numbers(files):
    """For each file: the confidence in skin, that there was no dermatoscope, the conditions; and the map."""
    logits, modality, maps = model.run(outputs, files)
    clinical = 1 / (1 + np.exp(-modality[:, 0]))
    return zip(files, model.skin(logits), clinical, model.probabilities(logits), maps[:, 0])


result = {}
for file, skin, clinical, row, lesion in numbers(images(FOLDER)):
    area = float(outline_of(lesion, Image.open(file).size).mean())
    result[file.name] = {
        "skin": round(float(skin), 4),
        "clinical": round(float(clinical), 4),
        "classes": {code: round(float(p), 4) for code, p in zip(model.codes, row)},
        "area": round(area, 4),
    }
(FOLDER / "expected.json").write_text(json.dumps(result, indent=2) + "\n")

lines = [",".join(["file", "skin", "clinical", *model.codes])]
for file, skin, clinical, row, _ in numbers(images(PARITY)):
    lines.append(",".join([file.name, *(f"{p:.6f}" for p in (skin, clinical, *row))]))
(PARITY / "expected.csv").write_text("\n".join(lines) + "\n")
