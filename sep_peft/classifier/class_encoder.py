"""`ClassEncoder`: text embeddings of a task's classes, encoded anew by a training step, cached in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..method.heads import HeadLogits
from ..method.losses import PROTOTYPE_SCALE
from ..method.mix import mix_embeddings, unit, wide
from ..tracing import is_traced, untraced
from ..tuner.model import find_towers
from ..tuner.modes import evaluating
from ..tuner.offload import compute_device
from ..tuner.passes import TrunkFeatures
from ..tuner.settings import TowerSettings
from ..tuner.tower import SEPTower
from .calibration import Calibration
from .class_sample import ClassSample
from .classes import TaskClasses
from .coupled import coupled_texts
from .following import Following
from .label_calibration import LabelCalibration, LabelScale, Sigmoids
from .logits import ClassWeights, OwnTexts
from .on_the_way import at_hand, send
from .text_chunks import TextChunks
from .value_sample import ValueSample, versions


#: Class texts encoded at a time.
TEXT_CHUNK_SIZE = 256
#: Text tokens, prompts included, whose activations a training step keeps; for ViT-B/16 about 0.46 MB each in fp32.
KEPT_TOKENS = 8192
#: Name of the classes of descriptions, among the tensors that follow the model.
OWNERS = "owners"
#: What names of a head's tensors begin with, among those that follow the model.
HEAD_PREFIX = "head."
#: The same for tokenized class names.
TEXT_PREFIX = "text."


class ClassEncoder(Following):
    """Encodes the classes of a task by both branches of the text tower.

    Args:
        model: with a SEP adapter on its text tower. It is no child of this module: the owner of this owns the model.
        classes: C classes.
        chunk_size: texts encoded at a time, those of similar length together.
        kept_tokens: text tokens, prompts included, whose activations a training step keeps. Where the chunks have more,
            the backward pass computes each of them again, so memory does not grow with the number of classes; 0 is
            always.

    Raises:
        ValueError: a class text does not fit beside the prompts, or has an id outside of the vocabulary, prototypes
            have another width than embeddings, `chunk_size` is below 1, or `kept_tokens` below 0.
    """

    names: TextChunks

    def __init__(
        self, model: nn.Module, classes: TaskClasses, chunk_size: int = TEXT_CHUNK_SIZE, kept_tokens: int = KEPT_TOKENS
    ):
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, but got {chunk_size}.")
        if kept_tokens < 0:
            raise ValueError(f"kept_tokens must be at least 0, but got {kept_tokens}.")
        self._model = (model,)
        self.classes = classes
        self.chunk_size = chunk_size
        self.kept_tokens = kept_tokens
        self._cache: dict[str, tuple] = {}
        device = compute_device(model)
        described = [] if classes.descriptions is None else [classes.descriptions.inputs]
        read = (classes.class_inputs, *classes.template_inputs, *described)
        for inputs in read:
            self.tower.texts.check_ids(inputs)
        tokenized = [self.tower.texts.trim(inputs) for inputs in read]
        self.tower.texts.check_room(tokenized[0], self.tower.active_settings)
        for inputs in tokenized:
            self.tower.texts.check_length(inputs)
        tokenized = [self.tower.texts.without_mask(inputs) for inputs in tokenized]
        if classes.prototypes is not None:
            if (size := self.tower.head.embed_size) is not None:
                _check_width(classes.prototypes, size)
            self.following["prototypes"] = unit(wide(classes.prototypes))
        if classes.head is not None:
            tensors = {name: wide(x) if x.is_floating_point() else x for name, x in classes.head.tensors.items()}
            self.following |= {HEAD_PREFIX + name: tensor for name, tensor in tensors.items()}
        if isinstance(classes.calibration, LabelCalibration):
            for name in ("trained", "zero_shot"):
                sigmoids = getattr(classes.calibration, name).sigmoids()
                self.following |= {f"{name}.slopes": sigmoids.slopes, f"{name}.biases": sigmoids.biases}
        chunks = [TextChunks(self.tower, inputs, chunk_size) for inputs in tokenized]
        count = len(classes.template_inputs)
        self.names, self.templates = chunks[0], nn.ModuleList(chunks[1 : count + 1])
        self.descriptions = nn.ModuleList(chunks[count + 1 :])  # of all classes, or empty
        if classes.descriptions is not None:
            self.following[OWNERS] = torch.tensor(classes.descriptions.owners)  # (T,)
        self.following |= {TEXT_PREFIX + name: value for name, value in tokenized[0].items()}
        self.sample = ClassSample(len(classes))
        self.to(device)

    @property
    def prototypes(self) -> torch.Tensor | None:
        """Those that were kept of the classes, (C, E), of unit length; None without any."""
        return self.following.get("prototypes")

    @property
    def tower(self) -> SEPTower:
        return find_towers(self._model[0])["text"]

    def weights(self, *, training: bool) -> ClassWeights:
        """What the classes give to logits.

        Args:
            training: encode SEP's texts anew, for a step that trains the adapter; the texts alone then make logits.
                Otherwise they are taken from the cache, until a weight or the active adapter changes, and kept
                prototypes, the margin of zero-shot and the calibration take part. The modules' mode does not matter.
        """
        settings, calibration = self.tower.active_settings, self.calibration
        frozen_embeds = self.frozen_embeds(waits=not training)
        if settings is None:
            embeds = frozen_embeds
        elif training:
            embeds = self._mixed(settings, self.names, self._name_trunks(settings), frozen_embeds)
        else:
            embeds = self._cached_mixed(settings, frozen_embeds)
        if training:
            return ClassWeights(embeds, frozen_embeds)
        temperature = calibration.temperature if isinstance(calibration, Calibration) else 1.0
        trained = self.prototype_weights(), self.classes.zero_shot_margin, temperature, self.head_logits()
        return ClassWeights(embeds, frozen_embeds, *trained, sigmoids=self._sigmoids())

    @property
    def calibration(self) -> Calibration | LabelCalibration | None:
        """That of the classes; None without an adapter, because the temperature is not that of zero-shot."""
        return None if self.tower.active_settings is None else self.classes.calibration

    @property
    def label_scale(self) -> LabelScale | None:
        """How logits become scores where an image may have several classes, by the adapter or, without one, zero-shot.

        None where it has one, and without a calibration.
        """
        calibration = self.classes.calibration
        return getattr(calibration, self._scale_name) if isinstance(calibration, LabelCalibration) else None

    @property
    def _scale_name(self) -> str:
        return "zero_shot" if self.tower.active_settings is None else "trained"

    def _sigmoids(self) -> Sigmoids | None:
        """Those of `label_scale`, where the model is."""
        if not isinstance(self.classes.calibration, LabelCalibration):
            return None
        name = self._scale_name
        return Sigmoids(self.following[f"{name}.slopes"], self.following[f"{name}.biases"])

    def prototype_weights(self) -> torch.Tensor | None:
        """What makes the kept prototypes W into logits: ``weight 10 w_c / |w_c|``, (C, E), as their loss scales them.

        None without an adapter, to which they belong, and where no prototypes were kept.

        Raises:
            ValueError: the prototypes have another size than the embeddings.
        """
        if self.prototypes is None or self.tower.active_settings is None:
            return None
        _check_width(self.prototypes, self.frozen_embeds().shape[1])
        return self.classes.prototype_logit_weight * PROTOTYPE_SCALE * self.prototypes

    def head_logits(self) -> HeadLogits | None:
        """The kept head; None without an adapter, to which it belongs, and where there is none.

        Raises:
            ValueError: it reads embeddings of another size.
        """
        head = self.classes.head
        if head is None or self.tower.active_settings is None:
            return None
        if head.width != (size := self.frozen_embeds().shape[1]):
            raise ValueError(
                f"The {head.kind} head of the classes reads {head.width} entries, but the model's embeddings "
                f"have {size}: it was made with another base model."
            )
        tensors = {name: self.following[HEAD_PREFIX + name] for name in head.tensors}
        return HeadLogits(head.kind, tensors, head.logit_weight, len(self.classes))

    # Compilers run what looks into a cache as it is: their graphs could not tell when an entry gets old.

    @untraced
    def frozen_embeds(self, *, waits: bool = True) -> torch.Tensor:
        """Frozen text embeddings (C, E), of unit length, averaged over templates and descriptions, without dropout.

        Args:
            waits: for an accelerator, to see whether its weights were changed in ways that torch does not count; a
                training step goes on, and the next one sees it.
        """
        tower = self.tower

        def encode():
            plain = [] if self.descriptions else [self.names]
            read = cast(Iterable[TextChunks], self.templates or plain)
            embeds = [unit(wide(chunks.encode(tower.embed_frozen))) for chunks in read]
            if self.descriptions:
                return self._with_descriptions(embeds)
            return unit(torch.stack(embeds).mean(dim=0))

        return self._cached("frozen", (), encode, tower.base_layer.parameters(), waits=waits)

    def _with_descriptions(self, of_templates: list[torch.Tensor]) -> torch.Tensor:
        """(C, E) of unit length: the mean over all texts of each class, of which (C, E) are those of each template."""
        (chunks,) = cast(Iterable[TextChunks], self.descriptions)
        embeds, owners = unit(wide(chunks.encode(self.tower.embed_frozen))), self.following[OWNERS]  # (T, E), (T,)
        count = len(self.classes)
        sums = embeds.new_zeros(count, embeds.shape[1]).index_add_(0, owners, embeds)  # (C, E)
        counts = owners.bincount(minlength=count)[:, None] + len(of_templates)  # (C, 1)
        return unit((sums + sum(of_templates)) / counts)

    @untraced
    def _cached_mixed(self, settings: TowerSettings, frozen_embeds: torch.Tensor) -> torch.Tensor:
        """SEP's text embeddings (C, E), of unit length, in evaluation."""
        tower, adapter = self.tower, self.tower.prompting_adapter()
        assert adapter is not None, "there are settings, so there is an adapter"
        parameters = tower.base_layer.parameters(), tower.adapter_parameters(adapter)
        return self._cached(
            "mixed",
            (adapter, settings.frozen_weight),
            lambda: self._mixed(settings, self.names, None, frozen_embeds),
            *parameters,
        )

    @untraced
    def _name_trunks(self, settings: TowerSettings) -> list[TrunkFeatures] | None:
        """What the layers below `start_layer` make of each chunk of class names; None where there is nothing to keep.

        These layers are not trained, so a training step finds it done.
        """
        tower = self.tower
        if not self._has_trunks(settings):
            return None
        key = (tower.prompting_adapter(), settings.start_layer)
        trunks = partial(self.names.map, tower.trunk)
        return self._cached("trunk", key, trunks, tower.base_layer.parameters(), waits=False)

    def _mixed(
        self,
        settings: TowerSettings,
        names: TextChunks,
        trunks: list[TrunkFeatures] | None,
        frozen_embeds: torch.Tensor,
    ) -> torch.Tensor:
        """SEP's text embeddings (C, E), of unit length, of some names or of all."""
        tower = self.tower
        if settings.batch_coupled:  # every class must see every other
            texts = coupled_texts(tower, self.classes.class_inputs, settings.num_prompts)
            prompted = tower.embed_prompted(**cast(dict[str, Any], texts))
        else:
            tokens = names.num_tokens(settings.num_prompts)
            again = torch.is_grad_enabled() and len(names) > 1 and tokens > self.kept_tokens
            embed = partial(checkpoint, tower.embed_prompted, use_reentrant=False) if again else tower.embed_prompted
            prompted = names.encode(embed, trunks)
        return mix_embeddings(wide(prompted), frozen_embeds, tower.frozen_weight)

    # a sample of the classes

    def sampled_weights(self, labels: torch.Tensor, size: int, seed: int) -> ClassWeights:
        """What the classes give to the logits of a training step that encodes some of the class texts alone.

        These are the next `size` of `ClassSample` and the own classes of the images; other classes take part with
        their last embeddings. Logits are those of all classes. The gradient of a text embedding is in the mean that of
        all classes: an image's own class counts once, a drawn one C / `size` times, others not. What an image gives to
        loss and gradients does not depend on the images beside it, so neither does a step on how it is shared out.

        For an adapter that is not `batch_coupled`.

        Args:
            labels: (B,) of the images.
            size: classes to draw, from 1 to C.
            seed: of what is drawn.
        """
        settings, frozen_embeds = self.tower.active_settings, self.frozen_embeds(waits=False)
        assert settings is not None and not settings.batch_coupled, "which need all class texts"
        drawn, kept = self._draw(settings, size, seed, frozen_embeds)
        own = labels.long()
        names, chosen, places = self._names_of(drawn, own)
        trunks = names.map(self.tower.trunk) if self._has_trunks(settings) else None
        fresh = self._mixed(settings, names, trunks, frozen_embeds[chosen])[places]
        drawn_embeds, own_embeds = fresh.split([len(drawn), len(own)])
        values = drawn_embeds.detach()
        counted = values + (len(self.classes) / len(drawn)) * (drawn_embeds - values)
        embeds = kept.index_copy(0, drawn, counted)
        self._keep(drawn, values)
        return ClassWeights(embeds, frozen_embeds, own=OwnTexts(own, own_embeds))

    @untraced
    def _draw(
        self, settings: TowerSettings, size: int, seed: int, frozen_embeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Classes that are drawn, (S,), ascending, and the kept embeddings (C, E)."""
        tower, adapter = self.tower, self.tower.prompting_adapter()
        assert adapter is not None, "there are settings, so there is an adapter"
        watched = (
            *tower.base_layer.parameters(),
            *tower.adapter_parameters(adapter),
            *tower.projection_parameters(),
        )
        compute = partial(self._cached_mixed, settings, frozen_embeds)
        kept = self.sample.embeds((adapter, settings.frozen_weight, self._autocast()), watched, compute, frozen_embeds)
        drawn = torch.tensor(self.sample.draw(size, seed))
        return send(drawn, frozen_embeds.device), kept

    @untraced
    def _names_of(self, drawn: torch.Tensor, own: torch.Tensor) -> tuple[TextChunks, torch.Tensor, torch.Tensor]:
        """Texts of the classes that are drawn (S,) and of the images' own (B,).

        Each of them is there once where labels can be read. On an accelerator they are as many as there are indices,
        and as long as the longest of all classes, so that nobody waits for a label or a length. Where processes hold
        the tower together they are one chunk, whatever their number and length: all processes must then call it
        equally often, and each has other images.

        Returns:
            the texts, their classes (T,), and where among them those of `drawn` and `own` are, (S + B,).
        """
        wanted = torch.cat([drawn, own])  # (S + B,)
        known, together = at_hand(wanted), held_together(self.tower)
        every = torch.arange(len(wanted), device=wanted.device)
        classes, places = wanted.unique(return_inverse=True) if known else (wanted, every)
        names = [name for name in self.following if name.startswith(TEXT_PREFIX)]
        inputs = {name.removeprefix(TEXT_PREFIX): self.following[name][classes] for name in names}
        size = len(classes) if together else self.chunk_size
        return TextChunks(self.tower, inputs, size, by_length=known and not together), classes, places

    @untraced
    def _keep(self, classes: torch.Tensor, embeds: torch.Tensor) -> None:
        self.sample.refresh(classes, embeds)

    def _has_trunks(self, settings: TowerSettings) -> bool:
        """Whether what the layers below `start_layer` make of class names can be kept."""
        return not (settings.start_layer == 0 or settings.batch_coupled or self.tower.spec.in_stages)

    def _cached(
        self,
        name: str,
        key: tuple,
        compute: Callable[[], Any],
        *parameters: Iterable[nn.Parameter],
        waits: bool = True,
    ) -> Any:
        """What `compute` gives, in evaluation and without gradients, of the present values of `parameters`.

        Threads that find no entry compute each its own, all of the same values; an entry appears when it is whole.
        What a thread computes while it is traced is no value, and never kept.

        Args:
            name: of the entry; one that was made for another key is dropped.
            key: what the value depends on beside parameters, the projection and autocast, which belongs to the thread.
            compute: makes the value.
            parameters: that it depends on.
            waits: as for `ValueSample.has_changed`.
        """
        if is_traced():
            with torch.no_grad():
                return compute()
        watched = list(chain(*parameters, self.tower.projection_parameters()))
        key = (*key, self._autocast(), *versions(watched))
        entry = self._cache.get(name)
        if entry is None or entry[0] != key or entry[1].has_changed(waits=waits):
            # an inference tensor could not take part in a later training step
            with torch.inference_mode(False), torch.no_grad(), evaluating(self._model[0]):
                entry = (key, ValueSample(watched), compute())
            self._cache[name] = entry
        return entry[2]

    def _autocast(self) -> torch.dtype | None:
        """What this thread computes in under autocast; None without."""
        device = self.names.places.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _check_width(prototypes: torch.Tensor, size: int) -> None:
    """
    Raises:
        ValueError: the prototypes (C, E) have another width than the embeddings.
    """
    if prototypes.shape[1] != size:
        raise ValueError(
            f"The prototypes of the classes have {prototypes.shape[1]} entries, but the model's embeddings {size}: "
            "they were made with another base model."
        )


def held_together(module: nn.Module) -> bool:
    """Whether several processes hold the parameters of a module together, as FSDP2 lets them."""
    return any(hasattr(parameter, "to_local") for parameter in module.parameters())  # which a DTensor has


def padding_of(model: nn.Module) -> dict[str, Any]:
    """How a tokenizer has to pad for the model's text tower."""
    tower = find_towers(model).get("text")
    if tower is None or not tower.spec.max_length_padding:
        return {"padding": True}
    return {"padding": "max_length", "max_length": cast(Any, tower.base_layer).config.max_position_embeddings}
