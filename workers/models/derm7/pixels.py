"""Image files as the service sees them: `worker pixels` decodes, turns and squashes them, in training and evaluation too; and
the outlines that `worker outlines` says it would report."""

import io
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

TARGET = Path(__file__).resolve().parents[3] / "target"
# As `cargo build -p dermflow-workers` makes it, with and without --release; both decode alike.
BUILT = [TARGET / profile / "worker" for profile in ("release", "debug")]
AT_ONCE = 200  # files of one call


def program(given=None):
    """The worker's program: the one given, or the first that was built."""
    found = next((p for p in ([given] if given else BUILT) if p.is_file()), None)
    if found is None:
        raise SystemExit("no worker: cargo build --release -p dermflow-workers, or give --worker")
    return found


def decoded(worker, files, size=None):
    """One array uint8 [rows, columns, 3] for each file: the whole frame, squashed to `size` (columns, rows) if given."""
    options = ["--size", *map(str, size)] if size else []
    for start in range(0, len(files), AT_ONCE):
        command = [worker, "pixels", *options, *files[start : start + AT_ONCE]]
        stream = io.BytesIO(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        while stream.readline():  # P6
            columns, rows = map(int, stream.readline().split())
            stream.readline()  # 255
            yield np.frombuffer(stream.read(columns * rows * 3), np.uint8).reshape(rows, columns, 3)


def outlined(worker, model, library, files):
    """One ring for each file: points (x, y) in pixels, the first one again at the end; none where no lesion is seen."""
    for start in range(0, len(files), AT_ONCE):
        command = [worker, "outlines", "--ort-dylib", library, model, *files[start : start + AT_ONCE]]
        for line in subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines():
            points = line.removeprefix("POLYGON ").strip("()")
            yield [] if points == "EMPTY" else [tuple(map(float, point.split())) for point in points.split(", ")]


def bilinear(image, size):
    """A PIL image squashed as the worker does it: with antialiasing, rounded to whole values, columns before rows. In one
    step, Pillow 13 takes whichever is quicker first."""
    narrow = image.resize((size[0], image.height), Image.Resampling.BILINEAR)
    return np.asarray(narrow.resize(size, Image.Resampling.BILINEAR))
