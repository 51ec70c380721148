"""The files of a classifier, in a folder or on the Hub: adapter, classes and model card."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import wraps
from typing import Any, cast

import torch
import transformers
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME
from transformers.utils import PROCESSOR_NAME

from ..tuner.config import SEPConfig
from ..tuner.disk import try_folder
from ..tuner.files import (
    cast_adapter,
    cast_tensor,
    check_file,
    check_numbers,
    check_save_dtype,
    read_shapes,
    read_tensors,
    replace_files,
)
from ..tuner.find_file import find_file
from ..tuner.json_files import check_json, read_json, write_json
from ..tuner.messages import one_line, shown
from ..tuner.save_id import SAVE_ID, check_save_id, stamp_files
from .card import CONFUSION_FILE, CardDetails, is_hub_name, make_card, read_card
from .classes import TaskClasses
from .processor_files import PROCESSOR_FILES, check_processor, write_processor
from .whitened import WHITENING_FILE, Whitening, read_whitening, save_whitening


logger = logging.getLogger(__name__)

#: File beside the adapter that holds the classes.
CLASSES_FILE = "sep_classes.json"
#: File beside it that holds their prototypes, where predictions use any.
PROTOTYPES_FILE = "sep_prototypes.safetensors"
#: File beside it that holds another head.
HEAD_FILE = "sep_head.safetensors"
#: Every file that a save may write.
SAVED_FILES = (
    SAFETENSORS_WEIGHTS_NAME,
    CONFIG_NAME,
    CLASSES_FILE,
    PROTOTYPES_FILE,
    HEAD_FILE,
    WHITENING_FILE,
    REPOCARD_NAME,
    CONFUSION_FILE,
)
#: Version of the layout of classes, of those with a head, of those with descriptions, and of those several of which an
#: image may have, which earlier releases cannot read.
FORMAT_VERSION, HEAD_FORMAT_VERSION, DESCRIPTIONS_FORMAT_VERSION, LABELS_FORMAT_VERSION = 1, 2, 3, 4
#: Largest class file that is written and read, in bytes: 20,000 classes with 7 templates.
MAX_CLASSES_BYTES = 2**26
#: No model embeds images and texts in more dimensions.
MAX_EMBEDDING_SIZE = 2**16


# writing


def save_files(
    model: nn.Module,
    classes: TaskClasses | None,
    folder: str | os.PathLike,
    details: CardDetails,
    save_dtype: torch.dtype | None = None,
    whitening: Whitening | None = None,
    processor: Any = None,
) -> None:
    """Write the active adapter, the classes and the whitening if there are any and the model card, all or none.

    Args:
        processor: to write as well; None: none is. A processor that is there stays then, unless the adapter that was
            there has another base model.

    Raises:
        TypeError: the model is no `PeftModel`.
        ValueError: the metadata of the card that is there cannot be read, the weights cannot have `save_dtype`, the
            processor cannot be saved, or what is saved could not be loaded; nothing is written then.
    """
    model = _as_peft_model(model)
    if processor is not None:
        check_processor(processor)
    check_save_dtype(save_dtype)
    check_loadable(model, classes)
    card = os.path.join(folder, REPOCARD_NAME)
    old = read_card(card) if os.path.isfile(card) else None
    details = replace(details, base_model=details.base_model or base_model_name(model))
    with replace_files(folder) as temporary:
        _write(model, classes, temporary, details, old, save_dtype, name_of(folder), whitening=whitening)
        if processor is not None:
            write_processor(processor, temporary)
        stale = _stale_processor_files(folder, temporary)
    # those of another save, which `push_folder` would share
    for file in (*_not_written(classes, details, whitening), *stale):
        with suppress(FileNotFoundError):
            os.remove(os.path.join(folder, file))


def _not_written(classes: TaskClasses | None, details: CardDetails, whitening: Whitening | None) -> list[str]:
    """Files that a save of these parts does not have, but another may."""
    parts = {
        CONFUSION_FILE: details.confusion,
        CLASSES_FILE: classes,
        PROTOTYPES_FILE: None if classes is None else classes.prototypes,
        HEAD_FILE: None if classes is None else classes.head,
        WHITENING_FILE: whitening,
    }
    return [name for name, part in parts.items() if part is None]


def _stale_processor_files(folder: str | os.PathLike, written: str) -> list[str]:
    """Files of a processor in a folder that do not belong to what was written and will take its place there.

    All others where a processor was written; else those of an adapter of another base model, and not what somebody
    saved beside this one.
    """
    if os.path.isfile(os.path.join(written, PROCESSOR_NAME)):
        return [name for name in PROCESSOR_FILES if not os.path.isfile(os.path.join(written, name))]
    configs = [os.path.join(place, CONFIG_NAME) for place in (folder, written)]
    if not os.path.isfile(configs[0]):
        return []
    try:
        before, after = (read_json(config).get("base_model_name_or_path") for config in configs)
    except ValueError:  # what was there is damaged, and is replaced
        return list(PROCESSOR_FILES)
    return [] if before == after else list(PROCESSOR_FILES)


def name_of(folder: str | os.PathLike) -> str:
    """The last part of a folder's path."""
    return os.path.basename(os.path.abspath(folder))


