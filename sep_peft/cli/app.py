"""The command line ``sep-peft``: arguments, errors and output. What each command does is in the file of its name.

Results go to standard output, as text or with ``--json`` as one JSON document; progress and warnings go to standard
error. Exit codes: 0 done, 1 an error, 2 a mistake in the arguments, 130 interrupted, 143 ended by SIGTERM.

That file is imported when the command runs, so that help and mistakes in the arguments do not wait for it.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from transformers.utils import logging

from ..method.pairs_recipe import LOSSES, PairsRecipe
from ..tuner.config import SEPConfig
from ..version import __version__
from . import options
from .text import json_text, one_line, printable


if TYPE_CHECKING:
    from .session import Result


PROGRAM = "sep-peft"

# Help is plain: Rich cuts long names of options off in a narrow window, and reads brackets as its markup.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None: those of this process.

    Returns:
        the exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given, prog_name=PROGRAM, standalone_mode=False, obj=command_line(given))
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)  # of the command whose arguments they are
        path = PROGRAM if context is None else context.command_path
        _complain(f"error: {error.format_message().rstrip('.')}. See `{path} --help`.")
        return error.exit_code
    if code == 130:
        _complain("interrupted")
    return code


def command_line(arguments: Sequence[str]) -> str:
    """A command as it was given, for a shell, without the token."""
    shown, hide = [PROGRAM], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        shown.append("..." if hide else f"{name}=..." if name == "--token" and equals else argument)
        hide = argument == "--token"
    return shlex.join(shown)


def _report(work: Callable[[], Result], as_json: bool, quiet: bool, debug: bool) -> int:
    """Do the work of a command and print what it found; returns the exit code."""
    if quiet:
        logging.disable_progress_bar()
    try:
        # what libraries print must not get into the result
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _complain(f"warning: {message}")
            warnings.simplefilter("ignore", FutureWarning)  # libraries tell each other what they will change
            result = work()
    except Exception as error:  # a user's mistakes come as errors of many libraries
        if debug:
            raise
        _complain(f"error: {str(error).strip() or type(error).__name__}")
        return 1
    encoding = sys.stdout.encoding or "utf-8"
    if as_json:
        _print(json_text(result.data, encoding))
    else:
        text = "\n".join(map(printable, result.lines))
        _print(text.encode(encoding, "backslashreplace").decode(encoding))
    return result.code


def _complain(message: str) -> None:
    print(f"{PROGRAM}: {one_line(message)}", file=sys.stderr)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever reads has seen enough, as `head` does; nothing more may be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_version(wanted: bool) -> None:
    if wanted:
        _print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback(
    help="Adapt CLIP to your own images with SEP, Self-Enhanced Prompt Tuning, and use what you trained.",
    epilog="Exit codes: 0 done, 1 an error, 2 a mistake in the arguments, 130 after Ctrl-C, 143 after SIGTERM. "
    f"`{PROGRAM} COMMAND --help` says more.",
)
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command()
def train(
    context: typer.Context,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Class folders; or train/, and val/ and test/ if any, with class folders in each. Or a .csv, .json or "
            ".jsonl file with an image, its labels, and perhaps its split in each row: it may have several labels.",
        ),
    ],
    base_model: options.BaseModel,
    output: options.Output,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Name of the data for the model card; default: that of FOLDER.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(metavar="TEXT", help='Licence of the adapter for the model card: "apache-2.0".')
    ] = None,
    template: options.Template = None,
    shots: Annotated[
        int | None, options.count(f"Training images per class of class folders ({options.SHOTS}).")
    ] = None,
    epochs: options.Epochs = None,
    max_steps: options.MaxSteps = None,
    batch_size: options.TrainBatchSize = None,
    learning_rate: options.LearningRate = None,
    time: options.Time = None,
    patience: options.Patience = None,
    keep_last: options.KeepLast = False,
    cache: options.Cache = None,
    views: options.Views = None,
    seed: options.Seed = None,
    text_prompts: options.TextPrompts = None,
    vision_prompts: options.VisionPrompts = None,
    start_layer: options.StartLayer = None,
    fusion_rank: options.FusionRank = None,
    fusion_hidden_size: options.FusionHiddenSize = None,
    share_fusion: options.ShareFusion = None,
    save_dtype: options.SaveDtype = "fp32",
    save_processor: options.SaveProcessor = False,
    compact: options.Compact = False,
    published: options.Published = False,
    retrieval: options.Retrieval = False,
    report: options.Report = True,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    device: options.Device = None,
    token: options.Token = None,
) -> int:
    """Train an adapter on folders of images, one per class."""
    make_config, make_recipe = options.SETTINGS[
        options.setting_of(compact=compact, published=published, retrieval=retrieval)
    ]
    config_options = options.given(
        num_text_prompts=text_prompts,
        num_vision_prompts=vision_prompts,
        start_layer=start_layer,
        fusion_rank=fusion_rank,
        fusion_hidden_size=fusion_hidden_size,
        share_fusion=share_fusion,
    )
    recipe_options = options.given(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        views=views,
        seed=seed,
    )
    from .session import Session
    from .train import train as run

    return _report(
        lambda: run(
            folder,
            base_model,
            output,
            make_config(**config_options),
            make_recipe(**recipe_options),
            Session(device, token, quiet),
            shots=shots,
            cache=cache,
            template=template,
            save_dtype=options.DTYPES[save_dtype],
            save_processor=save_processor,
            overwrite=overwrite,
            resume=resume,
            max_seconds=time,
            patience=patience,
            keep="last" if keep_last else "best",
            name=name,
            license=license,
            report=report,
            command=context.obj,
        ),
        as_json,
        quiet,
        debug,
    )


@app.command()
def train_pairs(
    context: typer.Context,
    pairs: Annotated[
        Path,
        typer.Argument(
            metavar="PAIRS",
            help="JSON lines; or a folder with metadata.jsonl or a .txt beside each image, or train/, val/, test/ so.",
        ),
    ],
    base_model: options.BaseModel,
    output: options.Output,
    val: Annotated[
        Path | None, typer.Option(metavar="FILE|FOLDER", help="Pairs to validate on, in the place of val/.")
    ] = None,
    held_out: Annotated[
        int | None,
        options.integer("Images to hold out to validate on, where there is no val/; default: a tenth, at most 500."),
    ] = None,
    cut: Annotated[
        bool, typer.Option("--cut", help="Cut the ends of captions that are too long; default: refuse them.")
    ] = False,
    chunk_size: Annotated[
        int | None, options.count("Images whose activations are kept, so that a large batch needs little memory.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(parser=options.read_loss, metavar="|".join(LOSSES), help="Default: as the model was trained."),
    ] = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Name of the data for the model card; default: that of FILE.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(metavar="TEXT", help='Licence of the adapter for the model card: "apache-2.0".')
    ] = None,
    epochs: Annotated[int | None, options.count(f"Passes over the images ({PairsRecipe.epochs}).")] = None,
    max_steps: options.MaxSteps = None,
    batch_size: Annotated[
        int | None, options.count(f"Images a step, all compared with each other ({PairsRecipe.batch_size}).")
    ] = None,
    learning_rate: Annotated[float | None, options.number(f"Of AdamW ({PairsRecipe.learning_rate}).")] = None,
    mine_negatives: Annotated[
        int | None,
        options.integer("Captions of others that each image gets as hard negatives, by the frozen model (0)."),
    ] = None,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Mirror half of the images; no caption may say left or right.")
    ] = False,
    time: options.Time = None,
    patience: Annotated[int | None, options.count("End after so many epochs without a higher recall on val/.")] = None,
    keep_last: options.KeepLast = False,
    seed: options.Seed = None,
    text_prompts: options.TextPrompts = None,
    vision_prompts: options.VisionPrompts = None,
    start_layer: options.StartLayer = None,
    fusion_rank: options.FusionRank = None,
    fusion_hidden_size: options.FusionHiddenSize = None,
    share_fusion: options.ShareFusion = None,
    save_dtype: options.SaveDtype = "fp32",
    save_processor: options.SaveProcessor = False,
    report: options.Report = True,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    device: options.Device = None,
    token: options.Token = None,
) -> int:
    """Train an adapter on images with captions."""
    config_options = options.given(
        num_text_prompts=text_prompts,
        num_vision_prompts=vision_prompts,
        start_layer=start_layer,
        fusion_rank=fusion_rank,
        fusion_hidden_size=fusion_hidden_size,
        share_fusion=share_fusion,
    )
    recipe_options = options.given(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        mined_negatives=mine_negatives,
        loss=loss,
        seed=seed,
    )
    from .session import Session
    from .train_pairs import train_pairs as run

    return _report(
        lambda: run(
            pairs,
            base_model,
            output,
            SEPConfig(**config_options),
            PairsRecipe(mirror=mirror, **recipe_options),
            Session(device, token, quiet),
            val=val,
            held_out=held_out,
            long_captions="cut" if cut else "refuse",
            chunk_size=chunk_size,
            save_dtype=options.DTYPES[save_dtype],
            save_processor=save_processor,
            overwrite=overwrite,
            resume=resume,
            max_seconds=time,
            patience=patience,
            keep="last" if keep_last else "best",
            name=name,
            license=license,
            report=report,
            command=context.obj,
        ),
        as_json,
        quiet,
        debug,
    )


@app.command()
def predict(
    adapter: options.Adapter,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Files, folders or addresses of images.")],
    base_model: options.OtherBaseModel = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    top_k: Annotated[
        int | None,
        options.count(
            "Classes to name for each image, best first; default: all, but at most 5; of several labels all."
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME", help="Tell this class in place of the trained; repeat."),
    ] = None,
    zero_shot_margin: Annotated[float | None, options.margin("--class")] = None,
    unknown: Annotated[
        bool, typer.Option("--unknown", help="Say none of these where an image looks like no trained class.")
    ] = False,
    min_score: Annotated[
        float | None,
        options.number(
            "Say none of these where the best class has a lower score, from 0 to 1; of several, name all with it."
        ),
    ] = None,
    coverage: Annotated[
        float | None,
        options.number("Name as many classes as hold the right one with this chance, such as 0.9; no --top-k."),
    ] = None,
    batch_size: options.BatchSize = 32,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    device: options.Device = None,
    token: options.Token = None,
) -> int:
    """Classify images."""
    from .predict import predict as run
    from .session import AdapterSource, Session

    return _report(
        lambda: run(
            AdapterSource(adapter, revision, subfolder),
            images,
            Session(device, token, quiet),
            base_model=base_model,
            classes=classes,
            zero_shot_margin=zero_shot_margin,
            top_k=top_k,
            batch_size=batch_size,
            min_score=min_score,
            unknown=unknown,
            coverage=coverage,
        ),
        as_json,
        quiet,
        debug,
    )


@app.command()
def search(
    context: typer.Context,
    adapter: options.Adapter,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images in it and below are searched.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="A file or address of an image, or a text.")],
    base_model: options.OtherBaseModel = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    top_k: Annotated[int, options.count("Images to name, the most similar first.")] = 10,
    index: options.Index = None,
    batch_size: options.BatchSize = 32,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Search by the base model alone as well, and show both.")
    ] = False,
    page: options.Page = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    device: options.Device = None,
    token: options.Token = None,
) -> int:
    """Find images that look like another, or as a text says."""
    from .search import search as run
    from .session import AdapterSource, Session

    return _report(
        lambda: run(
            AdapterSource(adapter, revision, subfolder),
            folder,
            query,
            Session(device, token, quiet),
            base_model=base_model,
            top_k=top_k,
            index=index,
            batch_size=batch_size,
            compare_base=compare_base,
            page=page,
            command=context.obj,
        ),
        as_json,
        quiet,
        debug,
    )


@app.command()
def duplicates(
    context: typer.Context,
    adapter: options.Adapter,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images in it and below are compared.")],
    base_model: options.OtherBaseModel = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    threshold: Annotated[
        float | None,
        options.number("Cosine from which on two images are nearly the same; default: measured on copies of these."),
    ] = None,
    index: options.Index = None,
    batch_size: options.BatchSize = 32,
    page: options.Page = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    device: options.Device = None,
    token: options.Token = None,
) -> int:
    """Find images in a folder that are nearly the same."""
    from .duplicates import duplicates as run
    from .session import AdapterSource, Session

    return _report(
        lambda: run(
            AdapterSource(adapter, revision, subfolder),
            folder,
            Session(device, token, quiet),
            base_model=base_model,
            threshold=threshold,
            index=index,
            batch_size=batch_size,
            page=page,
            command=context.obj,
        ),
        as_json,
        quiet,
        debug,
    )


@app.command()
def embed(
    adapter: options.Adapter,
    given: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Images in it and below; or a text file with a text a line.")
    ],
    output: Annotated[Path, typer.Argument(metavar="FILE", help="A .npz, .safetensors or .parquet.")],
    base_model: options.OtherBaseModel = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    index: options.Index = None,
    cut: Annotated[
        bool, typer.Option("--cut", help="Cut the ends of texts that are too long; default: refuse them.")
    ] = False,
    whiten: options.Whiten = False,
    batch_size: options.BatchSize = 32,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    device: options.Device = None,
    token: options.Token = None,
) -> int:
    """Write the embeddings of images or texts into a file."""
    from .embed import embed as run
    from .session import AdapterSource, Session

    return _report(
        lambda: run(
            AdapterSource(adapter, revision, subfolder),
            given,
            output,
            Session(device, token, quiet),
            base_model=base_model,
            index=index,
            whiten=whiten,
            batch_size=batch_size,
            cut=cut,
        ),
        as_json,
        quiet,
        debug,
    )


@app.command()
def export(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="Folders, or names on the Hub; of one base model.")
    ],
    output: Annotated[Path, typer.Argument(metavar="FILE", help="A .onnx, or a .pt2 of torch.export.")],
    base_model: options.OtherBaseModel = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    embed: Annotated[bool, typer.Option("--embed", help="Give out embeddings in the place of scores.")] = False,
    whiten: options.Whiten = False,
    quantize: Annotated[
        str | None,
        typer.Option(parser=options.read_quantize, metavar="int8", help="Weights of 8 bits, in a .onnx."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Images to compare the file with the model on; default: made ones."),
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    device: options.CpuDevice = None,
    token: options.Token = None,
) -> int:
    """Write an adapter and its base model into one file."""
    from .export import export as run
    from .session import AdapterSource, Session

    return _report(
        lambda: run(
            adapters,
            output,
            AdapterSource(adapters[0], revision, subfolder),
            Session("cpu", token, quiet),
            base_model=base_model,
            embed=embed,
            whiten=whiten,
            quantize=quantize,
            images=images,
        ),
        as_json,
        quiet,
        debug,
    )


@app.command()
def evaluate(
    context: typer.Context,
    adapter: options.Adapter,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="test/ or val/ below it if there is one, else its class folders; train/ by k folds. Or a file of "
            "labels, as for train.",
        ),
    ],
    base_model: options.OtherBaseModel = None,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    new_classes: Annotated[
        bool,
        typer.Option("--new-classes", help="Tell apart the classes of FOLDER in place of the trained ones."),
    ] = False,
    zero_shot_margin: Annotated[float | None, options.margin("--new-classes")] = None,
    no_zero_shot: Annotated[
        bool, typer.Option("--no-zero-shot", help="Do not measure the base model as well.")
    ] = False,
    plots: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Draw confusion, reliability and wrong images; needs matplotlib."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with everything to look at: one HTML file."),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Train anew on all but one of so many parts of the training images, and test on it; 4 without test/.",
        ),
    ] = None,
    batch_size: options.BatchSize = 32,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    device: options.Device = None,
    token: options.Token = None,
) -> int:
    """Measure on images how often an adapter is right."""
    from .evaluate import evaluate as run
    from .session import AdapterSource, Session

    return _report(
        lambda: run(
            AdapterSource(adapter, revision, subfolder),
            folder,
            Session(device, token, quiet),
            base_model=base_model,
            new_classes=new_classes,
            zero_shot_margin=zero_shot_margin,
            zero_shot=not no_zero_shot,
            batch_size=batch_size,
            plots=plots,
            report=report,
            command=context.obj,
            folds=folds,
        ),
        as_json,
        quiet,
        debug,
    )


@app.command()
def import_reference(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Their prompt_learner/model.pth.tar-N.")],
    base_model: options.BaseModel,
    output: options.Output,
    overwrite: options.Overwrite = False,
    text_layers: options.Layers = None,
    vision_layers: options.Layers = None,
    classes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Class names, one a line, to save with the adapter."),
    ] = None,
    template: options.Template = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    device: options.Device = None,
    token: options.Token = None,
) -> int:
    """Turn a checkpoint of the authors' code into an adapter."""
    from .import_reference import import_reference as run
    from .session import Session

    return _report(
        lambda: run(
            checkpoint,
            base_model,
            output,
            Session(device, token, quiet),
            text_layers=text_layers,
            vision_layers=vision_layers,
            classes=classes,
            template=template,
            overwrite=overwrite,
        ),
        as_json,
        quiet,
        debug,
    )


@app.command()
def info(
    adapter: options.Adapter,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    device: options.IdleDevice = None,
    token: options.Token = None,
) -> int:
    """Say what an adapter is, without loading its base model."""
    from .info import info as run
    from .session import AdapterSource, Session

    return _report(
        lambda: run(AdapterSource(adapter, revision, subfolder), Session(device, token, quiet)),
        as_json,
        quiet,
        debug,
    )


@app.command()
def push(
    adapter: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where an adapter was saved.")],
    repo_id: Annotated[str, typer.Argument(metavar="NAME", help="On the Hub, user/name; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The CLIP by its name on the Hub, where the adapter names a folder."),
    ] = None,
    save_processor: Annotated[
        bool,
        typer.Option("--save-processor", help="Upload its processor as well, where none lies in the folder."),
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    device: options.IdleDevice = None,
    token: options.Token = None,
) -> int:
    """Share a saved adapter on the Hub."""
    from .push import push as run
    from .session import Session

    return _report(
        lambda: run(
            adapter,
            repo_id,
            Session(device, token, quiet),
            private=private or None,
            base_model=base_model,
            save_processor=save_processor,
        ),
        as_json,
        quiet,
        debug,
    )
