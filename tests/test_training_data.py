"""Images as training reads them: augmentation, and which image is shown when."""

from __future__ import annotations

import random
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader

from sep_peft.training import EpochSampler, LabelledImages, Recipe
from sep_peft.training.augmentation import crop_and_flip, input_size, random_box
from sep_peft.training.data import epoch_order
from sep_peft.training.decoded import DecodedImages


NAMES = ["cat", "dog", "cow"]


def make_image(seed: int = 0, size: tuple[int, int] = (64, 40)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


SAMPLES = [(make_image(i), NAMES[i % 3]) for i in range(7)]


@pytest.fixture(scope="module")
def processor():
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    return transformers.CLIPImageProcessor(**sizes)


def pixels(images: LabelledImages) -> torch.Tensor:
    return torch.stack([images[i]["pixel_values"] for i in range(len(images))])


# augmentation


@pytest.mark.parametrize("size", [(96, 64), (7, 200), (1, 1), (31, 33)])
@pytest.mark.parametrize("smallest", [0.08, 0.5, 1.0])
def test_box_is_inside_and_large_enough(size, smallest):
    source = random.Random(0)
    for _ in range(200):
        left, top, right, bottom = random_box(size, smallest, source)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        if 3 / 4 <= size[0] / size[1] <= 4 / 3 and min(size) > 20:
            assert (right - left) * (bottom - top) >= 0.9 * smallest * size[0] * size[1]


def test_boxes_have_the_fields_distribution():
    """Shares of the area and logarithms of the aspect are spread evenly, where every aspect fits into the image."""
    source = random.Random(0)
    boxes = [random_box((1000, 1000), 0.08, source) for _ in range(4000)]
    shares = np.array([(right - left) * (bottom - top) / 1e6 for left, top, right, bottom in boxes])
    ratios = np.log([(right - left) / (bottom - top) for left, top, right, bottom in boxes])
    small = shares[shares < 0.68]
    assert np.quantile(small, [0.0, 0.25, 0.5, 0.75]) == pytest.approx([0.08, 0.23, 0.38, 0.53], abs=0.02)
    expected = np.log(4 / 3) * np.array([-1, -0.5, 0, 0.5, 1])
    assert np.quantile(ratios[shares < 0.68], np.linspace(0, 1, 5)) == pytest.approx(expected, abs=0.03)


def test_a_whole_image_is_what_the_processor_gives(processor):
    """Without a crop, on an image of the model's size already, augmentation is the processor or its mirror image."""
    square = make_image(size=(24, 24))
    expected = processor(square, return_tensors="pt")["pixel_values"][0]
    images, seen = LabelledImages([(square, "cat")], NAMES, processor, Recipe(smallest_crop=1.0)), set()
    for epoch in range(20):
        found = images.at(0, epoch)["pixel_values"]
        assert found.shape == expected.shape
        seen |= {"as it is"} if torch.allclose(found, expected, atol=1e-5) else set()
        seen |= {"mirrored"} if torch.allclose(found, expected.flip(-1), atol=1e-5) else set()
    assert seen == {"as it is", "mirrored"}


def test_without_a_recipe_images_are_as_the_processor_makes_them(processor):
    images = LabelledImages(SAMPLES, NAMES, processor)
    expected = processor([image for image, _ in SAMPLES], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels(images), expected)
    assert [images[i]["labels"] for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]


PROCESSORS = [
    ("CLIPImageProcessor", {}, (224, 224)),
    ("CLIPImageProcessorPil", {}, (224, 224)),
    ("CLIPImageProcessor", {"do_center_crop": False, "size": {"height": 20, "width": 30}}, (20, 30)),
    ("CLIPImageProcessor", {"do_center_crop": False}, None),  # the shorter edge: the other depends on the image
    ("CLIPImageProcessor", {"do_center_crop": False, "do_resize": False}, None),
    ("SiglipImageProcessor", {}, (224, 224)),
    ("Siglip2ImageProcessor", {}, None),  # patches, as many as the image's aspect has
    ("EfficientNetImageProcessor", {}, (346, 346)),
    ("BridgeTowerImageProcessor", {}, (288, 288)),
    ("ConvNextImageProcessor", {}, None),
    ("FlavaImageProcessor", {}, (224, 224)),
]


@pytest.mark.parametrize(("name", "options", "size"), PROCESSORS)
def test_every_processor(name, options, size):
    """What is augmented has the keys and the size of what is not, whatever the image's aspect."""
    processor = getattr(transformers, name)(**options)
    assert input_size(processor) == size
    samples = [(make_image(0, (60, 60)), "cat"), (make_image(1, (80, 60)), "dog")]
    plain, augmented = (LabelledImages(samples, NAMES, processor, r)[0] for r in (None, Recipe()))
    assert set(plain) == set(augmented)
    assert plain["pixel_values"].shape == augmented["pixel_values"].shape
    assert plain["pixel_values"].mean() == pytest.approx(augmented["pixel_values"].mean().item(), abs=0.1)
    batch = next(iter(DataLoader(LabelledImages(samples, NAMES, processor, Recipe()), 2)))
    assert len(batch["pixel_values"]) == 2 and batch["labels"].tolist() == [0, 1]


def test_size_of_an_image_without_a_named_one():
    image = crop_and_flip(make_image(size=(64, 40)), 0.5, None, random.Random(0))
    assert image.size == (40, 40)


# which image when


def test_what_is_shown_depends_on_seed_epoch_and_index_alone(processor):
    recipe = Recipe(smallest_crop=0.3)
    images, again = (LabelledImages(SAMPLES, NAMES, processor, recipe) for _ in range(2))
    random.seed(0)
    torch.manual_seed(0)
    first = pixels(images)
    random.seed(1)
    images.set_epoch(1)
    second = pixels(images)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    images.set_epoch(0)
    assert torch.equal(pixels(images), first)
    assert torch.equal(torch.stack([again.at(i, 1)["pixel_values"] for i in reversed(range(7))]).flip(0), second)
    other = LabelledImages(SAMPLES, NAMES, processor, Recipe(smallest_crop=0.3, seed=2))
    assert not any(torch.equal(a, b) for a, b in zip(first, pixels(other), strict=True))
    same = LabelledImages([SAMPLES[0]] * 2, NAMES, processor, recipe)
    assert not torch.equal(*pixels(same))


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_epoch(persistent, processor):
    images = LabelledImages(SAMPLES, NAMES, processor, Recipe())
    plain = DataLoader(images, 3, sampler=EpochSampler(images, 1))
    options = {"num_workers": 2, "persistent_workers": persistent}
    with_workers = DataLoader(images, 3, sampler=EpochSampler(images, 1), **options)
    expected = [[batch["pixel_values"] for batch in plain] for _ in range(3)]
    found = [[batch["pixel_values"] for batch in with_workers] for _ in range(3)]
    for epoch in range(3):
        assert torch.equal(torch.cat(found[epoch]), torch.cat(expected[epoch])), epoch
    assert not torch.equal(torch.cat(expected[0]), torch.cat(expected[1]))


def test_order_of_the_epochs(processor):
    images = LabelledImages(SAMPLES, NAMES, processor)
    sampler = EpochSampler(images, 3)
    orders = [list(sampler) for _ in range(2)]
    assert len(sampler) == 7 and images.epoch == 1
    assert orders == [epoch_order(7, 3, 0), epoch_order(7, 3, 1)] and orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(7))
    resumed = EpochSampler(images, 3)
    resumed.set_epoch(1)
    assert list(resumed) == orders[1]


