"""What a classifier says of images and texts beside their classes: embeddings, to search and compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .embeddings import embed_given_images, embed_given_texts
from .tasks import Tasks
from .whitened import Whitening, check_whitening


class EmbeddingMixin:
    """Embeds by the active adapter of `model` or by that of a task."""

    model: nn.Module
    processor: Any
    tasks: Tasks
    whitening: Whitening | None

    def embed(
        self, images: Any, batch_size: int = 32, task: str | None = None, *, whiten: bool = False
    ) -> torch.Tensor:
        """SEP's embeddings of images, which compare with each other and with `embed_texts` by their product.

        Evaluation is used whatever the mode of the classifier; threads may embed at the same time. Classes, prototypes
        and calibration take no part.

        Args:
            images: as for `predict`.
            batch_size: images read and encoded at a time.
            task: whose adapter embeds; None: the active one.
            whiten: by the adapter's whitening, to compare images with images alone; see `fit_whitening`.

        Returns:
            (N, E), of unit length, in fp32 or wider, on the CPU; for one image alone (E,).

        Raises:
            ValueError: an image cannot be read, there is none, `batch_size` is below 1, there is no such task, or no
                whitening of its adapter.
        """
        whitening = check_whitening(self.whitening, task) if whiten else None
        adapter = None if task is None else self.tasks[task].adapter
        return embed_given_images(self.model, self.processor, images, batch_size, adapter, whitening)

    def embed_texts(
        self, texts: str | Sequence[str], task: str | None = None, *, truncate: bool = False
    ) -> torch.Tensor:
        """SEP's embeddings of any texts, such as "a red dress", as `embed` makes them of images.

        Args:
            texts: one text, or N of them.
            task: whose adapter embeds; None: the active one.
            truncate: cut texts of more tokens than `sep_peft.max_text_length` at their end, and warn of how many.

        Returns:
            (N, E), of unit length, in fp32 or wider, on the CPU; for one text alone (E,).

        Raises:
            TypeError: one is no text.
            ValueError: there is none, one is blank or does not fit beside the prompts, or there is no such task.

        Example:
            >>> found = classifier.embed(paths) @ classifier.embed_texts("a red dress")
            >>> best = [paths[index] for index in found.topk(5).indices]
        """
        adapter = None if task is None else self.tasks[task].adapter
        return embed_given_texts(self.model, self.processor, texts, adapter, truncate)
