"""The demo's page in headless Chromium. It needs Gradio, so the usual tests leave it out; `.ci/run` calls it by name.

python -m pytest tests/demo_in_browser.py
"""

from __future__ import annotations

import importlib
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from browser import WIDTHS, open_browser
from bundled import ASSETS, IMAGE_FILES, NAMES, shallow_clip
from labelled import make_classifier
from peft import get_peft_model
from PIL import Image
from transformers import AutoProcessor, CLIPModel

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.classifier.calibration import Calibration
from sep_peft.classifier.label_calibration import LabelCalibration, LabelScale


#: A name that acts where a page takes it for HTML or Markdown.
HOSTILE = "<img src=x onerror=document.title='owned'> **bold**"
SECONDS = 60


@pytest.fixture(scope="module")
def demo_file():
    pytest.importorskip("gradio", reason="the demo needs the package gradio")
    sys.path.insert(0, str(ASSETS.parent))
    yield importlib.import_module("demo")
    sys.path.remove(str(ASSETS.parent))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[str]:
    """Folders of two adapters over the small CLIP's first layers; the first one's classes are calibrated."""
    folder, clip = tmp_path_factory.mktemp("adapters"), shallow_clip(2)
    processor = AutoProcessor.from_pretrained(clip)
    for name, names in {"caltech": NAMES, "hostile": [HOSTILE, "lamp"]}.items():
        torch.manual_seed(0)
        model = get_peft_model(CLIPModel.from_pretrained(clip), SEPConfig())
        classifier = SEPClassifier.from_class_names(model, processor, names)
        if name == "caltech":
            # an energy that no image reaches, so that everything is none of these
            classifier.calibrate(Calibration(1.5, images=8, least_energy=1e6))
        classifier.save_pretrained(folder / name)
    return [str(folder / name) for name in ("caltech", "hostile")]


@pytest.fixture(scope="module")
def demo(demo_file, adapters):
    return demo_file.Demo.load(adapters, base_model=None, max_pixels=4_000_000)


@pytest.fixture(scope="module")
def address(demo_file, demo):
    page = demo_file.launch(demo, "127.0.0.1", 0, 5, prevent_thread_lock=True)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def browser():
    # with a camera, which shows a test pattern to whoever asks
    with open_browser("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream") as opened:
        yield opened


