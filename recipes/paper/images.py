"""Images that lie decoded in memory, and are cropped, mirrored and mixed a batch at a time.

What is random in a batch follows from the seed and from which images are in it. An epoch shuffles the images anew, so
its batches are others, and so are their crops. No state has to be saved for that: a run that is resumed in the middle
of an epoch, with any number of loading processes, sees what an uninterrupted one would have seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from ..common import SIZE

MARGIN = SIZE // 8  # black pixels around an image that is cropped at random


def decoded(data: Dataset) -> Tensor:
    """All images of a dataset, uint8 (n, 3, SIZE, SIZE)."""
    pixels = [np.asarray(image.convert("RGB").resize((SIZE, SIZE))) for image in data["image"]]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def cropped_and_mirrored(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Shifts each image by up to MARGIN pixels, and mirrors every other one, (b, 3, SIZE, SIZE)."""
    size = len(pixels)
    padded = F.pad(pixels, [MARGIN] * 4)
    windows = padded.unfold(2, SIZE, 1).unfold(3, SIZE, 1)  # (b, 3, shifts, shifts, SIZE, SIZE), no copy
    top, left = torch.from_numpy(rng.integers(2 * MARGIN + 1, size=(2, size)))
    cropped = windows[torch.arange(size), :, top, left]
    is_mirrored = torch.from_numpy(rng.random(size) < 0.5)
    return torch.where(is_mirrored[:, None, None, None], cropped.flip(3), cropped)


@dataclass
class Batches:
    """A collator: the numbers of some images -> pixel_values (b, 3, SIZE, SIZE) and labels (b,).

    The dataset of a Trainer is then a `range` of numbers: first those that train, then those that test.

    Attributes:
        pixels: all images, uint8 (n, 3, SIZE, SIZE).
        labels: their classes, (n,).
        num_train: so many of them train.
        augment: whether those are cropped and mirrored at random.
        mixup: those are mixed pairwise in shares from Beta(mixup, mixup) (arXiv 1710.09412), and their labels become
            (b, classes); 0: not.
        mean, std: of every channel, of pixels in [0, 1].
        seed: another one makes other crops of the same batches.
    """

    pixels: Tensor
    labels: Tensor
    num_train: int
    augment: bool = False
    mixup: float = 0.0
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    seed: int = 0

    @classmethod
    def of(cls, train: Dataset, test: Dataset, **settings: Any) -> "Batches":
        """The images of two datasets with the columns "image" and "label"."""
        labels = torch.tensor([*train["label"], *test["label"]])
        return cls(torch.cat([decoded(train), decoded(test)]), labels, len(train), **settings)

    @property
    def train(self) -> range:
        """The numbers of the images that train."""
        return range(self.num_train)

    @property
    def test(self) -> range:
        """The numbers of the images that test."""
        return range(self.num_train, len(self.labels))

    def __call__(self, numbers: list[int]) -> dict[str, Tensor]:
        """The batch of these images, either of those that train or of those that test."""
        pixels = self.pixels[numbers]
        labels = self.labels[numbers]
        is_training = numbers[0] < self.num_train
        rng = np.random.default_rng([self.seed, *numbers])
        if is_training and self.augment:
            pixels = cropped_and_mirrored(pixels, rng)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        values = (pixels / 255 - mean) / std
        if is_training and self.mixup:
            share = rng.beta(self.mixup, self.mixup)
            order = torch.from_numpy(rng.permutation(len(numbers)))
            classes = F.one_hot(labels, int(self.labels.max()) + 1).float()
            values = share * values + (1 - share) * values[order]
            labels = share * classes + (1 - share) * classes[order]
        return {"pixel_values": values, "labels": labels}
