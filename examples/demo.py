"""A page in the browser that classifies images: upload one or take one, choose a task, and see what decided.

    pip install "sep_peft[demo]"
    python examples/demo.py my-task                           # http://127.0.0.1:7860
    python examples/demo.py me/clothing me/flowers --port 8000  # several tasks over one base model, from the Hub

Nothing is fetched but the adapters and their base model; the page itself asks no other machine for anything.
"""

from __future__ import annotations

import argparse
import html
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from sep_peft import SEPClassifier
from sep_peft.classifier.calibration import Calibration
from sep_peft.classifier.classes import TaskClasses
from sep_peft.classifier.images import read_image
from sep_peft.tuner.messages import one_line, printable


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read where Gradio is imported
try:
    import gradio as gr
except ImportError as error:
    raise SystemExit('The demo needs Gradio: pip install "sep_peft[demo]"') from error


TITLE = "What is in the image?"
NONE_OF_THESE = "none of these"
#: Classes whose scores are shown.
SHOWN_CLASSES = 5
#: Columns of the drawing of what was selected, which fits a phone.
COLUMNS = 3
#: Of the drawings; a screen's pixels are finer than those of CSS.
DOTS_PER_INCH = 130
#: What may go wrong with an image or an adapter of somebody else, beside mistakes in the program.
EXPECTED = (OSError, ValueError, FloatingPointError)


class Demo:
    """What the page does; it knows nothing of the page.

    Args:
        classifier: in evaluation, with a processor.
        own: name of its own task; the others are those of `classifier.tasks`.
        max_pixels: of an image.
    """

    def __init__(self, classifier: SEPClassifier, own: str, max_pixels: int):
        self.classifier, self.own, self.max_pixels = classifier, own, max_pixels

    @classmethod
    def load(cls, adapters: Sequence[str], base_model: str | None, max_pixels: int) -> Demo:
        """
        Args:
            adapters: folders or ids on the Hub; tasks get the last part of these as names.
            base_model: in the place of the one that the first adapter names; None: that one.
            max_pixels: of an image.

        Raises:
            OSError, ValueError: as `SEPClassifier.from_pretrained` and `load_task`.
        """
        parts = {}
        if base_model is not None:
            parts = {"model": AutoModel.from_pretrained(base_model)}
            parts["processor"] = AutoProcessor.from_pretrained(base_model)
        classifier = SEPClassifier.from_pretrained(adapters[0], **parts).eval()
        names: list[str] = []
        for adapter in adapters:
            name = printable(Path(adapter).name) or "task"
            names.append(name if name not in names else f"{name} ({len(names) + 1})")
        for adapter, name in zip(adapters[1:], names[1:], strict=True):
            classifier.load_task(adapter, name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(classifier.to(device), names[0], max_pixels)

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks, the classifier's own first."""
        return [self.own, *self.classifier.tasks]

    def task(self, name: str) -> str | None:
        """A task's name -> what `predict` calls it."""
        return None if name == self.own else name

    def classes(self, task: str) -> TaskClasses:
        """Of a task."""
        return self.classifier.classes if self.task(task) is None else self.classifier.tasks[task].classes

    def names(self, task: str) -> list[str]:
        """Classes of a task."""
        return list(self.classes(task).names)

    def can_reject(self, task: str) -> bool:
        """Whether a task was calibrated for an answer of none of these."""
        calibration = self.classes(task).calibration
        return isinstance(calibration, Calibration) and calibration.knows_strangers

    def read(self, path: str) -> Image.Image:
        """
        Raises:
            ValueError: it is no image, or has more than `max_pixels`.
        """
        content = Path(path).read_bytes()  # messages then tell nothing of the server's folders
        try:
            with Image.open(path) as opened:  # reads its size alone
                width, height = opened.size
        except OSError:
            return read_image(content)  # whose message says what is wrong
        if width * height > self.max_pixels:
            raise ValueError(
                f"The image has {width} x {height} pixels; at most {self.max_pixels:,} are allowed. Make it smaller."
            )
        return read_image(content)

    def answer(self, image: Image.Image, task: str, reject: bool) -> tuple[str, dict[str, float]]:
        """What is said of an image, and its best scores; all classes that are named, where there may be several.

        Raises:
            ValueError: as `predict`.
        """
        name, several = self.task(task), self.classes(task).multi_label
        ranking = self.classifier.predict(image, task=name, min_score=0 if several else None)
        scores = {printable(entry["label"]): entry["score"] for entry in ranking[:SHOWN_CLASSES]}
        known = self.classifier.predict(image, task=name, unknown=reject and self.can_reject(task))
        said = known if several else known and ranking[:1]
        return ", ".join(printable(entry["label"]) for entry in said) or NONE_OF_THESE, scores

    def drawings(self, image: Image.Image, task: str) -> tuple[Image.Image, Image.Image | None]:
        """What decided for the best class, and what SEP selected; None where it selects nothing.

        Raises:
            ValueError: as `explain`.
        """
        explanation = self.classifier.explain(image, task=self.task(task))
        decided = as_image(replace(explanation, layers=[]).plot())
        if not explanation.layers:
            return decided, None
        selected = replace(explanation, label=None, score=None, effects=None)
        return decided, as_image(selected.plot(columns=COLUMNS))


def make_page(demo: Demo) -> gr.Blocks:
    """The page of a demo. Foreign text stands only where Gradio shows it as it is, and in `told` is escaped."""

    def look_at(path: str | None, task: str, reject: bool) -> Iterator[tuple]:
        yield "", None, None, None  # nothing of the image before stays beside this one
        if path is None:
            return
        with told():
            image = demo.read(path)
            answer = demo.answer(image, task, reject)
            yield *answer, None, None  # the drawings of a large model take a while
            yield *answer, *demo.drawings(image, task)

    def choose(task: str) -> tuple:
        return ", ".join(map(printable, demo.names(task))), gr.update(interactive=demo.can_reject(task))

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f"# {TITLE}")
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    sources=["upload", "webcam"],
                    label="Image",
                    elem_id="image",
                    buttons=[],
                )
                # Gradio's own decodes it, whatever its size, and its errors tell the server's folders
                image.preprocess = lambda uploaded: None if uploaded is None else uploaded.path
                task = gr.Dropdown(
                    demo.tasks, value=demo.own, label="Task", elem_id="task", visible=len(demo.tasks) > 1
                )
                classes = gr.Textbox(
                    label="Classes", value=choose(demo.own)[0], interactive=False, lines=2, max_lines=3
                )
                reject = gr.Checkbox(
                    label=f'May be "{NONE_OF_THESE}"',
                    info="Needs a task whose scores were calibrated.",
                    interactive=demo.can_reject(demo.own),
                    elem_id="reject",
                )
            with gr.Column():
                said = gr.Textbox(label="Answer", interactive=False, elem_id="said")
                scores = gr.Label(label="Scores", show_heading=False, elem_id="scores")
                # without Gradio's label and buttons, which would cover the titles
                drawing = {"format": "png", "interactive": False, "show_label": False, "buttons": []}
                gr.Markdown("Patches that decided")
                decided = gr.Image(alt_text="Patches that decided", elem_id="decided", **drawing)
        gr.Markdown("Patches that SEP selected before each layer")
        with gr.Row():
            selected = gr.Image(alt_text="Patches that SEP selected", elem_id="selected", **drawing)
        inputs, outputs = [image, task, reject], [said, scores, decided, selected]
        options: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        for event in (image.change, reject.input):
            event(look_at, inputs, outputs, trigger_mode="always_last", **options)
        task.input(choose, task, [classes, reject], **options).then(look_at, inputs, outputs, **options)
    return page


