"""What SEP costs on a GPU beside plain CLIP and beside LoRA: the part of `benchmark.py` behind ``--device``.

Models have the sizes of CLIP and random weights in bf16. What is compared runs by turns; times are those of CUDA events
around several calls, launches are counted by torch's profiler, and memory is what torch allocated at the peak. On
another device than CUDA the same code is timed by the clock and the operators of torch are counted, which shows that it
runs and nothing else.

The estimate of a whole base-to-new comparison is worked out from the measured step and the measured encoding of images.
It leaves out what reading and decoding images takes, which workers do meanwhile.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from benchmark import (
    MIB,
    VIT_B_16,
    Row,
    Settings,
    Task,
    Workload,
    inference,
    lora_step,
    make_clip,
    make_lora,
    make_sep,
    make_task,
    sep_full_step,
    sep_step,
)
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sep_peft.training import Recipe


VIT_L_14_336 = replace(
    VIT_B_16,
    text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    vision={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    projection_dim=768,
)
MODELS = {"ViT-B/16": VIT_B_16, "ViT-L/14-336": VIT_L_14_336}
BATCHES = (1, 32, 256)
#: Classes of a step, and the larger number from which the cost of a class text is told.
CLASSES, MORE_CLASSES = 50, 200

# names of what is measured
PLAIN, PLAIN_COMPILED = "plain CLIP", "plain CLIP compiled"
LORA, SEP, SEP_LATE, SEP_COMPILED, SEP_GRAPHS = "LoRA", "SEP", "SEP late start", "SEP compiled", "SEP CUDA graphs"
SEP_SAME_LOSS, SEP_MORE = "SEP, LoRA's loss", "SEP, more classes"
ENCODING, TRAINING = "encoding", "training step"

#: The most that a ratio should be, of ViT-B/16: name -> goal.
GOALS = {
    f"ViT-B/16, batch 256, {ENCODING}: {SEP} / {PLAIN}": 2.1,
    f"ViT-B/16, batch 1, {ENCODING}: {SEP} / {PLAIN}": 2.5,
    f"ViT-B/16, batch 256, {ENCODING}: {SEP_LATE} / {PLAIN}": 1.35,
    f"ViT-B/16, batch 1, {ENCODING}: {SEP_LATE} / {PLAIN}": 1.6,
    f"ViT-B/16, batch 32, {TRAINING}: {SEP_SAME_LOSS} / {LORA}": 1.1,
    f"ViT-B/16, batch 32, {ENCODING}: {SEP_COMPILED} / {SEP}": 1 / 1.2,
    f"ViT-B/16, batch 32, {TRAINING}: {SEP_COMPILED} / {SEP}": 1 / 1.2,
}
ESTIMATE = "estimate: 11 data sets, base to new, one seed"
GOALS[ESTIMATE] = 30.0

#: The field's eleven data sets: name -> (classes, test images), of the splits of CoOp (arXiv 2109.01134).
DATA_SETS = {
    "ImageNet": (1000, 50_000),
    "Caltech101": (100, 2_465),
    "OxfordPets": (37, 3_669),
    "StanfordCars": (196, 8_041),
    "Flowers102": (102, 2_463),
    "Food101": (101, 30_300),
    "FGVCAircraft": (100, 3_333),
    "SUN397": (397, 19_850),
    "DTD": (47, 1_692),
    "EuroSAT": (10, 8_100),
    "UCF101": (101, 3_783),
}
SHOTS = 16
#: Calls of CUDA that start work on a GPU.
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


@dataclass(frozen=True)
class Plan:
    """What is measured on a device.

    Args:
        device: of torch.
        models: name -> sizes.
        batches: images a batch.
        rounds: repetitions of every timing.
        seconds_a_round: how long the calls of one round take together, about.
        compiles: whether compiled models are measured, which takes a minute for each.
        dtype: of the base models.
    """

    device: torch.device
    models: dict[str, Settings]
    batches: tuple[int, ...] = BATCHES
    rounds: int = 5
    seconds_a_round: float = 0.3
    compiles: bool = True
    dtype: torch.dtype = torch.bfloat16


def measure_device(plan: Plan, left_out: list[str]) -> Iterator[Row]:
    """All rows of a plan, those with goals first.

    Args:
        left_out: gets what has no room in the memory of the device.
    """
    found: dict[str, float] = {}
    for name, settings in plan.models.items():
        for batch in sorted(plan.batches, key=lambda size: size != 32):
            for kind, make in ((ENCODING, encodings), (TRAINING, training_steps)):
                title = f"{name}, batch {batch}, {kind}"
                try:
                    for row in measure_together(plan, title, make(plan, replace(settings, batch_size=batch))):
                        found[row.name] = statistics.median(row.values)
                        yield row
                except torch.OutOfMemoryError:
                    left_out.append(f"{title}: out of memory")
                if plan.device.type == "cuda":
                    torch.cuda.empty_cache()
        if (row := estimate(name, plan.batches, found)) is not None:
            yield row


def on_device(plan: Plan, task: Task) -> Task:
    """A task with everything on the device, images in the type of the model."""

    def move(texts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(plan.device) for name, value in texts.items()}

    pixels = task.pixel_values.to(plan.device, plan.dtype)
    return Task(pixels, task.labels.to(plan.device), move(task.names), move(task.templates))


def there(plan: Plan, model: nn.Module) -> nn.Module:
    """A model on the device: what is frozen in the plan's type, what is trained in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(plan.device, torch.float32 if parameter.requires_grad else plan.dtype)
    return model.to(plan.device)


