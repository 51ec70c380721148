"""Options of ``sep-peft``: how their values are read, and those that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..method.pairs_recipe import LOSSES
from ..method.recipe import Recipe
from ..tuner.config import MODALITIES, SEPConfig


#: Setting -> what makes the adapter's configuration and its recipe.
SETTINGS: dict[str, tuple[Callable[..., SEPConfig], Callable[..., Recipe]]] = {
    "default": (SEPConfig, Recipe),
    "compact": (SEPConfig.compact, Recipe.compact),
    "published": (SEPConfig.published, Recipe.published),
    "retrieval": (SEPConfig.retrieval, Recipe.retrieval),
}
#: Training images a class, unless told otherwise.
SHOTS = 16
#: Choices of --save-dtype.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_of(name: str) -> str:
    """The default of an option of `SEPConfig` or `Recipe`, then the settings that have another, for help."""
    values = {}
    for setting, makers in SETTINGS.items():
        holder = next(made for made in (make() for make in makers) if hasattr(made, name))
        values[setting] = getattr(holder, name)
    others = [f"{setting} {_shown(value)}" for setting, value in values.items() if value != values["default"]]
    return ", ".join([_shown(values["default"]), *others])


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def setting_of(**asked: bool) -> str:
    """Name of the setting that one of the options asks for; "default" where none does.

    Args:
        asked: name of a setting -> whether its option was given.

    Raises:
        BadParameter: several were given.
    """
    found = [name for name, given in asked.items() if given]
    if len(found) > 1:
        both = " and ".join(f"--{name}" for name in found)
        many = "both" if len(found) == 2 else "all"
        raise typer.BadParameter(f"{both} exclude each other, but {many} were given. Pass one of them.")
    return found[0] if found else "default"


def given(**values: Any) -> dict[str, Any]:
    """The options that were given; the setting has a default for each of the others."""
    return {name: value for name, value in values.items() if value is not None}


# values


def reader(convert: Callable[[str], Any], allowed: Callable[[Any], bool], description: str) -> Callable[[Any], Any]:
    """Makes a parser of an option's text.

    Args:
        convert: text -> value; raises ValueError where it cannot.
        allowed: whether a value is.
        description: what the value must be, for the message.
    """

    def read(text: Any) -> Any:
        try:
            value = convert(text)
        except ValueError:
            allowable = False
        else:
            allowable = allowed(value)
        if not allowable:
            raise typer.BadParameter(f"must be {description}, but got {str(text)!r}.")
        return value

    return read


def _layers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _start_layers(text: str) -> int | dict[str, int]:
    if "=" not in text:
        return int(text)
    pairs = [part.partition("=") for part in text.split(",")]
    starts = {name: int(value) for name, _, value in pairs}
    if len(starts) < len(pairs) or not set(starts) <= set(MODALITIES):
        raise ValueError
    return starts


def _seconds(text: str) -> float:
    """1h30m is 5400; a number alone is of seconds."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip().lower())
    if found is None:
        raise ValueError(text)
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(3600 * hours + 60 * minutes + seconds)


def _any(value: Any) -> bool:
    return True


read_count = reader(int, lambda value: value >= 1, "a whole number of at least 1")
read_integer = reader(int, _any, "a whole number")
read_number = reader(float, _any, "a number")
read_time = reader(_seconds, lambda value: value > 0, "a time such as 90s, 10m or 1h30m")
read_layers = reader(_layers, lambda layers: min(layers) >= 0, "layers counted from 0, such as 1,2,3")
read_start_layers = reader(_start_layers, _any, "a whole number, or one for each tower, such as text=9,vision=18")
read_loss = reader(str, LOSSES.__contains__, f"one of {', '.join(LOSSES)}")
read_quantize = reader(str, "int8".__eq__, "int8")
read_dtype = reader(str, DTYPES.__contains__, f"one of {', '.join(DTYPES)}")


def count(help: str, **options) -> Any:
    """An option that takes a whole number of at least 1."""
    return typer.Option(parser=read_count, metavar="N", help=help, **options)


def integer(help: str, **options) -> Any:
    """An option that takes a whole number."""
    return typer.Option(parser=read_integer, metavar="N", help=help, **options)


def number(help: str, **options) -> Any:
    """An option that takes a number."""
    return typer.Option(parser=read_number, metavar="X", help=help, **options)


def margin(option: str) -> Any:
    """The option --zero-shot-margin of a command that takes other classes with `option`."""
    return typer.Option(
        parser=read_number,
        metavar="TIMES",
        help=f"With {option} zero-shot decides unless SEP is so many times as confident; 0: never; default: of classes "
        f"that were not trained, that of the adapter's recipe ({default_of('zero_shot_margin')}).",
    )


