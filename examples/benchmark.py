"""What SEP costs in time, memory and bytes beside plain CLIP and beside LoRA, measured on this machine.

The models have the sizes of CLIP ViT-B/16 and random weights, so nothing is downloaded: no cost depends on the values.
Workloads that are compared run by turns, in a new order every round, and a ratio is the median of the ratios of the
single rounds, so that a machine that other programs slow down now and then still gives usable numbers. For Linux and
macOS, on the CPU where no device is named.

    python examples/benchmark.py                     # a few minutes on two cores
    python examples/benchmark.py --fast              # a tiny model, seconds: only to see that everything runs
    python examples/benchmark.py --extended          # everything; compiling takes minutes
    python examples/benchmark.py --only resident     # a hundred adapters in one model
    python examples/benchmark.py --only mixed        # a batch whose samples use sixteen adapters
    python examples/benchmark.py --only imports      # what `import sep_peft` adds to `import peft`
    python examples/benchmark.py --only epoch        # an epoch with 21,000 classes; some minutes
    python examples/benchmark.py --check             # every goal, in five minutes at most; fails where one is not met
    python examples/benchmark.py --device cuda       # a GPU: other models, batches and goals; see benchmark_device.py

On Linux, glibc gives freed memory back to the system during every training step and takes it again page by page. Plain
CLIP without gradients hardly notices. All timings but one are made with that turned off, for every workload alike; a
program of yours gets the same by `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python ...`.

The table goes to stdout and, with the spread over the rounds, into a JSON file, row by row; so does what was measured
when Ctrl-C or SIGTERM comes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import AutoProcessor, CLIPConfig, CLIPModel

import sep_peft
from sep_peft import SEPClassifier, SEPConfig, TrunkCache, cast_adapter
from sep_peft.folders import read_folder
from sep_peft.training import History, LabelledImages, Recipe, fit
from sep_peft.training.epochs import Epochs
from sep_peft.training.progress import Progress


MIB = 2**20
#: The quickstart's model and images.
ASSETS = Path(__file__).parent / "assets"
#: Bytes in one unit of `ru_maxrss`.
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
#: Bytes from which on glibc takes a block from the system and gives it back when it is freed.
MMAP_THRESHOLD = 2**18
#: Options of glibc's `mallopt`.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
#: Token ids of CLIP.
VOCABULARY, BOS, EOS = 49408, 49406, 49407

Workload = Callable[[], object]

# names of the workloads
PLAIN = "plain image encoding"
PROMPTED = "prompted image forward"
SEP = "SEP image encoding"
SEP_LATE = "SEP image encoding, late start"
SEP_ONE = "SEP encoding of one image"
SEP_ONE_CLASSIFIED = "SEP classification of one image"
PLAIN_EVALUATION = "plain evaluation"
SEP_EVALUATION = "SEP evaluation"
LORA_STEP = "LoRA step"
SEP_STEP = "SEP step"
SEP_FULL_STEP = "SEP step, full loss"
SEP_MORE_STEP = "SEP step, full loss, more classes"
SEP_CACHED_STEP = "SEP step, full loss, late start, cached trunk"
SEP_FROZEN_STEP = "SEP step, full loss, cached frozen embeddings"
SEP_MORE_CLASSES_STEP = "SEP step, more classes"
SEP_MANY_STEP = "SEP step, many classes"
SEP_SAMPLED_STEP = "SEP step, many classes, sampled"
SEP_FULL_SAMPLED_STEP = "SEP step, full loss, many classes, sampled"

AS_IT_IS = "glibc as it is"
LOADING = "quickstart: share of time that a step waits for images"
RESIDENT = "resident adapters / their files"
MIXED, MIXED_SMALL = "SEP image encoding, mixed batch", "SEP image encoding, mixed batch, quickstart's model"
ADD_FIRST, ADD_LAST = "SEP adapter: add the first", "SEP adapter: add the last"
LOAD_LAST = "SEP task: load beside all"
EPOCH, EPOCH_MEMORY = "fit, an epoch with very many classes", "fit, peak memory with very many classes"
#: What a new interpreter runs, as arguments of Python.
BASE_IMPORT = ("-c", "import peft")
IMPORTS = {"import sep_peft": ("-c", "import sep_peft"), "sep-peft --help": ("-m", "sep_peft", "--help")}
ABOVE_PEFT = "above import peft"


# what is measured


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and of the task.

    Args:
        text, vision: options of the towers.
        projection_dim: width of the joint space.
        late_start: the `start_layer` that is compared with 0.
        batch_size: images a batch.
        num_classes: classes of the task.
        more_classes: classes of the task with more classes, for time.
        many_classes: classes of the task with many classes, all encoded or a sample of them.
        epoch_classes: classes of the epoch with very many.
        resident: adapters that are in one model at once.
        mixed_samples, mixed_adapters: samples of a mixed batch, and adapters that they use.
        rounds: repetitions of every timing.
        goals: name of a row -> the most that it should be.
        goals_alone: leave out what no goal is about.
        threads: CPU threads of torch.
        seed: of weights, images and texts.
    """

    text: dict
    vision: dict
    projection_dim: int
    late_start: int
    batch_size: int
    num_classes: int
    more_classes: int
    many_classes: int
    epoch_classes: int
    resident: int
    mixed_samples: int
    mixed_adapters: int
    rounds: int
    goals: dict
    goals_alone: bool = False
    threads: int = 0
    seed: int = 0


