"""Images that are nearly the same: groups of them by their embeddings, and ``sep-peft duplicates``."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bundled import IMAGE_FILES, NAMES
from PIL import Image
from shallow_classifier import classifier_maker

from sep_peft.classifier import near_duplicates
from sep_peft.classifier.near_duplicates import Group, groups, nearest, worse_copy
from sep_peft.cli.app import main
from sep_peft.training import Recipe, image_pages


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def reached(alike: torch.Tensor) -> list[set[int]]:
    """Sets of nodes that are connected by a matrix (N, N), found one after the other."""
    found, left = [], set(range(len(alike)))
    while left:
        own, new = set(), {min(left)}
        while new:
            own |= new
            new = {other for node in new for other in alike[node].nonzero()[:, 0].tolist()} - own
        found.append(own)
        left -= own
    return [own for own in found if len(own) > 1]


@pytest.mark.parametrize("block", [2**24, 500, 1])
def test_groups_are_chains_of_what_is_alike(block, monkeypatch):
    """However many rows are compared at a time."""
    monkeypatch.setattr(near_duplicates, "BLOCK", block)
    embeds = unit(60, 4)
    embeds[[7, 31, 50]] = embeds[3].clone()
    cosines, least = embeds @ embeds.T, 0.93
    found = groups(embeds, least)
    expected = reached((cosines >= least).fill_diagonal_(False))
    assert sorted(map(sorted, expected)) == sorted(group.places for group in found) and len(expected) > 3
    assert any(cosines[g.places][:, g.places].min() < least for g in found), "none of them is a chain"
    others = cosines.fill_diagonal_(-1).max(dim=1).values
    for group in found:
        torch.testing.assert_close(torch.tensor(group.similarities), others[group.places])
    surest = [max(group.similarities) for group in found]
    assert surest == sorted(surest, reverse=True)
    copies = groups(embeds, 1.0)
    assert [group.places for group in copies] == [[3, 7, 31, 50]]


def test_none_are_alike():
    assert groups(torch.eye(5), 0.5) == [] and groups(torch.ones(1, 1), 0.5) == []


def test_the_nearest_of_others(monkeypatch):
    embeds, others = unit(9, 4), unit(5, 4, seed=1)
    best = (embeds @ others.T).max(dim=1)
    for block in (2**24, 11):
        monkeypatch.setattr(near_duplicates, "BLOCK", block)
        values, places = nearest(embeds, others)
        assert torch.equal(places, best.indices)
        torch.testing.assert_close(values, best.values)


# the command


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "saved"
    classifier_maker(Recipe())().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four images, the same bytes as one of them, a worse copy of another, and a file that is no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, path in zip(NAMES, IMAGE_FILES, strict=True):
        shutil.copy(path, folder / f"{name}.jpg")
    shutil.copy(IMAGE_FILES[1], folder / "<i>same.jpg")
    worse_copy(Image.open(IMAGE_FILES[2]).convert("RGB")).save(folder / "worse.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def run(capsys, *arguments) -> tuple[int, str]:
    code = main(["duplicates", *map(str, arguments), "--quiet"])
    return code, capsys.readouterr().out


def test_duplicates(adapter, folder, tmp_path, capsys):
    """Found by copies of these images, kept for the next time, and shown on a page."""
    page, index = tmp_path / "same.html", ["--index", tmp_path / "index.safetensors"]
    code, out = run(capsys, adapter, folder, *index, "--page", page, "--json")
    data = json.loads(out)
    assert (code, data["images"], data["embedded"], len(data["unreadable"])) == (1, 6, 6, 1)
    found = [{Path(each["image"]).name for each in group} for group in data["groups"]]
    assert found == [{"<i>same.jpg", f"{NAMES[1]}.jpg"}, {"worse.png", f"{NAMES[2]}.jpg"}]
    assert [each["similarity"] for each in data["groups"][0]] == pytest.approx([1, 1], abs=1e-5)
    assert 0.5 < data["threshold"] <= data["groups"][1][0]["similarity"] < 1
    source = page.read_text("utf-8")
    text = " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", source, flags=re.DOTALL)).split())
    width, height = Image.open(folder / "worse.png").size
    assert "4 of 6 images in 2 groups" in text and f"worse.png {width} × {height}, " in text
    assert "1.000 <i>same.jpg" in text and "<i>" not in source and source.count("data:image/jpeg") == 4

    (folder / "broken.jpg").unlink()
    code, out = run(capsys, adapter, folder, *index, "--threshold", 1)
    lines = out.splitlines()
    assert code == 0 and lines[2:] == ["", "2 of 6 images in 1 group, from a cosine of 1.000 on"]
    assert {line.partition(" ")[2] for line in lines[:2]} == {
        str(folder / "<i>same.jpg"),
        str(folder / f"{NAMES[1]}.jpg"),
    }
    (folder / "<i>same.jpg").unlink()
    code, out = run(capsys, adapter, folder, *index, "--threshold", 1, "--json")
    data = json.loads(out)
    assert (code, data["groups"], data["images"], data["embedded"], data["threshold"]) == (0, [], 5, 0, 1.0)


def test_the_page_says_what_it_leaves_out(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_pages, "SHOWN_GROUPS", 1)
    monkeypatch.setattr(image_pages, "SHOWN_MEMBERS", 2)
    names = [path.name for path in sorted(folder.glob("[a-z]*.jpg")) if path.name != "broken.jpg"]
    found = [Group([0, 1, 2], [0.99, 0.99, 0.98]), Group([2, 3], [0.97, 0.97])]
    image_pages.write_duplicates_page(tmp_path / "a.html", folder, names, found, 0.9, measured=False)
    text = re.sub(r"<[^>]+>", " ", (tmp_path / "a.html").read_text("utf-8"))
    assert "3 images, of which 2 are shown" in text and "1 more group with less similar images is in the JSON" in text
    image_pages.write_duplicates_page(tmp_path / "a.html", folder, names, [], 0.9, measured=False)
    assert "No two images are nearly the same." in (tmp_path / "a.html").read_text("utf-8")


def test_mistakes_of_duplicates(folder, tmp_path, capsys):
    none = tmp_path / "none"
    for arguments, message in [
        ([none, none], f"There is no folder {str(none)!r}."),
        ([none, folder], f"There is no adapter folder {none}."),
        ([none, folder, "--threshold", "0"], "--threshold must be above 0 and at most 1, a cosine, but got 0."),
        ([none, folder, "--threshold", "nan"], "--threshold must be above 0 and at most 1, a cosine, but got nan."),
        ([none, folder, "--page", folder], f"--page takes the name of a file, but {folder} is a folder."),
    ]:
        assert main(["duplicates", *map(str, arguments), "--quiet"]) == 1
        assert capsys.readouterr() == ("", f"sep-peft: error: {message}\n")