def check_loadable(model: PeftModel, classes: TaskClasses | None) -> None:
    """
    Raises:
        ValueError: the class file would be larger than any that is read, or a weight of the active adapter is not
            finite or larger than any that is.
    """
    if classes is not None:
        check_json(_class_data(classes, "0" * 32), CLASSES_FILE, MAX_CLASSES_BYTES)
    adapter = cast(str, model.active_adapter)
    weights = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    check_numbers(weights.items(), f"The adapter {shown(adapter)}")


def _class_data(classes: TaskClasses, save_id: str | None = None) -> dict[str, Any]:
    """What the class file holds."""
    version = FORMAT_VERSION if classes.head is None else HEAD_FORMAT_VERSION
    version = version if classes.descriptions is None else DESCRIPTIONS_FORMAT_VERSION
    version = LABELS_FORMAT_VERSION if classes.multi_label else version
    return {"format_version": version, **classes.to_json()} | ({} if save_id is None else {SAVE_ID: save_id})


def try_output(folder: str | os.PathLike, needed: int = 0) -> None:
    """Find out before long work whether `save_files` can save into a folder; nothing in it is changed.

    Args:
        folder: may be missing.
        needed: bytes that its disk must have room for.

    Raises:
        NotADirectoryError, PermissionError, DiskFullError: as `try_folder`.
        IsADirectoryError: a folder is in the place of a file that is to be written.
        ValueError: the metadata of the card that is there cannot be read.
    """
    try_folder(folder, needed)
    for path in (os.path.join(folder, name) for name in (*SAVED_FILES, *PROCESSOR_FILES)):
        if os.path.isdir(path):
            raise IsADirectoryError(f"{path} is a folder, but a file of that name is to be saved. Rename or remove it.")
    card = os.path.join(folder, REPOCARD_NAME)
    if os.path.isfile(card):
        read_card(card)


def update_card(model: nn.Module, classes: TaskClasses, folder: str | os.PathLike) -> None:
    """Write the model card of a folder anew; what its owner or another program wrote into it stays.

    Raises:
        TypeError: the model is no `PeftModel`.
        ValueError: the metadata of the card that is there cannot be read.
    """
    model = _as_peft_model(model)
    path = os.path.join(folder, REPOCARD_NAME)
    old = read_card(path) if os.path.isfile(path) else None
    details = CardDetails(base_model=base_model_name(model))
    base_class, config = type(model.get_base_model()).__name__, cast(SEPConfig, model.active_peft_config)
    make_card(classes, config, base_class, details, folder=name_of(folder), old=old).save(path)


