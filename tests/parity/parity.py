#!/usr/bin/env python3
"""Make the images of this folder: 200 of the test images of ISIC 2017, chosen and scaled by lot, a half as PNG and a half as
JPEG.

    python3 parity.py DIR      # DIR holds isic2017/ as the model card of derm7 describes it

The PNG have 32 colours each, which makes small files; the JPEG have 4:2:0 chroma, of which decoders make different pixels.
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
for number, name in enumerate(chance.sample(files, 200)):
    size = chance.randint(100, 240), chance.randint(100, 240)
    image = Image.open(data / name).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    file = folder / Path(name).name
    if number % 2:
        image.save(file, "JPEG", quality=80)
    else:
        image.quantize(32, dither=Image.Dither.NONE).save(file.with_suffix(".png"), optimize=True)
