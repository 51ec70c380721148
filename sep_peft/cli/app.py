"""The command line ``sep-peft``: arguments, errors and output. What each command does is in `commands`.

Results go to standard output, as text or with ``--json`` as one JSON document; progress and warnings go to standard
error. Exit codes: 0 done, 1 an error, 2 a mistake in the arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from transformers.utils import logging

from ..classifier.classes import TEMPLATE
from ..method.recipe import ZERO_SHOT_MARGIN, Recipe
from ..tuner.config import SEPConfig
from ..version import __version__
from . import commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None: those of this process.

    Returns:
        the exit code.
    """
    args = make_parser().parse_args(arguments)
    if args.quiet:
        logging.disable_progress_bar()
    try:
        with redirect_stdout(sys.stderr):  # what libraries print must not get into the result
            result = args.command(args)
    except KeyboardInterrupt:
        print("sep-peft: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # a user's mistakes come as errors of many libraries
        if args.debug:
            raise
        print(f"sep-peft: error: {_one_line(error)}", file=sys.stderr)
        return 1
    _print(json.dumps(result.data, indent=1, ensure_ascii=False) if args.json else result.text)
    return result.code


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever reads has seen enough, as `head` does; nothing more may be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the parsed `command` is the function to call."""
    parser = argparse.ArgumentParser(
        prog="sep-peft",
        description="Adapt CLIP to your own images with SEP, Self-Enhanced Prompt Tuning, and use what you trained.",
        epilog="Exit codes: 0 done, 1 an error, 2 a mistake in the arguments. `sep-peft COMMAND --help` says more.",
    )
    parser.add_argument("--version", action="version", version=f"sep-peft {__version__}")
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_train, _add_predict, _add_evaluate, _add_import_reference, _add_info):
        add(parsers)
    return parser


# commands


def _add_train(parsers) -> None:
    parser = _add(parsers, "train", commands.train, "train an adapter on folders of images, one per class")
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="class folders; or train/, and val/ and test/ if any, with class folders in each",
    )
    _add_base_model(parser, required=True)
    _add_output(parser)
    parser.add_argument("--name", help="name of the data for the model card; default: that of FOLDER")
    parser.add_argument("--license", help='licence of the adapter for the model card, such as "apache-2.0"')
    _add_template(parser)
    recipe, published, compact, config = Recipe(), Recipe.published(), Recipe.compact(), SEPConfig()
    group = parser.add_argument_group("training")
    group.add_argument("--shots", type=whole_number, default=16, help="training images per class (%(default)s)")
    group.add_argument("--epochs", type=whole_number, help=f"({recipe.epochs}, published {published.epochs})")
    group.add_argument("--max-steps", type=whole_number, help="stop earlier, after so many steps")
    group.add_argument("--batch-size", type=whole_number, default=recipe.batch_size, help="(%(default)s)")
    rates = f"({recipe.learning_rate}, compact {compact.learning_rate}, published {published.learning_rate})"
    group.add_argument("--learning-rate", type=float, help=rates)
    group.add_argument("--cache", help='folder for what is below --start-layer, computed once; or "memory"')
    group.add_argument("--views", type=whole_number, help=f"augmentations of each image in the cache ({recipe.views})")
    group.add_argument("--seed", type=int, default=recipe.seed, help="of drawn images and training (%(default)s)")
    group = parser.add_argument_group("adapter", "see SEPConfig in README")
    group.add_argument("--text-prompts", type=whole_number, default=config.num_text_prompts, help="(%(default)s)")
    group.add_argument("--vision-prompts", type=whole_number, default=config.num_vision_prompts, help="(%(default)s)")
    group.add_argument("--start-layer", type=int, default=config.start_layer, help="where prompts enter (%(default)s)")
    group.add_argument("--fusion-rank", type=whole_number, help=f"({config.fusion_rank})")
    group.add_argument("--fusion-hidden-size", type=whole_number, help=f"({config.fusion_hidden_size})")
    group.add_argument(
        "--share-fusion", action=argparse.BooleanOptionalAction, help=f"one for all layers ({config.share_fusion})"
    )
    group.add_argument(
        "--save-dtype",
        choices=list(commands.SAVE_DTYPES),
        default="fp32",
        help="of the weights in the file (%(default)s)",
    )
    setting = group.add_mutually_exclusive_group()
    for name, what in (
        ("compact", "one small fusion for all layers and its recipe, for a small adapter"),
        ("published", "the paper's full-width fusions and recipe, for a large adapter"),
    ):
        setting.add_argument(f"--{name}", dest="setting", action="store_const", const=name, help=what)
    parser.set_defaults(setting="default")


def _add_predict(parsers) -> None:
    parser = _add(parsers, "predict", commands.predict, "classify images")
    _add_adapter(parser)
    _add_base_model(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders or addresses of images")
    parser.add_argument("--top-k", type=whole_number, help="classes to name for each image, best first (at most 5)")
    parser.add_argument(
        "--class",
        dest="classes",
        metavar="NAME",
        action="append",
        help="tell this class in place of the trained; repeat",
    )
    _add_zero_shot_margin(parser, "--class")
    parser.add_argument("--batch-size", type=whole_number, default=32, help="(%(default)s)")


def _add_zero_shot_margin(parser: argparse.ArgumentParser, option: str) -> None:
    parser.add_argument(
        "--zero-shot-margin",
        type=float,
        default=ZERO_SHOT_MARGIN,
        metavar="TIMES",
        help=f"with {option} zero-shot decides unless SEP is so many times as confident (%(default)s; 0: never)",
    )


def _add_evaluate(parsers) -> None:
    parser = _add(parsers, "evaluate", commands.evaluate, "measure the accuracy on folders of images, one per class")
    _add_adapter(parser)
    _add_base_model(parser)
    parser.add_argument(
        "folder", metavar="FOLDER", help="test/ or val/ below it if there is one, else its class folders"
    )
    parser.add_argument(
        "--new-classes", action="store_true", help="tell apart the classes of FOLDER in place of the trained ones"
    )
    _add_zero_shot_margin(parser, "--new-classes")
    parser.add_argument("--no-zero-shot", action="store_true", help="do not measure the base model as well")
    parser.add_argument("--batch-size", type=whole_number, default=32, help="(%(default)s)")


def _add_import_reference(parsers) -> None:
    summary = "turn a checkpoint of the authors' code into an adapter"
    parser = _add(parsers, "import-reference", commands.import_reference, summary)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="their prompt_learner/model.pth.tar-N")
    _add_base_model(parser, required=True)
    _add_output(parser)
    for tower in ("text", "vision"):
        parser.add_argument(
            f"--{tower}-layers",
            type=layer_list,
            metavar="I,J,...",
            help="layers before which prompts are fused, counted from 0; default: all but the first",
        )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names, one a line, to save with the adapter"
    )
    _add_template(parser)


def _add_info(parsers) -> None:
    parser = _add(parsers, "info", commands.info, "say what an adapter is, without loading its base model")
    _add_adapter(parser)


# arguments that commands share


def _add(parsers, name: str, command, summary: str) -> argparse.ArgumentParser:
    parser = parsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.set_defaults(command=command)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--device", help="where to compute; default: a GPU if there is one")
    parser.add_argument("--token", help="token of the Hub; default: that of `hf auth login`")
    return parser


def _add_base_model(parser: argparse.ArgumentParser, required: bool = False) -> None:
    default = "" if required else "; default: the one that the adapter names"
    parser.add_argument("--base-model", required=required, help=f"the CLIP, a name on the Hub or a folder{default}")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the adapter goes")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is there")


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder, or a name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--subfolder", help="of ADAPTER")


def _add_template(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help=f"what the frozen text branch reads, with {{}} for the class; repeat to average ({TEMPLATE!r})",
    )


def whole_number(text: str) -> int:
    """Of at least 1; argparse puts the name of this function into its message."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {value}")
    return value


def layer_list(text: str) -> list[int]:
    """ "1,2,3" -> [1, 2, 3]."""
    return [int(part) for part in text.split(",")]
