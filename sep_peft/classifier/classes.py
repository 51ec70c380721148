"""The classes of a task: their names, what the two branches of the text tower read, and how both are stored."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..method.heads import ClassHead, check_logit_weight
from ..tuner.messages import listed, shown
from ..words import are, counted
from .calibration import Calibration, is_number
from .descriptions import Descriptions
from .label_calibration import LabelCalibration
from .label_training import KeptSigmoids
from .tokenized import check_inputs, check_text, to_lists, to_tensors, token_rows


#: What the prompted branch reads: the bare class name, as published.
CLASS_TEMPLATE = "{}."
#: `new_class_margin` of class files that name none: what the package's recipe said when they were written.
UNNAMED_MARGIN = 1.5
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
        calibration: how their logits become scores; None: as they are.
        head: another head than prototypes that takes part in predictions; None: there is none.
        descriptions: texts about each class that the frozen branch reads beside the templates; None: there are none.
        multi_label: whether an image may have several of the classes, or none.
        sigmoids: what makes logits into log odds where an image may have several of the classes and there is no
            calibration, as training left it; None: logits are as they are.

    Raises:
        ValueError: no classes, two whose names read alike, tensors that hold no ids, texts without a token, or whose
            first dimensions differ, or prototypes of another number, with a value that is not finite, or without a
            weight above 0, a margin below 0 or not finite, a head of other classes or beside prototypes, or of several
            labels an image a margin, a head that knows one, a calibration of the other kind, or sigmoids of others.
    """

    class_inputs: dict[str, torch.Tensor]
    template_inputs: tuple[dict[str, torch.Tensor], ...] = ()
    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = field(default=())
    prototypes: torch.Tensor | None = None
    prototype_logit_weight: float = 0.0
    zero_shot_margin: float = 0.0
    new_class_margin: float | None = None
    calibration: Calibration | LabelCalibration | None = None
    head: ClassHead | None = None
    descriptions: Descriptions | None = None
    multi_label: bool = False
    sigmoids: KeptSigmoids | None = None

    def __post_init__(self):
        count = len(self.class_inputs["input_ids"]) if "input_ids" in self.class_inputs else 0
        if count == 0:
            raise ValueError("class_inputs must hold input_ids of at least one class, but it is empty.")
        for inputs in self._inputs:
            check_inputs(inputs, count)
        if not self.names:
            object.__setattr__(self, "names", tuple(f"class {i}" for i in range(count)))
        check_class_names(self.names)
        if len(self.names) != count:
            names = counted(len(self.names), "class name")
            raise ValueError(f"There {are(len(self.names))} {names} for {counted(count, 'text')} of class_inputs.")
        if self.templates:
            check_templates(self.templates)
        if self.descriptions is not None:
            self.descriptions.check_classes(self.names, bool(self.template_inputs))
        for name in ("zero_shot_margin", "new_class_margin"):
            margin = getattr(self, name)
            if margin is not None and not (is_number(margin) and 0 <= margin < float("inf")):
                raise ValueError(f"{name} must be at least 0 and finite, but got {shown(margin)}.")
        if self.prototypes is not None:
            self._check_prototypes(self.prototypes)
        if self.head is not None:
            self.head.check_classes(count)
            if self.prototypes is not None:
                raise ValueError(f"Prototypes and a {self.head.kind} head cannot both predict. Keep one of them.")
        self._check_labels(count)

    def _check_labels(self, count: int) -> None:
        """
        Raises:
            ValueError: what is for classes of which an image has one comes with several labels an image, or the other
                way round.
        """
        if not isinstance(self.multi_label, bool):
            raise ValueError(f"multi_label must be True or False, but got {shown(self.multi_label)}.")
        if self.calibration is not None and isinstance(self.calibration, LabelCalibration) != self.multi_label:
            kind = type(self.calibration).__name__
            raise ValueError(f"A {kind} does not fit classes with multi_label={self.multi_label}.")
        if self.calibration is not None:
            self.calibration.check_classes(count)
        if self.multi_label and self.zero_shot_margin:
            raise ValueError(
                "zero_shot_margin compares classes of which an image has one, but these have multi_label=True. Pass 0."
            )
        if self.multi_label and self.head is not None:
            raise ValueError(f"A {self.head.kind} head tells one class an image, but these have multi_label=True.")
        if self.sigmoids is not None and not self.multi_label:
            raise ValueError("sigmoids are for classes of which an image may have several, but these have one.")
        if self.sigmoids is not None and len(self.sigmoids.biases) != count:
            raise ValueError(
                f"The sigmoids have the biases of {counted(len(self.sigmoids.biases), 'class', 'classes')}, but there "
                f"{are(count)} {count}."
            )

    def _check_prototypes(self, prototypes: torch.Tensor) -> None:
        shape = tuple(prototypes.shape)
        if len(shape) != 2 or shape[0] != len(self):
            raise ValueError(f"prototypes must have shape ({len(self)}, embedding size), but got {shape}.")
        if not prototypes.is_floating_point():
            raise ValueError(f"prototypes must be floats, but got {prototypes.dtype}.")
        if not prototypes.isfinite().all():
            raise ValueError("prototypes must be finite, but some values are not. Train with a lower learning rate.")
        check_logit_weight(self.prototype_logit_weight, "prototype_logit_weight")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def description_texts(self) -> tuple[tuple[str, ...], ...]:
        """The descriptions of each class; () where there are none."""
        return () if self.descriptions is None else self.descriptions.texts

    @classmethod
    def from_names(
        cls,
        names: Sequence[str],
        tokenizer,
        template: str | Sequence[str] = TEMPLATE,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        multi_label: bool = False,
        **padding,
    ) -> TaskClasses:
        """Tokenize class names for both branches; underscores in names are read as spaces.

        A warning names classes whose tokens are the same, such as ``Cat`` and ``cat`` in lower-case vocabularies: they
        always get the same score.

        Args:
            names: C class names.
            tokenizer: a tokenizer of transformers, or a processor that has one.
            template: text for the frozen branch with ``{}`` in place of the name, or several to average; an empty list
                where descriptions stand alone.
            descriptions: class name -> texts about it, such as "a cat has whiskers", for the frozen branch as well. All
                texts of a class count alike in the mean of their embeddings (CuPL, arXiv 2209.03320). None: templates
                alone.
            multi_label: whether an image may have several of the classes, or none.
            padding: how the tokenizer pads; to the longest text unless told otherwise.

        Raises:
            ValueError: no names, a name twice, two names that are the same text, a template without ``{}``, or
                descriptions of another class, none of a class without a template, or one that is blank.
        """
        names = names if isinstance(names, (str, bytes, Mapping)) or not isinstance(names, Iterable) else list(names)
        check_class_names(names)
        templates = [template] if isinstance(template, str) else template
        if templates or descriptions is None:
            check_templates(templates)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)

        def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
            encoded = tokenizer(texts, return_tensors="pt", **({"padding": True} | padding))
            return {key: encoded[key] for key in ("input_ids", "attention_mask") if key in encoded}

        def spoken(text: str) -> list[str]:
            return [text.replace("{}", name.replace("_", " ")) for name in names]

        described = None if descriptions is None else Descriptions.of_names(descriptions, names, tokenize)
        inputs = tokenize(spoken(CLASS_TEMPLATE)), tuple(tokenize(spoken(text)) for text in templates)
        classes = cls(*inputs, tuple(names), tuple(templates), descriptions=described, multi_label=multi_label)
        classes._warn_of_equal_texts()
        return classes

    def _warn_of_equal_texts(self) -> None:
        """Warn of classes that no image could tell apart."""
        described = (self.description_texts,) if self.description_texts else ()
        rows = zip(*map(token_rows, self._inputs), *described, strict=True)
        groups: dict[tuple, list[str]] = {}
        for name, row in zip(self.names, rows, strict=True):
            groups.setdefault(row, []).append(name)
        alike = [", ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
        if alike and self.prototypes is None:
            warnings.warn(
                f"These class names have the same tokens, so their scores will always be equal: {'; '.join(alike)}. "
                "Choose names that the tokenizer tells apart.",
                stacklevel=3,
            )

    def only(self, names: Sequence[str]) -> TaskClasses:
        """Some of these classes, in the order of `names`: their logits are what they are among all.

        Prototypes, head and margin stay theirs. The calibration is that of all; where classes are missing, it says
        nothing of images that belong to none, nor of sets.
        """
        rows = [self.names.index(name) for name in names]
        inputs, *templates = ({key: x[rows] for key, x in each.items()} for each in self._inputs)
        calibration = self.calibration
        if isinstance(calibration, Calibration) and len(rows) == len(self):
            calibration = calibration.in_order(rows)
        elif calibration is not None:
            calibration = calibration.for_some_classes(rows)
        return replace(
            self,
            class_inputs=inputs,
            template_inputs=tuple(templates),
            names=tuple(names),
            prototypes=None if self.prototypes is None else self.prototypes[rows],
            head=None if self.head is None else self.head.only(rows),
            descriptions=None if self.descriptions is None else self.descriptions.only(rows),
            calibration=calibration,
            sigmoids=None if self.sigmoids is None else self.sigmoids.only(rows),
        )

    @property
    def _inputs(self) -> tuple[dict[str, torch.Tensor], ...]:
        return (self.class_inputs, *self.template_inputs)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, so that loading needs no tokenizer. The prototypes have a file of their own."""
        return {
            "names": list(self.names),
            "templates": list(self.templates),
            "class_inputs": to_lists(self.class_inputs),
            "template_inputs": [to_lists(inputs) for inputs in self.template_inputs],
            "prototype_logit_weight": self.prototype_logit_weight,
            "zero_shot_margin": self.zero_shot_margin,
            "new_class_margin": self.new_class_margin,
            "calibration": self.calibration and self.calibration.to_json(),
            **({} if self.head is None else {"head": {"kind": self.head.kind, "logit_weight": self.head.logit_weight}}),
            **({} if self.descriptions is None else {"descriptions": self.descriptions.to_json()}),
            **({"multi_label": True} if self.multi_label else {}),
            **({} if self.sigmoids is None else {"sigmoids": self.sigmoids.to_json()}),
        }

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any],
        prototypes: torch.Tensor | None = None,
        head_tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> TaskClasses:
        """The inverse of `to_json`.

        Args:
            data: what `to_json` gave.
            prototypes: (C, E), where there are any.
            head_tensors: of the head, where there is one.

        Raises:
            ValueError: an entry is missing, or is not what `to_json` writes there.
        """
        if missing := [key for key in ("names", "templates", "class_inputs", "template_inputs") if key not in data]:
            raise ValueError(f"The class list lacks {', '.join(missing)}.")
        for key in ("names", "templates", "template_inputs"):
            if not isinstance(data[key], list):
                raise ValueError(f"{key} of the class list must be a list, but got {shown(data[key])}.")
        if prototypes is not None and "prototype_logit_weight" not in data:
            raise ValueError("The class list lacks prototype_logit_weight.")
        if not data["names"]:  # which would be made up
            raise ValueError("The class list is empty; at least one class name is needed.")
        calibration, multi_label = data.get("calibration"), data.get("multi_label", False)
        calibrations = LabelCalibration if multi_label else Calibration
        weight = data.get("prototype_logit_weight", 0.0)
        if not is_number(weight):
            raise ValueError(f"prototype_logit_weight of the class list must be a number, but got {shown(weight)}.")
        classes = cls(
            to_tensors(data["class_inputs"], "class_inputs"),
            tuple(to_tensors(inputs, "template_inputs") for inputs in data["template_inputs"]),
            tuple(data["names"]),
            tuple(data["templates"]),
            prototypes,
            0.0 if prototypes is None else weight,
            data.get("zero_shot_margin", 0.0),
            data.get("new_class_margin", UNNAMED_MARGIN),
            None if calibration is None else calibrations.from_json(calibration),
            None if head_tensors is None else _head_of(data.get("head"), head_tensors),
            Descriptions.from_json(data["descriptions"]) if "descriptions" in data else None,
            multi_label,
            KeptSigmoids.from_json(data["sigmoids"]) if "sigmoids" in data else None,
        )
        classes._warn_of_equal_texts()
        return classes


def _head_of(data: Any, tensors: Mapping[str, torch.Tensor]) -> ClassHead:
    """
    Raises:
        ValueError: what the class list says of its head is not what `TaskClasses.to_json` writes.
    """
    if not isinstance(data, Mapping) or not {"kind", "logit_weight"} <= set(data) or not isinstance(data["kind"], str):
        raise ValueError(f"head of the class list must have a kind and a logit_weight, but got {shown(data)}.")
    return ClassHead(data["kind"], dict(tensors), data["logit_weight"])


def check_class_names(names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: `names` is no sequence, is empty, holds something else than text, a name twice, also where only
            underscores and spaces tell two apart, or one that is too long or that UTF-8 cannot hold.
    """
    if isinstance(names, str):
        raise ValueError(f"Class names must be a list of names, but got the single string {shown(names)}.")
    if not isinstance(names, Sequence) or isinstance(names, bytes):
        raise ValueError(f"Class names must be a list of names, but got {shown(names)}.")
    if not names:
        raise ValueError("The class list is empty; at least one class name is needed.")
    for name in names:
        if not isinstance(name, str) or not name.replace("_", " ").strip():
            raise ValueError(f"A class name must be a text that is not blank, but got {shown(name)}.")
        check_text(name, "A class name")
    if duplicates := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"Class names must differ, but these occur more than once: {listed(duplicates)}.")
    spoken: dict[str, str] = {}
    for name in names:
        other = spoken.setdefault(" ".join(name.replace("_", " ").split()), name)
        if other != name:
            raise ValueError(
                "Class names must differ in more than underscores and spaces, which are read alike, but got "
                f"{shown(other)} and {shown(name)}."
            )


def check_templates(templates: Sequence[str]) -> None:
    """
    Raises:
        ValueError: `templates` is no list, is empty, or one of them is no text with ``{}`` once, is too long or
            cannot be held by UTF-8.
    """
    if not isinstance(templates, (list, tuple)) or not templates:
        raise ValueError(f"template must be a text or a list of texts, but got {shown(templates)}.")
    for text in templates:
        if not isinstance(text, str) or text.count("{}") != 1:
            raise ValueError(f"A template must contain {{}} once, in place of the class name, but got {shown(text)}.")
        check_text(text, "A template")
