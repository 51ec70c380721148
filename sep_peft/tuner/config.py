"""`SEPConfig`: every option of the method, with the checks that need no model."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from huggingface_hub.errors import RemoteEntryNotFoundError
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from ..families.spec import Architecture
from .files import WeightsOrigin, check_folder
from .find_file import find_file
from .json_files import JSONFileError, read_json
from .messages import shown
from .registration import METHOD, peft_type


#: What the paper and its released code use, whatever the defaults of `SEPConfig` are.
PUBLISHED = {
    "num_text_prompts": 6,
    "num_vision_prompts": 4,
    "fusion_rank": None,
    "fusion_hidden_size": 256,
    "share_fusion": False,
    "frozen_weight": 0.5,
}
#: One small fusion for all layers of a tower, whatever the defaults of `SEPConfig` are.
COMPACT = {"num_vision_prompts": 4, "fusion_rank": 4, "fusion_hidden_size": 16, "share_fusion": True}
#: Options that say something about fusions only.
FUSION_OPTIONS = ("fusion_tokens", "fusion_rank", "fusion_hidden_size", "share_fusion", "batch_coupled")
#: Value of `fusion` -> options that say nothing beside it.
UNUSED_OPTIONS = {"none": ("text_layers", "vision_layers", *FUSION_OPTIONS), "independent": FUSION_OPTIONS}
#: Values of `fusion_tokens` that are tokens chosen from those of an input.
CHOSEN_TOKENS = ("selected", "random")
#: The towers of a dual encoder.
MODALITIES = ("text", "vision")
#: Options that loading fills in.
FILLED_IN = ("base_architecture", "base_model_name_or_path", "auto_mapping", "inference_mode", "revision")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass
class SEPConfig(PeftConfig):
    """Options of SEP, Self-Enhanced Prompt Tuning (arXiv 2405.15549).

    Args:
        num_text_prompts (`int`): prompts of the text tower, 0 leaves it as it is. Default 6.
        num_vision_prompts (`int`): prompts of the image tower, 0 leaves it as it is. Default 16; 4 as published.
        text_layers (`list[int]`, *optional*): encoder layers of the text tower before which the prompts are made anew,
            counted from 0. None: every layer after `start_layer`.
        vision_layers (`list[int]`, *optional*): the same for the image tower.
        start_layer (`int` or `dict[str, int]`): the layer before which the prompts enter, one for both towers or one
            for each, as in ``{"text": 9, "vision": 18}``, where a tower that is left out has 0. Below it the prompted
            and the frozen tower are the same and are computed once. With 0 the text prompts take positions 1..n and
            move the text up, as published; above 0 positions are spent already, so they carry none. Default 0.
        fusion (`"attention"`, `"independent"` or `"none"`): how prompts are made anew before a layer. "attention" fuses
            them with tokens of the input, "independent" puts learned prompts of that layer in their place (deep prompts
            as in VPT-deep, arXiv 2203.12119), "none" lets them run through the layers as they are (shallow prompts as
            in CoOp and VPT). Default "attention".
        fusion_tokens (`"selected"`, `"random"`, `"mean"` or `"noise"`): what fusions read. "selected" are the tokens
            that represent the input, as published; "random" are tokens at pseudo-random positions, "mean" averages of
            equal stretches of all tokens, "noise" is the same noise for every input, which tells what reading the input
            is worth (arXiv 2506.23856). Default "selected".
        fusion_rank (`int`, *optional*): r factors the four projections of each fusion to rank r, None leaves them at
            full width as published. Default 4.
        fusion_hidden_size (`int`): width of the fusion's MLP, 256 as published. Default 32.
        share_fusion (`bool`): one fusion module for all layers of a tower instead of one for each, as published.
            Default False.
        frozen_weight (`float`): share of the frozen embedding in the mix, at least 0 and below 1. 0.5 is the published
            equal sum, 0 the prompted tower alone. Default 0.5.
        batch_coupled (`bool`): reproduce the released code, which attends across the inputs of the batch instead of
            across the tokens of one input, and selects one set of image tokens for the batch. The price: an embedding
            then depends on what else is in its batch, a single image gets no fusion, and the text tower must be given
            all classes at once. Default False.
        architecture (`Architecture` or `dict`, *optional*): the spec of a model that the package does not know; see
            `sep_peft.Architecture`. None: found by the model's type.
        target_modules (`list[str]`, *optional*): paths of the towers to adapt; None for all towers of the model type.
        modules_to_save (`list[str]`, *optional*): further modules to train in full and to save with the adapter.
        base_architecture (`dict`, *optional*): the towers this adapter fits, filled in when it is created and checked
            when it is loaded. Leave it alone.

    Raises:
        ValueError: an option has a value that is not allowed; the message names the option, the value and what is.
    """

    num_text_prompts: int = field(default=6, metadata={"help": "Prompts of the text tower, 0 leaves it alone."})
    num_vision_prompts: int = field(default=16, metadata={"help": "Prompts of the image tower, 0 leaves it alone."})
    text_layers: list[int] | None = field(
        default=None, metadata={"help": "Text layers before which prompts are fused; None: all after start_layer."}
    )
    vision_layers: list[int] | None = field(
        default=None, metadata={"help": "Image layers before which prompts are fused; None: all after start_layer."}
    )
    start_layer: int | dict[str, int] = field(
        default=0, metadata={"help": "The layer before which the prompts enter, for both towers or by tower."}
    )
    fusion: Literal["attention", "independent", "none"] = field(
        default="attention",
        metadata={
            "help": "'attention' fuses prompts with tokens, 'independent' learns them, 'none' leaves them shallow."
        },
    )
    fusion_tokens: Literal["selected", "random", "mean", "noise"] = field(
        default="selected", metadata={"help": "What fusions read: 'selected', 'random', 'mean' or 'noise'."}
    )
    fusion_rank: int | None = field(
        default=4, metadata={"help": "Rank of the fusion's projections; None for full width."}
    )
    fusion_hidden_size: int = field(default=32, metadata={"help": "Width of the fusion's MLP."})
    share_fusion: bool = field(default=False, metadata={"help": "One fusion module for all layers of a tower."})
    frozen_weight: float = field(
        default=0.5, metadata={"help": "Share of the frozen embedding in the mix, 0 <= frozen_weight < 1."}
    )
    batch_coupled: bool = field(
        default=False, metadata={"help": "Couple the inputs of a batch as the released code does."}
    )
    architecture: dict | None = field(
        default=None, metadata={"help": "Spec of a model that the package does not know; None: by model type."}
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Paths of the towers to adapt; None for all towers of the model type."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save with the adapter."}
    )
    base_architecture: dict | None = field(
        default=None, metadata={"help": "The towers this adapter fits; filled in by sep_peft."}
    )

    def __post_init__(self):
        if self.task_type is not None:
            raise ValueError(
                f"task_type must be None, but got {shown(self.task_type)}: SEP adapts both towers of a dual encoder, "
                "while PEFT's task types wrap models of another call signature. Leave task_type out."
            )
        super().__post_init__()
        self.peft_type = peft_type()
        # What the adapter's file asks for. No field, so that it is neither saved nor compared, while base_architecture
        # is filled in for each model.
        self.made_for = self.base_architecture
        self.weights_origin: WeightsOrigin | None = None  # no field for the same reason
        for name in ("num_text_prompts", "num_vision_prompts"):
            self._require(name, lambda v: _is_int(v) and v >= 0, "an integer of at least 0")
        if self.num_text_prompts == 0 and self.num_vision_prompts == 0:
            raise ValueError("num_text_prompts and num_vision_prompts must not both be 0: nothing would be adapted.")
        fusions = ("attention", "independent", "none")
        self._require("fusion", lambda v: v in fusions, '"attention", "independent" or "none"')
        sources = ("selected", "random", "mean", "noise")
        self._require("fusion_tokens", lambda v: v in sources, '"selected", "random", "mean" or "noise"')
        self._require("fusion_rank", lambda v: v is None or (_is_int(v) and v >= 1), "None or an integer of at least 1")
        self._require("fusion_hidden_size", lambda v: _is_int(v) and v >= 1, "an integer of at least 1")
        for name in ("share_fusion", "batch_coupled", "inference_mode"):
            self._require(name, lambda v: isinstance(v, bool), "True or False")
        self._require(
            "frozen_weight",
            lambda v: (_is_int(v) or isinstance(v, float)) and 0 <= v < 1,
            "a number of at least 0 and below 1",
        )
        self._require("base_architecture", lambda v: v is None or isinstance(v, dict), "None or a dict")
        self._settle_start_layer()
        for modality in MODALITIES:
            self._check_layers(modality)
        for name in ("target_modules", "modules_to_save"):
            self._check_names(name)
        if self.architecture is not None:
            # read and written back: a spec with a mistake is found here, and what is saved is plain JSON
            self.architecture = Architecture.from_dict(self.architecture).to_dict()
        self._settle_unused_options()
        if self.batch_coupled and self.fusion_tokens != "selected":
            raise ValueError(
                f'fusion_tokens must be "selected" with batch_coupled=True, as the released code has it, but got '
                f"{self.fusion_tokens!r}."
            )

    @classmethod
    def published(cls, **overrides) -> SEPConfig:
        """The setting of the paper: full-width fusions, one of its own for each layer.

        Args:
            overrides: options that differ; with ``fusion="independent"`` or "none" those of fusions stay unset.
        """
        return cls._setting(PUBLISHED, overrides)

    @classmethod
    def compact(cls, **overrides) -> SEPConfig:
        """A setting of a fifteenth of the default's size: one fusion of rank 4 for all layers of a tower.

        Args:
            overrides: options that differ; with ``fusion="independent"`` or "none" those of fusions stay unset.
        """
        return cls._setting(COMPACT, overrides)

    @classmethod
    def retrieval(cls, **overrides) -> SEPConfig:
        """For finding images by images: image prompts alone, so that texts are embedded as the frozen model has them.

        Args:
            overrides: options that differ.
        """
        return cls._setting({"num_text_prompts": 0, "num_vision_prompts": 4}, overrides)

    @classmethod
    def _setting(cls, options: dict, overrides: dict) -> SEPConfig:
        unused = UNUSED_OPTIONS.get(str(overrides.get("fusion")), ())
        options = {name: value for name, value in options.items() if name not in unused}
        return cls(**(options | overrides))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs) -> PeftConfig:
        """Load a configuration; in a local folder, the weights beside it are checked to be whole as well.

        It is one of another class where the file is that of another method, as in PEFT.

        Raises:
            ValueError: the configuration is missing or damaged, or an option has a value that is not allowed; the
                message names the file.
            SafetensorError: the weights are cut short; the message names the file.
        """
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except JSONFileError:
            raise
        except ValueError as error:
            file = os.path.join(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
            raise ValueError(f"{file}: {error}") from error
        check_folder(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        if isinstance(config, cls):  # PEFT gives the configuration of the method that the file names
            hub_options, _, _ = cls._split_kwargs(kwargs)
            options, frozen = config._options(), config.inference_mode
            path = os.fspath(pretrained_model_name_or_path)
            config.weights_origin = WeightsOrigin(path, subfolder, hub_options, options, frozen)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs) -> dict[str, Any]:
        """The options in a file, which `from_pretrained` reads by this.

        Raises:
            ValueError: the file is no JSON object within the bounds of `read_json`, or a key cannot be an option's.
        """
        options = read_json(path_json_file)
        options.pop("runtime_config", None)  # as PEFT does: it is never read from a file
        if taken := sorted({"cls", "self"} & set(options)):  # PEFT passes all of them by name
            raise ValueError(f"{os.fspath(path_json_file)} must not have the key {taken[0]!r}: no option is called so.")
        return options

    @classmethod
    def of_adapter(cls, path: str, subfolder: str | None = None, **hub_options) -> SEPConfig:
        """The configuration of a SEP adapter; unlike `from_pretrained` it refuses one of another method.

        Args:
            path: a folder, or the id of a repository on the Hub.
            subfolder: below `path`.
            hub_options: keyword arguments of `hf_hub_download`.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: there is no configuration, it is damaged or that of another method, or an option has a value
                that is not allowed.
            SafetensorError: the weights are cut short; the message names the file.
        """
        try:
            file = find_file(path, CONFIG_NAME, subfolder, hub_options)
            found = os.path.isfile(file)
        except RemoteEntryNotFoundError:
            file, found = "/".join(filter(None, (path, subfolder, CONFIG_NAME))), False
        if not found:
            raise ValueError(f"{file} does not exist, so this is no adapter. Pass the folder that holds it.")
        method = cls.from_json_file(file).get("peft_type")
        if method != METHOD:
            known = isinstance(method, str) and method in PeftType.__members__
            described = f"the method {method}" if known else "a method that PEFT does not know"
            raise ValueError(f"{path} holds an adapter of {described}, but SEP is needed.")
        return cast(SEPConfig, cls.from_pretrained(path, subfolder=subfolder, **hub_options))

    def take_weights_origin(self) -> WeightsOrigin | None:
        """Where the weights for this configuration lie, asked for once.

        None where it was not read from a file, or an option has changed since: then it is that of a new adapter.
        """
        origin, self.weights_origin = self.weights_origin, None
        return origin if origin is not None and origin.options == self._options() else None

    def _options(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name not in FILLED_IN}

    def layers_of(self, modality: str) -> list[int] | None:
        """`text_layers` or `vision_layers`."""
        return {"text": self.text_layers, "vision": self.vision_layers}[modality]

    def prompts_of(self, modality: str) -> int:
        """`num_text_prompts` or `num_vision_prompts`."""
        return {"text": self.num_text_prompts, "vision": self.num_vision_prompts}[modality]

    def start_layer_of(self, modality: str) -> int:
        """`start_layer` of the "text" or "vision" tower."""
        return self.start_layer[modality] if isinstance(self.start_layer, dict) else self.start_layer

    def _require(self, name: str, allowed, description: str) -> None:
        value = getattr(self, name)
        if not allowed(value):
            raise ValueError(f"{name} must be {description}, but got {shown(value)}.")

    def _settle_start_layer(self) -> None:
        """Check it; what is the same for both towers becomes one number."""
        if not isinstance(self.start_layer, dict):
            description = 'an integer of at least 0, or one for each tower as in {"text": 9, "vision": 18}'
            self._require("start_layer", lambda v: _is_int(v) and v >= 0, description)
            return
        if not self.start_layer or not set(self.start_layer) <= set(MODALITIES):
            raise ValueError(
                f'start_layer must name the towers "text" and "vision", but got {shown(self.start_layer)}.'
            )
        for modality, value in self.start_layer.items():
            if not _is_int(value) or value < 0:
                raise ValueError(
                    f"start_layer must be an integer of at least 0 for the {modality} tower, but got {shown(value)}."
                )
        starts = {modality: self.start_layer.get(modality, 0) for modality in MODALITIES}
        self.start_layer = starts if len(set(starts.values())) > 1 else starts[MODALITIES[0]]

    def _check_layers(self, modality: str) -> None:
        name, layers, start = f"{modality}_layers", self.layers_of(modality), self.start_layer_of(modality)
        if layers is None:
            return
        if not isinstance(layers, (list, tuple, range)) or not all(_is_int(i) and i >= 0 for i in layers):
            raise ValueError(f"{name} must be None or a list of layer indices of at least 0, but got {shown(layers)}.")
        if len(set(layers)) != len(layers):
            raise ValueError(f"{name} must name each layer once, but got {shown(list(layers))}.")
        if any(i <= start for i in layers):
            raise ValueError(
                f"{name} must be indices above start_layer={start}, where the prompts enter, but got "
                f"{shown(list(layers))}."
            )
        setattr(self, name, sorted(layers))

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        is_list = isinstance(value, (list, tuple, set))
        if not is_list or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name} must be None or a list of module names, but got {shown(value)}.")
        if name == "modules_to_save" and "" in value:  # which PEFT takes for every module
            raise ValueError(f"modules_to_save must name modules, but got an empty name in {shown(list(value))}.")
        setattr(self, name, sorted(value) if isinstance(value, set) else list(value))

    def _settle_unused_options(self) -> None:
        """An option that would be read and ignored is an error; a file may hold an earlier default: it is dropped."""
        for name in UNUSED_OPTIONS.get(self.fusion, ()):
            value, unset = getattr(self, name), self.__dataclass_fields__[name].default
            if self.made_for is not None:
                setattr(self, name, unset)
            elif value != unset:
                raise ValueError(
                    f'{name} must be left at {unset!r} with fusion="{self.fusion}", but got {shown(value)}.'
                )
