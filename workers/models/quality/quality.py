#!/usr/bin/env python3
"""How usable an image is, from its pixels alone: five parts and their product. README.md is the definition.

    python3 quality.py IMAGE...                       the statistics and parts of each image, as JSON
    python3 quality.py --validate --data DIR          degrade good images and print what the score makes of them
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

LONGER_SIDE = 224  # of the frame in which everything is measured, in pixels
BLUR = 9  # pixels of the running mean that focus is compared with
ACCEPTABLE = 0.5
SEED = 20261121

# part: (worst, best) of its statistic; linear between
FOCUS = (0.33, 0.53)
DARK, BRIGHT = (35.0, 80.0), (248.0, 222.0)
CLIPPED = (0.5, 0.1)
CONTRAST = (5.0, 20.0)
RESOLUTION = (np.log(48.0), np.log(160.0))
COVERAGE = (0.1, 0.5)


def ramp(value, ends):
    worst, best = ends
    return float(np.clip((value - worst) / (best - worst), 0, 1))


def frame(image):
    """Turned upright, RGB, made smaller until the longer side has 224 pixels; never enlarged."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    longer = max(image.size)
    if longer <= LONGER_SIDE:
        return np.asarray(image)
    size = [max(1, (2 * side * LONGER_SIDE + longer) // (2 * longer)) for side in image.size]
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def lost_to_blur(luma):
    """Of the differences between one row and the next, the share that a running mean over nine rows takes away."""
    half = BLUR // 2
    sums = np.cumsum(np.pad(luma, ((half + 1, half), (0, 0)), "edge"), 0)
    blurred = (sums[BLUR:] - sums[:-BLUR]) / BLUR
    sharp, soft = np.abs(np.diff(luma, axis=0)), np.abs(np.diff(blurred, axis=0))
    total = sharp.sum()
    return float(np.maximum(sharp - soft, 0).sum() / total) if total else 0.0


def rank(values, share):
    """The smallest value that at least `share` of all do not exceed."""
    counts = np.cumsum(np.bincount(values, minlength=256))
    return int(np.argmax(counts >= share * len(values)))


def statistics(image):
    pixels = frame(image).astype(np.int64)
    luma = (pixels @ [299, 587, 114] + 500) // 1000
    rows, columns = luma.shape
    y, x = (2 * np.arange(rows) + 1) / rows - 1, (2 * np.arange(columns) + 1) / columns - 1
    centre = y[:, None] ** 2 + x**2 <= 1  # a dermatoscope leaves the corners dark
    low, high = pixels.min(2), pixels.max(2)
    return {
        "sharpness": min(lost_to_blur(luma), lost_to_blur(luma.T)),
        "mean": float(luma[centre].mean()),
        "clipped": float(((low >= 250) | (high <= 5))[centre].mean()),
        "spread": rank(luma[centre], 0.95) - rank(luma[centre], 0.05),
        "side": min(image.size),
        "shown": float(((high >= 24) & (low <= 245)).mean()),
    }


def parts(found):
    exposure = min(ramp(found["mean"], DARK), ramp(found["mean"], BRIGHT), ramp(found["clipped"], CLIPPED))
    return {
        "focus": ramp(found["sharpness"], FOCUS),
        "exposure": exposure,
        "contrast": ramp(found["spread"], CONTRAST),
        "resolution": ramp(np.log(found["side"]), RESOLUTION),
        "coverage": ramp(found["shown"], COVERAGE),
    }


def score(image):
    return float(np.prod(list(parts(statistics(image)).values())))


def small(image, side):
    """As taken with fewer pixels."""
    factor = side / min(image.size)
    return image.resize([max(1, round(s * factor)) for s in image.size], Image.Resampling.BILINEAR)


def far(image, share):
    """The picture fills only this share of a black frame."""
    made = Image.new("RGB", image.size)
    inner = image.resize([max(1, round(s * share**0.5)) for s in image.size], Image.Resampling.BILINEAR)
    made.paste(inner, [(a - b) // 2 for a, b in zip(image.size, inner.size)])
    return made


def moved(image, length):
    """Motion blur along the rows, `length` pixels of a frame of 224."""
    width = max(1, round(length * max(image.size) / LONGER_SIDE))
    values = np.pad(np.asarray(image, np.float64), ((0, 0), (width, 0), (0, 0)), "edge").cumsum(1)
    return Image.fromarray(((values[:, width:] - values[:, :-width]) / width + 0.5).astype(np.uint8))




def scaled(image, radius):
    return image.filter(ImageFilter.GaussianBlur(radius * max(image.size) / LONGER_SIDE))


# kind: (part, how, levels from mild to clear). Lengths are pixels of a frame of 224.
DEGRADED = {
    "out of focus (Gaussian blur, sigma)": ("focus", scaled, [0.5, 1, 1.5, 2, 3, 4]),
    "moved (motion blur, pixels)": ("focus", moved, [2, 4, 6, 10, 16]),
    "too dark (gain)": ("exposure", lambda i, g: i.point(lambda v: v * g), [0.8, 0.6, 0.4, 0.3, 0.2, 0.1]),
    "too bright (gain)": ("exposure", lambda i, g: i.point(lambda v: min(255, v * g)), [1.2, 1.5, 2, 2.5, 3]),
    "fog (share of the contrast left)": ("contrast", lambda i, g: i.point(lambda v: 170 + (v - 170) * g), [0.7, 0.5, 0.3, 0.2, 0.1, 0.05]),
    "few pixels (shorter side)": ("resolution", small, [144, 112, 96, 80, 64, 48]),
    "far away (share of the frame)": ("coverage", far, [0.8, 0.5, 0.4, 0.3, 0.2, 0.1]),
}


def area(good, bad):
    """Of the ROC curve; ties count half."""
    good, bad = np.asarray(good)[:, None], np.asarray(bad)
    return float(((good > bad) + 0.5 * (good == bad)).mean())


def interval(good, bad, resamples):
    random = np.random.default_rng(SEED)
    draws = [random.integers(0, len(good), len(good)) for _ in range(resamples)]
    return np.percentile([area(good[d], bad[d]) for d in draws], [2.5, 97.5])


def images(root, name, split, number):
    with open(root / name / "labels.csv", newline="") as file:
        files = [root / name / r["file"] for r in csv.DictReader(file) if split is None or r.get("split") == split]
    chosen = np.random.default_rng(SEED).permutation(len(files))[:number]
    return [Image.open(files[i]).convert("RGB") for i in sorted(chosen)]


def validate(root, number, resamples):
    sets = {
        "HAM10000 test": images(root, "ham10000", "test", number),
        "ISIC 2017 test": images(root, "isic2017", "test", number),
        "HAM10000, 600 x 450": images(root, "samples-600x450", None, number),
        "PAD-UFES-20": images(root, "pad-ufes-20-samples", None, number),
    }
    good = {name: np.array([score(i) for i in given]) for name, given in sets.items()}
    print("| as published | images | median score | 5th percentile | acceptable |\n|---|---|---|---|---|")
    for name, scores in good.items():
        share = f"{(scores >= ACCEPTABLE).mean():.3f}"
        print(f"| {name} | {len(scores)} | {np.median(scores):.3f} | {np.percentile(scores, 5):.3f} | {share} |")
    for name in ("HAM10000 test", "ISIC 2017 test"):
        print(f"\n| {name}, degraded | mean score at each level | AUC at the last level | acceptable there | monotone |")
        print("|---|---|---|---|---|")
        worst = []
        for kind, (part, how, levels) in DEGRADED.items():
            rows = np.array([[score(how(i, level)) for i in sets[name]] for level in levels])
            steps = np.vstack([good[name], rows])
            means = ", ".join(f"{level:g}: {row.mean():.2f}" for level, row in zip(levels, rows))
            low, high = interval(good[name], rows[-1], resamples)
            monotone = "mean yes" if (np.diff(steps.mean(1)) <= 0).all() else "mean no"
            monotone += f", {(np.diff(steps, axis=0) <= 0.02).all(0).mean():.3f} of the images"
            found = f"{area(good[name], rows[-1]):.3f} ({low:.3f} to {high:.3f})"
            print(f"| {kind} | {means} | {found} | {(rows[-1] >= ACCEPTABLE).mean():.3f} | {monotone} |", flush=True)
            worst.append(rows[-1])
        worst = np.concatenate(worst)
        print(f"\n{name}: good against all clearly degraded, AUC {area(good[name], worst):.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--data", type=Path, help="folder with the data sets, as for derm7")
    parser.add_argument("--number", type=int, default=300, help="images of each data set")
    parser.add_argument("--resamples", type=int, default=1000)
    given = parser.parse_args()
    if given.validate:
        validate(given.data, given.number, given.resamples)
        return
    found = {}
    for file in given.files:
        image = Image.open(file)
        seen = statistics(image)
        found[file.name] = {"statistics": seen, "parts": parts(seen), "score": score(image)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
