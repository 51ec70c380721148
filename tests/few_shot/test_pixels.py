"""Test images that are kept: the same pixels as those that were read, in the room that they may take."""

from __future__ import annotations

import pytest
import torch
from images import batches
from PIL import Image
from pixels import KeptPixels, channel_values
from readers import ImageSet, Sample
from transformers import AutoImageProcessor


LABELS = [0, 1, 0, 1, 1]
BROKEN = 3
#: Bytes of an image of the small CLIP, a byte each.
SIZE = 3 * 64 * 64


@pytest.fixture
def processor(assets):
    return AutoImageProcessor.from_pretrained(assets / "clip-small")


@pytest.fixture
def data(assets):
    """Five images, of which one cannot be read; `opened` has the keys that were asked for."""
    files = sorted((assets / "caltech101" / "test" / "lamp").iterdir())
    opened = []

    def read(key):
        opened.append(key)
        if key == str(BROKEN):
            raise OSError("cut short")
        return Image.open(files[int(key)]).convert("RGB")

    samples = [Sample(str(index), label) for index, label in enumerate(LABELS)]
    found = ImageSet("lamps", ("old", "new"), {"test": samples}, read)
    return found, samples, opened


def gone_through(data, processor, kept=None, **options):
    return list(batches(data[0], data[1], processor, batch_size=2, kept=kept, **options))


def same(first, second):
    for one, other in zip(first, second, strict=True):
        assert (one[0] is None) == (other[0] is None) and (one[0] is None or torch.equal(one[0], other[0]))
        assert torch.equal(one[1], other[1]) and one[2] == other[2]


def test_kept_images_are_those_that_were_read(data, processor):
    found, samples, opened = data
    kept, expected = KeptPixels(processor, 5 * SIZE), gone_through(data, processor)
    opened.clear()
    for _ in range(2):
        same(gone_through(data, processor, kept), expected)
    assert opened == [sample.key for sample in samples]  # the broken one was asked for once, too
    again = [Sample(sample.key, 1 - sample.label) for sample in reversed(samples)]
    opened.clear()
    turned = gone_through((found, again, opened), processor, kept)
    assert not opened and turned[0][2] == [str(BROKEN)] and turned[0][1].tolist() == [0]
    assert torch.equal(turned[0][0][0], expected[2][0][0])
    shifted = gone_through(data, processor, kept, shifted="grey")
    assert opened and not torch.equal(shifted[0][0], expected[0][0])


def test_room_ends(data, processor):
    """What has no room is read again; with the images of another data set gone there is room."""
    opened = data[2]
    kept, expected = KeptPixels(processor, 3 * SIZE), gone_through(data, processor)
    same(gone_through(data, processor, kept), expected)
    opened.clear()
    same(gone_through(data, processor, kept), expected)
    assert opened == ["4"]
    kept.keep_only(["another"])
    opened.clear()
    same(gone_through(data, processor, kept), expected)
    assert len(opened) == 5


def test_values_that_are_no_bytes_are_kept_as_they_are(processor):
    kept, pixels = KeptPixels(processor, 2**20), torch.randn(1, 3, 64, 64)
    kept.add([("lamps", "", "0")], [True], pixels)
    assert torch.equal(kept.stacked([("lamps", "", "0")])[0], pixels)
    assert channel_values(processor, (8, 8)) is None
    values = channel_values(processor, (64, 64))
    assert values.shape == (3, 256) and (values.diff() > 0).all()
