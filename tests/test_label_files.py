"""Files that name the labels of images, and data sets of the package datasets."""

from __future__ import annotations

import json

import pytest
from labelled import NAMES, mosaics
from small_classifier import raises

from sep_peft.training import label_samples, read_label_file
from sep_peft.training.label_files import LabelFile, check_trainable, is_label_file, read_labelled_test


def expected(folder) -> LabelFile:
    train = [(folder / "a.png", ("dog", "sea")), (folder / "sub" / "b.png", ())]
    return LabelFile(
        ["dog", "sea"], train, {"val": [(folder / "c.png", ("sea",))], "test": [(folder / "d.png", ("dog",))]}
    )


ROWS = [
    ("a.png", ["dog", "sea"], "train"),
    ("sub/b.png", [], ""),
    ("c.png", ["sea"], "Valid"),
    ("d.png", ["dog"], "test"),
]
OBJECTS = [{"file_name": image, "labels": own, "split": split} for image, own, split in ROWS]
FILES = {
    "parted.csv": "image,labels,split\n" + "".join(f"{image},{';'.join(own)},{split}\n" for image, own, split in ROWS),
    "bars.csv": "\ufeffPath,Tags,Part\r\n" + "".join(f"{i},{' | '.join(o)},{s}\r\n" for i, o, s in ROWS),
    "lists.csv": 'image,labels,split\na.png,"[""dog"", ""sea""]",train\nsub/b.png,[],\nc.png,sea,val\nd.png,dog,test\n',
    "columns.csv": "image,dog,sea,split\na.png,1,1,train\nsub/b.png,0,0,train\n\nc.png,0,1,val\nd.png,1,0,test\n",
    "lines.jsonl": "\n".join(map(json.dumps, OBJECTS)) + "\n",
    "list.json": json.dumps(OBJECTS),
}


@pytest.mark.parametrize("name", FILES)
def test_every_layout_is_read(name, tmp_path):
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8", newline="")
    assert is_label_file(path) and not is_label_file(tmp_path)
    assert read_label_file(path) == expected(tmp_path)
    assert read_labelled_test(path) == expected(tmp_path).tests["test"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "{file} has no rows. It needs one for each image."),
        ("a.csv", "photo,labels\na.png,dog\n", "{file} needs a column of images, image, file_name, filename, file or "
         "path, but has 'photo', 'labels'."),
        ("a.csv", "image,labels\n,dog\n", "Line 2 of {file} needs a path in 'image', but has ''."),
        ("a.csv", "image,labels,split\na.png,dog,later\n", "Line 2 of {file} needs train, val or test in split, but "
         "has 'later'."),
        ("a.csv", "image,labels\na.png\n", "{file} cannot be read as CSV: line 2 has 1 value for 2 columns."),
        ("a.csv", "image,labels,Labels\na.png,b,c\n", "{file} cannot be read as CSV: two columns are called 'labels'."),
        ("a.csv", "image,labels\na.png,\n", "{file} has no label in any row."),
        ("a.csv", "image,dog\na.png,yes\n", "{file} needs a column of labels, labels, label, tags or classes, or one "
         "of 0 and 1 for each class, but line 2 has 'yes' in 'dog'."),
        ("a.csv", "image,labels\na.png,dog\n./a.png,sea\n", "Line 3 of {file} names the image './a.png' again, after "
         "line 2. Give an image one row with all its labels."),
        ("a.csv", "image,labels\n../a.png,dog\n", "Line 2 of {file} needs a path below its folder, but '../a.png' "
         "leads out of the folder."),
        ("a.jsonl", r'{"image": "/etc/a\u001b.png", "labels": ["dog"]}', "Line 1 of {file} needs a path below its "
         "folder, but '/etc/a\\x1b.png' leads out of the folder."),
        ("a.json", '[{"image": "a.png", "labels": ["dog", 3]}]', "Entry 0 of {file} needs a list of class names in "
         "labels, but has ['dog', 3]."),
        ("a.jsonl", '{"image": "a.png", "labels": ["dog"]}\n[]', "Line 2 of {file} must be an object with image and "
         "labels, but is []."),
        ("a.jsonl", "{", "{file} cannot be read as JSONL: Expecting property name enclosed in double quotes: line 1 "
         "column 2 (char 1)."),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with raises(message.format(file=path)):
        read_label_file(path)


def test_classes_to_train_are_two_and_have_images(tmp_path):
    with raises(f"There is no file {tmp_path / 'a.csv'}.", FileNotFoundError):
        read_label_file(tmp_path / "a.csv")
    with raises("a.csv needs at least two classes, but has 1."):
        check_trainable(LabelFile(["dog"], [("a", ("dog",))]), "a.csv")
    with raises("a.csv has classes of which no training image is: 'sea'."):
        check_trainable(LabelFile(["dog", "sea"], [("a", ("dog",))], {"val": [("b", ("sea",))]}), "a.csv")


def test_a_column_of_a_data_set_gives_samples():
    datasets = pytest.importorskip("datasets")
    images = mosaics("train", 3)
    places = [[NAMES.index(name) for name in own] for _, own in images]
    features = datasets.Features(
        {"picture": datasets.Image(), "tags": datasets.Sequence(datasets.ClassLabel(names=NAMES))}
    )
    found = datasets.Dataset.from_dict({"picture": [image for image, _ in images], "tags": places}, features)
    names, samples = label_samples(found, "picture", "tags")
    assert names == NAMES and [own for _, own in samples] == [own for _, own in images]
    assert all(isinstance(image, bytes) for image, _ in samples)  # not decoded yet
    texts = [{"image": "a.png", "labels": ["dog"]}, {"image": "b.png", "labels": []}]
    assert label_samples(texts) == (None, [("a.png", ("dog",)), ("b.png", ())])
    with raises("Row 0 of the data set needs a list of class names, but has 'dog'."):
        label_samples([{"image": "a.png", "labels": "dog"}])
    with raises("The data set has no column 'labels'; it has 'picture', 'tags'."):
        label_samples(found, "picture")
