"""Numbers in sentences: "1 image", "2 images are"."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, such as "1 image" or "2 images".

    Args:
        number: how many.
        noun: in the singular; of several words the last one changes.
        plural: None: the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def are(number: int) -> str:
    """The verb after so many things: "is" of one, "are" of others."""
    return "is" if number == 1 else "are"
