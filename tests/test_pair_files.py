"""Files and folders of images with captions: how they may lie, and mistakes in them, by file and line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from small_classifier import raises

from sep_peft.training import Pair, read_pairs
from sep_peft.training.pair_files import MAX_LINE, MAX_TEXT_FILE, read_pair_folder


def write(folder: Path, *lines, name: str = "pairs.jsonl", images: tuple[str, ...] = ("a.jpg", "b/c.png")) -> Path:
    """Images, empty ones, and a file of lines, objects as JSON and others as they are."""
    for image in images:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).touch()
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_text(text, "utf-8")
    return folder / name


def test_lines_of_one_image_are_put_together(tmp_path):
    file = write(
        tmp_path,
        {"file_name": "a.jpg", "text": " a cat "},
        "",
        {"image": "b/c.png", "captions": ["a dog", "an animal"], "negatives": ["a wolf"]},
        {"file_name": "./b/../a.jpg", "caption": "a tabby", "negatives": None, "other": 5},
    )
    assert read_pairs(file) == [
        Pair(tmp_path / "a.jpg", ("a cat", "a tabby")),
        Pair(tmp_path / "b/c.png", ("a dog", "an animal"), ("a wolf",)),
    ]
    assert [pair.source for pair in read_pairs(file)] == ["pairs.jsonl, line 1", "pairs.jsonl, line 3"]


WRONG = {
    "no JSON": ("{", "it is no JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
    "no object": ("[1]", "it must be a JSON object, but is [1]"),
    "deep": ("[" * 100_000, "it is no JSON (nested too deeply)"),
    "no image": (
        {"text": "a cat"},
        "the path of an image must stand under one of file_name, image, but it has none of file_name, image",
    ),
    "two captions": (
        {"image": "a.jpg", "text": "a", "caption": "b"},
        "a caption must stand under one of text, caption, captions, but it has both text and caption",
    ),
    "missing": ({"image": "x\x1b[2J.jpg", "text": "a"}, "there is no image 'x\\x1b[2J.jpg'"),
    "folder": ({"image": "b", "text": "a"}, "there is no image 'b'"),
    "out": ({"image": "b/../../a.jpg", "text": "a"}, "'b/../../a.jpg' leads out of the folder"),
    "absolute": ({"image": "/etc/passwd", "text": "a"}, "'/etc/passwd' leads out of the folder"),
    "drive": ({"image": "C:a.jpg", "text": "a"}, "'C:a.jpg' leads out of the folder"),
    "zero": ({"image": "a\0.jpg", "text": "a"}, "'a\\x00.jpg' leads out of the folder"),
    "number": ({"image": 5, "text": "a"}, "the path of the image must be a text, but is 5"),
    "blank": ({"image": "a.jpg", "captions": ["a", " "]}, "a caption is blank"),
    "none": ({"image": "a.jpg", "captions": []}, "it has no caption"),
    "surrogate": (
        {"image": "a.jpg", "text": "a \ud800"},
        "a caption is no text that UTF-8 can hold: 'a \\ud800'",
    ),
    "no text": ({"image": "a.jpg", "text": 5}, "a caption must be a text or a list of texts, but is 5"),
    "negative": (
        {"image": "a.jpg", "text": "a", "negatives": ["a"]},
        "'a' is both a caption and a negative of the image",
    ),
    "long": ('{"image": "' + "a" * MAX_LINE, f"it is longer than {MAX_LINE} bytes"),
}


@pytest.mark.parametrize(("line", "problem"), WRONG.values(), ids=WRONG)
def test_a_mistake_in_a_line(line, problem, tmp_path):
    file = write(tmp_path, {"image": "a.jpg", "text": "fine"}, line)
    with raises(f"'{file}' cannot be read: line 2: {problem}."):
        read_pairs(file)


def test_no_text_of_unicode(tmp_path):
    file = write(tmp_path)
    file.write_bytes(b'\xef\xbb\xbf{"image": "a.jpg", "text": "fine"}\n{"image": "a.jpg", "text": "\xff"}')
    with pytest.raises(ValueError, match="cannot be read: line 2: it is no JSON \\('utf-8' codec can't decode byte"):
        read_pairs(file)


def test_all_mistakes_are_told_at_once(tmp_path):
    file = write(tmp_path, *({"image": f"{index}.jpg", "text": "a"} for index in range(7)))
    listed = "; ".join(f"line {index + 1}: there is no image '{index}.jpg'" for index in range(5))
    with raises(f"'{file}' cannot be read: {listed}; and 2 more."):
        read_pairs(file)


def test_what_stands_there_twice_is_left_out(tmp_path):
    entry = {"image": "a.jpg", "text": "a cat"}
    file = write(tmp_path, entry, {"image": "b/c.png", "text": "a cat"}, entry, {"image": "./a.jpg", "text": "a cat"})
    with pytest.warns(UserWarning) as told:
        assert read_pairs(file) == [Pair(tmp_path / "a.jpg", ("a cat",)), Pair(tmp_path / "b/c.png", ("a cat",))]
    assert str(told[0].message) == (
        f"'{file}' has captions twice for the same image, which are left out: line 3 (line 1 has 'a cat' already), "
        "line 4 (line 1 has 'a cat' already)."
    )


def test_nothing(tmp_path):
    with raises(f"There is no file or folder '{tmp_path / 'x'}'.", FileNotFoundError):
        read_pairs(tmp_path / "x")
    with raises(f"'{write(tmp_path)}' holds no images with captions."):
        read_pairs(tmp_path / "pairs.jsonl")
    with raises(
        f"'{tmp_path}' holds no images with captions: neither metadata.jsonl nor a .txt file beside each image."
    ):
        read_pairs(tmp_path)


def test_what_is_no_json_lines(tmp_path):
    """One message, where each line of the file would be a mistake."""
    example = '{"file_name": "a.jpg", "text": "a cat"}'
    table = write(tmp_path, "image,labels", "a.jpg,cat;dog", name="labels.csv")
    with raises(
        f"'{table}' is a table, but images with captions are read from JSON lines, such as {example}. Labels, of which "
        "an image may have several, are for `sep-peft train`, which takes a .csv."
    ):
        read_pairs(table)
    for text in (f"[{example}]", f"[\n  {example},\n  {example}\n]", "["):
        (tmp_path / "pairs.json").write_text(text, "utf-8-sig")
        with raises(
            f"'{tmp_path / 'pairs.json'}' is one list, but images with captions are read from JSON lines: an object "
            f"such as {example} in each line, without brackets around them and commas after them."
        ):
            read_pairs(tmp_path / "pairs.json")


# folders


def test_a_folder_of_the_package_datasets(tmp_path):
    write(tmp_path, {"file_name": "a.jpg", "text": "a cat"}, name="metadata.jsonl")
    with pytest.warns(UserWarning) as told:
        found = read_pair_folder(tmp_path)
    assert (found.train, found.tests, found.layout) == ([Pair(tmp_path / "a.jpg", ("a cat",))], {}, "metadata.jsonl")
    assert [str(each.message) for each in told] == [
        f"1 image in '{tmp_path}' has no caption in metadata.jsonl and is left out: 'b/c.png'."
    ]


def test_files_of_text_beside_images(tmp_path):
    write(tmp_path, "a cat", "", " a tabby ", name="a.txt")
    write(tmp_path, "a dog", name="b/c.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_pair_folder(tmp_path)
    assert found.layout == ".txt beside each image"
    assert found.train == [Pair(tmp_path / "a.jpg", ("a cat", "a tabby")), Pair(tmp_path / "b/c.png", ("a dog",))]
    assert [pair.source for pair in found.train] == ["a.txt, line 1", "b/c.txt, line 1"]


def test_mistakes_in_files_of_text(tmp_path):
    write(tmp_path, "a cat", name="x.txt")
    write(tmp_path, " ", name="a.txt")
    write(tmp_path, "a dog", name="b/c.txt", images=("b/c.jpg",))
    for name, content in (("d", b"\xff"), ("e", b"a" * (MAX_TEXT_FILE + 1))):
        (tmp_path / f"{name}.jpg").touch()
        (tmp_path / f"{name}.txt").write_bytes(content)
    with raises(
        f"'{tmp_path}' cannot be read: 'a.txt': it is blank; 'b/c.txt': 2 images are beside it; 'd.txt': it is no "
        f"UTF-8 (invalid start byte at byte 0); 'e.txt': it has {MAX_TEXT_FILE + 1} bytes, but at most {MAX_TEXT_FILE} "
        "are read; 'x.txt': there is no image beside it."
    ):
        read_pairs(tmp_path)


def test_parts_of_a_folder(tmp_path):
    for part in ("Train", "validation", "test"):
        write(tmp_path / part, {"file_name": "a.jpg", "text": part}, name="metadata.jsonl", images=("a.jpg",))
    found = read_pair_folder(tmp_path)
    assert read_pairs(tmp_path) == found.train == [Pair(tmp_path / "Train/a.jpg", ("Train",))]
    assert found.tests == {
        "val": [Pair(tmp_path / "validation/a.jpg", ("validation",))],
        "test": [Pair(tmp_path / "test/a.jpg", ("test",))],
    }
