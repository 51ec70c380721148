"""`push_folder`: a saved adapter is checked, and its files alone go from a folder to the Hub."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME
from transformers import AutoProcessor

# the one that huggingface_hub asks with: httpx or, with newer ones, httpx2
from transformers.image_utils import httpx  # pyright: ignore[reportPrivateImportUsage]
from transformers.utils import PROCESSOR_NAME

from ..tuner.config import SEPConfig
from ..tuner.files import WeightsOrigin, check_folder, check_numbers, read_tensors
from ..tuner.json_files import read_json
from ..tuner.messages import one_line, shown
from .card import card_for_hub, is_hub_name, read_card
from .files import (
    CLASSES_FILE,
    SAVED_FILES,
    load_classes,
    name_base_model,
    naming_base_model,
    remote_card,
    replaced_on_hub,
)
from .processor_files import PROCESSOR_FILES, write_processor


#: Tokens of the Hub, as they begin, and places on a machine, as far as they tell whose it is.
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
PLACE = re.compile(
    r"(?<![\w.:/~-])(?:/(?:home|Users|root|tmp|mnt|media|var|opt|srv)/[^\s\"'`)]+|[A-Za-z]:\\+\w[^\s\"'`)]*)"
)
#: Files of other models, by their endings.
WEIGHTS = (".safetensors", ".bin", ".pt", ".onnx", ".gguf")


@dataclass(frozen=True)
class Pushed:
    """Where an adapter is on the Hub.

    Args:
        repo_id: its name.
        url: its address.
        commit: address of the commit.
        files: that were uploaded.
    """

    repo_id: str
    url: str
    commit: str
    files: list[str]


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    base_model: str | None = None,
    save_processor: bool = False,
) -> Pushed:
    """Upload what `SEPClassifier.save_pretrained` wrote, in one commit; the repository is made where it is missing.

    Only the files of the adapter are uploaded: neither the run beside it nor anything else in the folder. Those of an
    earlier adapter that this one does not have are removed. What was written on the Hub around the marked part of the
    model card stays.

    Args:
        folder: of the adapter; it is not changed.
        repo_id: "user/name", or a name alone for a repository of one's own.
        private: whether a new repository is private; None: as the user's account has it.
        token: of the Hub; None: the one of ``hf auth login``.
        base_model: name of the base model on the Hub, where the adapter names a folder.
        save_processor: upload the base model's processor as well, where none lies in the folder; one that does is
            uploaded in any case.

    Raises:
        FileNotFoundError: `folder` has no adapter or no model card.
        ValueError: the name is none of the Hub, the adapter cannot be loaded, others could not load its base model, a
            file tells a token or a place on this machine, or the repository holds something else.
        PermissionError: nobody is logged in, or the user may not write there.
        OSError: the Hub answers with another error, or cannot be reached.
    """
    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{shown(repo_id)} is no name that the Hub takes ({one_line(str(error)).rstrip('.')}). Pass one such as "
            "user/my-task."
        ) from error
    base_model, base_revision = _check_adapter(folder, base_model)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        own = (folder / PROCESSOR_NAME).is_file()
        names = [name for name in (*SAVED_FILES, *(PROCESSOR_FILES if own else ())) if (folder / name).is_file()]
        for name in names:
            shutil.copy(folder / name, temporary)
        if save_processor and not own:
            with naming_base_model(base_model):
                options = {"revision": base_revision, "token": token, "trust_remote_code": False}
                found = AutoProcessor.from_pretrained(base_model, **options)
            write_processor(found, temporary)
            names += [name for name in PROCESSOR_FILES if Path(temporary, name).is_file()]
        name_base_model(temporary, base_model)
        path = Path(temporary, REPOCARD_NAME)
        card_for_hub(read_card(path), repo_id, base_model).save(path)
        _check_texts(Path(temporary), folder)
        with _answers(repo_id, api.endpoint):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            _check_repository(api, repo_id, token)
            old = remote_card(repo_id, None, None, token)
            card_for_hub(read_card(path), repo_id, base_model, old).save(path)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=temporary,
                commit_message="Upload SEP adapter",
                delete_patterns=replaced_on_hub(api, repo_id),
            )
    return Pushed(repo_id, f"{api.endpoint}/{repo_id}", str(commit), names)


def _check_adapter(folder: Path, base_model: str | None) -> tuple[str, str]:
    """Make sure that a folder holds an adapter that loads, and a card; returns its base model's name and revision."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Pass the one that an adapter was saved in.")
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}, so it holds no adapter.")
    config = SEPConfig.of_adapter(str(folder), None)
    weights = cast(WeightsOrigin, config.take_weights_origin()).find()  # it has just been read
    if weights is None:
        raise FileNotFoundError(f"{folder} holds the configuration of an adapter, but no weights. Save it again.")
    check_folder(folder)
    check_numbers(read_tensors(weights), weights)
    if (folder / CLASSES_FILE).is_file():
        load_classes(str(folder), None, {})
    if not (folder / REPOCARD_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} has no model card, {REPOCARD_NAME}. Save the adapter with SEPClassifier.save_pretrained, which "
            "writes one."
        )
    name = base_model or config.base_model_name_or_path
    if not is_hub_name(name):
        raise ValueError(
            f"The adapter names {shown(name)} as its base model, which is no name on the Hub, so others could not load "
            "it. Pass its name there: --base-model user/name."
        )
    return cast(str, name), cast(str, config.revision or "main")


def _check_texts(staged: Path, folder: Path) -> None:
    """Refuse texts that tell what belongs to this machine or its user alone.

    Raises:
        ValueError: names the file, and what is in it unless that is a token.
    """
    for path in sorted(staged.iterdir()):
        if path.suffix not in (".md", ".json"):
            continue
        text = path.read_text(encoding="utf-8")
        if TOKEN.search(text):
            raise ValueError(f"{folder / path.name} holds what looks like a token of the Hub. Take it out.")
        if found := PLACE.search(text):
            raise ValueError(
                f"{folder / path.name} names {shown(found[0])}, a place on this machine, which others need not know. "
                "Take it out."
            )


def _check_repository(api: HfApi, repo_id: str, token: str | bool | None) -> None:
    """
    Raises:
        ValueError: the repository holds something else than an adapter of SEP.
    """
    files = api.list_repo_files(repo_id)
    kind: Any = None
    if CONFIG_NAME in files:
        kind = read_json(hf_hub_download(repo_id, CONFIG_NAME, token=token)).get("peft_type")
        if kind == "SEP":
            return
    others = [name for name in files if name == "config.json" or name.endswith(WEIGHTS)]
    if kind is not None or others:
        what = f"an adapter of the method {shown(kind)}" if kind is not None else f"another model ({', '.join(others)})"
        raise ValueError(f"{repo_id} holds {what} already. Choose another name.")


@contextmanager
def _answers(repo_id: str, endpoint: str) -> Iterator[None]:
    """What the Hub answers in the block, in a line that says what to do.

    Raises:
        PermissionError, OSError: in the place of the client's errors.
    """
    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        said = one_line(error.server_message or str(error)).rstrip(".")
        if status == 401:
            raise PermissionError(
                "The Hub does not know who you are. Log in with `hf auth login`, or pass --token with one that may "
                "write."
            ) from error
        if status == 403:
            raise PermissionError(f"You may not write to {repo_id}: {said}.") from error
        raise OSError(f"The Hub did not take {repo_id}: {said}.") from error
    except httpx.TransportError as error:
        raise OSError(f"The Hub at {endpoint} cannot be reached: {one_line(str(error))}.") from error
