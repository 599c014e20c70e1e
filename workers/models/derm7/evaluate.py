#!/usr/bin/env python3
"""Recompute every figure of the model card from the data sets.

    pip install -r requirements.txt
    cargo build --release -p dermflow-workers
    python3 evaluate.py --data DIR [--json FILE] [--check]

The worker's own program decodes and squashes the images. README.md describes what DIR holds. Thresholds are chosen on the `val` split and reported on `test`. With --check the
exit status is 1 when model.toml states other thresholds or metrics, or when pictures that show nothing are let pass. --model takes another folder, as ../derm7-int8. The probabilities of lesions are those given that the image shows skin, as in a report, whether or not
the image would be refused; how many are is a figure of its own.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFilter

from pixels import bilinear, decoded, outlined, program

FOLDER = Path(__file__).parent
TARGET_SENSITIVITY = 0.90  # of the thresholds of referral, on the val split
CALIBRATION_BINS = 15
SEED = 20261121
AGES = [0, 40, 60, 75]  # years, where the bands of the subgroups begin
FEWEST = 10  # images with, and without, what a figure of a subgroup is about
# What --check lets pass: another CPU's kernels move a probability by about 1e-6, and so at most a few images.
TOLERANCE = 0.002


def unrounded(image, size):
    bands = [band.convert("F").resize(size, Image.Resampling.BILINEAR) for band in image.split()]
    return np.stack([np.asarray(band) for band in bands], axis=-1)


def bicubic(image, size):
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def share(hits, number):
    """How many of how many, with the 95 % interval of the share (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    z, p = 1.959964, hits / number
    scale = 1 + z * z / number
    middle, half = p + z * z / (2 * number), z * np.sqrt(p * (1 - p) / number + z * z / (4 * number * number))
    low, high = max(0, middle - half) / scale, min(scale, middle + half) / scale
    return {"hits": int(hits), "of": int(number), "value": float(p), "low": float(low), "high": float(high)}


class Model:
    """The network with its description; knows nothing about the data sets."""

    def __init__(self, folder, threads, worker=None):
        self.folder, self.worker = folder, program(worker)
        self.description = tomllib.loads((folder / "model.toml").read_text())
        classes = self.description["class"]
        codes = [c["code"] for c in classes]
        self.log_prior = np.log([c["prior"] for c in classes])
        # Version 2026.11 does not say which, nor has it indicators.
        self.not_skin = codes.index(self.description.get("domain", {"class": "other"})["class"])
        self.conditions = np.delete(np.arange(len(codes)), self.not_skin)
        self.codes = [codes[c] for c in self.conditions]
        self.indicators = {i["id"]: i for i in self.description.get("indicator", []) if "classes" in i}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
        self.outputs = [o.name for o in self.session.get_outputs()]

    def frames(self, images, resize):
        """The whole frames squashed to the input size."""
        given = self.description["input"]
        size = given["width"], given["height"]
        if isinstance(images[0], Path):
            return list(decoded(self.worker, images, size))
        return [resize(image.convert("RGB"), size) for image in images]

    def tensor(self, frames):
        """Normalised, channels first."""
        given = self.description["input"]
        values = np.stack(frames).astype(np.float32) / np.float32(255)
        values = (values - np.float32(given["mean"])) / np.float32(given["deviation"])
        return values.transpose(0, 3, 1, 2)

    def run(self, names, images, resize=bilinear, batch=32):
        """`images`: paths, or PIL images for `resize`. One array per name of an output, one row per image."""
        rows = []
        for start in range(0, len(images), batch):
            tensors = self.tensor(self.frames(images[start : start + batch], resize))
            rows.append(self.session.run(names, {self.description["input"]["name"]: tensors}))
        return [np.concatenate(column).astype(np.float64) for column in zip(*rows)]

    def logits(self, images, resize=bilinear):
        return self.run([self.description["output"]["logits"]], images, resize)[0]

    def softmax(self, logits, adjust=True):
        """softmax(logits - ln prior) over all classes; plain softmax without `adjust`."""
        values = logits - self.log_prior if adjust else logits
        values = np.exp(values - values.max(1, keepdims=True))
        return values / values.sum(1, keepdims=True)

    def skin(self, logits, adjust=True):
        """The probability that an image shows skin."""
        return 1 - self.softmax(logits, adjust)[:, self.not_skin]

    def probabilities(self, logits, adjust=True):
        """Of the conditions, given that it does."""
        values = (logits - self.log_prior if adjust else logits)[:, self.conditions]
        values = np.exp(values - values.max(1, keepdims=True))
        return values / values.sum(1, keepdims=True)

    def counted(self, indicator):
        """Which conditions an indicator sums up."""
        return np.isin(self.codes, self.indicators[indicator]["classes"])

    def indicated(self, indicator, probabilities):
        return probabilities[:, self.counted(indicator)].sum(1)

    def positive(self, indicator, data):
        """Which images are of these conditions."""
        return np.isin(data.labels, np.array(self.codes)[self.counted(indicator)])


class Data:
    """One split of one data set: files, labels, and the groups that the bootstrap draws as a whole."""

    def __init__(self, root, name, split=None, label="dx", group=None):
        with open(root / name / "labels.csv", newline="") as file:
            rows = [r for r in csv.DictReader(file) if split is None or r["split"] == split]
        if not rows:
            sys.exit(f"{name}: no rows for split {split}")
        self.files = [root / name / r["file"] for r in rows]
        self.rows, self.labels = rows, np.array([r[label] for r in rows])
        names = [r[group] for r in rows] if group else range(len(rows))
        _, self.groups = np.unique(list(names), return_inverse=True)

    def keep(self, chosen):
        self.files = [f for f, c in zip(self.files, chosen) if c]
        self.rows, self.labels = [r for r, c in zip(self.rows, chosen) if c], self.labels[chosen]
        _, self.groups = np.unique(self.groups[chosen], return_inverse=True)

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
        pairs = yes.sum() * no.sum()
        return float((yes * (np.cumsum(no) - no / 2)).sum() / pairs) if pairs else float("nan")


def calibration_error(confidence, right, weights):
    """Expected calibration error of the first choice, equal-width bins."""
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights * (right - confidence), CALIBRATION_BINS)
    return float(np.abs(gap).sum() / weights.sum())