VIT_B_16 = Settings(
    text={"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
    vision={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
    projection_dim=512,
    late_start=9,
    batch_size=8,
    num_classes=50,
    more_classes=500,
    many_classes=1000,
    epoch_classes=21_000,
    resident=100,
    mixed_samples=32,
    mixed_adapters=16,
    rounds=7,
    goals={
        f"{PROMPTED} / {PLAIN}": 1.10,
        f"{SEP} / {PLAIN}": 2.10,
        f"{SEP_LATE} / {PLAIN}": 1 + (12 - 9) / 12 + 0.1,  # the shared layers once, the others twice
        f"{SEP_ONE_CLASSIFIED} / {SEP_ONE}": 1.10,
        f"{SEP_FULL_STEP} / {PLAIN}": 3.6,
        f"{SEP_MORE_STEP} / {PLAIN}": 7.0,
        f"{SEP_CACHED_STEP} / {SEP_FULL_STEP}": 0.25,
        f"{SEP_FROZEN_STEP} / {PLAIN}": 2.5,
        f"{SEP_FULL_SAMPLED_STEP} / {SEP_FULL_STEP}": 1.25,
        f"peak memory: {SEP_MANY_STEP} / {SEP_STEP}": 1.5,
        f"peak memory: {SEP_SAMPLED_STEP} / {SEP_STEP}": 1.2,
        LOADING: 5.0,
        "SEP adapter: size": 6.0,
        "SEP adapter: switch": 1.0,
        "compact SEP adapter: size": 1.0,
        "compact SEP adapter: load": 100.0,
        "compact SEP adapter: switch": 1.0,
        RESIDENT: 1.1,
        f"{MIXED} / one adapter": 1.3,
        f"{MIXED_SMALL} / one adapter": 1.3,
        f"{ADD_LAST} / {ADD_FIRST}": 2.0,
        LOAD_LAST: 200.0,
        **{f"{name}, {ABOVE_PEFT}": 0.2 for name in IMPORTS},
        EPOCH_MEMORY: 8192.0,
        f"{SEP}: compiled / eager": 1.0,
        f"{SEP}: bf16 autocast / eager": 1.0,
        f"{SEP_FULL_STEP}: compiled / eager": 1.0,
        f"{SEP_FULL_STEP}: bf16 autocast / eager": 1.0,
    },
)
TINY = Settings(
    text={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    vision={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    },
    projection_dim=32,
    late_start=1,
    batch_size=4,
    num_classes=10,
    more_classes=20,
    many_classes=300,
    epoch_classes=300,
    resident=3,
    mixed_samples=4,
    mixed_adapters=2,
    rounds=2,
    # what does not grow with the model outweighs everything else here: goals to see how a check tells of them
    goals={
        "SEP adapter: size": 1.0,
        "SEP adapter: switch": 0.0,
        f"{SEP}: compiled / eager": 1.0,
    },
)


@dataclass
class Row:
    """One line of the table: a quantity, as measured in each round."""

    name: str
    unit: str
    values: list[float]

    def to_json(self, goals: dict[str, float]) -> dict:
        median, goal = statistics.median(self.values), goals.get(self.name)
        return {
            "name": self.name,
            "unit": self.unit,
            "min": min(self.values),
            "median": median,
            "max": max(self.values),
            "rounds": len(self.values),
            "goal": goal,
            "met": None if goal is None else median <= goal,
        }


@dataclass
class Task:
    """A batch of images and the classes they belong to.

    Args:
        pixel_values: (B, 3, height, width).
        labels: (B,).
        names: tokenized class names, tensors (C, L), which SEP's prompted branch reads.
        templates: tokenized "a photo of a ...", tensors (C, L), which SEP's frozen branch, CLIP and LoRA read.
    """

    pixel_values: torch.Tensor
    labels: torch.Tensor
    names: dict[str, torch.Tensor]
    templates: dict[str, torch.Tensor]


# models and data


def make_clip(settings: Settings) -> CLIPModel:
    """CLIP with random weights, in fp32."""
    torch.manual_seed(settings.seed)
    text = {**settings.text, "vocab_size": VOCABULARY, "max_position_embeddings": 77}
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=settings.vision, projection_dim=settings.projection_dim)
    ).eval()


def make_sep(settings: Settings, **options) -> PeftModel:
    return get_peft_model(make_clip(settings), SEPConfig(**options))


def lora_config() -> LoraConfig:
    """LoRA on the attention of both towers."""
    return LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])


def make_lora(settings: Settings) -> PeftModel:
    return get_peft_model(make_clip(settings), lora_config())


def make_task(settings: Settings, num_classes: int) -> Task:
    generator = torch.Generator().manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    names = [[rng.randrange(1000, BOS) for _ in range(rng.randint(2, 4))] for _ in range(num_classes)]
    size = settings.vision["image_size"]
    return Task(
        pixel_values=torch.randn(settings.batch_size, 3, size, size, generator=generator),
        labels=torch.randint(num_classes, (settings.batch_size,), generator=generator),
        names=tokenize(names, before=[], after=[269]),  # "...."
        templates=tokenize(names, before=[320, 1125, 539, 320], after=[269]),  # "a photo of a ...."
    )