def wait(what, seconds: float = SECONDS):
    """What a function gives, once it is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


def value(browser, element: str):
    return browser.run(
        f"const e = document.querySelector('#{element} textarea, #{element} input'); return e && e.value"
    )


def upload(browser, path: Path) -> None:
    wait(lambda: browser.run("return !!document.querySelector('#image input[type=file]')"))
    browser.driver.find_element("css selector", "#image input[type=file]").send_keys(str(path))


def shown(browser, element: str) -> bool:
    script = f"const i = document.querySelector('#{element} img'); return !!i && i.complete && i.naturalWidth > 100"
    return browser.run(script)


def foreign(browser, address: str) -> list[str]:
    """Addresses on other machines that the page has asked for."""
    own = address.rstrip("/"), address.rstrip("/").replace("http", "ws")
    return [url for url in browser.requests() if not url.startswith(own)]


@pytest.mark.parametrize("width", WIDTHS)
def test_an_uploaded_image_is_classified(browser, address, demo, width, tmp_path):
    browser.open(address, width=width)
    upload(browser, IMAGE_FILES[0])
    expected = demo.classifier.predict(IMAGE_FILES[0])
    assert wait(lambda: value(browser, "said")) == expected[0]["label"]
    wait(lambda: shown(browser, "decided") and shown(browser, "selected"))
    text = browser.text()
    for entry in expected:
        assert f"{entry['score']:.0%}" in text and entry["label"] in text
    assert browser.overflow() == 0
    assert browser.errors() == []
    assert foreign(browser, address) == []
    browser.screenshot(tmp_path / f"demo-{width}.png")


def test_an_image_of_the_webcam_is_classified(browser, address):
    browser.open(address)
    wait(lambda: browser.run("return !!document.querySelector('#image input[type=file]')"))
    for button in (
        "[aria-label='Capture from camera']",
        "[title*='webcam access'] button",
        "[aria-label='capture photo']",
    ):
        find = f'return document.querySelector("#image {button}")'
        wait(partial(browser.run, find), 15).click()
    assert wait(lambda: value(browser, "said")) in NAMES


def test_none_of_these(browser, address):
    browser.open(address)
    upload(browser, IMAGE_FILES[1])
    assert wait(lambda: value(browser, "said")) in NAMES
    browser.driver.find_element("css selector", "#reject input").click()
    wait(lambda: value(browser, "said") == "none of these")


def test_names_of_strangers_are_text(browser, address):
    browser.open(address)
    upload(browser, IMAGE_FILES[0])
    wait(lambda: value(browser, "said"))
    box = browser.driver.find_element("css selector", "#task input")
    box.click()
    wait(lambda: browser.run("return !!document.querySelector('[role=option]')"))
    options = browser.driver.find_elements("css selector", "[role=option]")
    next(option for option in options if "hostile" in option.get_attribute("innerText")).click()
    assert wait(lambda: value(browser, "said") if value(browser, "said") in (HOSTILE, "lamp") else None)
    assert HOSTILE in browser.text()
    assert browser.run("return document.title") == "What is in the image?"
    assert browser.run("return document.querySelectorAll('img[src=x]').length") == 0
    assert browser.run("return document.querySelector('#reject input').disabled")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("<b>no image</b>"), "cannot be read"),
        (lambda path: Image.new("RGB", (4000, 2000)).save(path), "The image has 4000 x 2000 pixels; at most 4,000,000"),
        (lambda path: path.write_bytes(bytes(6 * 2**20)), "exceed the maximum allowed size"),
    ],
    ids=["text", "pixels", "bytes"],
)
def test_errors_are_shown(browser, address, make, message, tmp_path):
    path = tmp_path / "image.png"
    make(path)
    browser.open(address)
    upload(browser, path)
    wait(lambda: message in browser.text())
    assert not value(browser, "said")
    assert str(tmp_path) not in browser.text() and "/tmp" not in browser.text()


def test_errors_are_escaped(demo_file):
    import gradio

    with pytest.raises(gradio.Error) as caught, demo_file.told():
        raise ValueError("a <b>\n\x1b[2J")
    assert caught.value.message == r"a &lt;b&gt; \x1b[2J"


def test_tasks_with_one_name(demo_file, adapters, tmp_path):
    other = tmp_path / "caltech"
    other.symlink_to(adapters[0])
    loaded = demo_file.Demo.load([adapters[0], str(other)], None, 1000)
    assert loaded.tasks == ["caltech", "caltech (2)"]
    assert loaded.names("caltech (2)") == NAMES


def test_several_labels_an_image(demo_file):
    classifier, image = make_classifier().eval(), Image.open(IMAGE_FILES[0])
    for threshold in (0.0, 1.0):
        scale = LabelScale(1.0, (0.0,), (threshold,))
        classifier.calibrate(LabelCalibration(scale, scale, scale))
        said, scores = (shown := demo_file.Demo(classifier, "own", 1_000_000)).answer(image, "own", reject=True)
        assert said == (demo_file.NONE_OF_THESE if threshold else ", ".join(scores)) and len(scores) == 3
        assert all(drawing is not None for drawing in shown.drawings(image, "own"))


def test_no_adapter(demo_file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "/does/not/exist"])
    with pytest.raises(SystemExit, match=r"^2$"):
        demo_file.main()
    assert capsys.readouterr().err.splitlines()[-1].startswith("demo.py: error: ")


def test_zero_pixels(demo_file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "my-task", "--max-pixels", "0"])
    with pytest.raises(SystemExit, match=r"^2$"):
        demo_file.main()
    assert capsys.readouterr().err.splitlines()[-1] == "demo.py: error: --max-pixels must be at least 1"


def test_nothing_is_sent_or_shared(demo_file, demo, monkeypatch):
    page = demo_file.make_page(demo)
    assert page.analytics_enabled is False
    assert not any(dependency.api_visibility == "public" for dependency in page.fns.values())
