"""The training images: decoded by the worker into arrays once, then drawn, distorted and squashed as the service does it."""

import csv
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.append(str(Path(__file__).resolve().parents[1]))

from pixels import bilinear, decoded  # noqa: E402

CODES = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc", "other"]
OTHER = CODES.index("other")
SIZE = (224, 168)  # of the stored HAM10000 images, columns and rows
SMALLEST = 80  # pixels of the shorter side; the service refuses less
UNKNOWN = 255  # in a mask: nobody drew one
ISIC2017_WEIGHT = 1.5  # how much likelier than one of HAM10000 an image is drawn
SYNTHETIC_SHARE = 0.45  # of what is drawn as "other"; the rest are objects
MARGIN = 64  # pixels reflected around an image, so that turning it leaves no empty corners
KERNELS = [Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BOX, Image.Resampling.HAMMING]


class Split:
    """One split of one data set: `images` uint8 [n, rows, columns, 3], `masks` uint8 or None, `labels`."""

    def __init__(self, root, cache, name, split, worker):
        with open(root / name / "labels.csv", newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["split"] == split]
        if name == "ood-caltech101":
            rows = [r for r in rows if min(Image.open(root / name / r["file"]).size) >= SMALLEST]
        self.name = name
        self.labels = np.array([CODES.index(r.get("dx", "other")) for r in rows])
        files = [root / name / r["file"] for r in rows]
        # Objects come in many sizes.
        size = SIZE if name == "ood-caltech101" else None
        self.images = self.cached(cache / f"{name}-{split}.npy", lambda: np.stack(list(decoded(worker, files, size))))
        self.masks = None
        if name == "ham10000":
            folder = root / "ham10000-masks"
            self.masks = self.cached(cache / f"{name}-{split}-masks.npy", lambda: masks(folder, rows))

    @staticmethod
    def cached(file, make):
        if not file.exists():
            np.save(file, make())
        return np.load(file, mmap_mode="r")


def masks(folder, rows):
    """0 to 254; all UNKNOWN where there is no mask."""
    made = np.full((len(rows), SIZE[1], SIZE[0]), UNKNOWN, np.uint8)
    for row, mask in zip(rows, made):
        file = folder / f"{row['image_id']}_segmentation.png"
        if file.exists():
            drawn = Image.fromarray((np.asarray(Image.open(file)) > 0).astype(np.uint8) * 254)
            mask[:] = np.asarray(drawn.resize(SIZE, Image.Resampling.BOX))
    return made


class Draws:
    """Training image number `i`, with its label and mask: the same for the same seed and `i`."""

    def __init__(self, lesions, objects, side, seed, start, length):
        self.lesions, self.objects = lesions, objects
        self.side, self.seed, self.start, self.length = side, seed, start, length
        counts = np.bincount(np.concatenate([s.labels for s in lesions + [objects]]), minlength=len(CODES))
        self.prior = np.sqrt(counts) / np.sqrt(counts).sum()
        where = np.array([(d, i) for d, s in enumerate(lesions) for i in range(len(s.labels))])
        labels = np.concatenate([s.labels for s in lesions])
        self.places = [where[labels == c] for c in range(OTHER)]
        weights = [np.where(p[:, 0] == 0, 1.0, ISIC2017_WEIGHT) for p in self.places]
        self.weights = [w / w.sum() for w in weights]

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        random = np.random.default_rng((self.seed, self.start + number))
        label = int(random.choice(len(CODES), p=self.prior))
        mask = None
        if label != OTHER:
            split, index = self.places[label][random.choice(len(self.weights[label]), p=self.weights[label])]
            source = self.lesions[split]
            image = source.images[index]
            mask = source.masks[index] if source.masks is not None else None
        elif random.random() < SYNTHETIC_SHARE:
            image = synthetic(random, self.lesions[0].images)
        else:
            image = self.objects.images[random.integers(len(self.objects.images))]
        image, mask = distorted(random, image, mask, self.side)
        return image.transpose(2, 0, 1), mask, label