def tokenize(names: list[list[int]], before: list[int], after: list[int]) -> dict[str, torch.Tensor]:
    """What CLIP's tokenizer would return for the names between two pieces of text: ids and mask, each (C, L)."""
    texts = [[BOS, *before, *name, *after, EOS] for name in names]
    length = max(map(len, texts))
    input_ids = torch.tensor([text + [EOS] * (length - len(text)) for text in texts])
    attention_mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
    return {"input_ids": input_ids, "attention_mask": attention_mask}


# workloads: functions without arguments


def image_encoding(model: nn.Module, task: Task) -> Workload:
    return inference(model.get_image_features, task)


def inference(function: Callable, task: Task) -> Workload:
    """`function` of the images, without gradients."""
    return torch.no_grad()(partial(function, pixel_values=task.pixel_values))


def text_embeds(model: nn.Module, texts: dict[str, torch.Tensor]) -> torch.Tensor:
    """CLIP's text embeddings of unit length, (C, E)."""
    return F.normalize(model.get_text_features(**texts).pooler_output, dim=-1)


def clip_logits(model: nn.Module, text: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """CLIP's logits (B, C) for text embeddings (C, E)."""
    image = F.normalize(model.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)
    return model.logit_scale.exp() * image @ text.T


def clip_evaluation(model: CLIPModel, task: Task) -> Workload:
    """Classification by CLIP, with the text embeddings at hand."""
    with torch.no_grad():
        text = text_embeds(model, task.templates)
    return inference(partial(clip_logits, model, text), task)


def sep_evaluation(model: PeftModel, task: Task) -> Workload:
    """Classification by SEP; the classifier keeps the text embeddings from the first call on."""
    return inference(SEPClassifier(model, task.names, task.templates).eval(), task)


def training_step(module: nn.Module, compute_loss: Callable[[], torch.Tensor]) -> Workload:
    """Forward, backward and AdamW on the trainable parameters of `module`."""
    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        compute_loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lora_step(model: PeftModel, task: Task) -> Workload:
    def compute_loss() -> torch.Tensor:
        text = text_embeds(model, task.templates)
        return F.cross_entropy(clip_logits(model, text, task.pixel_values), task.labels)

    return training_step(model, compute_loss)


def sep_full_step(model: PeftModel, task: Task, class_sample: int | None = 0, **loss_weights: float) -> Workload:
    """A step on the published loss, or with other weights of its parts; `class_sample` is the recipe's."""
    recipe = Recipe(class_sample=class_sample, **loss_weights)
    classifier = SEPClassifier(model, task.names, task.templates, recipe=recipe)
    return training_step(classifier, lambda: classifier(task.pixel_values, task.labels).loss)


def sep_cached_step(model: PeftModel, task: Task) -> Workload:
    """A step of a later epoch: what training does not change of the images is in memory."""
    classifier = SEPClassifier(model, task.names, task.templates)
    images = [{"pixel_values": p, "labels": y} for p, y in zip(task.pixel_values, task.labels, strict=True)]
    cache = TrunkCache(model, images)

    def compute_loss() -> torch.Tensor:
        batch = torch.utils.data.default_collate([cache[index] for index in range(len(cache))])
        return classifier(**batch).loss

    return training_step(classifier, compute_loss)


def sep_step(model: PeftModel, task: Task, class_sample: int | None = 0) -> Workload:
    """A step on the cross entropy alone, the loss that LoRA gets as well."""
    return sep_full_step(model, task, class_sample, text_weight=0, vision_weight=0, prototype_weight=0)


def sep_sampled_step(model: PeftModel, task: Task) -> Workload:
    """`sep_step` with as many class texts as the default recipe draws."""
    return sep_step(model, task, class_sample=None)


# stopping


class Stopped(Exception):
    """A signal has come."""


class Stop:
    """The first of some signals raises `Stopped`, wherever the program is; a second one does what it always does.

    What it is raised in may make another error of it, as compilers do; `stopped` tells.

    Args:
        seconds: after which SIGALRM comes; None: never.
    """

    def __init__(self, seconds: int | None = None):
        self.received: str | None = None
        self._usual = {
            each: signal.signal(each, self._stop) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
        }
        signal.alarm(seconds or 0)

    def _stop(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number).name
        self.end()
        raise Stopped

    def stopped(self, error: Exception) -> bool:
        """Whether an error came of a signal; says so on standard error."""
        if self.received is None or not (isinstance(error, Stopped) or Stopped.__name__ in str(error)):
            return False
        print(f"{self.received} came; this is what was measured until then.", file=sys.stderr)
        return True

    def end(self) -> None:
        signal.alarm(0)
        for number, usual in self._usual.items():
            signal.signal(number, usual)


# time


def seconds(workload: Workload) -> float:
    start = time.perf_counter()
    workload()
    return time.perf_counter() - start


def repeated(workload: Workload, times: int) -> Workload:
    """The workload, so many times in a row: only for ratios of two that are repeated alike."""

    def run() -> None:
        for _ in range(times):
            workload()

    return run


def time_by_turns(workloads: dict[str, Workload], settings: Settings, title: str) -> dict[str, list[float]]:
    """Seconds of each workload in each round, after a round that does not count; when stopped, of the whole rounds."""
    names, rng = list(workloads), random.Random(settings.seed)
    times = {name: [] for name in names}
    try:
        with tqdm(total=(settings.rounds + 1) * len(names), desc=title) as progress:
            for index in range(settings.rounds + 1):
                rng.shuffle(names)
                for name in names:
                    elapsed = seconds(workloads[name])
                    if index > 0:
                        times[name].append(elapsed)
                    progress.update()
    except Stopped:
        whole = min(map(len, times.values()))
        if whole == 0:
            raise
        times = {name: values[:whole] for name, values in times.items()}
    return times


def needed(workloads: dict[str, Callable[[], Workload]], settings: Settings) -> dict[str, Workload]:
    """Makes workloads, or those alone that a goal is about."""
    about = {part for goal in settings.goals for part in goal.split(" / ")}
    return {name: make() for name, make in workloads.items() if not settings.goals_alone or name in about}


def ratio_rows(times: dict[str, list[float]], *pairs: tuple[str, str]) -> list[Row]:
    """`ratio_row` of each name and base that were measured."""
    return [ratio_row(times, *pair) for pair in pairs if set(pair) <= set(times)]


def ratio_row(times: dict[str, list[float]], name: str, base: str) -> Row:
    """How many times as long one workload takes as another, round by round."""
    return Row(f"{name} / {base}", "× time", [a / b for a, b in zip(times[name], times[base], strict=True)])


def measure_inference(settings: Settings) -> list[Row]:
    task = make_task(settings, settings.num_classes)
    one = replace(task, pixel_values=task.pixel_values[:1], labels=task.labels[:1])
    plain, sep = make_clip(settings), make_sep(settings)
    late = partial(make_sep, settings, start_layer=settings.late_start)
    workloads = {
        PLAIN: lambda: image_encoding(plain, task),
        PROMPTED: lambda: inference(sep.base_model.towers["vision"].embed_prompted, task),
        SEP: lambda: image_encoding(sep, task),
        SEP_LATE: lambda: image_encoding(late(), task),
        PLAIN_EVALUATION: lambda: clip_evaluation(plain, task),
        SEP_EVALUATION: lambda: sep_evaluation(sep, task),
        # One image takes a fraction of a second: what else the machine does in it would decide a round.
        SEP_ONE: lambda: repeated(image_encoding(sep, one), 5),
        SEP_ONE_CLASSIFIED: lambda: repeated(sep_evaluation(sep, one), 5),
    }
    times = time_by_turns(needed(workloads, settings), settings, "inference")
    evaluations = [name for name in (PLAIN_EVALUATION, SEP_EVALUATION) if name in times]
    return [
        *(Row(name, "s", times[name]) for name in (PLAIN,) if name in times),
        *ratio_rows(times, (PROMPTED, PLAIN), (SEP, PLAIN), (SEP_LATE, PLAIN)),
        *(Row(name, "images/s", [settings.batch_size / t for t in times[name]]) for name in evaluations),
        *ratio_rows(times, (SEP_EVALUATION, PLAIN_EVALUATION), (SEP_ONE_CLASSIFIED, SEP_ONE)),
    ]


def measure_allocator(settings: Settings) -> list[Row]:
    """A training step while glibc gives freed memory back."""
    task = make_task(settings, settings.num_classes)
    workloads = {
        PLAIN: image_encoding(make_clip(settings), task),
        SEP_FULL_STEP: sep_full_step(make_sep(settings), task),
    }
    times = time_by_turns(workloads, settings, AS_IT_IS)
    row = ratio_row(times, SEP_FULL_STEP, PLAIN)
    return [replace(row, name=f"{row.name}, {AS_IT_IS}")]


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation; other systems' allocators stay as they are."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def measure_training(settings: Settings) -> list[Row]:
    task = make_task(settings, settings.num_classes)
    sep = make_sep(settings)
    more, many = (partial(make_task, settings, count) for count in (settings.more_classes, settings.many_classes))
    late = partial(make_sep, settings, start_layer=settings.late_start)
    workloads = {
        PLAIN: lambda: image_encoding(make_clip(settings), task),
        LORA_STEP: lambda: lora_step(make_lora(settings), task),
        SEP_STEP: lambda: sep_step(sep, task),
        SEP_FULL_STEP: lambda: sep_full_step(sep, task),
        SEP_MORE_STEP: lambda: sep_full_step(sep, more()),
        SEP_FULL_SAMPLED_STEP: lambda: sep_full_step(sep, many(), class_sample=None),
        SEP_CACHED_STEP: lambda: sep_cached_step(late(), task),
        SEP_FROZEN_STEP: lambda: sep_cached_step(make_sep(settings), task),
    }
    times = time_by_turns(needed(workloads, settings), settings, "training")
    steps = [name for name in times if name != PLAIN]
    return [
        *(Row(name, "s", times[name]) for name in steps),
        *ratio_rows(times, *((name, PLAIN) for name in steps)),
        *ratio_rows(times, (SEP_CACHED_STEP, SEP_FULL_STEP), (SEP_FULL_SAMPLED_STEP, SEP_FULL_STEP)),
        *ratio_rows(times, (SEP_STEP, LORA_STEP), (SEP_FULL_STEP, LORA_STEP)),
    ]


def measure_extended(settings: Settings) -> list[Row]:
    """What torch.compile and autocast to bfloat16 do for plain CLIP, for SEP and for a training step."""
    task = make_task(settings, settings.num_classes)
    eager = {
        PLAIN: image_encoding(make_clip(settings), task),
        SEP: image_encoding(make_sep(settings), task),
        SEP_FULL_STEP: sep_full_step(make_sep(settings), task),
    }
    rows = []
    for mode, wrap in {"compiled": compiled, "bf16 autocast": torch.autocast("cpu", torch.bfloat16)}.items():
        faster = {f"{name}, {mode}": wrap(workload) for name, workload in eager.items()}
        times = time_by_turns({**eager, **faster}, settings, mode)
        for name in eager:
            values = [a / b for a, b in zip(times[f"{name}, {mode}"], times[name], strict=True)]
            rows.append(Row(f"{name}: {mode} / eager", "× time", values))
        rows.append(ratio_row(times, f"{SEP}, {mode}", f"{PLAIN}, {mode}"))
    return rows


def compiled(workload: Workload) -> Workload:
    return torch.compile(workload, dynamic=False)


# memory


@dataclass(frozen=True)
class MemoryCase:
    make_model: Callable[[Settings], nn.Module]
    make_workload: Callable[[nn.Module, Task], Workload]
    classes: str = "num_classes"  # which of the settings says how many


MEMORY_CASES = {
    PLAIN: MemoryCase(make_clip, image_encoding),
    SEP: MemoryCase(make_sep, image_encoding),
    LORA_STEP: MemoryCase(make_lora, lora_step),
    SEP_STEP: MemoryCase(make_sep, sep_step),
    SEP_MORE_CLASSES_STEP: MemoryCase(make_sep, sep_step, "more_classes"),
    SEP_MANY_STEP: MemoryCase(make_sep, sep_step, "many_classes"),
    SEP_SAMPLED_STEP: MemoryCase(make_sep, sep_sampled_step, "many_classes"),
}


def peak_memory(name: str, settings: Settings) -> tuple[int, int]:
    """For a process of its own: bytes at the peak of a workload, and how many of them came on top of the model."""
    torch.set_num_threads(settings.threads)
    case = MEMORY_CASES[name]
    model = case.make_model(settings)
    loaded = psutil.Process().memory_info().rss
    task = make_task(settings, getattr(settings, case.classes))
    workload = case.make_workload(model, task)
    for _ in range(2):  # the optimizer's state is there from the second step on
        workload()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
    return peak, peak - loaded


def send(sender: Connection, function: Callable, arguments: tuple) -> None:
    sender.send(function(*arguments))


def in_own_process(function: Callable, *arguments: object) -> tuple:
    """What a function returns in a process whose memory begins small.

    A process that is started directly begins with the peak of its parent; one that a small server forks does not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.clip.modeling_clip", "sep_peft"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(sender, function, arguments))
    process.start()
    sender.close()  # so that a process that fails ends the waiting
    try:
        return receiver.recv()
    finally:
        process.kill()  # it has nothing left to do, or this one was stopped
        process.join()


def measure_memory(settings: Settings) -> Iterator[Row]:
    # Without a fixed threshold the gaps in glibc's heap count as well. They say more about glibc than about a method: a
    # training step appears to take half as much again, and to take more the more chunks of texts it goes through.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MMAP_THRESHOLD)
    peaks = {}
    cases = (SEP_STEP, SEP_MANY_STEP, SEP_SAMPLED_STEP) if settings.goals_alone else tuple(MEMORY_CASES)
    for name in tqdm(cases, desc="memory"):
        peak, growth = in_own_process(peak_memory, name, settings)
        peaks[name] = peak
        yield Row(f"peak memory: {name}", "MiB", [peak / MIB])
        yield Row(f"peak memory above the model: {name}", "MiB", [growth / MIB])
        if name in (SEP_MORE_CLASSES_STEP, SEP_MANY_STEP, SEP_SAMPLED_STEP):
            yield Row(f"peak memory: {name} / {SEP_STEP}", "× memory", [peak / peaks[SEP_STEP]])


def epoch_cost(settings: Settings) -> tuple[float, int]:
    """For a process of its own: CPU seconds of an epoch of `fit` on the quickstart's model and images, beside whose
    classes there are many without an image, and bytes at the peak."""
    torch.set_num_threads(settings.threads)
    tiny = settings.num_classes == TINY.num_classes
    images = read_folder(ASSETS / "caltech101", shots=1 if tiny else 16, seed=1)
    names = [*images.names, *(f"thing number {index}" for index in range(settings.epoch_classes - len(images.names)))]
    model = get_peft_model(CLIPModel.from_pretrained(ASSETS / "clip-small"), SEPConfig())
    classifier = SEPClassifier.from_class_names(model, AutoProcessor.from_pretrained(ASSETS / "clip-small"), names)
    start = time.process_time()
    fit(classifier, images.train, Recipe(epochs=1, calibration_folds=0), quiet=True)
    return time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


def measure_epoch(settings: Settings) -> list[Row]:
    elapsed, peak = in_own_process(epoch_cost, settings)
    return [Row(EPOCH, "s of CPU", [elapsed]), Row(EPOCH_MEMORY, "MiB", [peak / MIB])]


# imports


def measure_imports(settings: Settings) -> list[Row]:
    """CPU seconds of new interpreters."""
    runs = {ABOVE_PEFT: BASE_IMPORT, **IMPORTS}
    times = {name: [] for name in runs}
    for index in range(settings.rounds + 1):  # the first one reads the files
        for name, arguments in runs.items():
            elapsed = cpu_seconds(arguments)
            if index > 0:
                times[name].append(elapsed)
    base = times[ABOVE_PEFT]
    above = {name: [a - b for a, b in zip(times[name], base, strict=True)] for name in IMPORTS}
    return [
        Row(BASE_IMPORT[-1], "s of CPU", base),
        *(Row(f"{name}, {ABOVE_PEFT}", "s of CPU", values) for name, values in above.items()),
    ]


def cpu_seconds(arguments: tuple[str, ...]) -> float:
    """Of a new interpreter, until it has ended."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# adapters


def measure_adapters(settings: Settings) -> Iterator[Row]:
    configs = {
        "SEP adapter": SEPConfig(),
        "compact SEP adapter": SEPConfig.compact(),
        "published SEP adapter": SEPConfig.published(),
        "LoRA adapter": lora_config(),
    }
    for name, config in tqdm(configs.items(), desc="adapters"):
        with tempfile.TemporaryDirectory() as folder:
            yield from measure_adapter(name, get_peft_model(make_clip(settings), config), folder, settings.rounds)
            if name == "SEP adapter":
                cast_adapter(folder, torch.bfloat16)
                yield Row(f"{name}, bf16: size", "MB", [adapter_bytes(folder) / 1e6])


def adapter_bytes(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("adapter_*"))


def measure_resident(settings: Settings) -> list[Row]:
    """Many adapters in one model: their bytes over those of as many files, and what adding and loading one then takes.

    Every round adds the first adapter to a new model, and one more to the model that has them all.
    """
    task = make_task(settings, settings.num_classes)
    first, last, loads = [], [], []
    for _ in range(settings.rounds):
        clip = make_clip(settings)
        first.append(1000 * seconds(partial(get_peft_model, clip, SEPConfig())))
    model = make_sep(settings)
    classifier = SEPClassifier(model, task.names, task.templates).eval()
    with tempfile.TemporaryDirectory() as folder:
        classifier.save_pretrained(folder)
        before, size = tensor_bytes(model), adapter_bytes(folder)
        for index in tqdm(range(settings.resident), desc="resident adapters"):
            model.add_adapter(f"adapter_{index}", SEPConfig())
        ratio = (tensor_bytes(model) - before) / settings.resident / size
        for index in range(settings.rounds):
            last.append(1000 * seconds(partial(model.add_adapter, f"last_{index}", SEPConfig())))
            loads.append(1000 * seconds(partial(classifier.load_task, folder, f"task_{index}")))
    return [
        Row(RESIDENT, "× bytes", [ratio]),
        Row(ADD_FIRST, "ms", first),
        Row(ADD_LAST, "ms", last),
        Row(f"{ADD_LAST} / {ADD_FIRST}", "× time", [b / a for a, b in zip(first, last, strict=True)]),
        Row(LOAD_LAST, "ms", loads),
    ]


def measure_mixed(settings: Settings) -> Iterator[Row]:
    """A batch whose samples use many adapters over the same batch with one, of models of both sizes."""
    models = {MIXED_SMALL: lambda: CLIPModel.from_pretrained(ASSETS / "clip-small")}
    if not settings.goals_alone:  # which have less time than this takes
        models[MIXED] = partial(make_clip, settings)
    for name, make_model in models.items():
        yield from measure_mixed_batch(name, make_model(), settings)


def measure_mixed_batch(name: str, clip: CLIPModel, settings: Settings) -> list[Row]:
    model = get_peft_model(clip, SEPConfig(), "adapter_0")
    adapters = [f"adapter_{index}" for index in range(settings.mixed_adapters)]
    for adapter in adapters[1:]:
        model.add_adapter(adapter, SEPConfig())
    model.eval()
    size, count = clip.config.vision_config.image_size, settings.mixed_samples
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(settings.seed))

    def workload(names: list[str]) -> Workload:
        return torch.no_grad()(partial(model.get_image_features, images, adapter_names=names))

    one = f"{name}, one adapter"
    # as they come: those of one adapter do not stand side by side
    mixed = workload([adapters[index % len(adapters)] for index in range(count)])
    times = time_by_turns({one: workload([adapters[0]] * count), name: mixed}, settings, "mixed batch")
    ratios = [a / b for a, b in zip(times[name], times[one], strict=True)]
    return [Row(name, "s", times[name]), Row(f"{name} / one adapter", "× time", ratios)]


