"""The pages of examples/web and examples/serve_page in headless Chromium; `.ci/run` calls it by name.

onnxruntime-web comes from npm's registry, once, into the cache.

python -m pytest tests/web_in_browser.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from browser import WIDTHS, open_browser
from bundled import ASSETS, IMAGE_FILES, NAMES
from exported_files import save
from PIL import Image

from sep_peft import SEPClassifier
from sep_peft.classifier.export_file import export_file


VERSION = "1.30.0"
PAGE = ASSETS.parent / "web"
#: Of onnxruntime-web, what the page loads.
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.mjs")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sep_peft_tests", f"onnxruntime-web-{VERSION}")
SECONDS = 60
#: In the page: the address of the image that was answered last, and its labels with their scores.
ANSWERED = "return window.answered || null"
ANSWER = """return [...document.querySelectorAll("#answer li")].map(
  line => [line.innerText.replace(/ [\\d.]+ %$/, ""), Number(line.dataset.score)])"""
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def onnxruntime_web() -> Path:
    """The folder with its files; skips the test where they cannot be had."""
    if not all((CACHE / name).is_file() for name in FILES):
        if shutil.which("npm") is None:
            pytest.skip("onnxruntime-web comes by npm, which is not installed")
        CACHE.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"onnxruntime-web@{VERSION}", "--pack-destination", str(CACHE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"onnxruntime-web cannot be had from npm: {done.stderr.strip()[-300:]}")
        (archive,) = CACHE.glob("*.tgz")
        with tarfile.open(archive) as opened:
            for name in FILES:
                (CACHE / name).write_bytes(opened.extractfile(f"package/dist/{name}").read())
        archive.unlink()
    return CACHE


class Handler(SimpleHTTPRequestHandler):
    """With the types that a browser needs to run modules."""

    def guess_type(self, path) -> str:
        types = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}
        return types.get(Path(path).suffix) or super().guess_type(path)

    def log_message(self, *_) -> None: ...


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> SEPClassifier:
    return SEPClassifier.from_pretrained(save(tmp_path_factory.mktemp("adapter") / "task", NAMES, seed=0))


@pytest.fixture(scope="module")
def address(classifier, tmp_path_factory) -> Iterator[str]:
    """Of the page, as docs/serving.md says how to serve it."""
    library, folder = onnxruntime_web(), tmp_path_factory.mktemp("web") / "page"
    shutil.copytree(PAGE, folder)
    shutil.copytree(library, folder / "ort")
    export_file(folder / "task.onnx", classifier, IMAGE_FILES)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()


def images(folder: Path) -> list[Path]:
    """A photograph as JPEG, wide and high images, and one that is clear in parts."""
    wide = Image.open(IMAGE_FILES[1]).convert("RGB").resize((333, 97))
    wide.save(folder / "wide.png")
    wide.rotate(90, expand=True).save(folder / "high.png")
    clear = Image.open(IMAGE_FILES[2]).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "clear.png")
    return [*IMAGE_FILES[:2], folder / "wide.png", folder / "high.png", folder / "clear.png"]


def test_the_page_gives_pythons_answer(classifier, address, tmp_path):
    with open_browser() as browser:
        for width in WIDTHS:
            browser.open(address, width)
            wait(lambda: "4 classes are known" in browser.text(), browser)
            for path in images(tmp_path):
                before = browser.run(ANSWERED)
                browser.driver.find_element("css selector", "#image").send_keys(str(path))
                wait(lambda before=before: browser.run(ANSWERED) not in (None, before), browser)
                found, expected = browser.run(ANSWER), classifier.predict(path)
                assert [label for label, _ in found] == [entry["label"] for entry in expected]
                tolerance = 0.02 if path.suffix == ".jpg" else 2e-3  # decoders of JPEG differ by a level here and there
                scores = [score for _, score in found]
                np.testing.assert_allclose(scores, [e["score"] for e in expected], atol=tolerance)
            assert browser.errors() == [] and browser.overflow() == 0 and browser.broken_images() == []
            assert all(asked.startswith(address.rpartition("/")[0]) for asked in browser.requests())
            browser.screenshot(tmp_path / f"web-{width}.png")


class Served(Handler):
    """The server's page, and answers that a server might give: of one label that acts as HTML, or of none."""

    answers: ClassVar[list] = []

    def do_GET(self) -> None:
        self._say({"tasks": ["task"]}) if self.path == "/tasks" else super().do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say({"task": "task", "answers": self.answers})

    def _say(self, data) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())


def test_the_servers_page_shows_any_answer():
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Served, directory=str(ASSETS.parent / "serve_page")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    label = "<img src=x onerror=document.title='owned'>"
    with open_browser() as browser:
        browser.open(f"http://127.0.0.1:{server.server_port}/index.html")
        wait(lambda: browser.run("return document.querySelectorAll('option').length"), browser)
        browser.driver.find_element("css selector", "#file").send_keys(str(IMAGE_FILES[0]))
        for answers, said in (([{"label": label, "score": 0.5}], label), ([], "none of these")):
            Served.answers = answers
            browser.driver.find_element("css selector", "#ask").click()
            wait(lambda said=said: browser.run("return document.querySelector('#said').textContent") == said, browser)
            rows = browser.run(
                "return [...document.querySelectorAll('#answers:not([hidden]) th')].map(e => e.textContent)"
            )
            assert rows == [answer["label"] for answer in answers]
        assert browser.run("return document.title") == "What is in the image?" and browser.errors() == []
    server.shutdown()


def wait(what, browser) -> None:
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end, browser.text()
        time.sleep(0.1)
