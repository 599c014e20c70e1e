#!/usr/bin/env python3
"""Recompute every figure of the model card from the data sets.

    pip install -r requirements.txt
    python3 evaluate.py --data DIR [--json FILE] [--check]

README.md describes what DIR holds. The malignancy threshold is chosen on the `val` split and reported on
`test`. With --check the exit status is 1 when model.toml states another threshold or other metrics.
"""

import argparse
import csv
import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FOLDER = Path(__file__).parent
TARGET_SENSITIVITY = 0.90  # of the malignancy threshold, on the val split
CALIBRATION_BINS = 15
SEED = 20261121
# What --check lets pass: another CPU's kernels move a probability by about 1e-6, and so at most a few images.
TOLERANCE = 0.002


def bilinear(image, size):
    """With antialiasing, rounded to whole values: what the service does."""
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)


def unrounded(image, size):
    bands = [band.convert("F").resize(size, Image.Resampling.BILINEAR) for band in image.split()]
    return np.stack([np.asarray(band) for band in bands], axis=-1)


def bicubic(image, size):
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32)


class Model:
    """The network with its description; knows nothing about the data sets."""

    def __init__(self, folder, threads):
        self.description = tomllib.loads((folder / "model.toml").read_text())
        classes = self.description["class"]
        self.codes = [c["code"] for c in classes]
        self.malignant = np.array([c["malignant"] for c in classes])
        self.log_prior = np.log([c["prior"] for c in classes])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])

    def tensor(self, image, resize):
        """The whole frame squashed to the input size, channels first."""
        given = self.description["input"]
        image = ImageOps.exif_transpose(image).convert("RGB")
        values = resize(image, (given["width"], given["height"])) / np.float32(255)
        values = (values - np.float32(given["mean"])) / np.float32(given["deviation"])
        return values.transpose(2, 0, 1)

    def logits(self, images, resize=bilinear, batch=32):
        """`images`: paths or PIL images. One row per image."""
        rows = []
        for start in range(0, len(images), batch):
            group = [i if isinstance(i, Image.Image) else Image.open(i) for i in images[start : start + batch]]
            tensors = np.stack([self.tensor(i, resize) for i in group])
            names = [self.description["output"]["logits"]]
            rows.append(self.session.run(names, {self.description["input"]["name"]: tensors})[0])
        return np.concatenate(rows).astype(np.float64)

    def probabilities(self, logits, adjust=True):
        """softmax(logits - ln prior) over all classes; plain softmax without `adjust`."""
        values = logits - self.log_prior if adjust else logits
        values = np.exp(values - values.max(1, keepdims=True))
        return values / values.sum(1, keepdims=True)

    def malignancy(self, probabilities):
        return probabilities[:, self.malignant].sum(1)


class Data:
    """One split of one data set: files, labels, and the groups that the bootstrap draws as a whole."""

    def __init__(self, root, name, split=None, label="dx", group=None):
        with open(root / name / "labels.csv", newline="") as file:
            rows = [r for r in csv.DictReader(file) if split is None or r["split"] == split]
        if not rows:
            sys.exit(f"{name}: no rows for split {split}")
        self.files = [root / name / r["file"] for r in rows]
        self.labels = np.array([r[label] for r in rows])
        names = [r[group] for r in rows] if group else range(len(rows))
        _, self.groups = np.unique(list(names), return_inverse=True)

    def draw(self, random):
        """Weights of the images in one bootstrap sample: how often each one's group was drawn."""
        number = self.groups.max() + 1
        return np.bincount(random.integers(number, size=number), minlength=number)[self.groups].astype(float)


def mean(hits, weights):
    return float(np.average(hits, weights=weights)) if weights.sum() else float("nan")


class Auc:
    """Area under the ROC curve with weights; ties count half. Sorts once, for many bootstrap samples."""

    def __init__(self, scores, positive):
        values, self.rank = np.unique(scores, return_inverse=True)
        self.size, self.positive = len(values), positive

    def __call__(self, weights):
        yes = np.bincount(self.rank, weights * self.positive, self.size)
        no = np.bincount(self.rank, weights * ~self.positive, self.size)
        return float((yes * (np.cumsum(no) - no / 2)).sum() / (yes.sum() * no.sum()))


