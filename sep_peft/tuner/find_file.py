"""Where the files of an adapter are: in a folder, or on the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME


def check_path(path: str) -> None:
    """
    Raises:
        FileNotFoundError: the path is that of a folder, and there is none; the Hub would call it no valid name.
        NotADirectoryError: the path is that of a file.
    """
    if os.path.isfile(path):
        raise NotADirectoryError(f"{path} is a file. Pass the folder of the adapter, in which {CONFIG_NAME} lies.")
    like_folder = os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1 or "\\" in path
    if like_folder and not os.path.isdir(path):
        raise FileNotFoundError(f"There is no adapter folder {path}.")


def find_file(path: str, name: str, subfolder: str | None, hub_options: Mapping[str, Any]) -> str:
    """A file of an adapter as a path on this machine; in a folder it may not exist.

    Args:
        path: a folder, or the id of a repository on the Hub, "user/name".
        name: of the file.
        subfolder: below `path`.
        hub_options: keyword arguments of `hf_hub_download`.

    Raises:
        FileNotFoundError: there is no such folder, and the path is no id of a repository, or the Hub cannot be reached.
        NotADirectoryError: the path is that of a file.
        HfHubHTTPError: the Hub has no such repository or file.
    """
    if os.path.isdir(path):
        return os.path.join(path, subfolder or "", name)
    check_path(path)
    try:
        return hf_hub_download(path, name, subfolder=subfolder, **hub_options)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"There is no adapter folder {path}, and no repository on the Hub can be called so."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no adapter folder {path}. A repository of this name on the Hub is not in the cache, and the Hub "
            "cannot be reached."
        ) from error