def measure_loading(settings: Settings) -> list[Row]:
    """How much of the time of `fit` on the quickstart's model and images goes by without an image to train on."""
    images = read_folder(ASSETS / "caltech101", shots=16, seed=1)
    model = get_peft_model(CLIPModel.from_pretrained(ASSETS / "clip-small"), SEPConfig())
    processor = AutoProcessor.from_pretrained(ASSETS / "clip-small")
    # a check has no time for whole epochs
    recipe = Recipe(max_steps=2 if settings.num_classes == TINY.num_classes else 7 if settings.goals_alone else None)
    classifier = SEPClassifier.from_class_names(model, processor, images.names, recipe=recipe)
    data = LabelledImages(images.train, images.names, processor, recipe)
    run = Epochs(classifier, data, recipe, Accelerator(device_placement=False), workers=0)
    run.prepare()
    shares = []
    for epoch in range(1 if recipe.max_steps else min(settings.rounds, recipe.epochs)):
        run.waited = 0.0
        elapsed = seconds(partial(run.epoch, epoch, Progress(History(recipe.epochs), 0, 0, quiet=True)))
        shares.append(100 * run.waited / elapsed)
    return [Row(LOADING, "%", shares)]


def tensor_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def measure_adapter(name: str, model: PeftModel, folder: str, rounds: int) -> list[Row]:
    """Bytes on disk, time to load from there (out of the file cache) and time to switch to a loaded one."""
    model.save_pretrained(folder)
    size = adapter_bytes(folder)
    loads, switches = [], []
    for _ in range(rounds + 1):
        loads.append(1000 * seconds(partial(model.load_adapter, folder, "second")))
        switches.append(1000 * seconds(partial(model.set_adapter, "second")))
        model.set_adapter("default")
        model.delete_adapter("second")
    return [
        Row(f"{name}: size", "MB", [size / 1e6]),
        Row(f"{name}: load", "ms", loads[1:]),
        Row(f"{name}: switch", "ms", switches[1:]),
    ]


