"""The output is tried before training, a full disk is called one, and what was trained goes elsewhere if need be."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bundled import ASSETS
from safetensors import SafetensorError
from small_classifier import IMAGES, LABELS, contents, make_classifier, raises, with_prototypes
from small_clip import make_clip

from sep_peft import CardDetails, SEPClassifier
from sep_peft.classifier import files
from sep_peft.classifier.files import SAVED_FILES, try_output
from sep_peft.cli.app import main
from sep_peft.training.checkpoint import CHECKPOINT_FILE
from sep_peft.training.run_log import RUN_FOLDER
from sep_peft.tuner import disk, json_files
from sep_peft.tuner.disk import DiskFullError, full_disk_named, try_folder


BASE = str(ASSETS / "clip-small")
SMALL = [
    "--shots",
    "1",
    "--max-steps",
    "1",
    "--fusion-rank",
    "2",
    "--share-fusion",
    "--fusion-hidden-size",
    "8",
    "--no-report",
]
NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes with an image to train and one to test on."""
    folder = tmp_path_factory.mktemp("data") / "kitchen"
    for part in ("train", "test"):
        for name in ("cup", "lamp"):
            (folder / part / name).mkdir(parents=True)
            shutil.copy(sorted((ASSETS / "caltech101" / part / name).iterdir())[0], folder / part / name)
    return folder


# trying


def test_trying_leaves_nothing(tmp_path):
    with_prototypes().save_pretrained(tmp_path / "there")
    before = contents(tmp_path)
    for folder in (tmp_path, tmp_path / "there", tmp_path / "new" / "er", Path(os.path.relpath(tmp_path / "new"))):
        try_output(folder, needed=1)
    assert contents(tmp_path) == before


@torch.no_grad()
def test_a_folder_in_the_place_of_any_file_that_is_saved(tmp_path):
    """Whatever the classifier has: what is tried is what is written."""
    classifier = with_prototypes()
    classifier.save_pretrained(tmp_path / "prototypes")
    classifier.keep_prototypes(kind="gda", batches=[{"pixel_values": IMAGES, "labels": LABELS}])
    classifier.fit_whitening([{"pixel_values": IMAGES, "labels": LABELS}])
    classifier.save_pretrained(tmp_path / "head", CardDetails(confusion=b"PNG"))
    written = {*contents(tmp_path / "prototypes"), *contents(tmp_path / "head")}
    assert written == set(SAVED_FILES)
    for name in written:
        taken = tmp_path / f"not {name}" / name
        taken.mkdir(parents=True)
        with raises(
            f"{taken} is a folder, but a file of that name is to be saved. Rename or remove it.", IsADirectoryError
        ):
            try_output(taken.parent)


def test_what_cannot_be_loaded_is_not_saved(tmp_path, monkeypatch):
    """Nothing is written, the folder included; what is at the limits is saved and loaded."""
    classifier = make_classifier()
    classifier.save_pretrained(tmp_path)
    before = contents(tmp_path)
    size, rest = len(before["sep_classes.json"]), "so it is not written. Leave out some of what it lists."
    monkeypatch.setattr(files, "MAX_CLASSES_BYTES", size - 1)
    with raises(f"sep_classes.json would have {size} bytes, but at most {size - 1} are read, {rest}"):
        classifier.save_pretrained(tmp_path / "new")
    monkeypatch.setattr(files, "MAX_CLASSES_BYTES", size)
    containers = sum(map(before["sep_classes.json"].count, (b"[", b"{")))
    monkeypatch.setattr(json_files, "MAX_CONTAINERS", containers - 1)
    message = f"sep_classes.json would hold {containers} lists and objects, but at most {containers - 1} are read, "
    with raises(message + rest):
        classifier.save_pretrained(tmp_path / "new")
    monkeypatch.setattr(json_files, "MAX_CONTAINERS", containers)
    prompts = classifier.vision_tower.sep_prompts["default"]
    with torch.no_grad():
        prompts[0, 0] = float("nan")
    with raises(
        "The adapter 'default' holds numbers that are not finite or larger than 65504 in "
        "base_model.model.vision_model.sep_prompts. Train with a lower learning rate, or take an earlier save."
    ):
        classifier.save_pretrained(tmp_path / "new")
    assert contents(tmp_path) == before
    with torch.no_grad():
        prompts[0, 0] = 0
    classifier.save_pretrained(tmp_path / "new")
    SEPClassifier.from_pretrained(tmp_path / "new", model=make_clip())


