#!/usr/bin/env python3
"""Write expected.json: the probabilities of derm7 for every image of this folder, by file and class code.

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

from evaluate import Model  # noqa: E402

model = Model(DERM7, threads=1)
files = sorted(f for f in FOLDER.iterdir() if f.suffix in (".jpg", ".png"))
rows = model.probabilities(model.logits(files))
result = {f.name: {c: round(float(p), 4) for c, p in zip(model.codes, row)} for f, row in zip(files, rows)}
(FOLDER / "expected.json").write_text(json.dumps(result, indent=2) + "\n")