# results


def describe(settings: Settings, rows: list[Row], stopped: str | None, **more: object) -> dict:
    """Everything that goes into the JSON file; `stopped` is the signal that ended it, or `UNFINISHED`."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    own = sep_peft.__version__  # of the code that runs, which may be a folder that was never installed
    return {
        "versions": {"python": platform.python_version(), **versions, "sep_peft": own},
        "machine": {
            "system": platform.platform(),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": settings.threads,
        },
        "settings": asdict(settings),
        "stopped": stopped,
        **more,
        "rows": [row.to_json(settings.goals) for row in rows],
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_json(path: Path, data: dict) -> None:
    """Written under another name first, so that a failure leaves what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def format_report(report: dict) -> str:
    """The table, under two lines on what was measured where."""
    settings, machine = report["settings"], report["machine"]
    cells = [("name", "value", "unit", "goal", "met"), *map(format_row, report["rows"])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        [
            f"{machine['cpu']}, {machine['threads']} threads; {format_items(report['versions'])}",
            format_items({key: value for key, value in settings.items() if isinstance(value, int)}),
            "",
            *(
                f"{name:<{widths[0]}}  {value:>{widths[1]}} {unit:<{widths[2]}}  {goal:<{widths[3]}}  {met}".rstrip()
                for name, value, unit, goal, met in cells
            ),
        ]
    )


