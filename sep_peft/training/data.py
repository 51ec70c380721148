"""Images with labels as training reads them: augmented anew in every epoch, the same in every run and process."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import nn
from transformers import TrainerCallback
from transformers.image_processing_base import ImageProcessingMixin

from ..classifier.images import read_image
from ..classifier.processors import processor_part
from ..classifier.trunk_cache import TrunkCache
from ..method.base_recipe import BaseRecipe
from .augmentation import crop_and_flip, input_size
from .decoded import DecodedImages


class EpochDataset(torch.utils.data.Dataset, ABC):
    """A data set that shows an epoch at a time; data loader workers that run already see the epoch change."""

    def __init__(self):
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that is shown, counted from 0."""
        return int(self._epoch)

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """An image as it is in this epoch."""

    @property
    def fingerprint(self) -> str:
        """What tells these images from others, for a training that is gone on with; "" where nothing does."""
        return ""

    def set_epoch(self, epoch: int) -> None:
        """Show another epoch. An `EpochSampler` calls it, and so does Trainer in one process."""
        self._epoch.fill_(epoch)


class AugmentedImages(EpochDataset):
    """Images as a model takes them.

    With a recipe they are augmented as the field does it: a random part, resized to the model's input and, where the
    recipe says so, mirrored half of the time. What is drawn depends on the recipe's seed, the epoch and the index
    alone, so workers, many processes and a resumed run see the same images. Files are decoded once, as far as
    `DecodedImages` has room.

    Args:
        images: N images.
        processor: an image processor of transformers, or a processor that has one.
        recipe: gives `smallest_crop`, `mirrors` and `seed`; None: images as they are.
        read: what `images` have in the place of an image -> an RGB `PIL.Image`; by default paths, URLs and images.

    Raises:
        ValueError: there is no image processor.
    """

    def __init__(
        self,
        images: Sequence[Any],
        processor,
        recipe: BaseRecipe | None = None,
        *,
        read: Callable[[Any], Image.Image] = read_image,
    ):
        super().__init__()
        self.images = list(images)
        self.recipe = recipe
        self._read = DecodedImages(read)
        self._processor = processor_part(processor, "image_processor", ImageProcessingMixin, "to read images")
        self._size = input_size(self._processor)

    def __len__(self) -> int:
        return len(self.images)

    def file_names(self) -> list[str]:
        """Of the images that are files, without their folders; "" for the others."""
        return [os.path.basename(image) if isinstance(image, (str, os.PathLike)) else "" for image in self.images]

    def image_at(self, index: int, epoch: int) -> dict[str, torch.Tensor]:
        """What the image processor gives for an image as it is in an epoch, such as `pixel_values` (channels, height,
        width)."""
        image, options = self._read(index, self.images[index]), {}
        if self.recipe is not None:
            source = random.Random(f"{self.recipe.seed}/{epoch}/{index}")
            image = crop_and_flip(image, self.recipe.smallest_crop, self._size, source, self.recipe.mirrors)
            if self._size is not None:  # rescaling and normalizing are left to do
                steps = ("do_resize", "do_center_crop")
                options = {step: False for step in steps if getattr(self._processor, step, None)}
        return {name: value[0] for name, value in self._processor(image, return_tensors="pt", **options).items()}