def push_files(
    model: nn.Module,
    classes: TaskClasses,
    repo_id: str,
    details: CardDetails,
    *,
    subfolder: str | None,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    save_dtype: torch.dtype | None = None,
    whitening: Whitening | None = None,
    processor: Any = None,
    **commit_options,
) -> str:
    """Upload what `save_files` writes, in one commit, in the place of what an earlier upload left there.

    The repository and the branch are made where they are missing.

    Returns:
        address of the commit.

    Raises:
        TypeError: the model is no `PeftModel`.
        ValueError: nobody else could load the base model, the metadata of the card that is there cannot be read, the
            weights cannot have `save_dtype`, the processor cannot be saved, or what is uploaded could not be loaded.
    """
    model = _as_peft_model(model)
    if processor is not None:
        check_processor(processor)
    check_save_dtype(save_dtype)
    check_loadable(model, classes)
    base_model = details.base_model or base_model_name(model)
    if base_model is None:
        raise ValueError(
            f"The base model was loaded from {model.active_peft_config.base_model_name_or_path!r}, which is no name on "
            'the Hub, so others could not load it. Pass CardDetails(base_model="user/name").'
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    old = remote_card(repo_id, subfolder, revision, token)
    details = replace(details, base_model=base_model, repo_id=repo_id)
    with tempfile.TemporaryDirectory() as folder:
        _write(model, classes, folder, details, old, save_dtype, subfolder=subfolder, whitening=whitening)
        if processor is not None:
            write_processor(processor, folder)
        name_base_model(folder, base_model)
        theirs = commit_options.pop("delete_patterns", None) or []
        deleted = [theirs] if isinstance(theirs, str) else [*theirs]
        deleted += replaced_on_hub(api, repo_id, subfolder, revision)
        place = {"path_in_repo": subfolder, "revision": revision, "delete_patterns": deleted}
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **place, **commit_options)


def replaced_on_hub(api: HfApi, repo_id: str, subfolder: str | None = None, revision: str | None = None) -> list[str]:
    """Files on the Hub that an upload of an adapter takes the place of: those that it does not have are removed.

    What is left of an earlier adapter would be loaded with the one that is there. A base model in the same place keeps
    its processor.
    """
    model = "/".join(filter(None, (subfolder, MODEL_CONFIG_NAME)))
    own = api.file_exists(repo_id, model, revision=revision)
    return [*SAVED_FILES, *(() if own else PROCESSOR_FILES)]


def base_model_name(model: PeftModel) -> str | None:
    """Name of the base model on the Hub; None where it came from a folder or was made here."""
    config = getattr(model.get_base_model(), "config", None)
    for name in (model.active_peft_config.base_model_name_or_path, getattr(config, "_name_or_path", None)):
        if is_hub_name(name):
            return name
    return None


def _as_peft_model(model: nn.Module) -> PeftModel:
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"Saving needs a PeftModel, but the model is a {type(model).__name__}. Wrap it with "
            "peft.get_peft_model, or save its adapter with its own save_pretrained."
        )
    return model


def _write(
    model: PeftModel,
    classes: TaskClasses | None,
    folder: str,
    details: CardDetails,
    old: ModelCard | None,
    save_dtype: torch.dtype | None,
    name: str | None = None,
    subfolder: str | None = None,
    whitening: Whitening | None = None,
) -> None:
    """Write all files of a save into an empty folder; `name` is that of the folder that they go to."""
    adapter = cast(str, model.active_adapter)  # PEFT allows a list as well; of SEP one is active
    model.save_pretrained(folder, selected_adapters=[adapter], save_embedding_layers=False)
    if adapter != "default":  # PEFT puts those into a folder of their own
        for entry in os.scandir(os.path.join(folder, adapter)):
            os.replace(entry.path, os.path.join(folder, entry.name))
        os.rmdir(os.path.join(folder, adapter))
    if save_dtype is not None:
        cast_adapter(folder, save_dtype)
    if classes is not None:
        _write_classes(classes, folder, save_dtype)
    if whitening is not None:
        save_whitening(whitening, folder)
    base_class = type(model.get_base_model()).__name__
    config = cast(SEPConfig, model.active_peft_config)
    card = make_card(classes, config, base_class, details, folder=name, subfolder=subfolder, old=old)
    save_id = stamp_files(folder)
    if classes is not None:
        write_json(_class_data(classes, save_id), os.path.join(folder, CLASSES_FILE))
    card.save(os.path.join(folder, REPOCARD_NAME))
    if details.confusion is not None:
        with open(os.path.join(folder, CONFUSION_FILE), "wb") as file:
            file.write(details.confusion)
    mode = os.stat(os.path.join(folder, REPOCARD_NAME)).st_mode
    for entry in os.scandir(folder):  # safetensors lets nobody else read what it writes
        os.chmod(entry.path, mode)