def encodings(plan: Plan, settings: Settings) -> dict[str, Callable[[], Workload]]:
    task = on_device(plan, make_task(settings, CLASSES))
    plain = there(plan, make_clip(settings).requires_grad_(False))
    sep, late = (there(plan, make_sep(settings, **o)) for o in ({}, {"start_layer": late_start(settings)}))

    def encode(model: nn.Module, **options) -> Workload:
        features = model.get_image_features
        return inference(
            torch.compile(features, fullgraph=True, dynamic=False, **options) if options else features, task
        )

    workloads = {
        PLAIN: partial(encode, plain),
        SEP: partial(encode, sep),
        SEP_LATE: partial(encode, late),
    }
    if plan.compiles:
        workloads[PLAIN_COMPILED] = partial(encode, plain, mode="default")
        workloads[SEP_COMPILED] = partial(encode, sep, mode="default")
        if settings.batch_size == 1 and plan.device.type == "cuda":
            workloads[SEP_GRAPHS] = partial(encode, sep, mode="reduce-overhead")
    return workloads


def late_start(settings: Settings) -> dict[str, int]:
    """Three quarters of each tower, as 9 of 12 layers."""
    return {
        name: tower["num_hidden_layers"] * 3 // 4
        for name, tower in (("text", settings.text), ("vision", settings.vision))
    }


def training_steps(plan: Plan, settings: Settings) -> dict[str, Callable[[], Workload]]:
    few, more = (on_device(plan, make_task(settings, count)) for count in (CLASSES, MORE_CLASSES))
    workloads = {
        LORA: lambda: lora_step(there(plan, make_lora(settings)), few),
        SEP: lambda: sep_full_step(there(plan, make_sep(settings)), few),
        SEP_SAME_LOSS: lambda: sep_step(there(plan, make_sep(settings)), few),
        SEP_MORE: lambda: sep_full_step(there(plan, make_sep(settings)), more),
    }
    if plan.compiles and settings.batch_size == 32:
        workloads[SEP_COMPILED] = lambda: torch.compile(
            sep_full_step(there(plan, make_sep(settings)), few), dynamic=False
        )
    return workloads


def measure_together(plan: Plan, title: str, workloads: dict[str, Callable[[], Workload]]) -> Iterator[Row]:
    """Times by turns, their ratios, launches and memory of workloads."""
    made: dict[str, Workload] = {}
    for name, make in workloads.items():
        base = allocated(plan)
        made[name] = make()
        for _ in range(3):  # what is compiled, cached or allocated once
            made[name]()
        if (peak := peak_memory(plan, made[name])) is not None:
            yield Row(f"{title}: {name}, peak memory", "MiB", [(peak - base) / MIB])
        what, number = count(made[name])
        yield Row(f"{title}: {name}, {what}", "", [number])
    calls = {
        name: max(1, min(100, round(plan.seconds_a_round / seconds(plan, work, 2)))) for name, work in made.items()
    }
    names, rng = list(made), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(plan.rounds):
        rng.shuffle(names)
        for name in names:
            times[name].append(seconds(plan, made[name], calls[name]))
    for name in made:
        yield Row(f"{title}: {name}", "ms", [1000 * value for value in times[name]])
    for name, other in ((SEP, PLAIN), (SEP_LATE, PLAIN), (SEP_SAME_LOSS, LORA), (SEP, LORA), (PLAIN_COMPILED, PLAIN)):
        if {name, other} <= set(times):
            yield ratio(title, times, name, other)
    for name in (SEP_COMPILED, SEP_GRAPHS):
        if name in times:
            yield ratio(title, times, name, SEP)


def ratio(title: str, times: dict[str, list[float]], name: str, other: str) -> Row:
    values = [a / b for a, b in zip(times[name], times[other], strict=True)]
    return Row(f"{title}: {name} / {other}", "× time", values)


def seconds(plan: Plan, workload: Workload, calls: int) -> float:
    """Of one call, from the time of several."""
    if plan.device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            workload()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        workload()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / calls


def count(workload: Workload) -> tuple[str, int]:
    """What one call starts, and how many: "launches" of kernels and graphs on a GPU, else "operators" of torch."""
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as seen:
        workload()
        if gpu:
            torch.cuda.synchronize()
    events = seen.key_averages()
    launches = sum(event.count for event in events if event.key in LAUNCHES)
    if launches:
        return "launches", launches
    return "operators", sum(event.count for event in events if event.key.startswith("aten::"))


def allocated(plan: Plan) -> int:
    return torch.cuda.memory_allocated() if plan.device.type == "cuda" else 0


def peak_memory(plan: Plan, workload: Workload) -> int | None:
    """Bytes at the peak of a call; None where the device does not tell."""
    if plan.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    workload()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def estimate(model: str, batches: tuple[int, ...], found: dict[str, float]) -> Row | None:
    """Minutes of one method and seed on all data sets: training on 16 images of each base class by the default recipe,
    and testing on all images; None where what it is worked out from was not measured."""
    recipe = Recipe()
    step = [found.get(f"{model}, batch {recipe.batch_size}, {TRAINING}: {name}") for name in (SEP, SEP_MORE)]
    encoded = found.get(f"{model}, batch {max(batches)}, {ENCODING}: {SEP}")
    if model not in MODELS or encoded is None or step[0] is None or step[1] is None or max(batches) < 256:
        return None
    a_class = (step[1] - step[0]) / (MORE_CLASSES - CLASSES)  # ms
    total = 0.0
    for classes, test_images in DATA_SETS.values():
        base = -(-classes // 2)
        steps = recipe.epochs * math.ceil(SHOTS * base / recipe.batch_size)
        texts = min(base, recipe.drawn_classes(base) + recipe.batch_size)
        total += steps * (step[0] + a_class * (texts - CLASSES))
        total += encoded * test_images / max(batches)
    name = ESTIMATE if model == "ViT-B/16" else f"{ESTIMATE}, {model}"
    return Row(name, "minutes", [total / 60_000])
