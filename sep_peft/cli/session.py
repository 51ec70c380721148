"""What the commands of ``sep-peft`` share: how they work, where an adapter is, what they load and what they found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from ..classifier.adapter import Adapter
from ..classifier.classifier import SEPClassifier
from ..classifier.files import MissingClassesError, naming_base_model
from ..training.folders import without_unreadable
from ..tuner.find_file import check_path
from ..words import are, counted
from .text import one_line


Model = TypeVar("Model", bound=torch.nn.Module)
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Result:
    """What a command found.

    Args:
        data: for ``--json``.
        lines: for people; they may hold text from outside as it is.
        code: exit code; 1 where something was left out.
    """

    data: Any
    lines: list[str]
    code: int = 0

    def with_file(self, kind: str, path: Path) -> Result:
        """The same and a file that was written, such as a "report", for both kinds of reader."""
        return replace(self, data=self.data | {kind: str(path)}, lines=[*self.lines, f"{kind}: {path}"])


@dataclass(frozen=True)
class Session:
    """How a command works, whatever it does.

    Args:
        device: where to compute; None: a GPU if there is one.
        token: of the Hub; None: that of ``hf auth login``.
        quiet: without progress.
    """

    device: str | None = None
    token: str | None = None
    quiet: bool = False

    def place(self, model: Model) -> Model:
        """Move a model to the device; returns it."""
        return model.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def progress(self, title: str):
        """Wraps what is iterated over, to show progress on standard error."""
        return partial(tqdm, desc=title, disable=self.quiet, file=sys.stderr)


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter is.

    Args:
        name: a folder, or a repository on the Hub.
        revision: branch, tag or commit on the Hub; None: the main branch.
        subfolder: of the folder or repository; None: none.
    """

    name: str
    revision: str | None = None
    subfolder: str | None = None

    def hub_options(self, session: Session) -> dict[str, Any]:
        """Those that were given."""
        options = {"token": session.token, "revision": self.revision}
        return {key: value for key, value in options.items() if value is not None}


def load_base(name: str, session: Session) -> tuple[torch.nn.Module, Any]:
    model = load_base_model(name, session)
    with naming_base_model(name):
        return model, AutoProcessor.from_pretrained(name, token=session.token, trust_remote_code=False)


def load_base_model(name: str, session: Session) -> torch.nn.Module:
    with naming_base_model(name):
        return AutoModel.from_pretrained(name, token=session.token, trust_remote_code=False)


def load_classifier(source: AdapterSource, base_model: str | None, session: Session) -> SEPClassifier:
    """
    Raises:
        ValueError: the adapter has no classes, or cannot be loaded.
    """
    try:
        return session.place(_load(SEPClassifier.from_pretrained, source, base_model, session))
    except MissingClassesError as error:
        raise ValueError(
            f"{source.name} has no classes to tell, as an adapter of `sep-peft train-pairs` has none. Use `sep-peft "
            "embed`, `sep-peft search` or `sep-peft export --embed`, or train with `sep-peft train`."
        ) from error


def load_adapter(source: AdapterSource, base_model: str | None, session: Session) -> Adapter:
    """An adapter without its classes, of which it may have none."""
    adapter = _load(Adapter.from_pretrained, source, base_model, session)
    session.place(adapter.model)
    return adapter


def _load(load: Callable[..., Loaded], source: AdapterSource, base_model: str | None, session: Session) -> Loaded:
    check_path(source.name)  # before a base model is loaded for it
    options: dict[str, Any] = {"subfolder": source.subfolder, **source.hub_options(session)}
    if base_model is not None:
        options["model"], options["processor"] = load_base(base_model, session)
    return load(source.name, **options)


def check_images(samples: Any, session: Session) -> tuple[Any, dict[Path, str]]:
    """The samples, of one label or several, whose images can be read, and what is wrong with the others."""
    samples, broken = without_unreadable(samples, session.progress("reading images"))
    warn_unreadable(broken)
    return samples, broken


def warn_unreadable(broken: Mapping[Any, str]) -> None:
    """Name and count images on standard error."""
    for error in broken.values():
        warn(error)
    if broken:
        warn(f"{counted(len(broken), 'image')} cannot be read and {are(len(broken))} left out")


def warn(message: str) -> None:
    """Tell something that does not end the command, on standard error."""
    print(f"sep-peft: warning: {one_line(message)}", file=sys.stderr)


def listed(broken: Mapping[Path, str]) -> list[dict[str, str]]:
    return [{"image": str(path), "error": error} for path, error in broken.items()]
