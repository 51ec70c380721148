"""How `serve.py` holds under load, and when a replica is killed in the middle: no answer lost, none wrong.

    python examples/serve_load.py --kill                                       # the quickstart's model
    python examples/serve_load.py --requests 1000 --tasks 20 --max-tasks 64   # and options of serve.py

It makes tasks over one base model, each of an adapter of its own with random weights, and asks the model itself what
is right for some images. Then it starts the server, and clients ask for tasks and images at random, each one question
after another. With `--kill` a replica gets SIGKILL after half of the answers. A client that gets no answer, or a
server's error, asks once more; one whose second question fails too has lost its answer. Every answer is compared with
the right one. The table goes to stdout, and the exit status is 1 where an answer was lost or wrong.

For Linux and macOS.
"""

from __future__ import annotations

import argparse
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import torch
from peft import get_peft_model
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor

from sep_peft import SEPClassifier, SEPConfig


EXAMPLES = Path(__file__).parent
ASSETS = EXAMPLES / "assets"
#: Most that a score may differ from the right one.
TOLERANCE = 1e-4
CLASSES = 5


@dataclass
class Question:
    """A task, an image file, and the right answer: label -> score."""

    task: str
    content: bytes
    right: dict[str, float]


@dataclass
class Results:
    """What the clients got; they write at the same time."""

    seconds: list[float] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


def make_base(folder: Path, layers: int) -> Path:
    """The quickstart's model with its first layers alone, and its processor."""
    clip = CLIPModel.from_pretrained(ASSETS / "clip-small")
    for tower in (clip.text_model, clip.vision_model):
        tower.encoder.layers = tower.encoder.layers[:layers]
        tower.config.num_hidden_layers = len(tower.encoder.layers)
    clip.save_pretrained(folder / "base")
    CLIPProcessor.from_pretrained(ASSETS / "clip-small").save_pretrained(folder / "base")
    return folder / "base"


def make_questions(folder: Path, base: Path, tasks: int, images: list[Path], names: list[str]) -> list[Question]:
    """Write tasks into a folder, each for some of the class names, and ask each about each image."""
    processor, contents = CLIPProcessor.from_pretrained(base), [image.read_bytes() for image in images]
    clip, questions = CLIPModel.from_pretrained(base), []
    for index in tqdm(range(tasks), desc="tasks"):
        torch.manual_seed(index)
        rng = random.Random(index)
        model = get_peft_model(clip, SEPConfig())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "sep_" in name:
                    parameter += 0.05 * torch.randn_like(parameter)
        classifier = SEPClassifier.from_class_names(model, processor, rng.sample(names, CLASSES)).eval()
        classifier.save_pretrained(folder / f"task-{index}")
        for content, answer in zip(contents, classifier.predict(contents), strict=True):
            right = {entry["label"]: entry["score"] for entry in answer}
            questions.append(Question(f"task-{index}", content, right))
        clip = model.unload()
    return questions


class Client(threading.Thread):
    """Asks one question after another until there are none left."""

    def __init__(self, address: str, questions: list[Question], results: Results, progress: tqdm):
        super().__init__()
        self.address, self.questions, self.results, self.progress = address, questions, results, progress

    def run(self) -> None:
        with httpx.Client(base_url=self.address, timeout=300, trust_env=False) as http:
            for question in self.questions:
                start = time.perf_counter()
                outcomes = [self._ask(http, question)]
                if outcomes[0] is None:
                    outcomes.append(self._ask(http, question))
                with self.results.lock:
                    self.results.seconds.append(time.perf_counter() - start)
                    self.results.counts["asked again"] += len(outcomes) - 1
                    self.results.counts[outcomes[-1] or "lost"] += 1
                    self.progress.update()

    @staticmethod
    def _ask(http: httpx.Client, question: Question) -> str | None:
        """ "right" or "wrong"; None without an answer."""
        try:
            response = http.post(f"/predict/{question.task}", content=question.content, params={"top_k": CLASSES})
        except httpx.HTTPError:
            return None
        if response.status_code == 408 or response.status_code >= 500:  # too slow, or a server's error
            return None
        if response.status_code != 200:
            return "wrong"
        found = {entry["label"]: entry["score"] for entry in response.json()["answers"]}
        same = found.keys() == question.right.keys()
        return "right" if same and all(abs(found[k] - v) < TOLERANCE for k, v in question.right.items()) else "wrong"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_server(base: Path, tasks: Path, port: int, log: Path, options: list[str]) -> subprocess.Popen:
    """`serve.py`, once it answers.

    Raises:
        RuntimeError: it has ended, or does not answer within five minutes.
    """
    ports = ["--port", str(port), "--metrics-port", str(free_port())]
    command = [
        sys.executable,
        str(EXAMPLES / "serve.py"),
        "--model",
        str(base),
        "--tasks",
        str(tasks),
        *ports,
        *options,
    ]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    end = time.monotonic() + 300
    while time.monotonic() < end and server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5, trust_env=False).status_code == 200:
                return server
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    server.terminate()
    raise RuntimeError(f"The server does not answer:\n{log.read_text()[-4000:]}")