def binary_calibration_error(chance, positive, weights):
    """The same for one probability."""
    return calibration_error(chance, positive.astype(float), weights)


def classification(model, data, probabilities):
    """Statistics of one classified data set as {code: function of the weights}."""
    first = np.array(model.codes)[probabilities.argmax(1)]
    right = first == data.labels
    confidence = probabilities.max(1)
    lesions = [c for c in model.codes if (data.labels == c).any()]
    malignant, suspicion = model.positive("malignancy", data), model.indicated("malignancy", probabilities)
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
        "malignancy-auc": Auc(suspicion, malignant),
        "calibration-error": lambda w: calibration_error(confidence, right, w),
        "mean-confidence": lambda w: mean(confidence, w),
        "malignancy-calibration-error": lambda w: binary_calibration_error(suspicion, malignant, w),
    }
    for code in lesions:
        result[f"{code}/sensitivity"] = sensitivity(code)
        result[f"{code}/specificity"] = specificity(code)
        result[f"{code}/auc"] = areas[code]
    return result


def choose_threshold(model, indicator, data, probabilities):
    """The highest threshold in whole per cent that keeps the target sensitivity."""
    scores = model.indicated(indicator, probabilities)[model.positive(indicator, data)]
    good = [t for t in np.arange(1, 100) / 100 if (scores >= t).mean() >= TARGET_SENSITIVITY]
    return float(max(good))


def choose_domain(skin):
    """The highest threshold in whole tenths that refuses none of these."""
    return float(max(t for t in np.arange(1, 10) / 10 if (skin >= t).all()))


def choose_thresholds(model, data, probabilities, skin):
    """{indicator: threshold}; what is not about referral stands in model.toml for other reasons."""
    chosen = {
        name: choose_threshold(model, name, data, probabilities) if given.get("referral") else given["threshold"]
        for name, given in model.indicators.items()
    }
    return chosen | {"domain": choose_domain(skin)}