def format_items(items: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in items.items())


def format_row(row: dict) -> tuple[str, str, str, str, str]:
    # three significant ones, and all before the point
    digits = max(0, 2 - math.floor(math.log10(abs(row["median"])))) if row["median"] else 0
    goal = "" if row["goal"] is None else f"≤ {row['goal']:.2f}"
    met = {None: "", True: "yes", False: "no"}[row["met"]]
    return row["name"], f"{row['median']:,.{digits}f}", row["unit"], goal, met


def format_check(report: dict, goals: dict[str, float]) -> str:
    """A line for each goal: name, goal, what was measured, and whether it is met."""
    rows = {row["name"]: format_row(row) for row in report["rows"]}
    width = max(map(len, goals))
    lines = []
    for name, goal in goals.items():
        _, value, unit, _, met = rows.get(name, ("", "not measured", "", "", "no"))
        lines.append(f"{name:<{width}}  goal ≤ {goal:<6g} measured {f'{value} {unit}':<18} met: {met}")
    return "\n".join(lines)


# the command line

EXTENDED, IMPORTING, EPOCHS = "extended", "imports", "epoch"
#: What is measured together, in this order.
GROUPS = {
    "memory": measure_memory,
    "allocator": measure_allocator,
    "adapters": measure_adapters,
    "resident": measure_resident,
    "loading": measure_loading,
    "mixed": measure_mixed,
    "inference": measure_inference,
    "training": measure_training,
    IMPORTING: measure_imports,
    EXTENDED: measure_extended,
    EPOCHS: measure_epoch,
}
#: Groups that are measured where they are asked for, one by one or by --extended.
ASKED_FOR = {EXTENDED, IMPORTING, EPOCHS}
#: What stands in the place of a signal while it runs, and stays where it is killed.
UNFINISHED = "unfinished"
#: How long a check of the goals may take, and its rounds.
CHECK_SECONDS, CHECK_ROUNDS = 290, 1
#: Groups that are about memory that is given back and taken again.
AS_GLIBC_DOES = ("memory", "allocator")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="use a tiny model; its numbers mean nothing")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), help="JSON file (benchmark.json)")
    parser.add_argument("--rounds", type=positive, help=f"rounds of every timing ({VIT_B_16.rounds})")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads of torch (all)")
    parser.add_argument(
        "--extended", action="store_true", help="also measure torch.compile, bfloat16, imports and 21,000 classes"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare with the goals, in five minutes; the exit status says if all are met",
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="measure these groups alone")
    parser.add_argument("--device", metavar="NAME", help="measure on a device of torch, such as cuda")
    on_device = parser.add_argument_group("with --device")
    on_device.add_argument("--models", nargs="+", metavar="NAME", help="ViT-B/16, ViT-L/14-336 (both)")
    on_device.add_argument("--batches", nargs="+", type=positive, metavar="N", help="images a batch (1 32 256)")
    on_device.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    on_device.add_argument("--seconds", type=positive, metavar="N", help="end after so many seconds (never)")
    arguments = parser.parse_args()
    for name in ("models", "batches", "no_compile", "seconds"):
        if arguments.device is None and getattr(arguments, name):
            parser.error(f"--{name.replace('_', '-')} is for --device")
    for name in ("only", "extended", "threads"):
        if arguments.device is not None and getattr(arguments, name) != parser.get_default(name):
            parser.error(f"--{name} is not for --device")
    return arguments


