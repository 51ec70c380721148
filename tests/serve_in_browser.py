"""`examples/serve.py` on a local Ray: its answers, its page in headless Chromium, a reload and the metrics.

It needs Ray, so the usual tests leave it out; `.ci/run` calls it by name.

python -m pytest tests/serve_in_browser.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import httpx
import pytest
import torch
from browser import WIDTHS, open_browser
from bundled import ASSETS, IMAGE_FILES, NAMES, shallow_clip
from peft import get_peft_model
from PIL import Image
from small_clip import perturb
from transformers import AutoProcessor, CLIPModel

from sep_peft import SEPClassifier, SEPConfig


pytest.importorskip("ray.serve", reason="serving needs the package ray[serve]")
sys.path.insert(0, str(ASSETS.parent))
import serve_load


sys.path.remove(str(ASSETS.parent))

#: A class name that acts where a page takes it for HTML.
HOSTILE = "<img src=x onerror=document.title='owned'>"
TASKS = {"caltech": NAMES, "hostile.1": [HOSTILE, "lamp"]}
SECONDS = 60


def make_classifier(names: list[str], seed: int) -> SEPClassifier:
    torch.manual_seed(seed)
    model = get_peft_model(CLIPModel.from_pretrained(shallow_clip(2)), SEPConfig())
    perturb(model, scale=0.02, seed=seed)
    processor = AutoProcessor.from_pretrained(shallow_clip(2))
    return SEPClassifier.from_class_names(model, processor, names).eval()


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory) -> tuple[Path, dict[str, SEPClassifier]]:
    """A folder of tasks, and what each is to answer."""
    folder = tmp_path_factory.mktemp("tasks")
    found = {name: make_classifier(names, seed) for seed, (name, names) in enumerate(TASKS.items())}
    for name, classifier in found.items():
        classifier.save_pretrained(folder / name)
    shutil.copytree(folder / "caltech", folder / "broken")
    (folder / "broken" / "sep_classes.json").write_text("{")
    return folder, found


@pytest.fixture(scope="module")
def server(classifiers, tmp_path_factory) -> Iterator[tuple[subprocess.Popen, str, str, Path]]:
    """The server's process, its address, that of its metrics, and its log."""
    port, metrics, log = serve_load.free_port(), serve_load.free_port(), tmp_path_factory.mktemp("log") / "server.log"
    limits = ["--max-megabytes", "1", "--max-pixels", "1000000", "--batch-wait", "0.05", "--metrics-port", str(metrics)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        process = serve_load.start_server(shallow_clip(2), classifiers[0], port, log, limits)
    yield process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}", log
    process.terminate()
    assert process.wait(timeout=120) == 0, log.read_text()


@pytest.fixture(scope="module")
def http(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[1], timeout=SECONDS, trust_env=False) as client:
        yield client


