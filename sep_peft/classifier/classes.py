"""The classes of a task: their names, what the two branches of the text tower read, and how both are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..tracing import is_traced


#: What the prompted branch reads: the bare class name, as published.
CLASS_TEMPLATE = "{}."
#: What the frozen branch reads unless told otherwise.
TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class TaskClasses:
    """C classes with their tokenized texts.

    Args:
        class_inputs: tokenized class names for the prompted branch, tensors (C, L).
        template_inputs: tokenized templates for the frozen branch, one dict a template; several are averaged. Empty:
            the frozen branch reads `class_inputs`.
        names: C labels, as predictions show them.
        templates: the template texts, where the classes were made from names.
        prototypes: (C, E), one trained vector a class that takes part in predictions; None: texts alone predict.
        prototype_logit_weight: weight of the prototypes' logits beside those of the texts.
        zero_shot_margin: zero-shot decides each image unless SEP is more than so many times as confident; 0: SEP
            decides alone. `ZERO_SHOT_MARGIN` suits classes that the adapter was not trained on.
        new_class_margin: the margin for classes that take the place of these, of the recipe that the adapter was
            trained by; None: not known.

    Raises:
        ValueError: no classes, two of one name, tensors whose first dimensions differ, or prototypes of another number,
            with a value that is not finite, or without a weight above 0, or a margin below 0 or not finite.
    """

    class_inputs: dict[str, torch.Tensor]
    template_inputs: tuple[dict[str, torch.Tensor], ...] = ()
    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = field(default=())
    prototypes: torch.Tensor | None = None
    prototype_logit_weight: float = 0.0
    zero_shot_margin: float = 0.0
    new_class_margin: float | None = None

    def __post_init__(self):
        count = len(self.class_inputs["input_ids"]) if "input_ids" in self.class_inputs else 0
        if count == 0:
            raise ValueError("class_inputs must hold input_ids of at least one class, but it is empty.")
        for inputs in (self.class_inputs, *self.template_inputs):
            for key, value in inputs.items():
                if value.ndim != 2 or len(value) != count:
                    raise ValueError(f"{key} must have shape ({count}, tokens), but got {tuple(value.shape)}.")
        if not self.names:
            object.__setattr__(self, "names", tuple(f"class {i}" for i in range(count)))
        check_class_names(self.names)
        if len(self.names) != count:
            raise ValueError(f"There are {len(self.names)} class names for {count} texts of class_inputs.")
        for name in ("zero_shot_margin", "new_class_margin"):
            margin = getattr(self, name)
            if margin is not None and not 0 <= margin < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, but got {margin!r}.")
        if self.prototypes is not None:
            self._check_prototypes()

    def _check_prototypes(self) -> None:
        shape = tuple(self.prototypes.shape)
        if len(shape) != 2 or shape[0] != len(self):
            raise ValueError(f"prototypes must have shape ({len(self)}, embedding size), but got {shape}.")
        if not self.prototypes.isfinite().all():
            raise ValueError("prototypes must be finite, but some values are not. Train with a lower learning rate.")
        weight = self.prototype_logit_weight
        if not 0 < weight < float("inf"):
            raise ValueError(f"prototype_logit_weight must be above 0 and finite, but got {weight!r}.")

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def from_names(
        cls, names: Sequence[str], tokenizer, template: str | Sequence[str] = TEMPLATE, **padding
    ) -> TaskClasses:
        """Tokenize class names for both branches; underscores in names are read as spaces.

        Args:
            names: C class names.
            tokenizer: a tokenizer of transformers, or a processor that has one.
            template: text for the frozen branch with ``{}`` in place of the name, or several to average.
            padding: how the tokenizer pads; to the longest text unless told otherwise.

        Raises:
            ValueError: no names, a name twice, or a template without ``{}``.
        """
        names = names if isinstance(names, str) else list(names)
        check_class_names(names)
        templates = [template] if isinstance(template, str) else list(template)
        for text in templates:
            if text.count("{}") != 1:
                raise ValueError(f"A template must contain {{}} once, in place of the class name, but got {text!r}.")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)

        def tokenize(text: str) -> dict[str, torch.Tensor]:
            spoken = [text.replace("{}", name.replace("_", " ")) for name in names]
            encoded = tokenizer(spoken, return_tensors="pt", **({"padding": True} | padding))
            return {key: encoded[key] for key in ("input_ids", "attention_mask") if key in encoded}

        return cls(tokenize(CLASS_TEMPLATE), tuple(map(tokenize, templates)), tuple(names), tuple(templates))

    def to_json(self) -> dict[str, Any]:
        """Plain lists, so that loading needs no tokenizer. The prototypes have a file of their own."""
        return {
            "names": list(self.names),
            "templates": list(self.templates),
            "class_inputs": _to_lists(self.class_inputs),
            "template_inputs": [_to_lists(inputs) for inputs in self.template_inputs],
            "prototype_logit_weight": self.prototype_logit_weight,
            "zero_shot_margin": self.zero_shot_margin,
            "new_class_margin": self.new_class_margin,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], prototypes: torch.Tensor | None = None) -> TaskClasses:
        """The inverse of `to_json`.

        Args:
            data: what `to_json` gave.
            prototypes: (C, E), where there are any.

        Raises:
            ValueError: an entry is missing.
        """
        if missing := [key for key in ("names", "templates", "class_inputs", "template_inputs") if key not in data]:
            raise ValueError(f"The class list lacks {', '.join(missing)}.")
        return cls(
            _to_tensors(data["class_inputs"]),
            tuple(map(_to_tensors, data["template_inputs"])),
            tuple(data["names"]),
            tuple(data["templates"]),
            prototypes,
            0.0 if prototypes is None else data["prototype_logit_weight"],
            data.get("zero_shot_margin", 0.0),
            data.get("new_class_margin"),
        )


def check_labels(labels: torch.Tensor, count: int) -> None:
    """
    Raises:
        ValueError: one of `labels` (B,) is no index of `count` classes.
    """
    if is_traced():
        return  # a branch on data would break the graph; cross entropy checks the range as well
    wrong = labels[(labels < 0) | (labels >= count)]
    if len(wrong):
        raise ValueError(
            f"Labels must be between 0 and {count - 1} for {count} classes, but got {sorted(set(wrong.tolist()))}."
        )


def check_class_names(names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: `names` is a single string, is empty, holds something else than text, or one name twice.
    """
    if isinstance(names, str):
        raise ValueError(f"Class names must be a list of names, but got the single string {names!r}.")
    if not names:
        raise ValueError("The class list is empty; at least one class name is needed.")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"A class name must be a text that is not blank, but got {name!r}.")
    if duplicates := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"Class names must differ, but these occur more than once: {', '.join(duplicates)}.")


def _to_lists(inputs: dict[str, torch.Tensor]) -> dict[str, list]:
    return {key: value.tolist() for key, value in inputs.items()}


def _to_tensors(lists: Mapping[str, list]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(value, dtype=torch.long) for key, value in lists.items()}
