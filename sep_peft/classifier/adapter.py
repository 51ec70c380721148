"""`Adapter`: a model with an adapter and its processor, without a class list: to embed, to save and to load."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..tuner.config import SEPConfig
from .card import CardDetails
from .embeddings import embed_given_images, embed_given_texts
from .files import load_base, load_whitening, save_files
from .processor_files import processor_to_save
from .whitened import Whitening, check_whitening


class Adapter:
    """What needs no classes: embeddings of images and texts by the active adapter of a model, and its files.

    Args:
        model: a `PeftModel` with a SEP adapter.
        processor: of transformers, with a tokenizer and an image processor.
        whitening: of the adapter's image embeddings; None: it has none.

    Example:
        >>> adapter = Adapter.from_pretrained("my-adapter")
        >>> adapter.embed(["a.jpg", "b.jpg"]) @ adapter.embed_texts("a red dress")
    """

    def __init__(self, model: nn.Module, processor: Any, whitening: Whitening | None = None):
        self.model, self.processor, self.whitening = model, processor, whitening

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        model: nn.Module | None = None,
        processor: Any = None,
        subfolder: str | None = None,
        trust_remote_code: bool = False,
        **hub_options,
    ) -> Adapter:
        """Load an adapter, with or without a class list beside it, in evaluation.

        Args:
            path: a folder or the id of a repository on the Hub.
            model: the base model; None: the one that the adapter names, which is loaded with its processor.
            processor: None: where the base model is loaded, the one beside the adapter, else that of the base model.
            subfolder: below `path`.
            trust_remote_code: whether code that comes with the base model that the adapter names may run.
            hub_options: `revision`, `token`, `cache_dir` and so on, for the Hub.

        Raises:
            ValueError, OSError, AdapterMismatchError: as `SEPClassifier.from_pretrained`.
        """
        path = os.fspath(path)
        SEPConfig.of_adapter(path, subfolder, **hub_options)  # before PEFT reads it, whose errors name no file
        whitening = load_whitening(path, subfolder, hub_options)  # before the model is touched
        if model is None:
            model, found = load_base(path, subfolder, hub_options, trust_remote_code)
            processor = processor or found
        options = {"subfolder": subfolder, **hub_options}
        return cls(PeftModel.from_pretrained(model, path, **options).eval(), processor, whitening)  # pyright: ignore[reportArgumentType]

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        details: CardDetails | None = None,
        save_dtype: torch.dtype | None = None,
        *,
        save_processor: bool = False,
    ) -> None:
        """Save the active adapter and a model card; the class list of an adapter that was there is removed.

        Args:
            folder: where to; made where it is missing.
            details: for the model card.
            save_dtype: of the weights in the file; None: as they are.
            save_processor: as for `SEPClassifier.save_pretrained`.

        Raises:
            TypeError, ValueError: as `SEPClassifier.save_pretrained`.
        """
        saved = processor_to_save(self.processor, save_processor)
        save_files(self.model, None, folder, details or CardDetails(), save_dtype, self.whitening, processor=saved)

    def embed(self, images: Any, batch_size: int = 32, *, whiten: bool = False) -> torch.Tensor:
        """SEP's embeddings of images, (N, E), of unit length, on the CPU; for one image alone (E,).

        Args:
            images: as `SEPClassifier.predict` takes them.
            batch_size: images read and encoded at a time.
            whiten: by the adapter's whitening, to compare images with images alone.

        Raises:
            ValueError: an image cannot be read, there is none, `batch_size` is below 1, or the adapter has no
                whitening.
        """
        whitening = check_whitening(self.whitening) if whiten else None
        return embed_given_images(self.model, self.processor, images, batch_size, whitening=whitening)

    def embed_texts(self, texts: str | Sequence[str], *, truncate: bool = False) -> torch.Tensor:
        """SEP's embeddings of texts, (N, E), of unit length, on the CPU; for one text alone (E,).

        Args:
            texts: one, or N of them.
            truncate: cut texts of more tokens than `sep_peft.max_text_length` at their end, and warn of how many.

        Raises:
            TypeError: one is no text.
            ValueError: there is none, or one is blank or does not fit beside the prompts.
        """
        return embed_given_texts(self.model, self.processor, texts, None, truncate)