def calibration_error(confidence, right, weights):
    """Expected calibration error of the first choice, equal-width bins."""
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights * (right - confidence), CALIBRATION_BINS)
    return float(np.abs(gap).sum() / weights.sum())


def classification(model, data, probabilities):
    """Statistics of one classified data set as {code: function of the weights}."""
    first = np.array(model.codes)[probabilities.argmax(1)]
    right = first == data.labels
    confidence = probabilities.max(1)
    lesions = [c for c in model.codes if (data.labels == c).any()]
    malignant = np.isin(data.labels, np.array(model.codes)[model.malignant])
    areas = {c: Auc(probabilities[:, model.codes.index(c)], data.labels == c) for c in lesions}

    def sensitivity(code):
        return lambda w: mean(right[data.labels == code], w[data.labels == code])

    def specificity(code):
        return lambda w: mean(first[data.labels != code] != code, w[data.labels != code])

    def macro(functions):
        return lambda w: float(np.mean([f(w) for f in functions]))

    result = {
        "top1-sensitivity": macro([sensitivity(c) for c in lesions]),
        "top1-specificity": macro([specificity(c) for c in lesions]),
        "top1-accuracy": lambda w: mean(right, w),
        "macro-auc": macro(areas.values()),
        "melanoma-auc": areas["mel"],
        "malignancy-auc": Auc(model.malignancy(probabilities), malignant),
        "calibration-error": lambda w: calibration_error(confidence, right, w),
        "mean-confidence": lambda w: mean(confidence, w),
    }
    for code in lesions:
        result[f"{code}/sensitivity"] = sensitivity(code)
        result[f"{code}/specificity"] = specificity(code)
        result[f"{code}/auc"] = areas[code]
    return result


def choose_threshold(model, data, probabilities):
    """The highest threshold in whole per cent that keeps the target sensitivity."""
    malignant = np.isin(data.labels, np.array(model.codes)[model.malignant])
    scores = model.malignancy(probabilities)[malignant]
    good = [t for t in np.arange(1, 100) / 100 if (scores >= t).mean() >= TARGET_SENSITIVITY]
    return float(max(good))


def at_threshold(model, data, probabilities, threshold):
    malignant = np.isin(data.labels, np.array(model.codes)[model.malignant])
    above = model.malignancy(probabilities) >= threshold
    kinds = {
        "malignancy-sensitivity": (malignant, above),
        "malignancy-specificity": (~malignant, ~above),
        "above-threshold/mel": (data.labels == "mel", above),
        "above-threshold/bcc": (data.labels == "bcc", above),
        "above-threshold/akiec": (data.labels == "akiec", above),
    }
    return {k: lambda w, m=m, hit=hit: mean(hit[m], w[m]) for k, (m, hit) in kinds.items()}


def with_intervals(functions, parts, resamples):
    """{code: (value, low, high)}: 95 % percentile intervals. `parts`: the data sets, drawn independently."""
    random = np.random.default_rng(SEED)
    whole = np.ones(sum(len(p.files) for p in parts))
    samples = {code: [] for code in functions}
    for _ in range(resamples):
        weights = np.concatenate([p.draw(random) for p in parts])
        for code, function in functions.items():
            samples[code].append(function(weights))
    return {c: (f(whole), *np.nanpercentile(samples[c], [2.5, 97.5]).tolist()) for c, f in functions.items()}


def compare(model, data, usual, changed):
    """How another way to resize changes the first choice."""
    moved = int((usual.argmax(1) != changed.argmax(1)).sum())
    value = classification(model, data, changed)["top1-sensitivity"](np.ones(len(data.files)))
    return f"{moved} of {len(data.files)} first choices differ, top1-sensitivity {value:.3f}"


def synthetic():
    """Frames without any content, which a user may well send by mistake."""
    noise = np.random.default_rng(SEED).integers(0, 256, (168, 224, 3), np.uint8)
    flat = {"black": (0, 0, 0), "white": (255, 255, 255), "flat skin colour": (224, 180, 160)}
    return {k: Image.new("RGB", (224, 168), v) for k, v in flat.items()} | {"noise": Image.fromarray(noise)}