def measure(settings: Settings, chosen: set[str], stop: Stop) -> Iterator[Row]:
    """All rows of some groups, until it is stopped."""
    # what takes longest comes last, where time is short; it runs in processes of its own, so it may
    names = sorted(GROUPS, key=lambda name: name == "memory") if settings.goals_alone else list(GROUPS)
    for name in names:
        if name not in AS_GLIBC_DOES:
            keep_freed_memory()
        if name in chosen and stop.received is None:
            yield from GROUPS[name](settings)


def main_on_device(arguments: argparse.Namespace) -> int:
    """`main` for another device than the CPU; the exit status says whether all goals that were measured are met."""
    from benchmark_device import BATCHES, GOALS, MODELS, Plan, measure_device  # which takes models and rows from here

    models = {"tiny": TINY} if arguments.fast else {name: MODELS[name] for name in arguments.models or MODELS}
    plan = Plan(
        torch.device(arguments.device),
        models,
        tuple(arguments.batches or ((1, 2, 32) if arguments.fast else BATCHES)),
        rounds=arguments.rounds or (2 if arguments.fast else 5),
        seconds_a_round=0.01 if arguments.fast else 0.3,
        compiles=not arguments.no_compile,
        dtype=torch.float32 if torch.device(arguments.device).type == "cpu" else torch.bfloat16,
    )
    settings = replace(next(iter(models.values())), goals=GOALS, threads=torch.get_num_threads())
    rows, left_out, stop = [], [], Stop(arguments.seconds)
    card = torch.cuda.get_device_name() if plan.device.type == "cuda" else None
    try:
        for row in measure_device(plan, left_out):
            rows.append(row)
            write_json(arguments.output, describe(settings, rows, UNFINISHED, card=card, left_out=left_out))
    except Exception as error:
        if not stop.stopped(error):
            raise
    stop.end()
    report = describe(settings, rows, stop.received, card=card, left_out=left_out)
    known = {name: goal for name, goal in GOALS.items() if any(row.name == name for row in rows)}
    if card is not None:
        print(card)
    print(format_report(report))
    if known:
        print("", format_check(report, known), sep="\n")
    write_json(arguments.output, report)
    met = {row["name"] for row in report["rows"] if row["met"]}
    return int(arguments.check and not set(known) <= met)


