"""What is known of an architecture: where its towers are and how they behave. The specs are in `table`.

Paths are dotted and relative to what the field says.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal


#: A name in a path: an identifier that is not private, or the index of a list.
_NAME = r"(?:(?!_)\w+)"
#: Longest path or name in a spec; those of modules in models have some forty characters.
MAX_PATH = 300
_PATH = re.compile(rf"{_NAME}(?:\.{_NAME})*", re.ASCII)
_STAGES = re.compile(rf"{_NAME}(?:\.(?:{_NAME}|\*))*", re.ASCII)
_IDENTIFIER = re.compile(r"(?!_|\d)\w+", re.ASCII)


@dataclass(frozen=True)
class TowerSpec:
    """One tower of a model.

    Attributes:
        path: the tower, below the model; empty where the model is the tower.
        layers: the list of encoder layers, below the tower. Where they come in stages, "*" stands for each stage in
            turn, and prompts do not pass between the stages but around.
        inputs: name of the tower's main argument. With "input_ids" its tokens are read as those of a text, from first
            to last, whichever tower it is.
        projection: what maps the pooled output into the joint space, below the model; None where the tower does, or
            where there is no joint space. It must be affine, because the mix happens before it
            (`frozen_share`), unless `mixes_after_projection`.
        pooling: what the model pools from the tower's output: its "pooler_output", the "first_token" of
            `last_hidden_state`, or the mean over its tokens after `leading_tokens`, padding left out ("mean_tokens").
        insert_at: index before which prompts stand; None appends them.
        causal: whether the masks that reach the layers contain causality.
        positions: the position-embedding module whose indices move up after the prompts, below the tower; None where
            prompts carry no position because there is no room for more.
        entry_embedding: a further embedding whose first vector is added to entering prompts, below the tower.
        entry_norm: the norm between embeddings and the first layer that prompts pass as well, below the tower.
        leading_tokens: tokens before the first patch, such as CLS.
        text_end: how the end of a text is found beside its attention mask: the first "eos" of the configuration, where
            an EOS of 2 stands for the highest id as in old CLIP configurations, the "first_eos" whatever its id, the
            "highest" id, or None.
        max_length_padding: texts are padded to the full length, and that padding counts.
        renamed_inputs: name of an input as processors give it -> name as the tower takes it.
        hidden_size: name of the tower's width in its configuration.
        refused: why this tower takes no prompts; None where it does.
        refused_options: option of the tower's configuration that may not be set -> why it takes no prompts then.
        needed_options: option of the tower's configuration that must be set -> why it takes no prompts otherwise.
        mixes_after_projection: the projection is not affine, so the mix happens after it (`SEPProjection`).
        pooler_repeats: with pooling="first_token", `pooler_output` is that token as well, so it takes the same mix.
        mask_input: name of the input that tells tokens (1) from padding (0).
        rotary: the module that makes the layers' `rotary_pos_emb` from hidden states, below the tower; prompts and
            tokens take positions in it. None where positions are not rotary.
        projected: output of the tower that is its projected pooled output, so that it takes the mix as well.
        unit_option: option of the tower's configuration by which its pooled output, and so the mix, has unit length.
        videos: it sees the frames of videos, several of which belong together, and no single images.
        reader: the module that stands between the tower and its projection and reads all tokens of the tower by cross
            attention, below the model. It makes one embedding per query, and each is mixed (`SEPReader`);
            `pooling` says nothing then.
        queries: the queries by which `reader` makes the embeddings, (1, Q, D), a parameter below the model.
        layer_tokens: tokens that each layer adds after all others by itself and takes out again.
        mlp_norm: the norm in front of the MLP, below an encoder layer, of a tower that pools one token: the first of an
            image, the end of a text as `text_end` says (where there is none, the first). Of the last layer's MLP that
            token alone is then computed where nothing else is asked for, so the MLP's result must be added to what the
            norm has read. None: all tokens are.

    Raises:
        ValueError: a field has a value that is not allowed, or needs another field; the message names the field, the
            value and what is allowed.
    """

    path: str
    layers: str
    inputs: Literal["input_ids", "pixel_values"]
    projection: str | None = None
    pooling: Literal["pooler_output", "first_token", "mean_tokens"] = "pooler_output"
    insert_at: int | None = None
    causal: bool = False
    positions: str | None = None
    entry_embedding: str | None = None
    entry_norm: str | None = None
    leading_tokens: int = 0
    text_end: Literal["eos", "first_eos", "highest"] | None = None
    max_length_padding: bool = False
    renamed_inputs: Mapping[str, str] = field(default_factory=dict)
    hidden_size: str = "hidden_size"
    refused: str | None = None
    refused_options: Mapping[str, str] = field(default_factory=dict)
    needed_options: Mapping[str, str] = field(default_factory=dict)
    mixes_after_projection: bool = False
    pooler_repeats: bool = False
    mask_input: str = "attention_mask"
    rotary: str | None = None
    projected: str | None = None
    unit_option: str | None = None
    layer_tokens: int = 0
    mlp_norm: str | None = None
    videos: bool = False
    reader: str | None = None
    queries: str | None = None

    def __post_init__(self):
        _check_fields(self, TOWER_FIELDS)
        if self.refused is None and not self.layers:
            raise ValueError("TowerSpec.layers must be the path of the encoder layers, but got ''.")
        if self.mixes_after_projection and self.projection is None:
            raise ValueError("TowerSpec.projection must be a path where mixes_after_projection is set, but got None.")
        if (self.reader is None) != (self.queries is None):
            raise ValueError(
                "TowerSpec.reader and TowerSpec.queries must be set together, but got "
                f"{self.reader!r} and {self.queries!r}."
            )

    @property
    def in_stages(self) -> bool:
        """Whether the layers come in stages; hidden states are then recorded between these, where no prompts are."""
        return "*" in self.layers


@dataclass(frozen=True)
class Architecture:
    """A model: its towers, and how its logits are scaled.

    Attributes:
        text, vision: the towers; None where the model has none. One that hears stands in the place of one that sees.
        logit_scale: the scale's parameter, below the model; None without joint space.
        scale: "exp": logits are ``exp(scale) * cosine``; "divide": ``cosine / scale``; "multiply": ``scale * cosine``.
        logit_bias: what is added to the logits, below the model; None for nothing.
        variants: name of a model class -> its architecture, where classes of one model type differ.
        max_scale: attribute of the model; the scale's parameter counts between 0 and it. None where it counts as it is.

    Raises:
        ValueError: a field has a value that is not allowed, or there is no tower; the message names the field, the
            value and what is allowed.
    """

    text: TowerSpec | None = None
    vision: TowerSpec | None = None
    logit_scale: str | None = "logit_scale"
    scale: Literal["exp", "divide", "multiply"] = "exp"
    logit_bias: str | None = None
    variants: Mapping[str, Architecture] = field(default_factory=dict)
    max_scale: str | None = None

    def __post_init__(self):
        _check_fields(self, ARCHITECTURE_FIELDS)
        if not self.towers:
            raise ValueError("Architecture needs a tower: text and vision must not both be None.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON without variants, to be saved with an adapter."""
        return {key: value for key, value in asdict(self).items() if key != "variants"}

    @classmethod
    def from_dict(cls, spec: Architecture | Mapping[str, Any]) -> Architecture:
        """The inverse of `to_dict`; takes an `Architecture` as it is.

        Raises:
            ValueError: the spec names something that does not exist, or lacks something; the message says what is
                known.
        """
        if isinstance(spec, Architecture):
            return spec
        if not isinstance(spec, Mapping):
            raise ValueError(f"architecture must be an Architecture or a dict, but got {reprlib.repr(spec)}.")
        towers = {
            name: _build(TowerSpec, name, spec[name]) for name in ("text", "vision") if spec.get(name) is not None
        }
        return _build(cls, "architecture", dict(spec) | towers)

    @property
    def towers(self) -> dict[str, TowerSpec]:
        """ "text" and "vision" -> the towers that there are."""
        return {name: spec for name, spec in (("text", self.text), ("vision", self.vision)) if spec is not None}