def evaluate(model, root, resamples):
    val = Data(root, "ham10000", "val", group="lesion_id")
    test = Data(root, "ham10000", "test", group="lesion_id")
    objects = Data(root, "ood-caltech101", "test", label="category", group="category")
    foreign = Data(root, "isic2017", "test")
    phone = Data(root, "pad-ufes-20-samples", label="diagnostic")
    logits = {d: model.logits(d.files) for d in (val, test, objects, foreign, phone)}

    other, mel = model.codes.index("other"), model.codes.index("mel")
    resized = {f.__name__: model.logits(test.files, f) for f in (unrounded, bicubic)}
    result = {}
    for column, adjust in (("adjusted", True), ("unadjusted", False)):
        p = {d: model.probabilities(rows, adjust) for d, rows in logits.items()}
        threshold = choose_threshold(model, val, p[val])
        functions = classification(model, test, p[test]) | at_threshold(model, test, p[test], threshold)
        figures = with_intervals(functions, [test], resamples)
        is_object = np.repeat([False, True], [len(test.files), len(objects.files)])
        area = Auc(np.concatenate([p[test][:, other], p[objects][:, other]]), is_object)
        figures |= with_intervals({"out-of-domain-auc": area}, [test, objects], resamples)
        area = Auc(p[foreign][:, mel], foreign.labels == "mel")
        figures |= with_intervals({"isic2017-melanoma-auc": area}, [foreign], resamples)
        chosen = {d: rows.argmax(1) == other for d, rows in p.items()}
        frames = synthetic()
        blank = model.probabilities(model.logits(list(frames.values())), adjust)
        result[column] = {
            "threshold": threshold,
            "figures": figures,
            "other resizing": {
                name: compare(model, test, p[test], model.probabilities(rows, adjust)) for name, rows in resized.items()
            },
            "taken for other": {
                "lesions (HAM10000 test)": f"{chosen[test].sum()} of {len(test.files)}",
                "objects (Caltech-101 test)": f"{chosen[objects].sum()} of {len(objects.files)}",
                "lesions (ISIC 2017 test)": f"{chosen[foreign].sum()} of {len(foreign.files)}",
                "phone photographs (PAD-UFES-20)": f"{chosen[phone].sum()} of {len(phone.files)}",
            },
            "synthetic frames": {
                name: f"{model.codes[row.argmax()]} {row.max():.3f}, other {row[other]:.3f}"
                for name, row in zip(frames, blank, strict=True)
            },
        }
    return result


def show(result):
    """Markdown, as in the model card."""
    columns = list(result)
    print("| figure | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for code in result[columns[0]]["figures"]:
        cells = ("{:.3f} ({:.3f} to {:.3f})".format(*result[c]["figures"][code]) for c in columns)
        print(f"| {code} | " + " | ".join(cells) + " |")
    for column in columns:
        print(f"\n{column}: threshold {result[column]['threshold']:.2f}")
        for kind in ("other resizing", "taken for other", "synthetic frames"):
            for name, value in result[column][kind].items():
                print(f"  {kind}: {name}: {value}")


def differences(model, found):
    """What model.toml states otherwise."""
    stated = model.description["malignancy"]["threshold"]
    if abs(stated - found["threshold"]) > 1e-9:
        yield f"malignancy.threshold is {stated}, found {found['threshold']}"
    for metric in model.description["metric"]:
        seen = found["figures"][metric["code"]]
        for key, value in zip(("value", "low", "high"), seen, strict=True):
            if abs(metric[key] - value) > TOLERANCE:
                yield f"{metric['code']}.{key} is {metric[key]}, found {value:.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--resamples", type=int, default=2000, help="bootstrap samples")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write everything here too")
    parser.add_argument("--check", action="store_true", help="compare with model.toml")
    given = parser.parse_args()
    model = Model(FOLDER, given.threads)
    result = evaluate(model, given.data, given.resamples)
    show(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    if given.check:
        found = list(differences(model, result["adjusted"]))
        print("\nmodel.toml " + ("differs:\n" + "\n".join(found) if found else "agrees"))
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
