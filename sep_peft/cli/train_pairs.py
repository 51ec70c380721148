"""``sep-peft train-pairs``: trains an adapter on images with captions, measures its recall and saves it."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import set_seed

from ..classifier.adapter import Adapter
from ..classifier.card import CardDetails, RecallScore
from ..method.pairs_recipe import PairsRecipe
from ..training.captions import LongCaptions
from ..training.checkpoint import CHECKPOINT_FILE
from ..training.fit_pairs import fit_pairs
from ..training.folders import without_unreadable
from ..training.history import History, TrainingInterrupted
from ..training.pair_files import PairFolder, read_pair_folder, read_pairs
from ..training.pairs import Pair
from ..training.pairs_report import write_pairs_report
from ..training.retrieval import evaluate_pairs
from ..training.run_log import REPORT_FILE, RUN_FOLDER
from ..tuner.config import SEPConfig
from ..words import counted
from .ending import interrupted, protocol, saved_result, with_report
from .saving import Saved, check_output, save_somewhere, saved_bytes
from .session import Result, Session, listed, load_base, warn_unreadable


#: Images that are held out to validate on where nothing says otherwise: a tenth, but at most so many.
MOST_HELD_OUT = 500


def train_pairs(
    path: Path,
    base_model: str,
    output: Path,
    config: SEPConfig,
    recipe: PairsRecipe,
    session: Session,
    *,
    val: Path | None = None,
    held_out: int | None = None,
    long_captions: LongCaptions = "refuse",
    chunk_size: int | None = None,
    save_dtype: torch.dtype = torch.float32,
    save_processor: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    max_seconds: float | None = None,
    patience: int | None = None,
    keep: Literal["best", "last"] = "best",
    name: str | None = None,
    license: str | None = None,
    report: bool = True,
    command: str | None = None,
) -> Result:
    """Train an adapter on images with captions, and save it with a card.

    Args:
        path: of the pairs, a file or a folder; see `read_pair_folder`.
        base_model: name or folder of the model to adapt.
        output: folder to save into.
        config, recipe: the adapter and how to train it.
        session: how to work.
        val: of pairs to validate on; None: those of ``val/``, else images that are held out.
        held_out: how many images of the training pairs are held out to validate on, where there is nothing else; None:
            a tenth of them, at most `MOST_HELD_OUT`.
        long_captions, chunk_size, max_seconds, patience, keep: as for `fit_pairs`.
        save_dtype: of the weights in the file.
        save_processor: save the base model's processor with the adapter.
        overwrite: replace an adapter, or a training that was not finished, in `output`.
        resume: go on with the training in `output`; where there is none, begin.
        name: of the data in the model card; None: that of `path`.
        license: of the adapter in the model card; None: none.
        report: write a page to look at beside the adapter; see `write_pairs_report`.
        command: that was given, for the settings in the run's folder; None: not known.

    Raises:
        FileNotFoundError: there is no `path`.
        FileExistsError: `output` has an adapter or an unfinished training, and it was not said what to do with it.
        OSError: nothing can be saved in `output`, or its disk has too little room; found out before training.
        ValueError: pairs that cannot be trained on.
    """
    begun = time.monotonic()
    check_output(output, overwrite, resume)
    pairs, broken = _readable(_with_val(read_pair_folder(path), val, held_out, recipe.seed), session)
    validation = pairs.tests.get("val")
    if patience is not None and validation is None:
        raise ValueError("--patience needs pairs to validate on. Pass --val, or a --held-out above 0.")
    set_seed(recipe.seed)
    base, processor = load_base(base_model, session)
    model = session.place(get_peft_model(base, config))
    check_output(output, overwrite, resume, needed=saved_bytes(model))
    if not resume:
        (output / CHECKPOINT_FILE).unlink(missing_ok=True)  # it may be replaced
    name = name or path.resolve().stem
    notes = {"command": command, "data": str(path.resolve()), "layout": pairs.layout, "base_model": base_model}
    details = CardDetails(seeds=[recipe.seed], protocol=str(recipe), license=license)
    save = partial(
        save_somewhere, Adapter(model, processor), output, save_dtype=save_dtype, save_processor=save_processor
    )
    told = partial(_told, pairs=pairs, broken=broken)
    try:
        history = fit_pairs(
            model,
            pairs.train,
            recipe,
            processor=processor,
            eval_pairs=validation,
            long_captions=long_captions,
            chunk_size=chunk_size,
            folder=output,
            resume=resume,
            notes=notes,
            max_seconds=max_seconds,
            patience=patience,
            keep=keep,
            quiet=session.quiet,
        )
    except TrainingInterrupted as interruption:
        return interrupted(interruption, save, details, lambda saved, _, history: told(saved, [], history), report)
    options = {"batch_size": recipe.batch_size, "long_captions": long_captions}
    measured = {
        part: evaluate_pairs(model, found, processor, **options, progress=session.progress(part))
        for part, found in pairs.tests.items()
    }
    scores = [_score(name, part, found) for part, found in measured.items()]
    plan = f"{counted(len(pairs.train), 'image')}; {recipe}"
    saved = save(
        details=replace(details, protocol=protocol(plan, history, pairs.tests.get("val"), keep), recall_scores=scores)
    )
    result = told(saved, scores, history)
    if report:
        took = f"{sum(history.seconds):.0f} s in epochs, {time.monotonic() - begun:.0f} s in all"
        facts = {**notes, "recipe": str(recipe), "time": took}
        parts = {"title": name, "training_images": len(pairs.train), "history": history, "unreadable": broken}
        write = partial(write_pairs_report, evaluations=measured, facts=facts, **parts)
        result = with_report(result, saved.folder / RUN_FOLDER / REPORT_FILE, write)
    if history.stopped == "time":
        return replace(result, lines=[*result.lines, f"stopped by time {history}; --resume goes on"])
    if saved.error is None:
        (output / CHECKPOINT_FILE).unlink(missing_ok=True)
    return result


def _with_val(pairs: PairFolder, val: Path | None, held_out: int | None, seed: int) -> PairFolder:
    """The pairs with some to validate on, as it was said, in the place of those that are there."""
    if val is not None:
        if held_out is not None:
            raise ValueError("--val and --held-out exclude each other, but both were given. Pass one of them.")
        return replace(pairs, tests={"val": read_pairs(val), **{k: v for k, v in pairs.tests.items() if k != "val"}})
    if "val" in pairs.tests and held_out is None:
        return pairs
    count = min(MOST_HELD_OUT, len(pairs.train) // 10) if held_out is None else held_out
    if not 0 <= count < len(pairs.train):
        raise ValueError(f"--held-out must be from 0 to {len(pairs.train) - 1}, but got {count}.")
    if not count:
        return pairs
    if "val" in pairs.tests:
        raise ValueError("--held-out is for pairs without val/, but there is one. Leave it out.")
    chosen = set(random.Random(seed).sample(range(len(pairs.train)), count))
    train = [pair for index, pair in enumerate(pairs.train) if index not in chosen]
    return PairFolder(train, {"val": [pairs.train[index] for index in sorted(chosen)], **pairs.tests}, pairs.layout)


def _readable(pairs: PairFolder, session: Session) -> tuple[PairFolder, dict[Path, str]]:
    """Without images that cannot be read, which are named on standard error."""
    broken: dict[Path, str] = {}

    def kept(part: list[Pair]) -> list[Pair]:
        samples: Any = [(pair.image, pair) for pair in part]
        readable, more = without_unreadable(samples, session.progress("reading images"))
        broken.update(more)
        return [pair for _, pair in readable]  # pyright: ignore[reportReturnType]  # what stood beside the image

    train = kept(pairs.train)
    tests = {part: found for part, of_part in pairs.tests.items() if (found := kept(of_part))}
    warn_unreadable(broken)
    if not train:
        raise ValueError("No image to train on can be read.")
    return PairFolder(train, tests, pairs.layout), broken


def _score(name: str, part: str, found) -> RecallScore:
    return RecallScore(name, part, found.images, found.captions, found.adapted.named(), found.frozen.named())


def _told(
    saved: Saved, scores: list[RecallScore], history: History, pairs: PairFolder, broken: Mapping[Path, str]
) -> Result:
    size = (saved.folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    data = {
        "adapter": str(saved.folder),
        "error": saved.error,
        "bytes": size,
        "layout": pairs.layout,
        "training_images": len(pairs.train),
        "scores": [asdict(score) for score in scores],
        "unreadable": listed(broken),
        "history": history.to_json(),
    }
    lines = [
        f"saved {saved.folder} ({size / 1e6:.1f} MB), trained on {counted(len(pairs.train), 'image')} ({pairs.layout})"
    ]
    for score in scores:
        lines += [
            f"{score.split}: recall at 1, 5, 10 {_shares(score.adapted)} with SEP, {counted(score.images, 'image')}",
            f"{score.split}: recall at 1, 5, 10 {_shares(score.frozen)} without",
        ]
    if history.stopped == "patience":
        lines.append(f"stopped by patience {history}")
    return saved_result(saved, data, lines)


def _shares(named: Mapping[str, float]) -> str:
    """Such as "10.1 30.2 41.0 % image to text, 9.8 28.8 40.3 % text to image"."""
    ways = ("image_to_text", "text_to_image")
    found = {way: [f"{share:.1f}" for name, share in named.items() if name.startswith(way)] for way in ways}
    return ", ".join(f"{' '.join(shares)} % {way.replace('_', ' ')}" for way, shares in found.items())