def distorted(random, image, mask, side):
    """Turned, cut, recoloured and squashed: uint8 [side, side, 3] and uint8 [side / 4, side / 4]."""
    rows, columns = image.shape[:2]
    if random.random() < 0.08:
        image = with_marks(random, image, random.integers(1, 6))
    frame = Image.fromarray(np.pad(image, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), "reflect"))
    scale, aspect = random.uniform(0.68, 1.05), np.exp(random.uniform(-0.12, 0.12))
    half = np.array([columns * scale * aspect, rows * scale / aspect]) / 2
    slack = np.maximum(np.array([columns, rows]) / 2 - half, 0)
    centre = np.array([columns, rows]) / 2 + random.uniform(-1, 1, 2) * slack + MARGIN
    angle = random.uniform(0, 2 * np.pi) if random.random() < 0.6 else 0.0
    if random.random() < 0.5:
        half[0] = -half[0]
    if random.random() < 0.5:
        half[1] = -half[1]
    # Where each corner of the upright result lies in the frame.
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    width, height = (max(8, round(2 * abs(h))) for h in half)
    step = turn * (2 * half / np.array([width, height]))
    origin = centre - turn @ half
    coefficients = (step[0, 0], step[0, 1], origin[0], step[1, 0], step[1, 1], origin[1])
    kind = Image.Transform.AFFINE
    frame = frame.transform((width, height), kind, coefficients, Image.Resampling.BICUBIC)
    frame = recoloured(random, frame)
    if random.random() < 0.7:
        result = bilinear(frame, (side, side))
    else:
        result = np.asarray(frame.resize((side, side), KERNELS[random.integers(len(KERNELS))]))
    if random.random() < 0.25:
        result = result.copy()
        y, x = random.integers(0, side, 2)
        h, w = random.integers(side // 10, side // 3, 2)
        result[max(0, y - h // 2) : y + h // 2, max(0, x - w // 2) : x + w // 2] = random.integers(0, 256, 3)
    if mask is None or mask[0, 0] == UNKNOWN:
        return result, np.full((side // 4, side // 4), UNKNOWN, np.uint8)
    outline = Image.fromarray(np.pad(mask, MARGIN, "reflect"))
    outline = outline.transform((width, height), kind, coefficients, Image.Resampling.BILINEAR)
    return result, np.asarray(outline.resize((side // 4, side // 4), Image.Resampling.BILINEAR))


def recoloured(random, image):
    if random.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 1.5)))
    elif random.random() < 0.12:
        image = image.filter(ImageFilter.UnsharpMask(1.5, int(random.integers(30, 150)), 0))
    if random.random() < 0.15:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(random.integers(40, 95)))
        image = Image.open(file)
    values = np.asarray(image, np.float32) / 255
    if random.random() < 0.85:
        mean = values.mean((0, 1))
        values = (values - mean) * random.uniform(0.75, 1.3) + mean
        grey = values.mean(2, keepdims=True)
        values = (values - grey) * random.uniform(0.6, 1.4) + grey
        values = values * (random.uniform(0.75, 1.25) * random.uniform(0.92, 1.08, 3)).astype(np.float32)
        values = np.clip(values, 0, 1) ** random.uniform(0.8, 1.25)
    if random.random() < 0.1:  # the dark corners of a dermatoscope
        y, x = np.mgrid[-1 : 1 : values.shape[0] * 1j, -1 : 1 : values.shape[1] * 1j]
        edge, soft = random.uniform(0.9, 1.3), random.uniform(0.01, 0.2)
        values = values * np.clip((edge - np.hypot(x, y)) / soft + 0.5, 0, 1)[..., None]
    if random.random() < 0.1:
        values = values + random.normal(0, random.uniform(0.005, 0.05), values.shape)
    return Image.fromarray((np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8))


def with_marks(random, image, number, widest=5):
    """Strokes and dots, as of hairs, pens and rulers."""
    image = Image.fromarray(np.ascontiguousarray(image))
    draw, size = ImageDraw.Draw(image), np.array(image.size)
    for _ in range(number):
        colour = tuple(int(v) for v in random.integers(0, 256, 3))
        if random.random() < 0.4:
            colour = (int(random.integers(0, 60)),) * 3
        points = random.random() * size + np.cumsum(random.normal(0, 0.25, (random.integers(2, 7), 2)) * size, 0)
        draw.line([tuple(p) for p in points], fill=colour, width=int(random.integers(1, widest + 1)))
    return np.asarray(image)


def synthetic(random, lesions):
    """A frame that shows nothing: flat, a gradient, noise, stripes, text-like blocks, or scribbled over."""
    columns, rows = SIZE
    skin = np.array([random.uniform(90, 250), random.uniform(60, 220), random.uniform(50, 210)])
    skin = np.sort(skin)[::-1] if random.random() < 0.6 else random.uniform(0, 256, 3)
    level = random.random()
    base = skin if level < 0.6 else np.full(3, [0.0, 255.0, random.uniform(0, 256)][random.integers(3)])
    image = np.ones((rows, columns, 3)) * base
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    kind = random.integers(7)
    if kind == 1 or (kind != 2 and random.random() < 0.3):
        slope = random.normal(0, 40, (2, 3))
        image = image + y[..., None] * slope[0] + x[..., None] * slope[1]
    if kind == 2:
        cells = (int(random.integers(2, rows + 1)), int(random.integers(2, columns + 1)))
        depth = 1 if random.random() < 0.3 else 3
        rough = random.integers(0, 256, (*cells, depth)) if random.random() < 0.5 else (
            random.normal(128, random.uniform(10, 80), (*cells, depth)))
        rough = np.broadcast_to(np.clip(rough, 0, 255), (*cells, 3)).astype(np.uint8)
        kernel = Image.Resampling.NEAREST if random.random() < 0.5 else Image.Resampling.BICUBIC
        image = np.asarray(Image.fromarray(rough).resize(SIZE, kernel), np.float64)
    elif kind == 3:
        angle, pitch = random.uniform(0, np.pi), random.uniform(4, 60)
        wave = np.sin(pitch * (x * np.cos(angle) + y * np.sin(angle)) + random.uniform(0, 6))
        wave = np.sign(wave) if random.random() < 0.5 else wave
        image = image + wave[..., None] * random.uniform(10, 120) * random.uniform(0.3, 1, 3)
    elif kind == 4:
        image = np.array(image)
        for _ in range(random.integers(3, 80)):
            top, left = random.integers(0, rows), random.integers(0, columns)
            h, w = random.integers(2, 40, 2)
            image[top : top + h, left : left + w] = random.integers(0, 256, 3)
    elif kind == 5:
        image = with_marks(random, np.clip(image, 0, 255).astype(np.uint8), random.integers(3, 40), 7) * 1.0
    elif kind == 6:
        lesion = lesions[random.integers(len(lesions))]
        image = with_marks(random, lesion, random.integers(25, 60), 16) * 1.0
    if random.random() < 0.5 and kind != 6:
        image = image + random.normal(0, random.uniform(0.5, 12), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def load(root, cache, split, worker):
    """Lesions of HAM10000 and ISIC 2017, and objects."""
    root, cache = Path(root), Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    made = [Split(root, cache, n, split, worker) for n in ("ham10000", "isic2017", "ood-caltech101")]
    return made[:2], made[2]
