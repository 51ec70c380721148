"""Embeddings of any images and texts, and the search among them."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bundled import IMAGE_FILES, NAMES
from families import CASES
from peft import get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shallow_classifier import classifier_maker
from small_classifier import raises
from small_clip import make_clip, make_texts

from sep_peft import ImageEmbedder, SEPClassifier, SEPConfig, max_text_length
from sep_peft.classifier import image_index
from sep_peft.classifier.image_index import ImageIndex
from sep_peft.cli.app import main
from sep_peft.cli.search import is_image_query
from sep_peft.training import Recipe, image_pages


#: Name of a file that would do something, were it HTML, and that turns the direction of writing.
EVIL = "<img src=x onerror=alert(1)>\u202e.jpg"


@pytest.fixture(scope="module")
def classifier() -> SEPClassifier:
    """With a second adapter, whose task is called "other"; both are moved away from where they start."""
    made = classifier_maker(Recipe())()
    made.model.add_adapter("other", SEPConfig.compact(frozen_weight=0.1))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.model.named_parameters():
        if ".sep_" in name:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    made.add_task("other", NAMES)
    return made


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four images in two folders."""
    folder = tmp_path / "images"
    for name, path in zip(NAMES, IMAGE_FILES, strict=True):
        (folder / name[0]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name[0] / f"{name}.jpg")
    return folder


# embeddings