def test_images_are_read_as_told(processor):
    opened = []

    def read(key: str) -> Image.Image:
        opened.append(key)
        return make_image(int(key))

    images = LabelledImages([("5", "dog"), ("2", "cow")], NAMES, processor, read=read)
    assert torch.equal(images[1]["pixel_values"], processor(make_image(2), return_tensors="pt")["pixel_values"][0])
    assert opened == ["2"]


def test_what_is_not_allowed(processor):
    message = "The samples have classes that are not among the names: 'ant', 1."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LabelledImages([*SAMPLES, (make_image(), "ant"), (make_image(), 1)], NAMES, processor)
    message = "This classifier has no processor to read images. Pass processor=AutoProcessor.from_pretrained(...)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LabelledImages(SAMPLES, NAMES, None)
    images = LabelledImages([(Path("none.jpg"), "cat")], NAMES, processor)
    with pytest.raises(ValueError, match=r"^The image 'none.jpg' cannot be read: "):
        images[0]


def test_files_are_decoded_once(processor, tmp_path):
    """As far as there is room; images that are open already are not kept, and other processes begin empty."""
    reads = []

    def read(path):
        reads.append(path)
        return Image.new("RGB", (10, 5))

    decoded = DecodedImages(read, room=4 * 10 * 5 * 2)
    first = [decoded(index, f"{index}.jpg") for index in range(3)]
    again = [decoded(index, f"{index}.jpg") for index in range(3)]
    assert reads == ["0.jpg", "1.jpg", "2.jpg", "2.jpg"]  # for the third there is no room
    assert again[0] is first[0] and again[1] is first[1]
    decoded(0, Image.new("RGB", (10, 5)))
    decoded(0, Image.new("RGB", (10, 5)))
    assert len(reads) == 6
    deepcopy(decoded)(0, "0.jpg")
    assert len(reads) == 7

    path = tmp_path / "image.png"
    Image.new("RGB", (20, 20), "red").save(path)
    images = LabelledImages([(path, "cat")], NAMES, processor, Recipe())
    plain = images.plain()
    expected = [images.at(0, epoch)["pixel_values"] for epoch in range(3)]
    path.unlink()
    assert all(torch.equal(images.at(0, epoch)["pixel_values"], expected[epoch]) for epoch in range(3))
    assert plain[0]["pixel_values"].shape == expected[0].shape  # of the same images
