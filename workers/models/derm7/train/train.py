#!/usr/bin/env python3
"""Train one stage, from the weights of published versions or of a stage before (see ../README.md).

    python3 train.py --data DIR --cache DIR --start derm7.onnx --side 160 --steps 1300 --out stage1.pt
    python3 train.py --data DIR --cache DIR --start stage1.pt --side 192 --steps 700 --rate 0.5 --out stage2.pt

The state is saved every 50 steps; the same command goes on where it was stopped. Seeded; the CPU only.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

import data
from network import Network
from pixels import bilinear, program

BATCH, SAVE_EVERY = 32, 50
WARM_UP, WEIGHT_DECAY, SMOOTHING, CLIP, AVERAGE = 60, 0.02, 0.05, 2.0, 0.997
TEMPERATURE = 0.808  # that is folded into the classifier of 2026.11.1
BACKBONE_RATE, CLASSIFIER_RATE, DECODER_RATE = 4e-4, 1e-3, 2e-3
OUTLINE_WEIGHT = 0.5


def published(file):
    """What a version folds its BatchNorms into: the convolutions in the order in which they are computed, weights and
    biases in turn; and the layers without one, by their name. The decoder is not in each."""
    import onnx
    from onnx import numpy_helper

    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in onnx.load(file).graph.initializer}
    folded = [t for name, t in tensors.items() if name.startswith("onnx::Conv")]
    if "m._fc.weight" in tensors:
        return folded, {"classifier": [tensors["m._fc.weight"][..., None, None], tensors["m._fc.bias"]]}
    heads = {n: [tensors[f"network.{n}.{kind}"] for kind in ("weight", "bias")] for n in ("classifier", "decoder.mask")}
    heads["classifier"] = [t * TEMPERATURE for t in heads["classifier"]]
    return folded, heads


def from_onnx(network, file, blend, images):
    """Takes over the weights of a published version, or the mean of two, the second of which has the share `blend[1]`.

    The BatchNorms are put back with the mean and deviation that `images` give each layer, so that the network
    computes what the folded one does, and can be trained.
    """
    folded, heads = published(file)
    if blend:
        others, share = published(blend[0]), float(blend[1])
        folded[: len(others[0])] = [torch.lerp(a, b, share) for a, b in zip(folded, others[0])]
        for name, parts in others[1].items():
            heads[name] = [torch.lerp(a, b, share) for a, b in zip(heads[name], parts, strict=True)]
    for name, (weight, bias) in heads.items():
        part = network.get_submodule(name)
        part.weight.data, part.bias.data = weight, bias
    hooks = []
    layers = list(zip(network.convolutions(), folded[::2], folded[1::2]))
    for layer, weight, bias in layers:
        norm = layer.norm
        scale = weight.flatten(1).norm(dim=1).clamp_min(1e-6)  # BatchNorm makes the length of a filter free
        unit = weight[0].numel() ** 0.5 / 10
        layer.conv.weight.data = weight / scale.view(-1, 1, 1, 1) * unit

        def measure(module, given, made, ratio=scale / unit, bias=bias):
            values = given[0].double()
            module.seen += torch.stack([values.mean((0, 2, 3)), (values**2).mean((0, 2, 3))])
            module.batches += 1
            return given[0] * ratio.view(-1, 1, 1) + bias.view(-1, 1, 1)

        norm.seen, norm.batches, norm.ratio, norm.offset = 0, 0, scale / unit, bias
        hooks.append(norm.register_forward_hook(measure))
    with torch.no_grad():
        for batch in images.split(BATCH):
            network(batch / 255)
    for hook in hooks:
        hook.remove()
    for norm in (layer.norm for layer, _, _ in layers):
        mean, square = norm.seen / norm.batches
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(square - mean**2)
        norm.weight.data = norm.ratio * (norm.running_var + norm.eps).sqrt()
        norm.bias.data = norm.offset + norm.ratio * norm.running_mean
        del norm.seen, norm.batches, norm.ratio, norm.offset


def groups(network, rate):
    """Parameters with their learning rate; biases and BatchNorms do not decay."""
    made = []
    parts = [(network.blocks, BACKBONE_RATE), (network.head, BACKBONE_RATE)]
    parts += [(network.classifier, CLASSIFIER_RATE), (network.decoder, DECODER_RATE)]
    for part, own in parts:
        free = [p for p in part.parameters() if p.requires_grad]
        for decay, chosen in ((WEIGHT_DECAY, [p for p in free if p.ndim > 1]), (0, [p for p in free if p.ndim <= 1])):
            made.append({"params": chosen, "weight_decay": decay, "peak": own * rate, "lr": own * rate})
    return made


def outline_loss(made, mask):
    """Cross-entropy and soft Dice over the images that have a mask."""
    has = (mask != data.UNKNOWN).flatten(1).all(1)
    if not has.any():
        return made.sum() * 0
    made, wanted = made[has, 0], mask[has].float() / 254
    share = torch.sigmoid(made)
    both, all_ = (share * wanted).sum((1, 2)), (share + wanted).sum((1, 2))
    dice = 1 - (2 * both + 1) / (all_ + 1)
    return functional.binary_cross_entropy_with_logits(made, wanted) + dice.mean()


def squashed(images, side):
    frames = (bilinear(Image.fromarray(image), (side, side)) for image in images)
    return torch.tensor(np.stack(list(frames)).transpose(0, 3, 1, 2))


def validate(network, splits, side, prior):
    """Macro sensitivity with equal priors, melanoma AUC and mean IoU of the outlines."""
    network.eval()
    text = []
    for split in splits:
        rows, overlaps = [], []
        for start in range(0, len(split.labels), 64):
            with torch.no_grad():
                images = squashed(split.images[start : start + 64], side)
                logits, _, outline = network(images.to(memory_format=torch.channels_last) / 255)
            rows.append(logits)
            if split.masks is not None:
                wanted = torch.tensor(split.masks[start : start + 64])
                made = functional.interpolate(outline, wanted.shape[1:], mode="bilinear", align_corners=False)[:, 0] > 0
                has, wanted = (wanted != data.UNKNOWN).flatten(1).all(1), wanted > 127
                overlap = (made & wanted).sum((1, 2)) / (made | wanted).sum((1, 2)).clamp_min(1)
                overlaps += overlap[has].tolist()
        p = (torch.cat(rows) - torch.tensor(prior).log()).softmax(1).numpy()
        first, mel = p.argmax(1), split.labels == data.CODES.index("mel")
        recall = [np.mean(first[split.labels == c] == c) for c in np.unique(split.labels)]
        scores = p[:, data.CODES.index("mel")]
        area = np.mean(scores[mel][:, None] > scores[~mel][None])
        text.append(f"{split.name}: macro sensitivity {np.mean(recall):.3f}, melanoma AUC {area:.3f}")
        if overlaps:
            text.append(f"IoU {np.mean(overlaps):.3f}")
    return ", ".join(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder for decoded images, 2 GB")
    parser.add_argument("--start", type=Path, required=True, help="a version of model.onnx, or a finished stage")
    parser.add_argument("--blend", nargs=2, metavar=("FILE", "SHARE"), help="a version, or a stage, mixed into it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", type=Path, help="the worker's program [default: the one in target]")
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rates")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--validate-every", type=int, default=350)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    worker = program(given.worker)
    lesions, objects = data.load(given.data, given.cache, "train", worker)
    val, _ = data.load(given.data, given.cache, "val", worker)
    draws = data.Draws(lesions, objects, given.side, given.seed, 0, 0)

    network, average = Network(len(data.CODES)), Network(len(data.CODES))
    if given.start.suffix == ".onnx":
        chosen = np.random.default_rng(given.seed).choice(len(lesions[0].images), 128, replace=False)
        from_onnx(network, given.start, given.blend, squashed(lesions[0].images[np.sort(chosen)], given.side))
    else:
        network.load_state_dict(torch.load(given.start)["average"])
        for file, share in [given.blend] if given.blend else []:
            for mine, other in zip(network.state_dict().values(), torch.load(file)["average"].values()):
                if mine.is_floating_point():
                    mine.lerp_(other, float(share))
    network = network.to(memory_format=torch.channels_last)
    average = average.to(memory_format=torch.channels_last)
    average.load_state_dict(network.state_dict())
    for part in network.frozen():
        part.requires_grad_(False)
    optimizer = torch.optim.AdamW(groups(network, given.rate))
    done = 0
    if given.out.exists():
        state = torch.load(given.out)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]

    def save(step):
        state = {"network": network.state_dict(), "average": average.state_dict(), "step": step}
        partial = given.out.with_suffix(".partial")
        torch.save(state | {"optimizer": optimizer.state_dict(), "prior": draws.prior}, partial)
        partial.replace(given.out)

    if not done:
        save(0)
    # Another stage sees other draws.
    first = (given.side * 10_000 + done) * BATCH
    draws = data.Draws(lesions, objects, given.side, given.seed, first, (given.steps - done) * BATCH)
    batches = torch.utils.data.DataLoader(draws, BATCH, num_workers=1, prefetch_factor=4)
    losses, started = [], time.monotonic()
    for step, (images, masks, labels) in enumerate(batches, done):
        network.train()
        share = min(1, (step + 1) / WARM_UP) * 0.5 * (1 + np.cos(np.pi * step / given.steps))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        logits, _, outline = network(images.to(memory_format=torch.channels_last) / 255)
        kind = functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        shape = outline_loss(outline, masks)
        optimizer.zero_grad(set_to_none=True)
        (kind + OUTLINE_WEIGHT * shape).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        keep = min(AVERAGE, (step + 1) / (step + 10))
        with torch.no_grad():
            for old, new in zip(average.state_dict().values(), network.state_dict().values()):
                if old.is_floating_point():
                    old.lerp_(new, 1 - keep)
                else:
                    old.copy_(new)
        losses.append((float(kind), float(shape)))
        step += 1
        if step % SAVE_EVERY == 0 or step == given.steps:
            kind, shape = np.mean(losses[-SAVE_EVERY:], 0)
            pace = (time.monotonic() - started) / len(losses)
            print(f"{step}/{given.steps} loss {kind:.3f} outline {shape:.3f}, {pace:.2f} s a step", flush=True)
            save(step)
        if step % given.validate_every == 0 or step == given.steps:
            print(f"{step}", validate(average, val, given.side, draws.prior), flush=True)


if __name__ == "__main__":
    main()
