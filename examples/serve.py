"""Serve many tasks over one base model by HTTP, on Ray Serve: a batch may hold images of any tasks.

    pip install "sep_peft[serve]"
    python examples/serve.py --model openai/clip-vit-base-patch16 --tasks my_tasks   # http://127.0.0.1:8000
    curl --data-binary @a.jpg http://127.0.0.1:8000/predict/clothing
    curl --json '{"url": "https://images.example.com/a.jpg"}' http://127.0.0.1:8000/predict/clothing

`my_tasks` holds a folder for each task, as `SEPClassifier.save_pretrained` wrote it; `--hub clothing=me/clothing` adds
one from the Hub. Each replica has the base model once. A task is loaded when it is first asked for, and of more than
`--max-tasks` the least recently used one goes. The requests that come within `--batch-wait` make one batch, whose
frozen branch is computed once.

    GET  /                   a page to try tasks by hand
    GET  /tasks              {"tasks": [...]}
    POST /predict/TASK       an image file, or {"url": ...}; ?top_k=5
                             {"task": ..., "answers": [{"label": ..., "score": ...}, ...]}, best first
    GET  /healthz            {"status": "ok"} from a replica that answers

Errors are {"error": {"code": ..., "message": ...}}. Prometheus finds metrics at `--metrics-port`. SIGHUP has all
replicas read changed task folders anew, between two batches; SIGTERM and Ctrl-C end the server after the requests that
are running. It asks nobody who they are: put what does in front of it before other machines may reach it.
"""

# without `from __future__ import annotations`: replicas look annotations up, where Ray has not brought their names
import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from peft import get_peft_model
from PIL import Image
from serve_addresses import Addresses, Refused, too_large
from serve_tasks import Sources, TaskCache
from transformers import AutoModel, AutoProcessor

from sep_peft import SEPClassifier, SEPConfig
from sep_peft.classifier.images import read_image
from sep_peft.tuner.messages import one_line


os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # these are read where Ray is imported
# a busy machine takes longer to start a proxy than the few seconds after which Ray starts over
for name in ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"):
    os.environ.setdefault(name, "60")
try:
    import ray
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response
    from ray import serve
    from ray.serve.config import HTTPOptions
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise SystemExit('Serving needs Ray Serve: pip install "sep_peft[serve]"') from error


