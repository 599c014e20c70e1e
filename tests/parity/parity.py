#!/usr/bin/env python3
"""Make the images of this folder: 200 of the test images of ISIC 2017, chosen and scaled by lot, with 32 colours each.

    python3 parity.py DIR      # DIR holds isic2017/ as the model card of derm7 describes it

PNG, because decoders of JPEG differ, and what is compared begins at the pixels. Few colours make small files.
"""

import csv
import random
import sys
from pathlib import Path

from PIL import Image

data, folder = Path(sys.argv[1]) / "isic2017", Path(__file__).parent
with open(data / "labels.csv", newline="") as file:
    files = sorted(row["file"] for row in csv.DictReader(file) if row["split"] == "test")
chance = random.Random(2017)
for name in chance.sample(files, 200):
    size = chance.randint(100, 240), chance.randint(100, 240)
    image = Image.open(data / name).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    few = image.quantize(32, dither=Image.Dither.NONE)
    few.save((folder / Path(name).name).with_suffix(".png"), optimize=True)