def replicas(server: subprocess.Popen) -> list[psutil.Process]:
    """The replicas' processes among those that the server has started."""
    found = []
    for process in psutil.Process(server.pid).children(recursive=True):
        try:
            if "ServeReplica" in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def ask_all(address: str, questions: list[Question], clients: int, then, count: int) -> tuple[Results, float]:
    """Ask all questions by some clients at once; `then` is called once, after `count` answers."""
    results, start = Results(), time.perf_counter()
    with tqdm(total=len(questions), desc="requests", mininterval=2) as progress:
        threads = [Client(address, questions[index::clients], results, progress) for index in range(clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if then is not None and len(results.seconds) >= count:
                then()
                then = None
            time.sleep(0.02)
    return results, time.perf_counter() - start


def format_table(results: Results, elapsed: float, args: argparse.Namespace) -> str:
    times = sorted(1000 * each for each in results.seconds)
    median, p99 = statistics.median(times), times[min(len(times) - 1, int(0.99 * len(times)))]
    rows = {
        "requests": f"{len(times):,}",
        "tasks, replicas, clients": f"{args.tasks}, {args.replicas}, {args.clients}",
        "requests / s": f"{len(times) / elapsed:.1f}",
        "median": f"{median:.1f} ms",
        "p90": f"{times[int(0.9 * len(times))]:.1f} ms",
        "p99": f"{p99:.1f} ms",
        "p99 / median (goal at most 3)": f"{p99 / median:.2f}",
        "longest": f"{times[-1] / 1000:.1f} s",
        "replicas killed": str(int(args.kill)),
        "asked again": str(results.counts["asked again"]),
        "lost": str(results.counts["lost"]),
        "wrong": str(results.counts["wrong"]),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value:>12}" for name, value in rows.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--images", type=int, default=4, help="that each task is asked about")
    parser.add_argument("--layers", type=int, default=99, help="of the quickstart's model; default: all")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--kill", action="store_true", help="kill a replica after half of the answers")
    parser.add_argument("--seed", type=int, default=0, help="of the order of questions")
    args, options = parser.parse_known_args()  # what is not known here is the server's
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tasks, rng = make_base(folder, args.layers), folder / "tasks", random.Random(args.seed)
        images = sorted((ASSETS / "caltech101" / "test").glob("*/*.jpg"))
        names = sorted({image.parent.name for image in images})
        known = make_questions(tasks, base, args.tasks, rng.sample(images, args.images), names)
        port, log = free_port(), folder / "server.log"
        server = start_server(base, tasks, port, log, ["--replicas", str(args.replicas), "--seconds", "300", *options])
        try:
            address = f"http://127.0.0.1:{port}"
            ask_all(address, known[:: args.images] * args.replicas, args.clients, None, 0)  # every task once: cold
            kill = (lambda: replicas(server)[0].kill()) if args.kill else None
            questions = rng.choices(known, k=args.requests)
            results, elapsed = ask_all(address, questions, args.clients, kill, args.requests // 2)
        finally:
            server.terminate()
            server.wait(timeout=60)
    print(format_table(results, elapsed, args))
    return int(results.counts["right"] != args.requests)


if __name__ == "__main__":
    sys.exit(main())