#: Field of a spec as adapter files of version 0.1 may have it -> its name.
RENAMED_FIELDS = {"pooled": "pooling", "mixes_behind_projection": "mixes_after_projection"}


def _build(cls: type, name: str, values: Mapping[str, Any]) -> Any:
    """An instance from a dict, or an error that says what the dict may hold."""
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a {cls.__name__} or a dict, but got {reprlib.repr(values)}.")
    values = {RENAMED_FIELDS.get(field, field): value for field, value in values.items()}
    known = [f.name for f in fields(cls)]
    unknown = [key if _is_text(key) and key.isidentifier() else reprlib.repr(key) for key in set(values) - set(known)]
    if unknown := sorted(map(str, unknown)):
        raise ValueError(f"{name} has no field {', '.join(unknown)}; it knows {', '.join(known)}.")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{name} lacks a field: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


# what fields may hold: a description and a test


@dataclass(frozen=True)
class _Allowed:
    description: str
    holds: Callable[[Any], bool]

    def or_none(self) -> _Allowed:
        return _Allowed(f"None or {self.description}", lambda value: value is None or self.holds(value))


def _written(pattern: re.Pattern, description: str) -> _Allowed:
    return _Allowed(description, lambda value: _is_written(value, pattern))


def _one_of(*values: str) -> _Allowed:
    return _Allowed("one of " + ", ".join(map(repr, values)), lambda value: isinstance(value, str) and value in values)


