"""EfficientNet-Lite0 with three heads in one forward pass: classes, their activation maps, and the outline.

The layers are those of TensorFlow's EfficientNet-Lite0 (SAME padding, ReLU6, no squeeze and excitation), so that
published weights fit. No padding depends on the image size: every side must be a multiple of 32.
"""

import torch
from torch import nn
from torch.nn import functional

# expansion, channels, repeats, stride, kernel
STAGES = [
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
]
STEM, HEAD = 32, 1280
SKIPS = {2: 24, 4: 40, 10: 112}  # block: channels; strides 4, 8 and 16
FROZEN_BLOCKS = 3  # with the stem: general edges and colours, and the costliest part to train
EPSILON, MOMENTUM = 1e-3, 0.03


class Convolution(nn.Module):
    """Convolution with TensorFlow's SAME padding for even sides, BatchNorm, and ReLU6 unless `linear`."""

    def __init__(self, given, made, kernel=1, stride=1, groups=1, linear=False):
        super().__init__()
        self.uneven = stride == 2  # one column and row more at the right and at the bottom
        self.conv = nn.Conv2d(
            given, made, kernel, stride, 0 if self.uneven else kernel // 2, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(made, eps=EPSILON, momentum=MOMENTUM)
        self.linear = linear

    def forward(self, x):
        if self.uneven:
            before, after = (self.conv.kernel_size[0] - 2) // 2, (self.conv.kernel_size[0] - 1) // 2
            x = functional.pad(x, (before, after, before, after))
        x = self.norm(self.conv(x))
        return x if self.linear else functional.relu6(x, inplace=True)


class Block(nn.Module):
    """Inverted residual with stochastic depth."""

    def __init__(self, given, made, expansion, stride, kernel, drop):
        super().__init__()
        wide = given * expansion
        layers = [Convolution(given, wide)] if expansion > 1 else []
        layers += [Convolution(wide, wide, kernel, stride, groups=wide), Convolution(wide, made, linear=True)]
        self.layers = nn.Sequential(*layers)
        self.shortcut, self.drop = stride == 1 and given == made, drop

    def forward(self, x):
        y = self.layers(x)
        if not self.shortcut:
            return y
        if self.training and self.drop:
            keep = torch.rand(len(x), 1, 1, 1) >= self.drop
            y = y * (keep / (1 - self.drop)).to(y.dtype)
        return x + y


class Decoder(nn.Module):
    """From stride 32 up to stride 4, adding one skip connection per step."""

    def __init__(self, last=320, channels=(48, 32, 24, 16)):
        super().__init__()
        deep, middle, fine, finest = channels
        self.entry = Convolution(last, deep)
        widths = [(deep, middle), (middle, fine), (fine, finest)]
        self.sides = nn.ModuleList(
            Convolution(skip, given) for skip, (given, _) in zip(sorted(SKIPS.values(), reverse=True), widths)
        )
        self.steps = nn.ModuleList(Convolution(given, made, kernel=3) for given, made in widths)
        self.mask = nn.Conv2d(finest, 1, 1)

    def forward(self, last, skips):
        x = self.entry(last)
        for side, step, skip in zip(self.sides, self.steps, skips):
            x = step(functional.interpolate(x, scale_factor=2.0, mode="nearest") + side(skip))
        return self.mask(x)


class Network(nn.Module):
    """`image`: float [n, 3, side, side], RGB, 0 to 1.

    Gives logits [n, classes], the class activation maps [n, classes, side/32, side/32] whose mean the logits are,
    and the outline [n, 1, side/4, side/4], in logits.
    """

    def __init__(self, classes, dropout=0.3, drop_connect=0.1):
        super().__init__()
        self.stem = Convolution(3, STEM, kernel=3, stride=2)
        blocks, given, total = [], STEM, sum(stage[2] for stage in STAGES)
        for expansion, made, repeats, stride, kernel in STAGES:
            for repeat in range(repeats):
                drop = drop_connect * len(blocks) / total
                blocks.append(Block(given, made, expansion, 1 if repeat else stride, kernel, drop))
                given = made
        self.blocks = nn.ModuleList(blocks)
        self.head = Convolution(given, HEAD)
        self.classifier = nn.Conv2d(HEAD, classes, 1)
        self.decoder = Decoder()
        self.dropout = dropout
        self.eval()

    def train(self, mode=True):
        """The frozen layers keep the statistics of their BatchNorm."""
        super().train(mode)
        for part in self.frozen():
            part.eval()
        return self

    def frozen(self):
        return [self.stem, *self.blocks[:FROZEN_BLOCKS]]

    def features(self, image):
        """The last feature map, the input of the head, and the skip connections from coarse to fine."""
        skips = []
        with torch.no_grad():
            x = self.stem((image * 255 - 127) / 128)
            for number, block in enumerate(self.blocks[:FROZEN_BLOCKS]):
                x = block(x)
                if number in SKIPS:
                    skips.insert(0, x)
        for number, block in enumerate(self.blocks[FROZEN_BLOCKS:], FROZEN_BLOCKS):
            x = block(x)
            if number in SKIPS:
                skips.insert(0, x)
        return self.head(x), x, skips

    def forward(self, image):
        features, last, skips = self.features(image)
        outline = self.decoder(last, skips)
        if self.training:
            pooled = functional.dropout(features.mean((2, 3), keepdim=True), self.dropout)
            return self.classifier(pooled).flatten(1), None, outline
        maps = self.classifier(features)
        return maps.mean((2, 3)), maps, outline

    def convolutions(self):
        """Those with a BatchNorm, in the order in which they are computed."""
        yield self.stem
        for block in self.blocks:
            yield from block.layers
        yield self.head
        yield self.decoder.entry
        for pair in zip(self.decoder.sides, self.decoder.steps):
            yield from pair
