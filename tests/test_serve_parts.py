"""What `examples/serve.py` is made of beside Ray: addresses that may be asked, and tasks that are loaded on demand."""

from __future__ import annotations

import asyncio
import importlib
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from bundled import ASSETS, IMAGE_FILES, NAMES, shallow_clip
from peft import get_peft_model
from PIL import Image
from small_classifier import raises
from small_clip import perturb
from transformers import AutoProcessor, CLIPModel

from sep_peft import SEPClassifier, SEPConfig


sys.path.insert(0, str(ASSETS.parent))
serve_addresses, serve_tasks = (importlib.import_module(name) for name in ("serve_addresses", "serve_tasks"))
sys.path.remove(str(ASSETS.parent))
Addresses, Refused = serve_addresses.Addresses, serve_addresses.Refused
LOCAL = ["127.0.0.0/8"]


def refusal(call) -> tuple[int, str, str]:
    """Status, code and message of what is refused."""
    with pytest.raises(Refused) as error:
        call()
    return error.value.args


# addresses


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/small")
            self.end_headers()
        elif self.path == "/slow":
            threading.Event().wait(1)
        elif self.path == "/missing":
            self.send_error(404)
        else:
            content = b"x" * (10 if self.path == "/small" else 3000)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def local() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(address: str, *origins: str, **options) -> bytes:
    return asyncio.run(Addresses(origins, **({"max_bytes": 1000, "seconds": 5} | options)).fetch(address))


def test_an_allowed_address_is_read(local):
    assert fetch(f"{local}/small", local, networks=LOCAL) == b"x" * 10


@pytest.mark.parametrize(
    ("path", "status", "code", "message"),
    [
        ("/large", 413, "image_too_large", "The image has more than 1,000 bytes. Make it smaller."),
        ("/missing", 502, "address_unreachable", "127.0.0.1 answered with 404."),
        ("/redirect", 502, "address_redirects", "127.0.0.1 redirects; name the address where the image lies."),
        ("/slow", 504, "address_too_slow", "127.0.0.1 has not answered within 0.2 s."),
    ],
)
def test_what_an_address_may_not_do(local, path, status, code, message):
    seconds = 0.2 if path == "/slow" else 5
    call = lambda: fetch(local + path, local, networks=LOCAL, seconds=seconds)  # noqa: E731
    assert refusal(call) == (status, code, message)


@pytest.mark.parametrize(
    ("address", "status", "code", "message"),
    [
        ("file:///etc/passwd", 422, "invalid_address", "'file:///etc/passwd' is no address of http or https."),
        ("http://", 422, "invalid_address", "'http://' is no address of http or https."),
        ("https://a@b.example/", 422, "invalid_address", "'https://a@b.example/' names a user; leave that out."),
        (
            "https://other.example/",
            403,
            "address_not_allowed",
            "https://other.example:443 is not among the allowed origins.",
        ),
        ("http://127.0.0.1/", 403, "address_not_allowed", "127.0.0.1 is in a private network."),
        ("http://[::1]/", 403, "address_not_allowed", "::1 is in a private network."),
        ("http://[::ffff:10.0.0.1]/", 403, "address_not_allowed", "::ffff:10.0.0.1 is in a private network."),
        ("http://[64:ff9b::a00:1]/", 403, "address_not_allowed", "64:ff9b::a00:1 is in a private network."),
        ("http://[2002:a00:1::]/", 403, "address_not_allowed", "2002:a00:1:: is in a private network."),
        ("http://169.254.169.254/", 403, "address_not_allowed", "169.254.169.254 is in a private network."),
        ("http://localhost/", 403, "address_not_allowed", "localhost is in a private network."),
        (
            "http://127.0.0.1:8080/",
            403,
            "address_not_allowed",
            "http://127.0.0.1:8080 is not among the allowed origins.",
        ),
    ],
)
def test_addresses_that_are_not_asked(address, status, code, message):
    hosts = ("127.0.0.1", "[::1]", "[::ffff:10.0.0.1]", "169.254.169.254", "localhost")
    hosts += ("[64:ff9b::a00:1]", "[2002:a00:1::]")
    assert refusal(lambda: fetch(address, *(f"http://{host}" for host in hosts))) == (status, code, message)


@pytest.mark.parametrize("ip", ["1.1.1.1", "2606:4700::1111", "64:ff9b::101:101", "2002:101:101::"])
def test_public_addresses_are_asked(ip, monkeypatch):
    """Up to the connection, which is made to the address that was looked at."""
    asked = []

    async def handle(self, request: httpx.Request) -> httpx.Response:
        asked.append((request.url.host, request.headers["host"], request.extensions["sni_hostname"]))
        return httpx.Response(200, stream=httpx.ByteStream(b"image"))

    async def look_up(*args, **options) -> list:
        return [(0, 0, 0, "", (ip, 443))]

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", handle)
    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", look_up)
    assert fetch("https://a.example/b.jpg", "https://a.example") == b"image"
    assert asked == [(ip, "a.example", "a.example")]


def test_origins_are_addresses():
    with raises("'images.example.com' is no address of http or https."):
        Addresses(["images.example.com"], 1000, 5)