def _mapping(key: _Allowed, value: Callable[[Any], bool], description: str) -> _Allowed:
    return _Allowed(
        description,
        lambda found: isinstance(found, Mapping) and all(key.holds(k) and value(v) for k, v in found.items()),
    )


def _check_fields(spec: Any, allowed: Mapping[str, _Allowed]) -> None:
    """
    Raises:
        ValueError: a field holds what it may not.
    """
    for name, rule in allowed.items():
        value = getattr(spec, name)
        if not rule.holds(value):
            raise ValueError(f"{type(spec).__name__}.{name} must be {rule.description}, but got {reprlib.repr(value)}.")


def _is_written(value: Any, pattern: re.Pattern) -> bool:
    return isinstance(value, str) and len(value) <= MAX_PATH and pattern.fullmatch(value) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


_PLACE = _written(_PATH, "a dotted path of module names without leading underscores")
_OPTION = _written(_IDENTIFIER, "a name without leading underscore")
_FLAG = _Allowed("True or False", lambda value: isinstance(value, bool))
_COUNT = _Allowed(
    "an integer of at least 0", lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0
)
_REASONS = _mapping(_OPTION, _is_text, "a dict of option names and reasons")

#: Field of `TowerSpec` -> what it may hold.
TOWER_FIELDS = {
    "path": _Allowed(f"'' or {_PLACE.description}", lambda value: value == "" or _PLACE.holds(value)),
    "layers": _Allowed(
        'a dotted path of module names without leading underscores, "*" for stages',
        lambda value: value == "" or _is_written(value, _STAGES),
    ),
    "inputs": _one_of("input_ids", "pixel_values"),
    "pooling": _one_of("pooler_output", "first_token", "mean_tokens"),
    "text_end": _one_of("eos", "first_eos", "highest").or_none(),
    "insert_at": _COUNT.or_none(),
    **dict.fromkeys(("leading_tokens", "layer_tokens"), _COUNT),
    **dict.fromkeys(("causal", "max_length_padding", "mixes_after_projection", "pooler_repeats", "videos"), _FLAG),
    **dict.fromkeys(
        ("projection", "positions", "entry_embedding", "entry_norm", "rotary", "mlp_norm", "reader", "queries"),
        _PLACE.or_none(),
    ),
    **dict.fromkeys(("hidden_size", "mask_input"), _OPTION),
    **dict.fromkeys(("projected", "unit_option"), _OPTION.or_none()),
    "renamed_inputs": _mapping(_OPTION, _OPTION.holds, "a dict of names of inputs"),
    "refused": _Allowed("None or a reason", lambda value: value is None or _is_text(value)),
    **dict.fromkeys(("refused_options", "needed_options"), _REASONS),
}
_TOWER = _Allowed("None or a TowerSpec", lambda value: value is None or isinstance(value, TowerSpec))
#: Field of `Architecture` -> what it may hold.
ARCHITECTURE_FIELDS = {
    **dict.fromkeys(("text", "vision"), _TOWER),
    **dict.fromkeys(("logit_scale", "logit_bias"), _PLACE.or_none()),
    "scale": _one_of("exp", "divide", "multiply"),
    "variants": _mapping(
        _OPTION, lambda value: isinstance(value, Architecture), "a dict of class names and Architectures"
    ),
    "max_scale": _OPTION.or_none(),
}