class LabelledImages(AugmentedImages):
    """Images with labels, as `SEPClassifier` and Trainer take them; augmented as `AugmentedImages` are.

    An entry is a dict of what the image processor gives for one image and its label as `labels`.

    Args:
        samples: N images and names of their classes; where an image may have several, a list of names each, and
            `labels` are then (C,) with 1 for those of an image.
        names: all class names, in the order of the labels.
        processor, recipe, read: as for `AugmentedImages`.

    Raises:
        ValueError: a sample has a class that is not in `names`, or there is no image processor.

    Example:
        >>> images = LabelledImages(samples, classifier.class_names, processor, recipe)
        >>> loader = DataLoader(images, recipe.batch_size, sampler=EpochSampler(images, recipe.seed))
    """

    def __init__(
        self,
        samples: Sequence[tuple[Any, str]] | Sequence[tuple[Any, Sequence[str]]],
        names: Sequence[str],
        processor,
        recipe: BaseRecipe | None = None,
        *,
        read: Callable[[Any], Image.Image] = read_image,
    ):
        labels = {name: label for label, name in enumerate(names)}
        if unknown := sorted({repr(name) for _, own in samples for name in names_of(own) if name not in labels}):
            raise ValueError(f"The samples have classes that are not among the names: {', '.join(unknown)}.")
        super().__init__([image for image, _ in samples], processor, recipe, read=read)
        self.labels = [
            tuple(sorted({labels[name] for name in own})) if isinstance(own, (list, tuple)) else labels[cast(str, own)]
            for _, own in samples
        ]
        self._count = len(labels)

    def plain(self) -> LabelledImages:
        """The same images as they are, not augmented."""
        plain = copy.copy(self)
        plain.recipe = None
        return plain

    def targets(self) -> torch.Tensor:
        """Labels of all images, in order: (N,) class indices, or (N, C) with 1 for those of an image that may have
        several. int64 or fp32."""
        return torch.stack([torch.as_tensor(self._label(label)) for label in self.labels])

    def _label(self, label: int | tuple[int, ...]) -> int | torch.Tensor:
        if isinstance(label, int):
            return label
        target = torch.zeros(self._count)
        target[list(label)] = 1
        return target

    @property
    def fingerprint(self) -> str:
        """A digest of the labels, and of the file names where the images are files, in their order."""
        named = [list(pair) for pair in zip(self.file_names(), self.labels, strict=True)]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        return self.at(index, self.epoch)

    def at(self, index: int, epoch: int) -> dict[str, torch.Tensor | int]:
        """An entry as it is in an epoch, whichever is shown."""
        return {**self.image_at(index, epoch), "labels": self._label(self.labels[index])}


def names_of(label: Any) -> Sequence[Any]:
    """The names of a sample's classes, which has one or a list of them."""
    return label if isinstance(label, (list, tuple)) else [label]


class CachedImages(EpochDataset):
    """Images whose frozen pass, and all below the adapter's `start_layer`, is run once for some augmentations of each.

    Epoch e shows view ``e mod views``, which is augmented as in epoch ``e mod views``: with as many views as epochs
    training is what it is without a cache.

    Args:
        images: N of them.
        model: with a SEP adapter that prompts the image tower.
        views: augmentations of each image.
        folder: where to keep what was computed between runs; None: in memory.

    Raises:
        ValueError: the adapter has no prompts in the image tower; see `TrunkCache`.
    """

    def __init__(self, images: LabelledImages, model: nn.Module, views: int, folder: str | os.PathLike | None = None):
        super().__init__()
        self._count, self._views, self._fingerprint = len(images), views, images.fingerprint
        self._cache = TrunkCache(model, _FirstEpochs(images, views), folder)

    def __len__(self) -> int:
        return self._count

    @property
    def fingerprint(self) -> str:
        """That of the images."""
        return self._fingerprint

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        return self._cache[index + self.epoch % self._views * self._count]


class ImagePart(EpochDataset):
    """Some of the images of a data set, each augmented as in the whole.

    Args:
        images: the whole.
        indices: of the images of the part, in order.
    """

    def __init__(self, images: EpochDataset, indices: Sequence[int]):
        super().__init__()
        self._images, self._indices = images, list(indices)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self._images.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        return self._images[self._indices[index]]


class _FirstEpochs(torch.utils.data.Dataset):
    """N images as they are in the first epochs: entry i + N e is image i in epoch e."""

    def __init__(self, images: LabelledImages, epochs: int):
        self._images, self._epochs = images, epochs

    def __len__(self) -> int:
        return len(self._images) * self._epochs

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        epoch, image = divmod(index, len(self._images))
        return self._images.at(image, epoch)


# order


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` images in an epoch, which is the one that Trainer draws for the same seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


class EpochSampler(torch.utils.data.Sampler[int]):
    """Shuffles a data set anew in every epoch, and tells it the epoch.

    Every time it is gone through to the end is an epoch; `set_epoch` goes on elsewhere, after a resumed run.

    Args:
        images: to shuffle.
        seed: of the order; that of the recipe.
    """

    def __init__(self, images: EpochDataset, seed: int):
        self._images, self._seed, self._epoch = images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that comes next, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[int]:
        self._images.set_epoch(self._epoch)
        yield from epoch_order(len(self._images), self._seed, self._epoch)
        self._epoch += 1


class EpochCallback(TrainerCallback):
    """Tells a Trainer's `EpochDataset` the epoch; Trainer does so itself in one process, but not in several."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        assert train_dataloader is not None, "Trainer hands its data loader to callbacks"
        train_dataloader.dataset.set_epoch(int(state.epoch))
