"""`PrintableCard`: a model card whose metadata do nothing but show themselves, whoever wrote them."""

from __future__ import annotations

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..tuner.messages import acts


class PrintableCardData(ModelCardData):
    """Metadata of a card in which characters that act, such as one that turns the direction of writing, are escapes.

    They are those of YAML, so that what is read is what was written.
    """

    def to_yaml(self, line_break: str | None = None, *args, **kwargs) -> str:
        text = super().to_yaml(line_break, *args, **kwargs)
        if not any(map(_acts, text)):
            return text
        options = {"Dumper": _Quoting, "sort_keys": False, "allow_unicode": True, "line_break": line_break}
        text = yaml.dump(self.to_dict(), stream=None, **options).strip()
        return "".join(_escape(character) if _acts(character) else character for character in text)


class PrintableCard(ModelCard):
    """A model card with such metadata."""

    card_data_class = PrintableCardData  # pyright: ignore[reportAssignmentType]


class _Quoting(yaml.SafeDumper):
    """Writes texts with characters that act between double quotes, where YAML reads escapes."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if any(map(acts, text)) else None)


_Quoting.add_representer(str, _represent)


def _acts(character: str) -> bool:
    """Whether it acts; the ends of YAML's own lines do not."""
    return acts(character) and character not in "\r\n"


def _escape(character: str) -> str:
    """What YAML reads as the character, of those that PyYAML writes as they are."""
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