# tasks


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, CLIPModel, object]:
    """Tasks "one" to "four" in a folder, and one that cannot be loaded."""
    folder, clip = tmp_path_factory.mktemp("tasks"), CLIPModel.from_pretrained(shallow_clip(1))
    processor = AutoProcessor.from_pretrained(shallow_clip(1))
    for index, name in enumerate(("one", "two", "three", "four")):
        torch.manual_seed(index)
        model = get_peft_model(clip, SEPConfig(fusion="none", num_text_prompts=0))
        perturb(model, seed=index)
        SEPClassifier.from_class_names(model, processor, NAMES[index : index + 2]).save_pretrained(folder / name)
        clip = model.unload()
    shutil.copytree(folder / "one", folder / "broken")
    (folder / "broken" / "sep_classes.json").write_text("{")
    return folder, clip, processor


@pytest.fixture
def cache(written, tmp_path):
    """Over a copy of the tasks, with room for two."""
    folder, clip, processor = written
    shutil.copytree(folder, tmp_path / "tasks")
    model = get_peft_model(clip, SEPConfig(num_text_prompts=0, fusion="none"), "unused")
    classifier = SEPClassifier.from_class_names(model, processor, ["unused"]).eval()
    yield serve_tasks.TaskCache(classifier, serve_tasks.Sources(tmp_path / "tasks", {}), 2)
    model.unload()


def labels(answers: list) -> set[str]:
    return {entry["label"] for entry in answers}


def test_tasks_are_loaded_when_they_are_asked_for(cache):
    images = [Image.open(file) for file in IMAGE_FILES[:3]]
    answers = cache.predict(["one", "two", "one"], images)
    assert [labels(each) for each in answers] == [{*NAMES[:2]}, {*NAMES[1:3]}, {*NAMES[:2]}]
    assert [*cache.loaded] == ["one", "two"] and (cache.loads, cache.evictions) == (2, 0)
    cache.predict(["one"], images[:1])
    cache.predict(["three"], images[:1])  # of two, "two" was used longer ago
    assert [*cache.loaded] == ["one", "three"] and (cache.loads, cache.evictions) == (3, 1)
    assert len(cache.classifier.tasks) == 2 and len(cache.classifier.model.peft_config) == 3
    cache.predict(["four", "one"], images[:2])
    assert [*cache.loaded] == ["one", "four"]  # what a batch needs makes no room for it


def test_a_task_that_cannot_be_loaded_spoils_no_other(cache, caplog):
    image = Image.open(IMAGE_FILES[0])
    message = "The task 'broken' cannot be loaded; the server's log says why."
    for _ in range(2):  # it is not tried again at once
        wrong, right = cache.predict(["broken", "one"], [image, image])
        assert wrong.args == (503, "task_unavailable", message) and labels(right) == {*NAMES[:2]}
    assert cache.failures == 1 and caplog.text.count("the task broken cannot be loaded: ") == 1


def test_an_image_that_cannot_be_predicted_spoils_no_other(cache, monkeypatch):
    predict = cache.classifier.predict

    def fail_at(images, **options):
        if any(image.size == (1, 1) for image in images):
            raise FloatingPointError("not finite")
        return predict(images, **options)

    monkeypatch.setattr(cache.classifier, "predict", fail_at)
    image = Image.open(IMAGE_FILES[0])
    wrong, right = cache.predict(["one", "two"], [Image.new("RGB", (1, 1)), image])
    assert isinstance(wrong, FloatingPointError) and labels(right) == {*NAMES[1:3]}


def test_changed_tasks_are_read_anew(cache):
    image, folder = Image.open(IMAGE_FILES[0]), cache.sources.folder
    cache.predict(["one", "two"], [image, image])
    before = dict(cache.loaded)
    cache.refresh()
    assert cache.loaded == before
    shutil.rmtree(folder / "one")
    shutil.copytree(folder / "four", folder / "one")
    (folder / "two" / "sep_classes.json").write_text("{")  # half written: it stays as it is
    cache.refresh()
    assert cache.loaded["two"] == before["two"] and cache.loaded["one"] != before["one"]
    one, two = cache.predict(["one", "two"], [image, image])
    assert labels(one) == {*NAMES[3:5]} and labels(two) == {*NAMES[1:3]}
    shutil.rmtree(folder / "one")
    cache.refresh()
    assert [*cache.loaded] == ["two"] and len(cache.classifier.model.peft_config) == 2
    assert cache.need(["one"])["one"].status == 404


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "../one", "a\\b", "a" * 101, "one\n", "ünder", "one two"])
def test_names_that_are_no_paths(cache, name):
    status, code, _ = refusal(lambda: cache.sources.find(name))
    assert (status, code) == (422, "invalid_task")


def test_what_tasks_there_are(cache, tmp_path):
    assert cache.sources.names() == ["broken", "four", "one", "three", "two"]
    assert refusal(lambda: cache.sources.find("five")) == (
        404,
        "unknown_task",
        "There is no task 'five'; GET /tasks lists them.",
    )
    hub = serve_tasks.Sources(None, {"clothing": "me/clothing"})
    assert hub.find("clothing") == "me/clothing" and hub.names() == ["clothing"]
    with raises("'a/b' is no name for a task: letters, digits, '.', '_' and '-' are."):
        serve_tasks.Sources(None, {"a/b": "me/clothing"})
    with raises(f"{tmp_path / 'none'} is no folder. Name one that holds a folder for each task."):
        serve_tasks.Sources(tmp_path / "none", {})
