#!/usr/bin/env python3
"""Write model.onnx from a trained stage, and what model.toml needs from the validation split.

    python3 export.py --data DIR --cache DIR --stage stage2.pt --side 192 --out ../model.onnx

The temperature is folded into the classifier, so that softmax(logits - ln prior) is calibrated as it is. The
modality is a logistic regression on the pooled features, fitted to half of the few clinical photographs there are.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import data
from network import Network
from pixels import decoded, program
from train import squashed

# The power of the prior of training that is taken out of the answers: 0 ranks best, 1 finds the rare classes most often.
PRIOR_SHARE = 0.25
DERMOSCOPIC = 600  # images of each data set against which the photographs are told apart
PENALTY = 3e-3
SIZES = [None, (224, 168), (256, 256)]  # a photograph as published, and as the data sets store theirs


class Exported(nn.Module):
    """The network with the calibrated classifier and the modality."""

    def __init__(self, network, temperature, weight, bias):
        super().__init__()
        self.network = network
        network.classifier.weight.data /= temperature
        network.classifier.bias.data /= temperature
        self.modality = nn.Conv2d(len(weight), 1, 1)
        self.modality.weight.data, self.modality.bias.data = weight.view(1, -1, 1, 1), bias.view(1)

    def forward(self, image):
        features, last, skips = self.network.features(image)
        maps = self.network.classifier(features)
        modality = self.modality(features.mean((2, 3), keepdim=True)).flatten(1)
        return maps.mean((2, 3)), maps, self.network.decoder(last, skips), modality


def pooled(network, images):
    """Logits and the 1280 features, from uint8 [n, 3, side, side]."""
    logits, features = [], []
    with torch.no_grad():
        for batch in images.split(32):
            maps = network.features(batch.to(memory_format=torch.channels_last) / 255)[0]
            features.append(maps.mean((2, 3)))
            logits.append(network.classifier(maps).mean((2, 3)))
    return torch.cat(logits), torch.cat(features)


def temperature_of(logits, labels, log_prior):
    """The one that makes the probabilities as served of the validation images likeliest."""
    candidates = np.exp(np.linspace(np.log(0.3), np.log(3), 231))
    adjusted = logits.double() - log_prior
    losses = [nn.functional.cross_entropy(adjusted / t, labels).item() for t in candidates]
    return float(candidates[np.argmin(losses)])


def error(logits, labels, bins=15):
    confidence, first = logits.softmax(1).max(1)
    right = (first == labels).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.double).index_add(0, place, right - confidence.double())
    return float(gap.abs().sum() / len(labels))


def photographs(root, side, worker):
    """Of the patients with an even place in the sorted list; the others are for the test. Each in several sizes."""
    with open(root / "pad-ufes-20-samples" / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    patients = sorted({r["patient_id"] for r in rows})
    chosen = [r for r in rows if patients.index(r["patient_id"]) % 2 == 0]
    files = [root / "pad-ufes-20-samples" / r["file"] for r in chosen]
    with tempfile.TemporaryDirectory() as folder:
        copies = []
        for image in map(Image.fromarray, decoded(worker, files)):
            for size in SIZES:
                copies.append(Path(folder) / f"{len(copies)}.jpg")
                small = image.resize(size, Image.Resampling.LANCZOS) if size else image
                small.save(copies[-1], "JPEG", quality=84)
        made = np.stack(list(decoded(worker, copies, (side, side)))).transpose(0, 3, 1, 2)
    made = np.concatenate([made, made[..., ::-1], made[..., ::-1, :], made[..., ::-1, ::-1]])
    return torch.tensor(np.ascontiguousarray(made)), len(rows)


def logistic(yes, no):
    """Weight and bias; both kinds weigh the same in all."""
    x = torch.cat([yes, no])
    mean, deviation = x.mean(0), x.std(0) + 1e-3
    x, y = (x - mean) / deviation, torch.cat([torch.ones(len(yes)), torch.zeros(len(no))])
    share = torch.cat([torch.full((len(yes),), 0.5 / len(yes)), torch.full((len(no),), 0.5 / len(no))])
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        misses = nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, y, share, reduction="sum")
        value = misses + PENALTY * (weight**2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach(), bias.detach()
    return weight / deviation, bias - (weight * mean / deviation).sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--stage", type=Path, required=True)
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", type=Path, help="the worker's program [default: the one in target]")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    worker = program(given.worker)
    state = torch.load(given.stage)
    network = Network(len(data.CODES))
    network.load_state_dict(state["average"])
    network = network.to(memory_format=torch.channels_last).eval()

    val, _ = data.load(given.data, given.cache, "val", worker)
    log_prior = PRIOR_SHARE * torch.tensor(state["prior"]).log()
    ham, labels = pooled(network, squashed(val[0].images, given.side))[0], torch.tensor(val[0].labels)
    temperature = temperature_of(ham, labels, log_prior)
    before, after = (error((ham.double() - log_prior) / t, labels) for t in (1, temperature))
    print(f"temperature {temperature:.3f}, calibration error on val {before:.3f}, then {after:.3f}")
    prior = np.exp(log_prior.numpy() / temperature)
    for code, share in zip(data.CODES, prior / prior.sum()):
        print(f"prior {code} {share:.4f}")

    clinical, number = photographs(given.data, given.side, worker)
    lesions, _ = data.load(given.data, given.cache, "train", worker)
    random = np.random.default_rng(0)
    chosen = [np.sort(random.choice(len(s.images), DERMOSCOPIC, replace=False)) for s in lesions]
    dermoscopic = torch.cat([squashed(s.images[c], given.side) for s, c in zip(lesions, chosen)])
    weight, bias = logistic(pooled(network, clinical)[1], pooled(network, dermoscopic)[1])
    print(f"modality from {len(clinical) // len(SIZES) // 4} of {number} photographs and {len(dermoscopic)} others")

    torch.onnx.export(
        Exported(network, temperature, weight, bias).eval(),
        torch.rand(1, 3, given.side, given.side),
        str(given.out),
        opset_version=17,
        input_names=["image"],
        output_names=["logits", "cam", "outline", "modality"],
        dynamic_axes={n: {0: "n"} for n in ("image", "logits", "cam", "outline", "modality")},
    )


if __name__ == "__main__":
    main()