def at_thresholds(model, data, probabilities, thresholds):
    result = {}
    for name in model.indicators:
        positive = model.positive(name, data)
        above = model.indicated(name, probabilities) >= thresholds[name]
        result[f"{name}-sensitivity"] = lambda w, m=positive, hit=above: mean(hit[m], w[m])
        result[f"{name}-specificity"] = lambda w, m=~positive, hit=~above: mean(hit[m], w[m])
        if name == "malignancy":
            for code in ("mel", "bcc", "akiec"):
                m = data.labels == code
                result[f"above-threshold/{code}"] = lambda w, m=m, hit=above: mean(hit[m], w[m])
    return result


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


def groups(data):
    """{what they are told apart by: {name: which images}}; what labels.csv has no word for is a group, too."""

    def band(age):
        if not age:
            return "unknown"
        number = int(np.searchsorted(AGES, float(age), "right")) - 1
        last = number == len(AGES) - 1
        return f"{AGES[number]} and older" if last else f"{AGES[number]} to {AGES[number + 1] - 1}"

    kinds = {"age": "age_approx", "sex": "sex", "place": "localization", "diagnosis by": "dx_type"}
    for kind, column in kinds.items():
        values = np.array([band(r[column]) if kind == "age" else r[column] or "unknown" for r in data.rows])
        names = sorted(set(values), key=lambda name: (name == "unknown", name))
        yield kind, {name: values == name for name in names}


def subgroups(model, data, probabilities, threshold, resamples):
    """[[kind, group, images, malignant ones, melanomas, figure or None, ...]]: sensitivity and specificity for malignancy at
    the threshold, and melanoma AUC, each in the group alone."""
    malignant, melanoma = model.positive("malignancy", data), data.labels == "mel"
    above, score = model.indicated("malignancy", probabilities) >= threshold, probabilities[:, model.codes.index("mel")]
    functions, rows = {}, []
    for kind, members in groups(data):
        for name, of in members.items():
            yes, no, mel = of & malignant, of & ~malignant, of & melanoma
            row = [kind, name, *(int(m.sum()) for m in (of, yes, mel))]
            rows.append(row)
            if yes.sum() >= FEWEST:
                functions[kind, name, "sensitivity"] = lambda w, m=yes: mean(above[m], w[m])
            if no.sum() >= FEWEST:
                functions[kind, name, "specificity"] = lambda w, m=no: mean(~above[m], w[m])
            if min(mel.sum(), (of & ~melanoma).sum()) >= FEWEST:
                area = Auc(score[of], melanoma[of])
                functions[kind, name, "auc"] = lambda w, m=of, area=area: area(w[m])
    found = with_intervals(functions, [data], resamples)
    return [row + [found.get((*row[:2], figure)) for figure in ("sensitivity", "specificity", "auc")] for row in rows]


def compare(model, data, usual, changed):
    """How another way to decode or resize changes the answers."""
    moved = int((usual.argmax(1) != changed.argmax(1)).sum())
    value = classification(model, data, changed)["top1-sensitivity"](np.ones(len(data.files)))
    most = np.abs(usual - changed).max()
    return f"{moved} of {len(data.files)} first choices differ, top1-sensitivity {value:.3f}, a probability by {most:.3f}"


FRAMES = 50  # of each kind without content
# Of each kind, what --check demands to be refused, whatever the model: what a user sends by mistake gets no report.
LEAST_REFUSED = 0.95
NOTHING = "showing nothing, refused as no skin"


