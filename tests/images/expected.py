#!/usr/bin/env python3
"""Write expected.json: what derm7 makes of every image of this folder: the probabilities by class code, and the share
of the image that is lesion.

    pip install -r ../../workers/models/derm7/requirements.txt
    python3 expected.py
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
DERM7 = FOLDER.parent.parent / "workers" / "models" / "derm7"
sys.path.insert(0, str(DERM7))
sys.dont_write_bytecode = True

from PIL import Image  # noqa: E402

from evaluate import Model, outline_of  # noqa: E402

model = Model(DERM7, threads=1)
files = sorted(f for f in FOLDER.iterdir() if f.suffix in (".jpg", ".png"))
logits, maps = model.run([model.description["output"][name] for name in ("logits", "lesion")], files)
result = {}
for file, row, lesion in zip(files, model.probabilities(logits), maps[:, 0]):
    classes = {code: round(float(p), 4) for code, p in zip(model.codes, row)}
    area = float(outline_of(lesion, Image.open(file).size).mean())
    result[file.name] = {"classes": classes, "area": round(area, 4)}
(FOLDER / "expected.json").write_text(json.dumps(result, indent=2) + "\n")
