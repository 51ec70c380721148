"""`Descriptions`: texts of one's own about each class, for the frozen branch of the text tower.

Source: Pratt et al., "What does a platypus look like? Generating customized prompts for zero-shot image classification"
(CuPL), arXiv 2209.03320.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..tuner.messages import listed, shown
from ..words import counted
from .tokenized import check_inputs, check_text, to_lists, to_tensors


@dataclass(frozen=True)
class Descriptions:
    """T texts about C classes.

    Args:
        texts: for each class its texts; some classes may have none.
        inputs: all of them tokenized, class by class, tensors (T, L).

    Raises:
        ValueError: no text at all, one that is blank, too long or not held by UTF-8, or tensors of other texts.
    """

    texts: tuple[tuple[str, ...], ...]
    inputs: dict[str, torch.Tensor]

    def __post_init__(self):
        for text in (text for of_class in self.texts for text in of_class):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"A description must be a text that is not blank, but got {shown(text)}.")
            check_text(text, "A description")
        if not any(self.texts):
            raise ValueError("descriptions hold no text. Leave them out, or describe a class.")
        check_inputs(self.inputs, len(self.owners))

    @classmethod
    def of_names(
        cls,
        descriptions: Mapping[str, Sequence[str]],
        names: Sequence[str],
        tokenize: Callable[[list[str]], dict[str, torch.Tensor]],
    ) -> Descriptions:
        """
        Args:
            descriptions: class name -> its texts.
            names: of the C classes, in their order.
            tokenize: T texts -> tensors (T, L).

        Raises:
            ValueError: no mapping of lists, or a name that is no class; and as the class.
        """
        if not isinstance(descriptions, Mapping):
            raise ValueError(f"descriptions must map class names to lists of texts, but got {shown(descriptions)}.")
        if unknown := [name for name in descriptions if name not in names]:
            raise ValueError(f"descriptions are of {listed(unknown)}, but the classes are {listed(names)}.")
        for name, of_class in descriptions.items():
            if not isinstance(of_class, (list, tuple)) or not of_class:
                raise ValueError(f"Descriptions of {shown(name)} must be a list of texts, but got {shown(of_class)}.")
        texts = tuple(tuple(descriptions.get(name, ())) for name in names)
        flat = [text for of_class in texts for text in of_class]
        proper = all(isinstance(text, str) and text.strip() for text in flat) and flat
        return cls(texts, tokenize(flat) if proper else {})

    @property
    def owners(self) -> list[int]:
        """The class of each text, T indices."""
        return [place for place, of_class in enumerate(self.texts) for _ in of_class]

    def only(self, rows: Sequence[int]) -> Descriptions | None:
        """Those of some classes, in the order of their indices `rows`; None where these have none."""
        texts = tuple(self.texts[row] for row in rows)
        if not any(texts):
            return None
        places_of: list[list[int]] = [[] for _ in self.texts]
        for place, owner in enumerate(self.owners):
            places_of[owner].append(place)
        places = [place for row in rows for place in places_of[row]]
        return Descriptions(texts, {name: tensor[places] for name, tensor in self.inputs.items()})

    def check_classes(self, names: Sequence[str], with_templates: bool) -> None:
        """
        Raises:
            ValueError: they are of another number of classes than `names`, or one without a template has none.
        """
        if len(self.texts) != len(names):
            raise ValueError(
                f"There are descriptions of {counted(len(self.texts), 'class', 'classes')} for "
                f"{counted(len(names), 'class name')}."
            )
        bare = [name for name, of_class in zip(names, self.texts, strict=True) if not of_class]
        if bare and not with_templates:
            raise ValueError(f"Without a template every class needs a description, but {listed(bare)} have none.")

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {"texts": [list(of_class) for of_class in self.texts], "inputs": to_lists(self.inputs)}

    @classmethod
    def from_json(cls, data: Any) -> Descriptions:
        """The inverse of `to_json`.

        Raises:
            ValueError: an entry is missing, or is not what `to_json` writes there.
        """
        if not isinstance(data, Mapping) or set(data) != {"texts", "inputs"}:
            raise ValueError(f"descriptions of the class list must have texts and inputs, but got {shown(data)}.")
        if not isinstance(data["texts"], list) or not all(isinstance(of_class, list) for of_class in data["texts"]):
            raise ValueError(f"texts of descriptions must be lists of texts, but got {shown(data['texts'])}.")
        return cls(tuple(map(tuple, data["texts"])), to_tensors(data["inputs"], "inputs of descriptions"))