def _write_classes(classes: TaskClasses, folder: str, save_dtype: torch.dtype | None) -> None:
    """The class list, and the prototypes or the head that predict."""
    write_json(_class_data(classes), os.path.join(folder, CLASSES_FILE))
    if classes.prototypes is not None:
        kept = cast_tensor(classes.prototypes.contiguous(), save_dtype or classes.prototypes.dtype, "prototypes")
        save_file({"prototypes": kept}, os.path.join(folder, PROTOTYPES_FILE))
    if classes.head is not None:
        tensors = {
            name: cast_tensor(value.contiguous(), save_dtype or value.dtype, name)
            if value.is_floating_point()
            else value
            for name, value in classes.head.tensors.items()
        }
        save_file(tensors, os.path.join(folder, HEAD_FILE))


def name_base_model(folder: str, name: str) -> None:
    """Put the base model's name on the Hub into the adapter's configuration, where a folder may stand."""
    path = os.path.join(folder, CONFIG_NAME)
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config | {"base_model_name_or_path": name}, file, indent=2, sort_keys=True)


def remote_card(repo_id: str, subfolder: str | None, revision: str | None, token) -> ModelCard | None:
    """The model card of a repository on the Hub; None where it has none."""
    try:
        return read_card(hf_hub_download(repo_id, REPOCARD_NAME, subfolder=subfolder, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        return None


# reading


def path_first(load: Callable) -> Callable:
    """Let a class method `from_pretrained(path, *, model=None, ...)` take the older order (model, path, ...) as well.

    Raises:
        TypeError: no path, something else in its place, or a model by position and by name.
    """

    @wraps(load)
    def from_pretrained(cls, *args, **kwargs):
        call = f"{cls.__name__}.from_pretrained"
        if len(args) == 2 or (len(args) == 1 and "path" in kwargs):
            if "model" in kwargs or (len(args) == 2 and "path" in kwargs):
                raise TypeError(f"{call} got a model or a path twice. Call {call}(path, model=model).")
            warnings.warn(
                f"{call}(model, path) is deprecated. Call {call}(path, model=model).", DeprecationWarning, stacklevel=2
            )
            kwargs |= {"model": args[0], "path": args[-1] if len(args) == 2 else kwargs["path"]}
        elif len(args) == 1:
            kwargs["path"] = args[0]
        elif args:
            raise TypeError(f"{call} takes one argument by position, the path, but got {len(args)}.")
        path = kwargs.pop("path", None)
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(
                f"{call} needs the folder or repository of an adapter, a str or a path, but got {type(path).__name__}. "
                f"Call {call}(path), or {call}(path, model=model) where the base model is loaded."
            )
        return load(cls, path, **kwargs)

    return from_pretrained


class MissingClassesError(ValueError):
    """There is an adapter, but no class list beside it."""


def load_classes(path: str, subfolder: str | None, hub_options: Mapping[str, Any]) -> TaskClasses:
    """The classes beside an adapter.

    Raises:
        MissingClassesError: there are none.
        ValueError: they are no JSON, incomplete, or of a newer format; the message names the file.
        MixedSaveError: they belong to another save than the weights or the prototypes.
        SafetensorError: the weights or the prototypes are cut short.
    """
    file, found = _find(path, CLASSES_FILE, subfolder, hub_options)
    if not found:
        raise MissingClassesError(
            f"{file} does not exist, so there are no classes to load. Save with SEPClassifier.save_pretrained, or "
            "load the adapter alone with PeftModel.from_pretrained and name the classes with "
            "SEPClassifier.from_class_names."
        )
    data = read_json(file, MAX_CLASSES_BYTES)
    version = data.get("format_version")
    if type(version) is not int or not FORMAT_VERSION <= version <= LABELS_FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {shown(version)}, but this version of sep_peft reads "
            f"{FORMAT_VERSION} to {LABELS_FORMAT_VERSION}. Upgrade sep_peft."
        )
    weights, found = _find(path, SAFETENSORS_WEIGHTS_NAME, subfolder, hub_options)
    if found:
        check_file(weights)
        check_save_id(weights, file, data.get(SAVE_ID))
    prototypes, head_tensors = None, None
    if data.get("head"):
        head_file = _find_part(path, HEAD_FILE, subfolder, hub_options, file, data.get(SAVE_ID))
        check_numbers(read_tensors(head_file), head_file)
        head_tensors = load_file(head_file)
    elif data.get("prototype_logit_weight"):
        prototypes_file = _find_part(path, PROTOTYPES_FILE, subfolder, hub_options, file, data.get(SAVE_ID))
        prototypes = _read_prototypes(prototypes_file, data.get("names"))
    try:
        return TaskClasses.from_json(data, prototypes, head_tensors)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_whitening(path: str, subfolder: str | None, hub_options: Mapping[str, Any]) -> Whitening | None:
    """The whitening beside an adapter; None where it has none.

    Raises:
        ValueError, MixedSaveError, SafetensorError: as `read_whitening`.
    """
    try:
        file, found = _find(path, WHITENING_FILE, subfolder, hub_options)
    except LocalEntryNotFoundError:  # neither here nor to be asked for
        return None
    return read_whitening(file, _find(path, SAFETENSORS_WEIGHTS_NAME, subfolder, hub_options)[0]) if found else None


def _find(path: str, name: str, subfolder: str | None, hub_options: Mapping[str, Any]) -> tuple[str, bool]:
    """A file of an adapter, as a path on this machine where it is there, and whether it is."""
    try:
        file = find_file(path, name, subfolder, hub_options)
    except RemoteEntryNotFoundError:
        return "/".join(filter(None, (path, subfolder, name))), False
    return file, os.path.isfile(file)


def _find_part(
    path: str, name: str, subfolder: str | None, hub_options: Mapping[str, Any], classes_file: str, save_id: str | None
) -> str:
    """A file that the classes need, as a path on this machine.

    Raises:
        ValueError: it is not there.
        MixedSaveError: it belongs to another save than the classes.
        SafetensorError: it is cut short.
    """
    file, found = _find(path, name, subfolder, hub_options)
    if not found:
        raise ValueError(f"{file} does not exist, but {CLASSES_FILE} says that it should. Copy or download it again.")
    check_file(file)
    check_save_id(file, classes_file, save_id)
    return file


def _read_prototypes(file: str, names: Any) -> torch.Tensor:
    """(C, E), for C names; the header is compared before anything is read."""
    shapes = {key: tuple(shape) for key, shape in read_shapes(file).items()}
    shape = shapes.get("prototypes", ())
    fits = len(shape) == 2 and isinstance(names, list) and shape[0] == len(names) and shape[1] <= MAX_EMBEDDING_SIZE
    if len(shapes) != 1 or not fits:
        raise ValueError(
            f"{file} must hold prototypes alone, one for each name in {CLASSES_FILE}, but holds "
            f"{shown(shapes)}. Copy or download it again."
        )
    check_numbers(read_tensors(file), file)
    return load_file(file)["prototypes"]


def load_base(
    path: str, subfolder: str | None, hub_options: Mapping[str, Any], trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """The base model that an adapter was made for, and the processor beside the adapter, else that of the base model.

    Args:
        path: of the adapter, a folder or the id of a repository.
        subfolder: below `path`.
        hub_options: keyword arguments of `hf_hub_download`.
        trust_remote_code: whether code that comes with the base model may run. The adapter's author named it, so it is
            the caller who decides.

    Raises:
        OSError: the base model cannot be loaded.
        ValueError: the adapter does not say which, or it lies on the Hub and names a path on this machine. Every
            message tells how to hand in the model.
    """
    config = SEPConfig.of_adapter(path, subfolder, **hub_options)
    name, mapping, revision = config.base_model_name_or_path, config.auto_mapping, config.revision or "main"
    class_name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    model_class = getattr(transformers, class_name, None) if isinstance(class_name, str) else None
    if not (isinstance(name, str) and name and isinstance(revision, str)):
        model_class = None
    if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
        raise ValueError(
            f"The adapter {path} does not name a base model of transformers. Load the model and hand it in: "
            "SEPClassifier.from_pretrained(path, model=model, processor=processor)."
        )
    if not is_hub_name(name):
        if not os.path.isdir(path):
            raise ValueError(
                f"The adapter {path} on the Hub names {shown(name)} as its base model, which is a path on this machine "
                "or no name on the Hub. Load the model you trust and hand it in: "
                "SEPClassifier.from_pretrained(path, model=model, processor=processor)."
            )
        logger.warning("The adapter %s names its base model by a path on this machine: %r is loaded.", path, name)
    options = {key: hub_options[key] for key in ("token", "cache_dir", "local_files_only") if key in hub_options}
    options |= {"revision": revision, "trust_remote_code": trust_remote_code}
    with naming_base_model(cast(str, name)):
        model = model_class.from_pretrained(name, **options)
        if not has_processor(path, subfolder, hub_options):
            return model, transformers.AutoProcessor.from_pretrained(name, **options)
    return model, load_processor(path, subfolder, hub_options)


def load_base_image_processor(path: str, subfolder: str | None, hub_options: Mapping[str, Any]) -> Any:
    """The image processor of the base model that an adapter names, whatever lies beside the adapter.

    Raises:
        OSError: it cannot be loaded.
    """
    config = SEPConfig.of_adapter(path, subfolder, **hub_options)
    name = cast(str, config.base_model_name_or_path)
    options = {key: hub_options[key] for key in ("token", "cache_dir", "local_files_only") if key in hub_options}
    with naming_base_model(name):
        return transformers.AutoImageProcessor.from_pretrained(name, revision=config.revision or "main", **options)


def has_processor(path: str, subfolder: str | None, hub_options: Mapping[str, Any]) -> bool:
    """Whether a processor lies beside an adapter, in a folder or on the Hub."""
    return _find(path, PROCESSOR_NAME, subfolder, hub_options)[1]


def load_processor(path: str, subfolder: str | None, hub_options: Mapping[str, Any]) -> Any:
    """The processor beside an adapter; code that comes with it does not run.

    Raises:
        ValueError: it is damaged, or needs code.
    """
    try:
        return transformers.AutoProcessor.from_pretrained(
            path, subfolder=subfolder or "", trust_remote_code=False, **hub_options
        )
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise ValueError(
            f"The processor beside the adapter {path} cannot be loaded ({one_line(str(error)).rstrip('.')}). Pass "
            "processor=AutoProcessor.from_pretrained(...), or remove its files."
        ) from error


@contextmanager
def naming_base_model(name: str) -> Iterator[None]:
    """Errors of loading a base model or its processor say which it is, and what to pass.

    Raises:
        OSError: in the place of any OSError or ValueError of the block.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        here = is_hub_name(name) or os.path.isdir(name)
        reason = one_line(str(error)).rstrip(".") if here else "there is no such folder"
        raise OSError(
            f"The base model {shown(name)} cannot be loaded: {reason}. Pass one that can: "
            "--base-model NAME on the command line, or in Python "
            "SEPClassifier.from_pretrained(path, model=model, processor=processor)."
        ) from error