def wait(what, seconds: float = SECONDS):
    """What a function gives, once it is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


def assert_answers(found: list[dict], expected: list[dict]) -> None:
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    for a, b in zip(found, expected, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)


def test_requests_of_different_tasks_at_once(http, classifiers):
    """Each is answered as its classifier answers alone."""
    questions = [(name, file) for file in IMAGE_FILES[:4] for name in TASKS]

    def ask(question: tuple[str, Path]) -> httpx.Response:
        return http.post(f"/predict/{question[0]}", content=question[1].read_bytes(), params={"top_k": 2})

    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(ask, questions))
    for (name, file), response in zip(questions, responses, strict=True):
        assert response.status_code == 200, response.text
        assert response.json()["task"] == name
        assert_answers(response.json()["answers"], classifiers[1][name].predict(file, top_k=2))


def large_image() -> bytes:
    content = BytesIO()
    Image.new("1", (2000, 600)).save(content, "PNG")
    return content.getvalue()


ERRORS = {
    "no image": (
        "caltech",
        {"content": b"<b>no image</b>"},
        422,
        "unreadable_image",
        "The image <15 bytes> cannot be read: ",
    ),
    "nothing": ("caltech", {"content": b""}, 422, "invalid_request", "The request has no body; send an image file."),
    "bytes": ("caltech", {"content": bytes(1_000_001)}, 413, "image_too_large", "The image has more than 1,000,000"),
    "chunks": (
        "caltech",
        {"content": iter([bytes(600_000)] * 2)},
        413,
        "image_too_large",
        "The image has more than 1,000,000 bytes. Make it smaller.",
    ),
    "pixels": (
        "caltech",
        {"content": large_image()},
        413,
        "image_too_large",
        "The image has 2000 x 600 pixels; at most 1,000,000 are allowed.",
    ),
    "task": ("other", {"content": b"x"}, 404, "unknown_task", "There is no task 'other'; GET /tasks lists them."),
    "path": ("%2e%2e", {"content": b"x"}, 422, "invalid_task", "'..' is no name of a task"),
    "hidden": (".git", {"content": b"x"}, 422, "invalid_task", "'.git' is no name of a task"),
    "slash": ("a%2Fb", {"content": b"x"}, 404, "http_error", ""),
    "broken": (
        "broken",
        {"content": IMAGE_FILES[0].read_bytes()},
        503,
        "task_unavailable",
        "The task 'broken' cannot be loaded; the server's log says why.",
    ),
    "json": ("caltech", {"json": ["x"]}, 422, "invalid_request", 'The JSON must be {"url": "https://..."}.'),
    "origin": (
        "caltech",
        {"json": {"url": "http://169.254.169.254/x"}},
        403,
        "address_not_allowed",
        "http://169.254.169.254:80 is not among the allowed origins.",
    ),
    "top_k": (
        "caltech",
        {"content": b"x", "params": {"top_k": 0}},
        422,
        "invalid_request",
        "top_k must be from 1 to 1000, but is 0.",
    ),
    "no number": ("caltech", {"content": b"x", "params": {"top_k": "x"}}, 422, "invalid_request", "top_k: "),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_json(http, case):
    task, options, status, code, message = ERRORS[case]
    response = http.post(f"/predict/{task}", **options)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code and error["message"].startswith(message)
    assert "/tmp" not in error["message"]


def test_health_and_tasks(http):
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/tasks").json() == {"tasks": ["broken", *TASKS]}
    assert http.get("/other").json()["error"]["code"] == "http_error"
    assert http.get("/predict/caltech").status_code == 405


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page(server, classifiers, width, tmp_path):
    with open_browser() as browser:
        browser.open(server[1] + "/", width=width)
        wait(lambda: browser.run("return document.querySelectorAll('#task option').length") == 3)
        for name in TASKS:
            browser.run("document.getElementById('task').value = arguments[0]", name)
            browser.driver.find_element("id", "file").send_keys(str(IMAGE_FILES[0]))
            browser.driver.find_element("id", "ask").click()
            expected = classifiers[1][name].predict(IMAGE_FILES[0])
            wait(lambda label=expected[0]["label"]: browser.run("return said.textContent") == label)
            for entry in expected[:5]:
                assert entry["label"] in browser.text() and f"{100 * entry['score']:.0f} %" in browser.text()
            assert browser.overflow() == 0 and browser.broken_images() == []
            browser.screenshot(tmp_path / f"{name}-{width}.png")
        assert browser.run("return document.title") == "What is in the image?"
        assert browser.run("return document.querySelectorAll('img[src=x]').length") == 0
        assert browser.errors() == []
        assert {address.partition("?")[0] for address in browser.requests()} == {
            server[1] + path for path in ("/page.css", "/page.js", "/tasks", "/predict/caltech", "/predict/hostile.1")
        }
        browser.run("document.getElementById('task').value = 'broken'")
        browser.driver.find_element("id", "ask").click()
        wait(lambda: "cannot be loaded" in browser.run("return said.textContent"))
        browser.screenshot(tmp_path / f"error-{width}.png")


def test_a_reload_reads_changed_tasks_while_requests_go_on(server, http, classifiers):
    process, _, _, log = server
    folder, content = classifiers[0], IMAGE_FILES[0].read_bytes()
    changed = make_classifier(["zebra", "okapi"], 9)
    shutil.rmtree(folder / "caltech")
    changed.save_pretrained(folder / "caltech")
    replicas = {replica.pid for replica in serve_load.replicas(process)}

    def ask() -> dict:
        response = http.post("/predict/caltech", content=content)
        assert response.status_code == 200, response.text
        return response.json()["answers"]

    assert {entry["label"] for entry in ask()} <= set(NAMES)  # in memory
    os.kill(process.pid, signal.SIGHUP)
    found = wait(lambda: [answers for answers in [ask()] if answers[0]["label"] in ("zebra", "okapi")])[0]
    assert_answers(found, changed.predict(IMAGE_FILES[0]))
    wait(lambda: "changed tasks were read anew" in log.read_text())
    assert {replica.pid for replica in serve_load.replicas(process)} == replicas


def test_metrics(server, http):
    def metrics() -> dict[str, float]:
        text = httpx.get(server[2], timeout=SECONDS, trust_env=False).text
        lines = [line for line in text.splitlines() if "sep_" in line and not line.startswith("#")]
        return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    found = wait(lambda: {name: value for name, value in metrics().items() if "sep_tasks_loaded" in name})
    assert max(found.values()) == 2
    assert any("sep_requests" in name for name in metrics()) and any("sep_latency_ms" in name for name in metrics())


def test_no_answer_is_lost_or_wrong_where_a_replica_is_killed(tmp_path):
    """A small load test: the program itself, whose exit status tells."""
    options = ["--requests", "120", "--tasks", "3", "--images", "2", "--layers", "1", "--kill"]
    quiet = {"HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, serve_load.__file__, *options]
    result = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    table = dict(line.rsplit(None, 1) for line in result.stdout.splitlines() if line.strip())
    assert {table[name] for name in ("lost", "wrong")} == {"0"} and table["replicas killed"] == "1"
    assert json.loads(table["asked again"]) <= 8  # those that were running