def test_what_cannot_be_saved_into(tmp_path, monkeypatch):
    file, card = tmp_path / "file", tmp_path / "card" / "README.md"
    file.write_text("mine")
    card.parent.mkdir()
    card.write_text("---\nlicense: [\n---\n")
    with raises(f"{file} is a file; a folder is needed to save into.", NotADirectoryError):
        try_output(file)
    with raises(f"{file / 'a/b'} cannot be made, because {file} is a file. Choose another folder.", NotADirectoryError):
        try_output(file / "a" / "b")
    with pytest.raises(ValueError, match=f"^The metadata of the model card {re.escape(str(card))} cannot be read"):
        try_output(card.parent)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    message = f"{tmp_path} cannot be written (Permission denied). Choose another folder, or change its permissions."
    with raises(message, PermissionError):
        try_output(tmp_path)


def test_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_500_000))
    try_folder(tmp_path, needed=2_500_000)
    folder = tmp_path / "new"
    message = (
        f"{folder} needs room for 9.0 MB, but its disk has 2.5 MB left. Make room, or choose a folder on another disk."
    )
    with raises(message, DiskFullError):
        try_folder(folder, needed=9_000_000)
    assert not folder.exists()


FULL = "The disk is full, so nothing could be saved in {}. Make room, or choose a folder on another disk."
RUST = "Error while serializing: I/O error: {} (os error {})"


@pytest.mark.parametrize(
    "error", [NO_ROOM, OSError(errno.EDQUOT, "quota"), SafetensorError(RUST.format("No space left on device", 28))]
)
def test_a_full_disk_is_called_one(error):
    with raises(FULL.format("here"), DiskFullError), full_disk_named("here"):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), SafetensorError(RUST.format("broken", 5)), OSError()])
def test_other_errors_stay(error):
    with pytest.raises(type(error)) as found, full_disk_named("here"):
        raise error
    assert found.value is error


@pytest.mark.parametrize("writes", ["sep_peft.classifier.files.stamp_files", "peft.peft_model.safe_save_file"])
def test_a_save_on_a_full_disk_leaves_the_older_one(writes, tmp_path, monkeypatch):
    with_prototypes().save_pretrained(tmp_path)
    before = contents(tmp_path)

    def full(*args, **kwargs):
        raise NO_ROOM

    monkeypatch.setattr(writes, full)
    with raises(FULL.format(tmp_path), DiskFullError):
        make_classifier().save_pretrained(tmp_path)
    assert contents(tmp_path) == before


# the command


def train(images: Path, output: Path, capsys, *options: str) -> tuple[int, str, str]:
    arguments = ["train", str(images), "--base-model", BASE, "--output", str(output), *SMALL, "--quiet", *options]
    capsys.readouterr()
    return main(arguments), *capsys.readouterr()


def test_the_output_is_tried_before_training(images, tmp_path, capsys, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr("sep_peft.cli.train.fit", never)
    (tmp_path / "file").write_text("mine")
    code, _, err = train(images, tmp_path / "file" / "new", capsys)
    assert code == 1 and err.startswith(f"sep-peft: error: {tmp_path / 'file/new'} cannot be made, because ")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    code, _, err = train(images, tmp_path / "new", capsys)
    message = rf"sep-peft: error: {tmp_path}/new needs room for \d\.\d MB, but its disk has 0\.0 MB left\. Make room, "
    assert code == 1 and re.match(message, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_saved_goes_to_a_temporary_folder(images, tmp_path, capsys, monkeypatch):
    """Two failing saves: the output's alone, then that of the temporary folder as well."""
    output, save = tmp_path / "new", SEPClassifier.save_pretrained

    def fail(classifier, folder, *args, **options):
        if folder == output:
            raise DiskFullError(FULL.format(output))
        save(classifier, folder, *args, **options)

    monkeypatch.setattr(SEPClassifier, "save_pretrained", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, printed, err = train(images, output, capsys, "--json")
    data = json.loads(printed)
    rescue = Path(data["adapter"])
    assert code == 1 and data["error"] == FULL.format(output)
    assert {path.name for path in output.iterdir()} == {CHECKPOINT_FILE, RUN_FOLDER}  # it can be gone on with
    reason = f"because saving where it was asked for failed: {FULL.format(output)}\n"
    assert f"sep-peft: warning: the adapter is in {rescue}, {reason}" in err
    assert rescue.parent == tmp_path and SEPClassifier.from_pretrained(rescue).class_names == ["cup", "lamp"]

    def fail_always(classifier, folder, *args, **options):
        raise DiskFullError(FULL.format(Path(folder).name[:8]))

    monkeypatch.setattr(SEPClassifier, "save_pretrained", fail_always)
    code, printed, err = train(images, output, capsys, "--resume")
    assert (code, printed) == (1, "")
    both = f"Nothing could be saved: {FULL.format('new')} In a temporary folder: {FULL.format('sep-peft')}"
    assert err == f"sep-peft: error: {both}\n"