@contextmanager
def told() -> Iterator[None]:
    """Errors that a user can do something about are shown on the page, as text: Gradio reads HTML in messages."""
    try:
        yield
    except EXPECTED as error:
        raise gr.Error(html.escape(one_line(str(error))), duration=None, print_exception=False) from error


def as_image(figure) -> Image.Image:
    """A figure of matplotlib as pixels."""
    png = BytesIO()
    figure.savefig(png, dpi=DOTS_PER_INCH)
    return Image.open(png)


def launch(demo: Demo, host: str, port: int, max_megabytes: int, **options) -> gr.Blocks:
    """Serve a demo; returns its page, which ends with `close()`.

    Args:
        demo: to serve.
        host, port: where; port 0 takes a free one.
        max_megabytes: of an uploaded file.
        options: of Gradio's `launch`.
    """
    page = make_page(demo)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # not those of Google
    page.queue(max_size=32).launch(
        server_name=host,
        server_port=port or None,
        share=False,
        show_error=True,
        max_file_size=f"{max_megabytes}mb",
        theme=gr.themes.Default(**fonts),
        footer_links=[],
        ssr_mode=False,
        quiet=True,  # Gradio would advise to share it
        **options,
    )
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", help="folders or ids on the Hub, of one base model; a task each")
    parser.add_argument("--base-model", help="name or folder; default: the one that the first adapter names")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; default: this one alone")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max-megabytes", type=int, default=20, help="of an uploaded file")
    parser.add_argument("--max-pixels", type=int, default=50_000_000, help="of an image")
    args = parser.parse_args()
    for name in ("max_megabytes", "max_pixels"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        demo = Demo.load(args.adapters, args.base_model, args.max_pixels)
    except EXPECTED as error:
        parser.error(one_line(str(error)))
    page = launch(demo, args.host, args.port, args.max_megabytes, prevent_thread_lock=True)
    print(f"{page.local_url} (Ctrl-C ends it)")
    page.block_thread()


if __name__ == "__main__":
    main()