def frames(lesions):
    """Pictures that show nothing, which a user may well send by mistake. Made otherwise than those of training."""
    random = np.random.default_rng(SEED)
    size = (600, 450)

    def flat(colour):
        return Image.new("RGB", size, tuple(int(v) for v in colour))

    def noise(grey, cell):
        shape = (size[1] // cell, size[0] // cell) if grey else (size[1] // cell, size[0] // cell, 3)
        image = Image.fromarray(random.integers(0, 256, shape, np.uint8)).convert("RGB")
        return image.resize(size, Image.Resampling.BILINEAR)

    def scribbled(image, strokes, width):
        image = image.convert("RGB").resize(size)
        draw = ImageDraw.Draw(image)
        for _ in range(strokes):
            x, y = random.integers(-200, size[0]), random.integers(-200, size[1])
            w, h = random.integers(50, 500, 2)
            turn = int(random.integers(0, 360))
            colour = tuple(int(v) for v in random.integers(0, 256, 3))
            draw.arc((x, y, x + w, y + h), turn, turn + int(random.integers(60, 360)), colour, width)
        return image

    def skin():
        red = random.uniform(110, 245)
        return np.array([red, red * random.uniform(0.6, 0.85), red * random.uniform(0.45, 0.75)])

    def written():
        image = flat(random.integers(200, 256, 3))
        draw = ImageDraw.Draw(image)
        for line in range(14):
            text = "".join(chr(97 + int(c)) if c < 26 else " " for c in random.integers(0, 32, 70))
            draw.text((20, 15 + 30 * line), text, fill=(20, 20, 40), font_size=int(random.integers(14, 26)))
        return image

    some = [Image.open(lesions[i]) for i in random.choice(len(lesions), FRAMES, replace=False)]
    dim = [np.clip(random.normal(random.uniform(0, 6), 2, (*size[::-1], 3)), 0, 255) for _ in range(FRAMES)]
    glare = [np.clip(random.normal(random.uniform(249, 255), 2, (*size[::-1], 3)), 0, 255) for _ in range(FRAMES)]
    return {
        "black, with sensor noise": [Image.fromarray(v.astype(np.uint8)) for v in dim],
        "white, with sensor noise": [Image.fromarray(v.astype(np.uint8)) for v in glare],
        "flat grey": [flat([v] * 3) for v in np.linspace(0, 255, FRAMES)],
        "flat skin colour": [flat(skin()) for _ in range(FRAMES)],
        "flat, any colour": [flat(random.integers(0, 256, 3)) for _ in range(FRAMES)],
        "coloured noise": [noise(False, cell) for cell in np.repeat([1, 2, 5, 10, 30], FRAMES // 5)],
        "grey noise": [noise(True, cell) for cell in np.repeat([1, 2, 5, 10, 30], FRAMES // 5)],
        "scribble on paper": [scribbled(flat([255] * 3), random.integers(3, 20), 5) for _ in range(FRAMES)],
        "scribble on skin colour": [scribbled(flat(skin()), random.integers(3, 20), 5) for _ in range(FRAMES)],
        "lesion scribbled over": [scribbled(i, 45, 26) for i in some],
        "text": [written() for _ in range(FRAMES)],
        "lesion blurred beyond recognition": [i.filter(ImageFilter.GaussianBlur(60)) for i in some],
    }


def mask_of(root, file):
    """The mask that was drawn for an image of HAM10000; for a few there is none."""
    return root / "ham10000-masks" / f"{file.stem}_segmentation.png"


def outline_of(logits, size):
    """Inside or not, for each pixel of `size`: the logits, bilinear, above 0."""
    grown = Image.fromarray(logits.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(grown) > 0


def within(ring, size, shape):
    """Which pixels of a mask of `shape` have their centre within a ring (even-odd), in pixels of an image of `size`."""
    rows, columns = ((np.arange(n) + 0.5) / n * length for n, length in zip(shape, reversed(size)))
    inside = np.zeros(shape, bool)
    for (ax, ay), (bx, by) in zip(ring, ring[1:]):
        crossed = (ay > rows) != (by > rows)
        if crossed.any():
            inside[crossed] ^= columns < (ax + (rows[crossed] - ay) / (by - ay) * (bx - ax))[:, None]
    return inside


def box_of(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)


def box_overlap(a, b):
    across, down = (max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return across * down / max(1, sum(areas) - across * down)


def outlines(model, root, data):
    """Overlap with the drawn masks, and how often the heat map of the first choice is hottest inside."""
    maps, logits, made = model.run(["cam", model.description["output"]["logits"], "outline"], data.files)
    places = np.exp(maps - model.log_prior[:, None, None])
    heat = places / places.sum(1, keepdims=True)
    first = model.conditions[model.probabilities(logits).argmax(1)]
    found = []
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.*"))
    rings = outlined(model.worker, model.folder, library, data.files)
    columns = zip(data.files, made[:, 0], heat[np.arange(len(first)), first], rings, strict=True)
    for file, row, warmth, ring in columns:
        drawn = np.asarray(Image.open(mask_of(root, file))) > 0
        mask = outline_of(row, drawn.shape[::-1])
        told = within(ring, Image.open(file).size, drawn.shape)
        overlap = (told & drawn).sum() / (told | drawn).sum()
        union, side = (mask | drawn).sum(), np.array(warmth.shape)
        top = (np.array(np.unravel_index(warmth.argmax(), side)) + 0.5) / side * drawn.shape
        found.append(
            (
                (mask & drawn).sum() / union,
                2 * (mask & drawn).sum() / (mask.sum() + drawn.sum()),
                box_overlap(box_of(mask), box_of(drawn)),
                abs(mask.mean() - drawn.mean()),
                (mask & drawn).sum() / union < 0.5,
                drawn[tuple(top.astype(int))],
                drawn.mean(),
                overlap,
                2 * (told & drawn).sum() / (told.sum() + drawn.sum()),
                box_overlap(box_of(told), box_of(drawn)),
                abs(told.mean() - drawn.mean()),
                overlap < 0.5,
            )
        )
    codes = ["iou", "dice", "box-iou", "area-error", "share-below-half"]
    codes = codes + ["heat-map-inside", "heat-map-inside-by-chance"] + [f"served-{code}" for code in codes]
    columns = np.array(found, float).T
    return {f"outline-{c}": lambda w, column=column: mean(column, w) for c, column in zip(codes, columns)}


def modality(model, root):
    """Photographs that were not used, against dermoscopic test images."""
    phone = Data(root, "pad-ufes-20-samples", label="diagnostic", group="patient_id")
    phone.keep(phone.groups % 2 == 1)
    parts = [phone, Data(root, "ham10000", "test", group="lesion_id"), Data(root, "isic2017", "test")]
    scores = np.concatenate([model.run(["modality"], p.files)[0][:, 0] for p in parts])
    clinical = np.repeat([True, False, False], [len(p.files) for p in parts])
    # The same photographs, stored as HAM10000 is: what is told apart is not only the size of the file.
    small = []
    with tempfile.TemporaryDirectory() as folder:
        for image in map(Image.fromarray, decoded(model.worker, phone.files)):
            small.append(Path(folder) / f"{len(small)}.jpg")
            image.resize((224, 168), Image.Resampling.LANCZOS).save(small[-1], "JPEG", quality=84)
        again = model.run(["modality"], small)[0][:, 0] > 0
    return parts, {
        "modality/auc": Auc(scores, clinical),
        "modality/photographs-recognised": lambda w: mean(scores[clinical] > 0, w[clinical]),
        "modality/photographs-recognised-as-224x168": lambda w: mean(again, w[clinical]),
        "modality/dermoscopic-recognised": lambda w: mean(scores[~clinical] <= 0, w[~clinical]),
    }


def evaluate(model, root, resamples):
    val = Data(root, "ham10000", "val", group="lesion_id")
    test = Data(root, "ham10000", "test", group="lesion_id")
    objects = Data(root, "ood-caltech101", "test", label="category", group="category")
    foreign = Data(root, "isic2017", "test")
    phone = Data(root, "pad-ufes-20-samples", label="diagnostic")
    logits = {d: model.logits(d.files) for d in (val, test, objects, foreign, phone)}

    own = [Image.fromarray(frame) for frame in decoded(model.worker, test.files)]
    changed = {f.__name__: model.logits(own, f) for f in (unrounded, bicubic)}
    changed["libjpeg-turbo"] = model.logits([Image.open(f) for f in test.files])
    empty = {name: model.logits(images) for name, images in frames(test.files).items()}
    result = {}
    for column, adjust in (("adjusted", True), ("unadjusted", False)):
        p = {d: model.probabilities(rows, adjust) for d, rows in logits.items()}
        skin = {d: model.skin(rows, adjust) for d, rows in logits.items()}
        thresholds = choose_thresholds(model, val, p[val], skin[val])
        functions = classification(model, test, p[test]) | at_thresholds(model, test, p[test], thresholds)
        accepted = {d: shown >= thresholds["domain"] for d, shown in skin.items()}
        functions["domain-lesions-accepted"] = lambda w: mean(accepted[test], w)
        figures = with_intervals(functions, [test], resamples)
        is_object = np.repeat([False, True], [len(test.files), len(objects.files)])
        area = Auc(-np.concatenate([skin[test], skin[objects]]), is_object)
        figures |= with_intervals({"out-of-domain-auc": area}, [test, objects], resamples)
        functions = {"domain-objects-refused": lambda w: mean(~accepted[objects], w)}
        figures |= with_intervals(functions, [objects], resamples)
        functions = {
            f"isic2017-{name}-auc": Auc(p[foreign][:, model.codes.index(code)], foreign.labels == code)
            for name, code in (("melanoma", "mel"), ("keratosis", "bkl"))
        }
        three = [model.codes.index(c) for c in ("bkl", "mel", "nv")]
        choice = np.array(model.codes)[three][p[foreign][:, three].argmax(1)]
        functions["isic2017-three-class-sensitivity"] = lambda w: float(
            np.mean([mean((choice == c)[foreign.labels == c], w[foreign.labels == c]) for c in ("bkl", "mel", "nv")])
        )
        above = at_thresholds(model, foreign, p[foreign], thresholds)
        functions |= {f"isic2017-{c}": above[c] for c in ("malignancy-sensitivity", "malignancy-specificity")}
        figures |= with_intervals(functions, [foreign], resamples)
        refused = {name: model.skin(rows, adjust) < thresholds["domain"] for name, rows in empty.items()}
        result[column] = {
            "thresholds": thresholds,
            "figures": figures,
            "other pixels": {
                name: compare(model, test, p[test], model.probabilities(rows, adjust)) for name, rows in changed.items()
            },
            "refused as no skin": {
                "lesions (HAM10000 test)": share((~accepted[test]).sum(), len(test.files)),
                "objects (Caltech-101 test)": share((~accepted[objects]).sum(), len(objects.files)),
                "lesions (ISIC 2017 test)": share((~accepted[foreign]).sum(), len(foreign.files)),
                "phone photographs (PAD-UFES-20)": share((~accepted[phone]).sum(), len(phone.files)),
            },
            NOTHING: {name: share(rows.sum(), len(rows)) for name, rows in refused.items()},
        }
        if adjust:
            result[column]["subgroups"] = subgroups(model, test, p[test], thresholds["malignancy"], resamples)
    if "outline" in model.outputs:
        drawn = Data(root, "ham10000", "val", group="lesion_id")
        drawn.keep(np.array([mask_of(root, f).exists() for f in drawn.files]))
        found = with_intervals(outlines(model, root, drawn), [drawn], resamples)
        parts, functions = modality(model, root)
        found |= with_intervals(functions, parts, resamples)
        for column in result.values():
            column["figures"] |= found
    return result


def gain(model, other, root, resamples):
    """What `model` has more than `other`, on the same images and the same samples of lesions: {which priors: figures}."""
    test, foreign = Data(root, "ham10000", "test", group="lesion_id"), Data(root, "isic2017", "test")
    logits = {(m, d): m.logits(d.files) for m in (model, other) for d in (test, foreign)}
    codes = ["top1-sensitivity", "top1-accuracy", "macro-auc", "melanoma-auc", "malignancy-auc", "calibration-error"]
    result = {}
    for name, own, its in (("as served", True, True), ("both without priors", False, False), ("only it without", True, False)):
        adjust = {model: own, other: its}
        both = [classification(model, test, m.probabilities(logits[m, test], adjust[m])) for m in (model, other)]
        functions = {c: lambda w, c=c, both=both: both[0][c](w) - both[1][c](w) for c in codes}
        result[name] = with_intervals(functions, [test], resamples)
        p = [m.probabilities(logits[m, foreign], adjust[m]) for m in (model, other)]
        functions = {}
        for figure, code in (("melanoma", "mel"), ("keratosis", "bkl")):
            a, b = (Auc(rows[:, model.codes.index(code)], foreign.labels == code) for rows in p)
            functions[f"isic2017-{figure}-auc"] = lambda w, a=a, b=b: a(w) - b(w)
        result[name] |= with_intervals(functions, [foreign], resamples)
    return result


def milliseconds(model, file, runs=200):
    """Median time of one image on one thread, with decoding and resizing left out."""
    tensor = model.tensor(model.frames([file], bilinear))
    times = []
    for _ in range(runs):
        start = time.process_time()
        model.session.run(None, {model.description["input"]["name"]: tensor})
        times.append(time.process_time() - start)
    return 1000 * float(np.median(times))


def show(result):
    """Markdown, as in the model card."""
    columns = list(result)
    print("| figure | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for code in result[columns[0]]["figures"]:
        cells = ("{:.3f} ({:.3f} to {:.3f})".format(*result[c]["figures"][code]) for c in columns)
        print(f"| {code} | " + " | ".join(cells) + " |")
    for column in columns:
        print(f"\n{column}: thresholds {result[column]['thresholds']}")
        for name, text in result[column]["other pixels"].items():
            print(f"  other pixels: {name}: {text}")
        for kind in ("refused as no skin", NOTHING):
            for name, found in result[column][kind].items():
                print(f"  {kind}: {name}: " + "{hits} of {of}, {value:.3f} ({low:.3f} to {high:.3f})".format(**found))
    print("\nadjusted, malignancy threshold:")
    print("| group | images | malignant | melanomas | sensitivity | specificity | melanoma AUC |\n|---|---|---|---|---|---|---|")
    for kind, name, *counts in result["adjusted"]["subgroups"]:
        cells = [n if isinstance(n, int) else "{:.3f} ({:.3f} to {:.3f})".format(*n) if n else "too few" for n in counts]
        print(f"| {kind}: {name} | " + " | ".join(map(str, cells)) + " |")


def differences(model, found):
    """What model.toml states otherwise."""
    stated = {name: given["threshold"] for name, given in model.indicators.items()}
    for name, threshold in (stated | {"domain": model.description["domain"]["threshold"]}).items():
        if abs(threshold - found["thresholds"][name]) > 1e-9:
            yield f"the threshold of {name} is {threshold}, found {found['thresholds'][name]}"
    for metric in model.description["metric"]:
        seen = found["figures"][metric["code"]]
        for key, value in zip(("value", "low", "high"), seen, strict=True):
            if abs(metric[key] - value) > TOLERANCE:
                yield f"{metric['code']}.{key} is {metric[key]}, found {value:.4f}"
    for name, refused in found[NOTHING].items():
        if refused["value"] < LEAST_REFUSED:
            yield f"of what shows nothing ({name}) {refused['value']:.3f} is refused, must be {LEAST_REFUSED}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--resamples", type=int, default=2000, help="bootstrap samples")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, default=FOLDER, help="the model's folder [default: this one]")
    parser.add_argument("--worker", type=Path, help="the worker's program [default: the one in target]")
    parser.add_argument("--json", type=Path, help="write everything here too")
    parser.add_argument(
        "--against",
        type=Path,
        help="only the differences from the version in this folder: as served, both without priors, and only it without",
    )
    parser.add_argument("--check", action="store_true", help="compare with model.toml")
    given = parser.parse_args()
    model = Model(given.model, given.threads, given.worker)
    if given.against:
        other = Model(given.against, given.threads, given.worker)
        found = gain(model, other, given.data, given.resamples)
        print("| figure | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
        for code in found["as served"]:
            print(f"| {code} | " + " | ".join("{:+.3f} ({:.3f} to {:.3f})".format(*c[code]) for c in found.values()) + " |")
        return
    result = evaluate(model, given.data, given.resamples)
    show(result)
    alone = Model(given.model, 1, given.worker)
    sample = given.data / "ham10000" / "images" / "ISIC_0024306.jpg"
    print(f"\n{milliseconds(alone, sample):.1f} ms of one core for each image")
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    if given.check:
        found = list(differences(model, result["adjusted"]))
        print("\nmodel.toml " + ("does not hold:\n" + "\n".join(found) if found else "agrees"))
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
