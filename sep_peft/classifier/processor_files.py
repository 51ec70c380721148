"""The processor in an adapter's folder, so that the folder alone says what an image and a text become.

It is saved where it is asked for: the tokenizer of CLIP takes 3.6 MB, four times as much as an adapter.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from ..tuner.messages import listed


TOKENIZER_CONFIG = "tokenizer_config.json"
#: Every file that a processor of the models that SEP knows may write.
PROCESSOR_FILES = (
    PROCESSOR_NAME,
    IMAGE_PROCESSOR_NAME,
    TOKENIZER_CONFIG,
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *(
        "spiece.model",
        "sentencepiece.bpe.model",
        "tokenizer.model",
        "video_preprocessor_config.json",
        "chat_template.jinja",
    ),
)
#: What a tokenizer's configuration tells of the machine that it was loaded on.
LOCAL_KEYS = ("is_local", "local_files_only", "name_or_path")


def processor_to_save(processor: Any, wanted: bool) -> Any:
    """The processor if it is to be saved, else None.

    Raises:
        ValueError: it is none that can be saved with an adapter.
    """
    if wanted:
        check_processor(processor)
    return processor if wanted else None


def check_processor(processor: Any) -> None:
    """
    Raises:
        ValueError: it is none that can be saved with an adapter.
    """
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            "There is no processor of transformers to save with the adapter, with a tokenizer and an image processor. "
            "Pass processor=AutoProcessor.from_pretrained(...), or leave out save_processor (--save-processor)."
        )


def write_processor(processor: Any, folder: str | os.PathLike) -> None:
    """Write a processor's files, which tell nothing of this machine.

    Args:
        processor: of transformers, with a tokenizer and an image processor.
        folder: that exists.

    Raises:
        ValueError: it is no such processor, or one that writes other files, such as code.
    """
    check_processor(processor)
    with tempfile.TemporaryDirectory() as temporary:
        processor.save_pretrained(temporary)
        names = [
            path.relative_to(temporary).as_posix() for path in sorted(Path(temporary).rglob("*")) if path.is_file()
        ]
        if others := set(names) - set(PROCESSOR_FILES):
            raise ValueError(
                f"{type(processor).__name__} writes {listed(sorted(others))}, which is no file of a processor that SEP "
                "knows. Save it yourself: processor.save_pretrained(folder)."
            )
        config = Path(temporary, TOKENIZER_CONFIG)
        if config.is_file():
            data = json.loads(config.read_text(encoding="utf-8"))
            kept = {key: value for key, value in data.items() if key not in LOCAL_KEYS}
            config.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name in names:
            shutil.copy(Path(temporary, name), Path(folder, name))