def test_images_are_embedded_as_the_exported_module_does(classifier):
    pixels = classifier.processor(images=[Image.open(path).convert("RGB") for path in IMAGE_FILES], return_tensors="pt")
    classifier.train()  # evaluation all the same
    embeds = classifier.embed(IMAGE_FILES, batch_size=3)
    assert classifier.training and embeds.shape == (4, 128) and embeds.device.type == "cpu" and not embeds.requires_grad
    with torch.no_grad():
        expected = ImageEmbedder(classifier.model).eval()(**pixels)
    classifier.train()
    torch.testing.assert_close(embeds, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(classifier.embed(IMAGE_FILES[1]), embeds[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(classifier.embed(Image.open(path) for path in IMAGE_FILES), embeds)


TEXTS = ["a red dress", "pizza", "a photo of a cougar's face, seen from the side"]


def test_texts_are_embedded_as_the_model_does(classifier):
    """Whatever stands beside them: the reference has one text at a time, without padding."""
    embeds = classifier.embed_texts(TEXTS)
    assert embeds.shape == (3, 128) and not embeds.requires_grad
    for text, embed in zip(TEXTS, embeds, strict=True):
        inputs = classifier.processor(text=[text], return_tensors="pt")
        with torch.no_grad():
            expected = classifier.model.eval().get_text_features(**inputs).pooler_output
        torch.testing.assert_close(embed, F.normalize(expected[0], dim=-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(classifier.embed_texts(text), embed, rtol=1e-4, atol=1e-5)


def test_a_task_embeds_by_its_adapter(classifier):
    expected = {}
    for adapter in ("default", "other"):
        classifier.model.set_adapter(adapter)
        expected[adapter] = classifier.embed(IMAGE_FILES[:2]), classifier.embed_texts(TEXTS)
    classifier.model.set_adapter("default")
    found = classifier.embed(IMAGE_FILES[:2], task="other"), classifier.embed_texts(TEXTS, task="other")
    for one, other, right in zip(found, expected["default"], expected["other"], strict=True):
        assert torch.equal(one, right) and not torch.allclose(one, other, atol=1e-3)
    with raises("There is no task 'third'; the tasks are ['other']."):
        classifier.embed(IMAGE_FILES, task="third")
    with raises("There is no task 'third'; the tasks are ['other']."):
        classifier.embed_texts("pizza", task="third")


def test_what_cannot_be_embedded(classifier):
    for texts, message, error in [
        ([], "There is no text to embed.", ValueError),
        (["pizza", " "], "A text is blank. Write what an image shows.", ValueError),
        (["pizza", 3], "Texts must be strings, but got 3.", TypeError),
    ]:
        with raises(message, error):
            classifier.embed_texts(texts)
    with pytest.raises(ValueError, match=r"^A text of \d+ tokens does not fit: the text tower has 77 positions"):
        classifier.embed_texts("red " * 200)
    room = max_text_length(classifier.model)
    assert room == 77 - 6
    with pytest.warns(UserWarning, match=f"^1 of 2 texts is longer than {room} tokens; its end is not read.$"):
        embeds = classifier.embed_texts(["red " * 200, "pizza"], truncate=True)
    fitting = classifier.embed_texts(["red " * (room - 2), "pizza"], truncate=True)  # with BOS and EOS
    torch.testing.assert_close(embeds, fitting)
    with raises("There is no image to embed."):
        classifier.embed([])
    with raises("batch_size must be a whole number of at least 1, but got 0."):
        classifier.embed(IMAGE_FILES, batch_size=0)
    with raises("The image '/none.jpg' cannot be read: there is no such file."):
        classifier.embed([IMAGE_FILES[0], "/none.jpg"])


@pytest.mark.parametrize(
    ("config", "room"),
    [({}, 14), ({"start_layer": 1}, 20), ({"num_text_prompts": 0}, 20), ({"num_text_prompts": 9}, 11)],
)
def test_room_for_texts(config, room):
    """Texts of so many tokens go through the tower, and longer ones do not."""
    model = get_peft_model(make_clip(), SEPConfig(**({"num_vision_prompts": 4} | config)))
    assert max_text_length(model) == room
    model.get_text_features(**make_texts([room]))
    with pytest.raises(ValueError, match=r"does not fit|must be less"):
        model.get_text_features(**make_texts([room + 1]))


def test_room_in_positions_that_prompts_leave_alone():
    model = get_peft_model(CASES["siglip"].build(), SEPConfig(num_text_prompts=3, num_vision_prompts=2))
    assert max_text_length(model) == CASES["siglip"].config().text_config.max_position_embeddings
    with raises("The model has no text tower with a SEP adapter."):
        max_text_length(make_clip())


# the index


def index(classifier: SEPClassifier, folder: Path, **options) -> ImageIndex:
    return ImageIndex.of_folder(folder, classifier.model, classifier.processor, **options)


def test_the_most_similar_are_found(classifier, folder, tmp_path):
    found = index(classifier, folder, file=tmp_path / "index.safetensors", batch_size=3)
    assert found.names == ("b/barrel.jpg", "c/cougar_face.jpg", "p/pizza.jpg", "s/sunflower.jpg")
    query = classifier.embed(folder / "p" / "pizza.jpg")
    expected = sorted(
        ((name, float(query @ classifier.embed(folder / name))) for name in found.names), key=lambda pair: -pair[1]
    )
    best = found.search(query, 3)
    assert [name for name, _ in best] == [name for name, _ in expected[:3]] and best[0][0] == "p/pizza.jpg"
    assert [cosine for _, cosine in best] == pytest.approx([cosine for _, cosine in expected[:3]], abs=1e-5)
    assert len(found.search(query, 99)) == 4
    with raises("top_k must be at least 1, but got 0."):
        found.search(query, 0)
    with raises("The embedding must have the shape (128,), but has (3,)."):
        found.search(torch.ones(3))


def test_only_what_has_changed_is_embedded(classifier, folder, tmp_path):
    """New, changed, renamed and removed images; then another adapter, whose embeddings are others."""
    file = tmp_path / "kept" / "index.safetensors"
    first = index(classifier, folder, file=file)
    again = index(classifier, folder, file=file)
    assert (first.embedded, again.embedded) == (4, 0)
    assert again.names == first.names and torch.equal(again.embeds, first.embeds)
    (folder / "b" / "barrel.jpg").unlink()
    (folder / "s" / "sunflower.jpg").rename(folder / "s" / "flower.jpg")
    shutil.copy(IMAGE_FILES[0], folder / "p" / "pizza.jpg")
    third = index(classifier, folder, file=file)
    assert third.names == ("c/cougar_face.jpg", "p/pizza.jpg", "s/flower.jpg") and third.embedded == 2
    torch.testing.assert_close(third.embeds, classifier.embed([folder / name for name in third.names]))
    other = index(classifier, folder, file=file, adapter="other")
    assert other.embedded == 3
    torch.testing.assert_close(other.embeds, classifier.embed([folder / n for n in other.names], task="other"))
    assert os.listdir(file.parent) == [file.name] and index(classifier, folder, file=file).embedded == 3


def rewrite(file: Path, **changes) -> None:
    tensors = {**load_file(file), **{name: value for name, value in changes.items() if name != "marks"}}
    save_file(tensors, file, metadata={"marks": changes["marks"]} if "marks" in changes else None)


def keep_marks(file: Path, change) -> None:
    """Other embeddings under the right names."""
    with safe_open(file, "pt") as opened:
        marks = opened.metadata()["marks"]
    rewrite(file, embeddings=change(load_file(file)["embeddings"]), marks=marks)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:200]),
        lambda file: rewrite(file),
        lambda file: rewrite(file, marks="[" * 100_000),
        lambda file: rewrite(file, marks='{"../../etc/passwd": "1 1"}'),
        lambda file: rewrite(file, marks="[1, 2]"),
        lambda file: rewrite(
            file, embeddings=torch.full((4, 128), torch.nan), marks='{"a": 1, "b": 1, "c": 1, "d": 1}'
        ),
        lambda file: rewrite(file, probe=torch.ones(3), marks='{"a": 1, "b": 1, "c": 1, "d": 1}'),
        lambda file: keep_marks(file, lambda embeds: 2 * embeds),
        lambda file: keep_marks(file, lambda embeds: embeds.to(torch.float8_e4m3fn)),
        lambda file: keep_marks(file, lambda embeds: embeds[:, :64].contiguous()),
    ],
    ids=["empty", "cut", "no marks", "deep", "other names", "list", "NaN", "other probe", "long", "float8", "narrow"],
)
def test_a_file_that_is_none_of_ours_is_made_anew(damage, classifier, folder, tmp_path):
    file = tmp_path / "index.safetensors"
    expected = index(classifier, folder, file=file)
    damage(file)
    found = index(classifier, folder, file=file)
    assert found.embedded == 4 and found.names == expected.names
    assert index(classifier, folder, file=file).embedded == 0


def test_names_in_a_file_lead_nowhere(classifier, folder, tmp_path):
    """Also with the right shapes and the right model: only images in the folder are answers."""
    file = tmp_path / "index.safetensors"
    index(classifier, folder, file=file)
    names = ["../../etc/passwd", "/etc/passwd", "gone.jpg", "x"]
    rewrite(file, marks=json.dumps(dict.fromkeys(names, "1 1")))
    assert set(index(classifier, folder, file=file).names).isdisjoint(names)


def test_unreadable_images_are_named_and_left_out(classifier, folder, tmp_path):
    (folder / "broken.jpg").write_bytes(b"no image")
    found = index(classifier, folder, file=tmp_path / "index.safetensors")
    assert len(found.names) == 4 and found.embedded == 4 and list(found.unreadable) == ["broken.jpg"]
    assert "cannot be read: it is empty, damaged or of no format that Pillow reads." in found.unreadable["broken.jpg"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with raises(f"{str(empty)!r} holds no image that can be read."):
        index(classifier, empty, file=tmp_path / "other.safetensors")
    with raises(f"There is no folder {str(tmp_path / 'none')!r}.", NotADirectoryError):
        index(classifier, tmp_path / "none")
    assert not (tmp_path / "other.safetensors").exists()
    with raises(f"An index is a file, but {str(empty)!r} is a folder. Name a file in it.", IsADirectoryError):
        index(classifier, folder, file=empty)


def test_an_image_that_goes_away_meanwhile(classifier, folder, tmp_path, monkeypatch):
    """Before it is looked at, or before it is read."""
    gone = folder / "a.jpg"
    monkeypatch.setattr(image_index, "find_images", lambda _: [gone, *sorted(folder.glob("?/*.jpg"))])
    found = index(classifier, folder, file=tmp_path / "index.safetensors", progress=lambda steps: remove(folder, steps))
    assert found.names == ("b/barrel.jpg", "c/cougar_face.jpg", "s/sunflower.jpg")
    reason = "cannot be read: there is no such file."
    assert found.unreadable == {"p/pizza.jpg": f"The image {str(folder / 'p' / 'pizza.jpg')!r} {reason}"}


def remove(folder: Path, steps):
    (folder / "p" / "pizza.jpg").unlink()
    return steps


def test_what_was_embedded_before_an_interruption_is_kept(classifier, folder, tmp_path):
    def interrupt(steps):
        yield from list(steps)[:2]
        raise KeyboardInterrupt

    file = tmp_path / "index.safetensors"
    with pytest.raises(KeyboardInterrupt):
        index(classifier, folder, file=file, batch_size=1, progress=interrupt)
    expected = classifier.embed(sorted(folder.glob("?/*.jpg")))
    found = index(classifier, folder, file=file)
    assert found.embedded == 2
    torch.testing.assert_close(found.embeds, expected)


def test_every_folder_has_its_own_file_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    files = [image_index.index_file(tmp_path / name) for name in ("one", "two", "one/../one")]
    assert files[0] == files[2] != files[1] and files[0].name == "index.safetensors"


# the command


@pytest.fixture(scope="module")
def adapter(classifier, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "saved"
    classifier.save_pretrained(folder)
    return folder


def test_search(classifier, adapter, folder, tmp_path, capsys):
    file = tmp_path / "index.safetensors"
    arguments = ["search", adapter, folder, folder / "p" / "pizza.jpg", "--index", file, "--top-k", 2, "--quiet"]
    assert main([*map(str, arguments), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["query"] == {"image": str(folder / "p" / "pizza.jpg")} and (data["images"], data["embedded"]) == (4, 4)
    assert data["found"][0] == {"image": str(folder / "p" / "pizza.jpg"), "similarity": pytest.approx(1, abs=1e-4)}
    assert main([*map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"1.000 {folder / 'p' / 'pizza.jpg'}" and len(lines) == 2

    (folder / "broken\x1b[2J.jpg").write_bytes(b"no image")
    arguments[3] = "a slice of pizza"
    assert main([*map(str, arguments), "--json"]) == 1
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data["query"] == {"text": "a slice of pizza"} and data["embedded"] == 0 and len(data["unreadable"]) == 1
    expected = classifier.embed_texts("a slice of pizza") @ classifier.embed(data["found"][0]["image"])
    assert data["found"][0]["similarity"] == pytest.approx(float(expected), abs=1e-5)
    assert "\x1b" not in err and re.search(r"sep-peft: warning: The image .+broken.+ cannot be read", err)


def test_search_beside_the_base_model_with_a_page(classifier, adapter, folder, tmp_path, capsys):
    """Both lists, each by its own embeddings; the page names nothing that acts and asks nobody for anything."""
    (folder / "p" / "pizza.jpg").rename(folder / EVIL)
    page, query = tmp_path / "pages" / "found.html", "a <b>pizza</b> {{ 7 * 7 }}"
    arguments = [adapter, folder, query, "--index", tmp_path / "index", "--top-k", 3, "--compare-base", "--page", page]
    assert main(["search", *map(str, arguments), "--quiet", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["page"] == str(page)
    with classifier.model.disable_adapter():
        base = classifier.embed_texts(query) @ classifier.embed(data["found_by_base_model"][0]["image"])
    assert data["found_by_base_model"][0]["similarity"] == pytest.approx(float(base), abs=1e-5)
    assert data["found"][0]["similarity"] != pytest.approx(float(base), abs=1e-4)
    assert sorted(path.name for path in tmp_path.glob("index*")) == ["index", "index-base"]
    source = page.read_text("utf-8")
    text = html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", source, flags=re.DOTALL))
    assert f"\u201c{query}\u201d" in text and "4 images searched" in text and "Found by the base model" in text
    assert "place 1 by the base model" in text or "not found by the base model" in text
    for found in (data["found"], data["found_by_base_model"]):
        for each in found:
            name = os.path.relpath(each["image"], folder).replace("\u202e", r"\u202e")
            assert f"{each['similarity']:.3f}" in text and name in text
    assert source.count("data:image/jpeg") == 6
    assert not re.search(r"<script|<b>pizza|\u202e|https?://|url\(|@import", source)

    shutil.copy(IMAGE_FILES[0], tmp_path / "query.jpg")
    arguments = [adapter, folder, tmp_path / "query.jpg", "--index", tmp_path / "index", "--page", page, "--quiet"]
    assert main(["search", *map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1] == f"page: {page}" and lines[0].endswith("barrel.jpg")
    assert "the image that was searched by" in page.read_text("utf-8")


def test_an_image_that_went_away_has_no_thumbnail(folder, tmp_path):
    found = {"with SEP": [("b/barrel.jpg", 0.5), ("gone.jpg", 0.25)]}
    image_pages.write_search_page(tmp_path / "page.html", "a barrel", folder, found, images=1)
    source = (tmp_path / "page.html").read_text("utf-8")
    assert source.count("data:image") == 1 and "cannot be read any more" in source and "1 image searched" in source


def test_what_is_meant_as_an_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lamp").mkdir()
    shutil.copy(IMAGE_FILES[0], tmp_path / "barrel")
    asked = ["https://x/a", "barrel", "lamp", "./lamp", "a lamp", "a lamp.", "half and/or half"]
    assert [is_image_query(query) for query in asked] == [True, True, False, True, False, False, False]
    with raises("There is no image 'lmap.JPG'. Pass a file that is there, or a text.", FileNotFoundError):
        is_image_query("lmap.JPG")


def test_mistakes_of_search(adapter, folder, tmp_path, capsys):
    none = tmp_path / "none"
    (tmp_path / "text.txt").write_text("no image")
    unreadable = f"The image {str(tmp_path / 'text.txt')!r} cannot be read: it is empty, damaged or of no format that "
    unreadable += "Pillow reads."
    for arguments, message in [
        ([adapter, none, "x"], f"There is no folder {str(none)!r}."),
        ([none, folder, "x"], f"There is no adapter folder {none}."),
        ([adapter, folder, " "], "A text is blank. Write what an image shows."),
        ([none, folder, tmp_path / "text.txt"], unreadable),
        ([none, folder, "lmap.png"], "There is no image 'lmap.png'. Pass a file that is there, or a text."),
        ([none, folder, "x", "--page", folder], f"--page takes the name of a file, but {folder} is a folder."),
        ([none, folder, "x", "--page", "/proc/a.html"], "/proc cannot be written (No such file or directory). Choose "
         "another folder, or change its permissions."),
        ([adapter, folder, "x", "--index", folder], f"An index is a file, but {str(folder)!r} is a folder. Name a file "
         "in it."),
        ([adapter, folder, "x", "--index", "/proc/index"], "/proc cannot be written (No such file or directory). "
         "Choose another folder, or change its permissions."),
    ]:  # fmt: skip
        assert main(["search", *map(str, arguments), "--quiet"]) == 1
        assert capsys.readouterr() == ("", f"sep-peft: error: {message}\n")


@pytest.mark.parametrize("ending", ["npz", "safetensors", "parquet"])
def test_embed(ending, classifier, adapter, folder, tmp_path, capsys):
    if ending == "parquet":
        pytest.importorskip("pyarrow", reason="a .parquet needs the package pyarrow")
    (tmp_path / "texts.txt").write_text("a red dress\n\na slice of pizza\n")
    index = ["--index", str(tmp_path / "index.safetensors")]
    for given, kind in ((folder, "image"), (tmp_path / "texts.txt", "text")):
        file = tmp_path / f"{kind}.{ending}"
        code = main(["embed", str(adapter), str(given), str(file), *index, "--quiet", "--json"])
        data = json.loads(capsys.readouterr().out)
        assert code == (1 if data["unreadable"] else 0)
        names, embeds = read_embeds(file)
        assert (data["kind"], data["rows"], data["size"]) == (kind, len(names), embeds.shape[1])
        expected = classifier.embed([folder / name for name in names]) if kind == "image" else None
        expected = classifier.embed_texts(["a red dress", "a slice of pizza"]) if expected is None else expected
        torch.testing.assert_close(embeds, expected, rtol=1e-4, atol=1e-5)


def read_embeds(file: Path) -> tuple[list[str], torch.Tensor]:
    """Names and embeddings (N, E), as a user reads them."""
    if file.suffix == ".npz":
        read = np.load(file)
        return read["names"].tolist(), torch.from_numpy(read["embeddings"])
    if file.suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.read_table(file)
        return table["name"].to_pylist(), torch.tensor(table["embedding"].to_pylist())
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["names"]), opened.get_tensor("embeddings")


def test_embed_of_names_that_are_no_utf_8(adapter, tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="a .parquet needs the package pyarrow")
    folder, file = tmp_path / "images", tmp_path / "a.parquet"
    folder.mkdir()
    shutil.copy(IMAGE_FILES[0], os.fsencode(folder) + b"/\xff\x1b.jpg")
    index = ["--index", str(tmp_path / "index.safetensors")]
    assert main(["embed", str(adapter), str(folder), str(file), *index, "--quiet"]) == 1
    message = r"A .parquet holds UTF-8, which '\udcff\x1b.jpg' is not. Write a .npz or .safetensors."
    assert capsys.readouterr() == ("", f"sep-peft: error: {message}\n") and not file.exists()


def test_long_lines_of_texts_are_named_or_cut(classifier, adapter, tmp_path, capsys):
    file, texts = tmp_path / "texts.txt", ["pizza", "red " * 70, "red " * 200, "a lamp"]
    file.write_text("\n\n".join(texts))
    arguments = ["embed", str(adapter), str(file), str(tmp_path / "a.npz"), "--quiet"]
    assert main(arguments) == 1
    message = (
        f"{str(file)!r} has texts of more than 71 tokens (BOS and EOS included), for which there is no room beside the "
        "prompts: line 3 with 72, line 5 with 202. Shorten them, or pass --cut."
    )
    assert capsys.readouterr() == ("", f"sep-peft: error: {message}\n") and not (tmp_path / "a.npz").exists()
    assert main([*arguments, "--cut"]) == 0
    out, err = capsys.readouterr()
    assert "wrote" in out and err == (
        "sep-peft: warning: 2 of 4 texts are longer than 71 tokens; their ends are not read.\n"
    )
    fitting = classifier.embed_texts(["pizza", "red " * 69, "red " * 69, "a lamp"])
    torch.testing.assert_close(read_embeds(tmp_path / "a.npz")[1], fitting, rtol=1e-4, atol=1e-5)


def test_mistakes_of_embed(adapter, folder, tmp_path, capsys):
    none = tmp_path / "none"
    (tmp_path / "blank.txt").write_text(" \n\n")
    for arguments, message in [
        ([adapter, tmp_path / "blank.txt", tmp_path / "a.npz"], f"{str(tmp_path / 'blank.txt')!r} is blank. Write a "
         "text in each line."),
        ([adapter, folder, tmp_path / "a.csv"], "The file must end in .npz, .safetensors, .parquet, but got 'a.csv'."),
        ([adapter, none, tmp_path / "a.npz"], f"There is no folder or file {str(none)!r}."),
        ([none, folder, tmp_path / "a.npz"], f"There is no adapter folder {none}."),
        ([none, folder, "/proc/a.npz"], "/proc cannot be written (No such file or directory). Choose another folder, "
         "or change its permissions."),
    ]:  # fmt: skip
        assert main(["embed", *map(str, arguments), "--quiet"]) == 1
        assert capsys.readouterr() == ("", f"sep-peft: error: {message}\n")
    assert not list(tmp_path.glob("a.*"))