# options that commands share

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="Where to compute; default: a GPU if there is one.")]
IdleDevice = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="Accepted as by every command; nothing is computed here.")
]
CpuDevice = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="Accepted as by every command; this one uses the CPU.")
]
Token = Annotated[str | None, typer.Option(metavar="TEXT", help="Token of the Hub; default: that of `hf auth login`.")]

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder, or a name on the Hub.")]
Revision = Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of ADAPTER on the Hub.")]
Subfolder = Annotated[str | None, typer.Option(metavar="FOLDER", help="Folder of the adapter in ADAPTER.")]

BaseModel = Annotated[str, typer.Option(metavar="NAME", help="The CLIP, a name on the Hub or a folder.")]
OtherBaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="NAME",
        help="The CLIP, a name on the Hub or a folder; default: the one that the adapter names.",
    ),
]
Output = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the adapter goes.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an adapter or an unfinished training that is there.")
]
Template = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="What the frozen text branch reads, with {} for the class; repeat to average; default: a photo of a {}.",
    ),
]
Layers = Annotated[
    list | None,
    typer.Option(
        parser=read_layers,
        metavar="I,J,...",
        help="Layers before which prompts are fused, counted from 0; default: all but the first.",
    ),
]
Page = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with the images: one HTML file.")]
BatchSize = Annotated[int, count("Images at a time.")]
Index = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Where embeddings of images are kept, so that the next time embeds only what is new; default: the cache.",
    ),
]

# options of train

Epochs = Annotated[int | None, count(f"Passes over the images ({default_of('epochs')}).")]
MaxSteps = Annotated[int | None, count("Stop earlier, after so many steps.")]
TrainBatchSize = Annotated[int | None, count(f"Images a step ({default_of('batch_size')}).")]
LearningRate = Annotated[float | None, number(f"Of AdamW ({default_of('learning_rate')}).")]
Cache = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help='Folder for what training does not change of the images; or "memory".'),
]
Views = Annotated[int | None, count(f"Augmentations of each image in the cache ({default_of('views')}).")]
Time = Annotated[
    float | None,
    typer.Option(
        "--time", parser=read_time, metavar="TIME", help="End before an epoch that would last longer than 10m."
    ),
]
Patience = Annotated[int | None, count("End after so many epochs without a higher accuracy on val/.")]
KeepLast = Annotated[
    bool,
    typer.Option("--keep-last", help="Keep the last epoch's weights; default: the best on val/, if any."),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with the training in the output, given the same options; or begin."),
]
Seed = Annotated[int | None, integer(f"Of drawn images and training ({default_of('seed')}).")]

TextPrompts = Annotated[int | None, count(f"Prompts of the text tower ({default_of('num_text_prompts')}).")]
VisionPrompts = Annotated[int | None, count(f"Prompts of the vision tower ({default_of('num_vision_prompts')}).")]
StartLayer = Annotated[
    Any,
    typer.Option(
        parser=read_start_layers,
        metavar="N",
        help=f"Layer where prompts enter ({default_of('start_layer')}); one for each tower: text=9,vision=18.",
    ),
]
FusionRank = Annotated[int | None, count(f"Rank of the fusion's projections ({default_of('fusion_rank')}).")]
FusionHiddenSize = Annotated[int | None, count(f"Width of the fusion's MLP ({default_of('fusion_hidden_size')}).")]
ShareFusion = Annotated[
    bool | None,
    typer.Option("--share-fusion/--no-share-fusion", help=f"One fusion for all layers ({default_of('share_fusion')})."),
]
SaveDtype = Annotated[
    str, typer.Option(parser=read_dtype, metavar="|".join(DTYPES), help="Of the weights in the adapter's file.")
]
SaveProcessor = Annotated[
    bool,
    typer.Option("--save-processor", help="Save tokenizer and image processor with the adapter, 3.6 MB for CLIP's."),
]
Compact = Annotated[
    bool,
    typer.Option("--compact", help="Setting: one small fusion for all layers and its recipe, for a small adapter."),
]
Retrieval = Annotated[
    bool,
    typer.Option("--retrieval", help="Setting: image prompts alone, trained to find images of the same class."),
]
Whiten = Annotated[
    bool,
    typer.Option("--whiten", help="Embeddings of images by the adapter's whitening, to compare with images alone."),
]
Report = Annotated[
    bool,
    typer.Option(
        "--report/--no-report",
        show_default=False,
        help="Draw, and write run/report.html beside the adapter, a page to look at (yes).",
    ),
]
Published = Annotated[
    bool,
    typer.Option("--published", help="Setting: the paper's full-width fusions and recipe, for a large adapter."),
]
