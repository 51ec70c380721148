"""How a training ended, as ``train`` and ``train-pairs`` tell it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..classifier.card import CardDetails
from ..training.history import History, TrainingInterrupted
from ..words import counted
from .saving import Saved
from .session import Result, warn


def interrupted(
    interruption: TrainingInterrupted,
    save: Callable[..., Saved],
    details: CardDetails,
    tell: Callable[[Saved, CardDetails, History], Result],
    report: bool,
) -> Result:
    """Save what there is; nothing is measured, because whoever interrupts waits for the end.

    Args:
        interruption: that ended the training.
        save: takes the details of the card.
        details: for the model card, without the interruption.
        tell: what the command says of an adapter that was saved.
        report: whether a report would have been written.
    """
    history = interruption.history
    code = 143 if history.stopped == "SIGTERM" else 130
    if not history.rows:
        data = {"adapter": None, "history": history.to_json()}
        return Result(data, [f"{interruption.ended}, so there is nothing to save"], code)
    ended, missing = interruption.ended, [*interruption.missing, *(["report"] if report else [])]
    result = tell(save(details=replace(details, protocol=f"{details.protocol}; {ended}")), details, history)
    after = [f"there is no {name}, which comes after the last epoch" for name in missing]
    lines = [*result.lines, *after, f"{ended}; --resume goes on"]
    return replace(result, code=code, lines=lines, data=result.data | {"missing": missing})


def protocol(plan: str, history: History, held_out: Sequence[Any] | None, keep: Literal["best", "last"]) -> str:
    """How it was trained, for the model card.

    Args:
        plan: what it was meant to be.
        history: of the training.
        held_out: images it was validated on; None: none.
        keep: whose weights they are.
    """
    ended = "" if history.stopped is None else f"; stopped by {history.stopped} {history}"
    if held_out is None or keep == "last":
        return f"{plan}{ended}"
    return f"{plan}{ended}; the weights of epoch {history.best}, the best on {counted(len(held_out), 'image')} of val"


def with_report(result: Result, path: Path, write: Callable[[Path], None]) -> Result:
    """A result with the report that was written, if any: what was trained is worth more than a page about it.

    Args:
        result: of the training.
        path: of the report.
        write: writes it.
    """
    try:
        write(path)
    except Exception as error:
        warn(f"no report could be written: {str(error).strip() or type(error).__name__}")
        return replace(result, data=result.data | {"report": None})
    return result.with_file("report", path)


def saved_result(saved: Saved, data: dict[str, Any], lines: list[str]) -> Result:
    """What a command says of an adapter that was saved, with a warning where that was not where it was asked for."""
    if saved.error is not None:
        warn(f"the adapter is in {saved.folder}, because saving where it was asked for failed: {saved.error}")
    return Result(data, lines, code=0 if saved.error is None else 1)