LOG = logging.getLogger("ray.serve")
#: The page's files by their address, with the type of each; read here, so that replicas need no files.
PAGE = {
    name: ((Path(__file__).parent / "serve_page" / file).read_bytes(), kind)
    for name, file, kind in (
        ("", "index.html", "text/html; charset=utf-8"),
        ("page.js", "page.js", "text/javascript; charset=utf-8"),
        ("page.css", "page.css", "text/css; charset=utf-8"),
    )
}
#: The page runs its own files alone and asks nobody else.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
#: Answers that `top_k` may ask for.
MOST_ANSWERS = 1000
#: Seconds after which a batch that does not end makes a replica count as ill; Ray then starts another.
LONGEST_BATCH = 120.0
#: Upper bounds of the classes of latency, in milliseconds.
LATENCIES = [5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


def failure(status: int, code: str, message: str) -> JSONResponse:
    """An error as JSON."""
    return JSONResponse({"error": {"code": code, "message": one_line(message)}}, status)


@api.exception_handler(Refused)
async def refused(request: Request, error: Refused) -> JSONResponse:
    return failure(error.status, error.code, error.message)


@api.exception_handler(HTTPException)
async def no_such_page(request: Request, error: HTTPException) -> JSONResponse:
    return failure(error.status_code, "http_error", str(error.detail))


@api.exception_handler(RequestValidationError)
async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    return failure(422, "invalid_request", f"{first['loc'][-1]}: {first['msg']}.")


@api.exception_handler(Exception)
async def broken(request: Request, error: Exception) -> JSONResponse:
    return failure(500, "internal_error", "The server could not answer; its log says why.")


@serve.deployment(graceful_shutdown_timeout_s=30, health_check_period_s=5, health_check_timeout_s=30)
@serve.ingress(api)
class Server:
    """One replica: the base model, the tasks that it has loaded, and the requests that wait for the next batch.

    Args:
        model: the base model, a folder or an id on the Hub.
        sources: of the tasks.
        addresses: fetches images from allowed addresses.
        options: `max_tasks`, `max_batch`, `batch_wait`, `max_bytes`, `max_pixels` of the command line.
    """

    def __init__(self, model: str, sources: Sources, addresses: Addresses, options: dict[str, Any]):
        base, processor = AutoModel.from_pretrained(model), AutoProcessor.from_pretrained(model)
        # an adapter that no task uses: tasks stand beside a classifier's own
        bare = SEPConfig(num_text_prompts=0, num_vision_prompts=1, fusion="none")
        classifier = SEPClassifier.from_class_names(get_peft_model(base, bare, "unused"), processor, ["unused"])
        classifier.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.cache = TaskCache(classifier, sources, options["max_tasks"])
        self.sources, self.addresses = sources, addresses
        self.max_bytes, self.max_pixels = options["max_bytes"], options["max_pixels"]
        # the model and the tasks belong to one thread; images are read in others
        self.worker, self.readers = ThreadPoolExecutor(1), ThreadPoolExecutor(options["readers"])
        self.busy_since: float | None = None
        self.answer.set_max_batch_size(options["max_batch"])
        self.answer.set_batch_wait_timeout_s(options["batch_wait"])
        self.requests = serve.metrics.Counter("sep_requests", "Requests by their answer.", ("status",))
        self.latency = serve.metrics.Histogram("sep_latency_ms", "Of requests that were answered.", LATENCIES)
        self.batches = serve.metrics.Histogram("sep_batch_images", "Images of a batch.", [1, 2, 4, 8, 16, 32, 64])
        self.tasks_loaded = serve.metrics.Gauge("sep_tasks_loaded", "Tasks in memory.")
        self.task_loads = serve.metrics.Gauge("sep_task_loads", "Tasks read since the start.")
        self.task_evictions = serve.metrics.Gauge("sep_task_evictions", "Tasks that made room since the start.")
        self.task_failures = serve.metrics.Gauge("sep_task_failures", "Tasks that could not be read since the start.")

    # what Ray asks

    async def refresh(self) -> None:
        """Read changed tasks anew, after the batch that is running; all replicas are told so at a time."""
        await asyncio.get_running_loop().run_in_executor(self.worker, self.cache.refresh)

    def check_health(self) -> None:
        """
        Raises:
            RuntimeError: a batch does not end.
        """
        since = self.busy_since
        if since is not None and time.monotonic() - since > LONGEST_BATCH:
            raise RuntimeError(f"A batch has been running for more than {LONGEST_BATCH:g} s.")

    # what clients ask

    @api.get("/healthz")
    async def healthz(self) -> dict:
        return {"status": "ok"}

    @api.get("/tasks")
    async def tasks(self) -> dict:
        names = await asyncio.get_running_loop().run_in_executor(self.readers, self.sources.names)
        return {"tasks": names}

    @api.get("/{name}")
    async def page(self, name: str = "") -> Response:
        if name not in PAGE:
            raise HTTPException(404, "There is nothing at this address.")
        content, kind = PAGE[name]
        return Response(content, media_type=kind, headers=PAGE_HEADERS)

    @api.get("/")
    async def front(self) -> Response:
        return await self.page("")

    @api.post("/predict/{task}")
    async def predict(self, task: str, request: Request, top_k: int = 5) -> Response:
        start = time.perf_counter()
        try:
            answers = await self._predict(task, request, top_k)
            response = JSONResponse({"task": task, "answers": answers})
        except Refused as error:
            response = failure(error.status, error.code, error.message)
        except Exception:
            LOG.exception("a request failed")
            response = failure(500, "internal_error", "The server could not answer; its log says why.")
        self.requests.inc(tags={"status": str(response.status_code)})
        self.latency.observe(1000 * (time.perf_counter() - start))
        return response

    async def _predict(self, task: str, request: Request, top_k: int) -> list[dict]:
        self.sources.find(task)  # before anything is read
        if not 1 <= top_k <= MOST_ANSWERS:
            raise Refused(422, "invalid_request", f"top_k must be from 1 to {MOST_ANSWERS}, but is {top_k}.")
        content = await self._content(request)
        image = await asyncio.get_running_loop().run_in_executor(self.readers, self._read, content)
        answer = await self.answer((task, image))
        if isinstance(answer, Exception):
            raise answer
        return answer[:top_k]

    async def _content(self, request: Request) -> bytes:
        """The image file of a request, or what lies at the address in it."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await self._body(request)
        if kind != "application/json":
            return body
        try:
            address = json.loads(body)["url"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Refused(422, "invalid_request", 'The JSON must be {"url": "https://..."}.') from error
        if not isinstance(address, str):
            raise Refused(422, "invalid_request", "url must be a text.")
        return await self.addresses.fetch(address)

    async def _body(self, request: Request) -> bytes:
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_bytes:
            raise too_large(self.max_bytes)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.max_bytes:
                raise too_large(self.max_bytes)
        if not body:
            raise Refused(422, "invalid_request", "The request has no body; send an image file.")
        return bytes(body)

    def _read(self, content: bytes) -> Image.Image:
        """
        Raises:
            Refused: it is no image (422), or has more than `max_pixels` (413).
        """
        try:
            try:
                with Image.open(BytesIO(content)) as opened:  # reads its size alone
                    width, height = opened.size
            except Exception:  # Pillow raises many kinds; the reader tells clients nothing of this process
                return read_image(content)
            if width * height > self.max_pixels:
                message = f"The image has {width} x {height} pixels; at most {self.max_pixels:,} are allowed."
                raise Refused(413, "image_too_large", message)
            return read_image(content)
        except ValueError as error:
            raise Refused(422, "unreadable_image", str(error)) from error

    # batches

    @serve.batch
    async def answer(self, requests: list[tuple[str, Image.Image]]) -> list[Any]:
        """For each task and image the classes with their scores, best first, or why there are none."""
        names, images = zip(*requests, strict=True)
        self.busy_since = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            answers = await loop.run_in_executor(self.worker, self.cache.predict, names, images)
        finally:
            self.busy_since = None
        self.batches.observe(len(requests))
        self.tasks_loaded.set(len(self.cache.loaded))
        self.task_loads.set(self.cache.loads)
        self.task_evictions.set(self.cache.evictions)
        self.task_failures.set(self.cache.failures)
        return answers


# the program


def application(args: argparse.Namespace, sources: Sources, addresses: Addresses):
    """What Ray Serve runs."""
    options = {name: getattr(args, name) for name in ("max_tasks", "max_batch", "batch_wait", "max_pixels", "readers")}
    return Server.options(
        num_replicas=args.replicas,
        ray_actor_options={"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica},
        max_ongoing_requests=4 * args.max_batch,
        max_queued_requests=args.max_queued,
    ).bind(args.model, sources, addresses, {**options, "max_bytes": args.max_megabytes * 10**6})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base model, a folder or an id on the Hub")
    parser.add_argument("--tasks", type=Path, help="folder that holds a folder for each task")
    parser.add_argument("--hub", nargs="*", default=[], metavar="NAME=REPOSITORY", help="tasks from the Hub")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; default: this one alone")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, default=9000, help="where Prometheus finds metrics")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--cpus-per-replica", type=float, default=1)
    parser.add_argument("--gpus-per-replica", type=float, default=0)
    parser.add_argument("--max-tasks", type=int, default=128, help="tasks that a replica keeps in memory")
    parser.add_argument("--max-batch", type=int, default=32, help="images of a batch")
    parser.add_argument("--batch-wait", type=float, default=0.005, help="seconds that a batch waits for more images")
    parser.add_argument("--max-queued", type=int, default=1000, help="requests that wait; more are told to come again")
    parser.add_argument("--readers", type=int, default=2, help="threads of a replica that read images")
    parser.add_argument("--max-megabytes", type=int, default=20, help="of an image file")
    parser.add_argument("--max-pixels", type=int, default=50_000_000, help="of an image")
    parser.add_argument("--seconds", type=float, default=60, help="after which a request is given up")
    parser.add_argument("--allow", nargs="*", default=[], metavar="ORIGIN", help="as https://images.example.com")
    parser.add_argument("--allow-network", nargs="*", default=[], help="private networks of these, as 10.1.0.0/16")
    parser.add_argument("--fetch-seconds", type=float, default=10, help="for an image from an address")
    args = parser.parse_args()
    for name in ("replicas", "max_tasks", "max_batch", "max_queued", "readers", "max_megabytes", "max_pixels"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.max_tasks < args.max_batch:
        parser.error("--max-tasks must be at least --max-batch: each image of a batch may be of another task")
    if args.tasks is None and not args.hub:
        parser.error("name --tasks, --hub or both")
    if bad := [each for each in args.hub if not all(each.partition("="))]:
        parser.error(f"--hub takes NAME=REPOSITORY, but got {bad[0]!r}")
    return args


def main() -> None:
    args = parse_arguments()
    try:
        hub = dict(each.split("=", 1) for each in args.hub)
        sources = Sources(None if args.tasks is None else args.tasks.resolve(), hub)
        limits = {"max_bytes": args.max_megabytes * 10**6, "seconds": args.fetch_seconds}
        addresses = Addresses(args.allow, networks=args.allow_network, **limits)
    except ValueError as error:
        raise SystemExit(one_line(str(error))) from error
    for module in ("serve_addresses", "serve_tasks"):  # which replicas on other machines do not have
        ray.cloudpickle.register_pickle_by_value(sys.modules[module])
    cpus = max(args.replicas * args.cpus_per_replica + 1, 2)
    local = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": cpus, "_metrics_export_port": args.metrics_port}
    ray.init(include_dashboard=False, log_to_driver=True, **local)
    options = HTTPOptions(host=args.host, port=args.port, request_timeout_s=args.seconds)
    serve.start(http_options=options)
    server = serve.run(application(args, sources, addresses), name="sep")
    received: SimpleQueue[int] = SimpleQueue()
    for each in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda number, frame: received.put(number))
    print(f"http://{args.host}:{args.port} (Ctrl-C ends it)", flush=True)
    while received.get() == signal.SIGHUP:
        server.broadcast("refresh").results()
        print("changed tasks were read anew", flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
