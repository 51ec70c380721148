"""Readers of data sets."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from readers import Sample, read_dataset


def keys(samples):
    return [sample.key for sample in samples]


def test_coop_split_keeps_order_and_names(images, describe, tmp_path):
    images("flowers/images", {"rose": 2, "aster": 2})
    split = {
        "train": [["aster/00.png", 1, "blue aster"]],
        "val": [["rose/00.png", 0, "rose"]],
        "test": [["rose/01.png", 0, "rose"], ["aster/01.png", 1, "blue aster"]],
    }
    (tmp_path / "flowers" / "split.json").write_text(json.dumps(split))
    description = describe("flowers", reader="coop", split_file="split.json", images="images", template="a {}.")
    data = read_dataset(description, tmp_path)
    assert data.classes == ("rose", "blue aster")  # in the order of the labels, not of the alphabet
    assert data.splits["test"] == [Sample("rose/01.png", 0), Sample("aster/01.png", 1)]
    assert data.template == "a {}."
    assert data.open("aster/01.png").size == (9, 7)


def test_coop_split_with_a_gap_in_its_labels(describe, tmp_path):
    (tmp_path / "gap").mkdir()
    (tmp_path / "gap" / "s.json").write_text(
        json.dumps({"train": [["a", 0, "a"], ["b", 2, "b"]], "val": [], "test": []})
    )
    with pytest.raises(ValueError) as error:
        read_dataset(describe("gap", reader="coop", split_file="s.json"), tmp_path)
    assert str(error.value) == f"{tmp_path / 'gap' / 's.json'}: labels must count from 0 to 1, but are [0, 2]."


def test_folder_without_parts_is_split_with_a_seed(images, describe, tmp_path):
    images("pets", {"cat": 20, "dog": 11})
    splits = [read_dataset(describe("pets", reader="folder", split_seed=seed), tmp_path).splits for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]
    everything = [sample for part in splits[0].values() for sample in part]
    assert len(everything) == len(set(everything)) == 31
    counts = {
        part: [[s.label for s in samples].count(label) for label in (0, 1)] for part, samples in splits[0].items()
    }
    assert counts == {"train": [10, 6], "val": [2, 1], "test": [8, 4]}


def test_folder_with_parts(images, describe, tmp_path):
    for part, count in (("train", 4), ("validation", 2), ("test", 3)):
        images(f"pets/{part}", {"cat": count, "dog": count})
    data = read_dataset(describe("pets", reader="folder"), tmp_path)
    assert {part: len(samples) for part, samples in data.splits.items()} == {"train": 8, "val": 4, "test": 6}
    assert keys(data.splits["val"]) == [f"validation/{c}/{i:02d}.png" for c in ("cat", "dog") for i in range(2)]


def test_folder_without_validation_takes_it_from_training(images, describe, tmp_path):
    for part in ("train", "test"):
        images(f"pets/{part}", {"cat": 10, "dog": 5})
    data = read_dataset(describe("pets", reader="folder"), tmp_path)
    assert {part: len(samples) for part, samples in data.splits.items()} == {"train": 12, "val": 3, "test": 15}
    assert not set(keys(data.splits["train"])) & set(keys(data.splits["val"]))


def test_domains(images, describe, tmp_path):
    for domain in ("photo", "sketch"):
        images(f"shapes/{domain}", {"disc": 6, "star": 6})
    data = read_dataset(describe("shapes", reader="domains"), tmp_path)
    assert data.domains == ["photo", "sketch"]
    assert data.classes == ("disc", "star")
    assert {s.domain for s in data.splits["test"] if s.key.startswith("sketch/")} == {"sketch"}


def test_huggingface_data_set(images, describe, tmp_path):
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    for part in ("train", "test"):
        images(f"pets/{part}", {"cat": 5, "dog": 5})
    data = read_dataset(describe("pets", reader="huggingface", path=str(tmp_path / "pets")), tmp_path)
    assert data.classes == ("cat", "dog")
    assert {part: len(samples) for part, samples in data.splits.items()} == {"train": 8, "val": 2, "test": 10}
    dog = next(sample for sample in data.splits["test"] if sample.label == 1)
    assert data.open(dog.key).getpixel((0, 0))[0] == 40  # the colour that dogs have here


def test_huggingface_image_that_cannot_be_read(images, describe, tmp_path):
    """A decompression bomb and a long image are ValueErrors as everywhere, so that runs replace them."""
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    for part in ("train", "test"):
        images(f"pets/{part}", {"cat": 5, "dog": 5})
    folder = tmp_path / "pets" / "test" / "cat"
    Image.new("L", (1, 1)).save(folder / "00.png", format="bmp")
    content = bytearray((folder / "00.png").read_bytes())
    content[18:26] = (60000).to_bytes(4, "little") * 2
    (folder / "00.png").write_bytes(content)
    Image.new("L", (1, 100_000)).save(folder / "01.png")
    data = read_dataset(describe("pets", reader="huggingface", path=str(tmp_path / "pets")), tmp_path)
    reasons = []
    for sample in data.splits["test"]:
        try:
            data.open(sample.key)
        except ValueError as error:
            reasons.append(str(error).split(" cannot be read: ")[1])
    assert sorted(reason.split(" (")[0].split(",")[0] for reason in reasons) == [
        "Image size",
        "its size is 1 x 100000",
    ]


@pytest.mark.parametrize("names", [("Train", "Valid", "TEST"), ("training", "val", "testing")])
def test_folders_called_like_parts(names, images, describe, tmp_path):
    for name, count in zip(names, (4, 2, 3), strict=True):
        images(f"pets/{name}", {"cat": count, "dog": count})
    images("pets/__MACOSX", {"cat": 1})
    data = read_dataset(describe("pets", reader="folder"), tmp_path)
    assert {part: len(samples) for part, samples in data.splits.items()} == {"train": 8, "val": 4, "test": 6}
    assert data.classes == ("cat", "dog")


def test_part_of_the_classes(images, describe, tmp_path):
    images("pets", {"ant": 9, "cat": 9, "dog": 9})
    data = read_dataset(describe("pets", reader="folder", classes=["dog", "ant"]), tmp_path)
    assert data.classes == ("dog", "ant")
    for samples in data.splits.values():
        assert {sample.label: sample.key.split("/")[0] for sample in samples} == {0: "dog", 1: "ant"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reader": "zip"}, '{file}: "reader" must be one of coop, folder, domains, huggingface.'),
        ({"reader": "folder", "shots": 3}, "{file}: unknown options ['shots']; this reader takes ['split_seed']."),
        ({"reader": "folder", "classes": ["cow"]}, "pets has no classes ['cow']; it has cat, dog."),
    ],
)
def test_mistakes_in_a_description(images, describe, tmp_path, options, message):
    images("pets", {"cat": 3, "dog": 3})
    file = describe("pets", **options)
    with pytest.raises(ValueError) as error:
        read_dataset(file, tmp_path)
    assert str(error.value) == message.format(file=file)


def test_images_that_are_not_there(describe, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        read_dataset(describe("pets", reader="folder"), tmp_path)
    assert str(error.value) == f"{tmp_path / 'pets'} needs images of at least two classes, one folder each, but has []."