def main() -> int:
    arguments = parse_arguments()
    if arguments.device is not None:
        return main_on_device(arguments)
    settings = TINY if arguments.fast else VIT_B_16
    rounds = arguments.rounds or (CHECK_ROUNDS if arguments.check else settings.rounds)
    settings = replace(settings, threads=arguments.threads, rounds=rounds, goals_alone=arguments.check)
    if arguments.check and not (arguments.extended or arguments.fast):  # these alone take more than five minutes
        long = (" / eager", f"{MIXED} / one adapter", EPOCH_MEMORY)
        settings = replace(settings, goals={n: g for n, g in settings.goals.items() if not n.endswith(long)})
    torch.set_num_threads(settings.threads)
    usual = GROUPS.keys() - ASKED_FOR
    if arguments.check:  # which no goal is about, and which one is
        usual = usual - {"allocator"} | (set() if arguments.fast else {IMPORTING})
    chosen = set(arguments.only or usual) | (ASKED_FOR if arguments.extended else set())
    rows, stop = [], Stop(CHECK_SECONDS if arguments.check else None)
    try:
        for row in measure(settings, chosen, stop):
            rows.append(row)
            write_json(arguments.output, describe(settings, rows, UNFINISHED))
    except Exception as error:
        if not stop.stopped(error):
            raise
    stop.end()
    report = describe(settings, rows, stop.received)
    goals = settings.goals
    print(format_check(report, goals) if arguments.check else format_report(report))
    write_json(arguments.output, report)
    if stop.received is not None and not arguments.check:
        return 128 + signal.Signals[stop.received]
    met = {row["name"] for row in report["rows"] if row["met"]}
    return int(arguments.check and not set(goals) <= met)


if __name__ == "__main__":
    sys.exit(main())
