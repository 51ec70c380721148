"""The parts of a processor of transformers."""

from __future__ import annotations


def processor_part(processor, part: str, kind: type, purpose: str):
    """A processor's part, or the processor where it is that part itself.

    Args:
        processor: of transformers, or None.
        part: name of the part, such as "tokenizer".
        kind: class of the part.
        purpose: what it is for, for the message.

    Raises:
        ValueError: there is none.
    """
    found = getattr(processor, part, processor)
    if not isinstance(found, kind):
        raise ValueError(
            f"This classifier has no processor {purpose}. Pass processor=AutoProcessor.from_pretrained(...)."
        )
    return found
