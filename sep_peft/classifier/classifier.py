"""`SEPClassifier`: a model with a SEP adapter and a list of classes, to train, evaluate, predict, save and load."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils.generic import ModelOutput

from ..method.heads import NAMES, check_logit_weight
from ..method.label_losses import asymmetric_loss, label_loss
from ..method.losses import PROTOTYPE_SCALE, SEPLoss, sep_loss
from ..method.mix import unit, wide
from ..method.recipe import PROTOTYPE_LOGIT_WEIGHT, Recipe
from ..method.regularizers import regularizers
from ..tuner.config import SEPConfig
from ..tuner.current import walked_adapter
from ..tuner.messages import shown
from ..tuner.model import find_towers
from ..tuner.modes import evaluating
from ..tuner.offload import compute_device
from ..tuner.restore import unchanged_on_error
from ..tuner.texts import TextInputs
from ..tuner.tower import SEPTower
from .agreement import Agreement
from .answers import Answers
from .calibration import Calibration
from .card import CardDetails
from .class_encoder import KEPT_TOKENS, TEXT_CHUNK_SIZE, ClassEncoder, padding_of
from .classes import TEMPLATE, TaskClasses
from .embedding_mixin import EmbeddingMixin
from .embeddings import check_batch_size
from .explain import explain_label
from .explanation import Explanation
from .files import load_base, load_classes, load_whitening, path_first, push_files, save_files, update_card
from .fitting import fitted_classes
from .images import as_images, read_image
from .inputs import check_images, check_labels, check_targets, check_trunk, labels_in
from .label_calibration import LabelCalibration
from .label_training import TrainedSigmoids, train_alike
from .logits import ClassWeights, class_logits, zero_shot_logits
from .on_the_way import send
from .prediction import Task, check_answers, image_embeds, predict_batch
from .processor_files import processor_to_save
from .processors import processor_part
from .strength import with_frozen_weight
from .summary import summarize
from .tasks import Tasks
from .trainer_mixin import TrainerMixin
from .trunk_cache import embeds_from_trunk
from .whitened import Whitening, whitening_of


@dataclass
class SEPClassifierOutput(ModelOutput):
    """
    Args:
        loss: scalar, where labels were given: the objective of SEP while training, cross entropy in evaluation.
        logits: (B, C), scaled by the model's logit scale.
        parts: while training, the named parts of the loss, means over the B images of this batch.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    parts: SEPLoss | None = None


class SEPClassifier(EmbeddingMixin, TrainerMixin):
    """Classifies images by a SEP model and a list of classes.

    The prompted branch of the text tower reads the bare class name, the frozen branch a template. A training step
    encodes all class texts, or of many classes some, as the recipe's `class_sample` says; evaluation encodes them once,
    until a weight, the active adapter or the classes change.

    Args:
        model: a `PeftModel` with a SEP adapter, or a transformers model to which one was added.
        class_inputs: tokenized class names, tensors (C, L), or a `TaskClasses`.
        template_inputs: tokenized templates (C, L), or a list of such to average; None: the frozen branch reads
            `class_inputs`.
        processor: for `predict` and `set_classes`; a processor of transformers with tokenizer and image processor.
        recipe: how it is trained and what it does with classes that were not trained; `Recipe.published()` is the
            paper's. None: `Recipe()`, with the margin of new classes that `class_inputs` were saved with.
        text_weight: weight of the text consistency in the loss; None: the recipe's, 4.
        vision_weight: weight of the image consistency; None: the recipe's, 0.
        prototype_weight: weight of the prototype terms; None: the recipe's, 0.5. 0 makes no prototypes.
        chunk_size: class texts encoded at a time; see `ClassEncoder`.
        kept_tokens: tokens of class texts whose activations a training step keeps; see `ClassEncoder`.

    Raises:
        ValueError: no SEP adapter in the model, no tower that sees, no classes, a class twice, a class text that does
            not fit, or a weight below 0.

    Example:
        >>> classifier = SEPClassifier.from_class_names(model, processor, ["butterfly", "lobster"])
        >>> loss = classifier(pixel_values=pixel_values, labels=labels).loss
        >>> classifier.predict("image.jpg", top_k=1)
        [{'label': 'lobster', 'score': 0.98}]
    """

    def __init__(
        self,
        model: nn.Module,
        class_inputs: TextInputs | TaskClasses,
        template_inputs: TextInputs | Sequence[TextInputs] | None = None,
        *,
        processor=None,
        recipe: Recipe | None = None,
        text_weight: float | None = None,
        vision_weight: float | None = None,
        prototype_weight: float | None = None,
        chunk_size: int = TEXT_CHUNK_SIZE,
        kept_tokens: int = KEPT_TOKENS,
    ):
        super().__init__()
        weights = {"text_weight": text_weight, "vision_weight": vision_weight, "prototype_weight": prototype_weight}
        recipe = replace(
            recipe or _recipe_of(class_inputs), **{name: w for name, w in weights.items() if w is not None}
        )
        towers = find_towers(model)
        if set(towers) != {"text", "vision"}:
            raise ValueError(
                f"The model needs a SEP adapter on a text and an image tower, but has {sorted(towers) or 'none'}. Make "
                "one with peft.get_peft_model(model, SEPConfig())."
            )
        seeing = towers["vision"]
        if seeing.spec.inputs != "pixel_values":
            raise ValueError(
                f"SEPClassifier classifies images, but {type(seeing.owner).__name__} has a tower that reads "
                f"{seeing.spec.inputs} in the place of the one that sees."
            )
        if seeing.spec.videos:
            raise ValueError(
                f"SEPClassifier classifies images, but {type(seeing.owner).__name__} sees videos, of several frames "
                "each. Train its adapter with the model's own loss."
            )
        self.model = model
        self.processor = processor
        self.recipe = recipe
        self.whitening: Whitening | None = None  # of the active adapter, see `fit_whitening`
        self.trained: TaskClasses | None = None  # as `keep_prototypes` left or `from_pretrained` found them
        self.prototypes: nn.Parameter | None = None
        if not isinstance(class_inputs, TaskClasses):
            if template_inputs is None:
                template_inputs = ()
            elif isinstance(template_inputs, Mapping):
                template_inputs = (template_inputs,)
            class_inputs = TaskClasses(dict(class_inputs), tuple(map(dict, template_inputs)))
        self.encoder = ClassEncoder(model, class_inputs, chunk_size, kept_tokens)
        self.agreement = Agreement().to(self.device)
        self.agreement.state(class_inputs)
        self.tasks = Tasks(model)
        self.sigmoids: TrainedSigmoids | None = None  # of the loss, where an image may have several classes
        self.reset_sigmoids()
        if recipe.prototype_weight:
            self.reset_prototypes()

    @classmethod
    def from_class_names(
        cls,
        model: nn.Module,
        processor,
        class_names: Sequence[str],
        template: str | Sequence[str] = TEMPLATE,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        *,
        multi_label: bool = False,
        **options,
    ) -> SEPClassifier:
        """Make a classifier from names.

        Args:
            model, options: as for the class.
            processor: a processor of transformers, or a tokenizer where only tensors will be classified.
            class_names: C names; underscores are read as spaces.
            template: text for the frozen branch with ``{}`` in place of the name; several are averaged.
            descriptions: class name -> texts about it, averaged with the templates, or with ``template=[]`` in their
                place; see `TaskClasses.from_names`.
            multi_label: whether an image may have several of the classes, or none. Samples then have a list of names
                each, and scores come from a sigmoid for each class; see docs/labels.md.
        """
        padding = padding_of(model)
        classes = TaskClasses.from_names(class_names, processor, template, descriptions, multi_label, **padding)
        return cls(model, classes, processor=processor, **options)

    def __repr__(self) -> str:
        """A few lines; `repr(classifier.model)` is the tree of modules."""
        return summarize(self, find_towers(self.model), self.classes, list(self.tasks))

    # classes

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weights of the loss, of the classifier's recipe."""
        return self.recipe.loss_weights

    @property
    def class_names(self) -> list[str]:
        """C labels, in the order of the logits."""
        return list(self.classes.names)

    @property
    def classes(self) -> TaskClasses:
        return self.encoder.classes

    def set_classes(
        self,
        classes: Sequence[str] | TaskClasses,
        template: str | Sequence[str] | None = None,
        zero_shot_margin: float | None = None,
        *,
        descriptions: Mapping[str, Sequence[str]] | None = None,
    ) -> SEPClassifier:
        """Swap in other classes; nothing is trained, and the prototypes of the loss start anew. Returns self.

        The names that were trained, or some of them, with their texts bring back what was kept of them: each class
        has the logits that it has among all.

        Args:
            classes: names, for which the classifier needs a processor, or `TaskClasses`.
            template: None keeps the present one.
            zero_shot_margin: how far SEP must be ahead of zero-shot to decide, as `TaskClasses` has it. None: what
                `TaskClasses` say, and for names the recipe's, 1 by default, or 0 where all of them were trained or
                an image may have several: names take over from the present classes whether it may.
            descriptions: as for `from_class_names`; None: those of the trained names with these, else none.
        """
        named = not isinstance(classes, TaskClasses)
        found = self._tokenized(classes, template, zero_shot_margin, descriptions, self.classes.multi_label)
        if named:
            found = self._in_place_of_trained(found, zero_shot_margin is None, template is None, descriptions is None)
        before = self.sigmoids, self.prototypes
        self._encode(found)
        self.reset_sigmoids()
        if self.prototypes is not None:
            self.reset_prototypes()
        train_alike(self.model, before, (self.sigmoids, self.prototypes))
        return self

    def _in_place_of_trained(
        self, classes: TaskClasses, choose_margin: bool, any_template: bool, any_descriptions: bool
    ) -> TaskClasses:
        """Names with what training left for them.

        The trained classes, or some of them, for their own names; for others the temperature of new classes, and where
        the margin is to be chosen, none for trained names with other texts and the recipe's otherwise.
        """
        trained = self.trained
        known = trained is not None and set(classes.names) <= set(trained.names)
        if trained is not None and known and choose_margin:
            some = trained if classes.names == trained.names else trained.only(classes.names)
            alike = classes.templates == some.templates or (any_template and not some.templates)
            if alike and (any_descriptions or classes.description_texts == some.description_texts):
                return some
        if trained is not None and trained.calibration is not None:
            classes = replace(classes, calibration=trained.calibration.for_new_classes())
        if not choose_margin or classes.multi_label:
            return classes
        held_back = not known or (trained is not None and trained.zero_shot_margin)
        return replace(classes, zero_shot_margin=self.recipe.zero_shot_margin if held_back else 0.0)

    def calibrate(self, calibration: Calibration | LabelCalibration | None) -> SEPClassifier:
        """Let logits become scores by a calibration; `sep_peft.training.calibrate` finds one. Returns self.

        It belongs to the present classes and their prototypes, is saved with them, and is silent without an adapter.
        Other classes that take their place have its `new_class_temperature`. Labels stay as they are. That of classes
        several of which an image may have is a `LabelCalibration`.

        Args:
            calibration: of the present classes; None: logits as they are.

        Raises:
            ValueError: it is of the other kind, or of another number of classes.
        """
        classes = replace(self.classes, calibration=calibration)
        if self.trained is self.classes:
            self.trained = classes
        self._encode(classes)
        return self

    def _encode(self, classes: TaskClasses) -> None:
        sizes = self.encoder.chunk_size, self.encoder.kept_tokens
        self.encoder = ClassEncoder(self.model, classes, *sizes).train(self.training)
        self.agreement.state(classes)

    def _tokenized(
        self, classes, template, zero_shot_margin: float | None, descriptions=None, multi_label: bool = False
    ) -> TaskClasses:
        if not isinstance(classes, TaskClasses):
            tokenizer = processor_part(self.processor, "tokenizer", PreTrainedTokenizerBase, "to read class names")
            template = (self.classes.templates or TEMPLATE) if template is None else template
            padding = padding_of(self.model)
            classes = TaskClasses.from_names(classes, tokenizer, template, descriptions, multi_label, **padding)
        elif descriptions is not None:
            raise ValueError("descriptions are for class names; TaskClasses have their own.")
        return classes if zero_shot_margin is None else replace(classes, zero_shot_margin=zero_shot_margin)

    def add_task(
        self,
        name: str,
        classes: Sequence[str] | TaskClasses,
        adapter: str | None = None,
        template: str | Sequence[str] | None = None,
        zero_shot_margin: float | None = None,
        *,
        descriptions: Mapping[str, Sequence[str]] | None = None,
    ) -> SEPClassifier:
        """Add a task, for `predict(..., task=name)`. Returns self.

        Args:
            name: of the task.
            classes, template: as for `set_classes`.
            descriptions: as for `from_class_names`.
            adapter: an adapter of the model, or "__base__" for none; None: the one with the task's name.
            zero_shot_margin: as for `set_classes`, but 0 for names: a task is what its adapter was trained for.

        Raises:
            ValueError: the name is taken, there is no such adapter, or a class text does not fit.
        """
        self.tasks.check_new(name)
        classes = self._tokenized(classes, template, zero_shot_margin, descriptions)
        self.tasks.add(name, classes, name if adapter is None else adapter, self.encoder.chunk_size)
        return self

    def load_task(
        self, path: str | os.PathLike, name: str, *, subfolder: str | None = None, **hub_options
    ) -> SEPClassifier:
        """Load what `save_pretrained` wrote as a task and an adapter called `name`; the active one stays. Returns self.

        Raises:
            TypeError, ValueError, AdapterMismatchError: as `from_pretrained`, or the name is taken; nothing is loaded.
        """
        path, options = os.fspath(path), {"subfolder": subfolder, **hub_options}
        SEPConfig.of_adapter(path, **options)  # before PEFT reads it, whose errors name no file
        classes = load_classes(path, subfolder, hub_options)
        self.tasks.load(name, path, classes, self.encoder.chunk_size, **options)
        return self

    # prototypes

    @torch.no_grad()
    def reset_prototypes(self, batches: Iterable[Mapping[str, torch.Tensor]] | None = None) -> None:
        """Start the class prototypes W (C, E) of the loss; call it before the optimizer is made.

        Args:
            batches: dicts with `pixel_values` (B, channels, height, width), what else the image tower takes, and
                `labels` (B,), of the training images, or with `frozen_embeds` (B, E) in the place of pixels. W then
                starts at the mean frozen image embedding of each class, as published. Without them, and for classes
                without an image, it starts where it was kept, or at the frozen text embedding.
        """
        kept = self.encoder.prototypes
        prototypes = (self.encoder.frozen_embeds() if kept is None else kept).clone()  # (C, E)
        if batches is not None:
            sums, counts = torch.zeros_like(prototypes), prototypes.new_zeros(len(prototypes))
            for batch in batches:
                embeds, labels = self._frozen_images(batch)
                embeds = embeds.to(sums.dtype)
                if labels.ndim == 2:  # of each image, (B, C)
                    sums += labels.to(sums.dtype).T @ embeds
                    counts += labels.to(counts.dtype).sum(dim=0)
                    continue
                sums.index_add_(0, labels, embeds)
                counts.index_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
            seen = counts > 0
            prototypes[seen] = sums[seen] / counts[seen, None]
        self.prototypes = nn.Parameter(prototypes)

    def _frozen_images(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Frozen image embeddings (B, E) of unit length, and labels, of a batch as `reset_prototypes` takes it."""
        labels = labels_in(batch).to(self.device)
        check = check_targets if self.classes.multi_label else check_labels
        check(labels, len(self.classes))
        inputs = {name: value.to(self.device) for name, value in batch.items() if name != "labels"}
        known = inputs.get("frozen_embeds")
        return unit(self.vision_tower.embed_frozen(**inputs) if known is None else known), labels

    @torch.no_grad()
    def reset_sigmoids(self, batches: Iterable[Mapping[str, torch.Tensor]] | None = None) -> None:
        """Start what makes logits into log odds in the loss of several labels, after the prototypes.

        Where an image has one of the classes there is nothing to start.

        Args:
            batches: as for `reset_prototypes`; they then start at what suits zero-shot on these images. None: where
                they were kept, or at a slope of 1 without biases.
        """
        self.sigmoids = None
        if not self.classes.multi_label:
            return
        kept = self.classes.sigmoids if batches is None else None
        self.sigmoids = TrainedSigmoids(len(self.classes), kept).to(self.device)
        if batches is not None:
            both = [self._frozen_images(batch) for batch in batches]
            embeds, targets = (torch.cat(column) for column in zip(*both, strict=True))
            logits = zero_shot_logits(self.vision_tower, wide(embeds), self.encoder.frozen_embeds())
            self.sigmoids.start(logits, wide(embeds), self.prototypes, targets)

    def keep_prototypes(
        self,
        logit_weight: float | None = None,
        *,
        kind: str = "prototypes",
        batches: Iterable[Mapping[str, torch.Tensor]] | None = None,
    ) -> SEPClassifier:
        """Let a head predict beside the texts: the class prototypes W, as trained, or another; call it after training.

        Predictions then read ``logits + logit_weight 10 (cos(v, w_c) + cos(v0, w_c)) / 2`` with SEP's and the frozen
        image embedding v and v0, both of which the loss compares with W on this scale. As published W serves the loss
        alone. It knows the classes it was trained on: `set_classes` with others drops it, and with the same names or
        some of them brings it back. It is saved with the classes, and without an adapter it is silent. The classes
        count as trained: no margin of zero-shot holds SEP back on them.

        Other heads read the mean of v and v0 of the training images as they are, without augmentation: "gda" (class
        means and one covariance), "probe" (a linear one that the texts take part in), "residual" (a linear one that
        starts at the texts) and "tip-adapter-f" (a cache of them); see `sep_peft.method.fit_heads`. They stand on any
        adapter, need no prototypes in the loss, and take the place of what was kept. "prototypes-gda" is the mean of
        the logits of the trained prototypes and of GDA.

        Args:
            logit_weight: weight of the head's logits, above 0; None: for prototypes the recipe's
                `prototype_logit_weight`, 5, for other heads what `fit_head` chooses.
            kind: "prototypes", "gda", "probe", "prototypes-gda", "residual" or "tip-adapter-f".
            batches: dicts with `pixel_values`, what else the image tower takes, and `labels` (B,), of the training
                images; for all kinds but prototypes.

        Returns:
            self.

        Raises:
            ValueError: the classifier has no prototypes, numbers are not finite, the weight is not above 0, the kind is
                unknown, or its images are missing, or those of a class.
        """
        if kind != "prototypes":
            self._keep_head(kind, batches, logit_weight)
            return self
        if batches is not None:
            raise ValueError('batches must be left out for kind="prototypes", which were trained with the adapter.')
        kept = self._unit_prototypes().cpu()
        weight = self.recipe.prototype_logit_weight if logit_weight is None else logit_weight
        self._take_as_trained(replace(self.classes, prototypes=kept, prototype_logit_weight=weight, head=None))
        return self

    def _unit_prototypes(self) -> torch.Tensor:
        """W as trained, (C, E), of unit length.

        Raises:
            ValueError: there is none.
        """
        if self.prototypes is None:
            raise ValueError("There are no prototypes to keep: the classifier was made with prototype_weight=0.")
        return unit(wide(self.prototypes.detach()))

    def _keep_head(
        self, kind: str, batches: Iterable[Mapping[str, torch.Tensor]] | None, logit_weight: float | None
    ) -> None:
        if self.classes.multi_label:
            raise ValueError(
                f"A {shown(kind)} head tells one class an image, but it may have several of these. Keep prototypes."
            )
        if kind not in NAMES:
            raise ValueError(f"kind must be one of prototypes, {', '.join(NAMES)}, but got {kind!r}.")
        if logit_weight is not None:
            check_logit_weight(logit_weight, "logit_weight")
        if batches is None:
            raise ValueError(f"batches of the training images are needed for kind={kind!r}.")
        prototypes = None
        if kind == "prototypes-gda":
            weight = self.recipe.prototype_logit_weight or PROTOTYPE_LOGIT_WEIGHT
            prototypes = weight * PROTOTYPE_SCALE * self._unit_prototypes()
        with evaluating(self.model):
            classes = fitted_classes(
                kind, self.vision_tower, self.encoder, batches, self.device, logit_weight, prototypes
            )
        self._take_as_trained(classes)

    def finish_training(self) -> SEPClassifier:
        """Go over to evaluation as the recipe says; `fit` ends with it. Returns self.

        The prototypes are kept where the recipe gives them a weight in predictions, and the classes count as trained:
        no margin of zero-shot holds SEP back on them.

        Raises:
            ValueError: the prototypes are not finite.
        """
        if self.prototypes is not None and self.recipe.prototype_logit_weight:
            self.keep_prototypes()
        else:
            self._take_as_trained(replace(self.classes, prototypes=None, prototype_logit_weight=0.0, head=None))
        return self.eval()

    def _take_as_trained(self, classes: TaskClasses) -> None:
        kept = None if self.sigmoids is None else self.sigmoids.keep()
        classes = replace(classes, sigmoids=kept)
        self.trained = replace(classes, zero_shot_margin=0.0, calibration=None)  # which was that of other logits
        self._encode(self.trained)

    # strength

    def set_frozen_weight(
        self,
        weight: float,
        task: str | None = None,
        *,
        batches: Iterable[Mapping[str, torch.Tensor]] | None = None,
    ) -> SEPClassifier:
        """Set the share of the frozen embedding in the mix after training; see `sep_peft.set_frozen_weight`.

        Class texts are encoded anew. A calibration is dropped, because it is that of other logits. Prototypes and other
        heads read the mix as well, and are made anew from the training images: heads by fitting them again, prototypes
        as the mean of SEP's and the frozen embedding over the images of each class.

        Args:
            weight: at least 0 and below 1.
            task: a task of `add_task` or `load_task`, whose adapter is meant; None: the active adapter.
            batches: dicts with `pixel_values`, what else the image tower takes, and `labels` (B,), of the training
                images; where the classes keep prototypes or another head, and only there.

        Returns:
            self.

        Raises:
            ValueError: there is no such task, or no adapter, the weight is not allowed, `batches` are missing or
                superfluous, or classes beside these keep a head for the same adapter. Nothing is changed.
        """
        if task is not None:
            self.tasks[task]  # which tells what tasks there are
        served = {name: self.tasks[name] for name in self.tasks}
        active = next((name for t in find_towers(self.model).values() if (name := t.prompting_adapter())), None)
        changed = with_frozen_weight(
            self.model,
            self.vision_tower,
            {None: Task(active, self.encoder), **served},
            task,
            weight,
            batches,
            self.trained,
        )
        for name, classes in changed.items():
            if name is not None:
                self.tasks.put(name, classes)
                continue
            self.whitening = None  # of other embeddings
            if self.trained is not None:
                self.trained = classes if self.trained is self.classes else replace(self.trained, calibration=None)
            self._encode(classes)
        return self

    # forward

    @property
    def vision_tower(self) -> SEPTower:
        return find_towers(self.model)["vision"]

    @property
    def device(self) -> torch.device:
        return compute_device(self.model)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        trunk: torch.Tensor | None = None,
        frozen_embeds: torch.Tensor | None = None,
        trunk_layer: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SEPClassifierOutput:
        """Logits of images, and their loss: the objective of SEP while training, cross entropy in evaluation.

        Where an image may have several classes, logits are log odds of each and the losses those of `label_loss` and
        binary cross entropy.

        Args:
            pixel_values: (B, channels, height, width).
            labels: (B,) class indices, for the loss; where an image may have several, (B, C) with 1 for its labels.
            trunk, frozen_embeds, trunk_layer: (B, L, D), (B, E) and (B,) of a `TrunkCache`, in the place of images.
                `frozen_embeds` beside images, as `SEPTower.embed_frozen` gives them, spare the frozen pass.
            num_items_in_batch: images N of the whole step, over its micro-batches and all processes, as Trainer counts
                them: the loss is the mean over B images times ``B / N``, so that the losses of the micro-batches add up
                to the mean over the N images, whatever their sizes. None: the mean over B images.
            kwargs: what else the image tower takes.

        Shapes are checked before anything runs. Values are on the CPU alone: to read labels or pixels from an
        accelerator would make every step wait for it. Compiled and exported code has no checks.

        Raises:
            TypeError: pixels are no tensor, or labels none of integers.
            ValueError: pixels or labels of another shape, no image, labels of another number than the images, on the
                CPU a label out of range or a pixel that is not finite, neither or both of images and a trunk, or a
                trunk of another adapter.
        """
        if (pixel_values is None) == (trunk is None):
            raise ValueError("Pass either pixel_values or trunk and frozen_embeds.")
        if pixel_values is not None:
            check_images(pixel_values, self.vision_tower, frozen_embeds)
        else:
            check_trunk(trunk, frozen_embeds, trunk_layer)
        if labels is not None:
            images = pixel_values if trunk is None else trunk
            check = check_targets if self.classes.multi_label else check_labels
            check(labels, len(self.classes), None if images is None else len(images), waits=False)
        if not self.training:
            self.agreement.check()
        weights = self._weights(labels)
        if pixel_values is not None:
            image, frozen_image = self.image_embeds(pixel_values, frozen_embeds=frozen_embeds, **kwargs)
        else:
            assert trunk is not None and frozen_embeds is not None, "checked above"
            image, frozen_image = embeds_from_trunk(self.vision_tower, trunk, frozen_embeds, trunk_layer)
        logits = class_logits(self.vision_tower, image, frozen_image, weights)
        if self.sigmoids is not None and weights.sigmoids is None:  # no calibration has taken their place
            logits = self.sigmoids(logits)
        if labels is None:
            self.tell_that_there_is_no_loss()
            return SEPClassifierOutput(logits=logits)
        if not self.training:
            several = self.classes.multi_label
            loss = asymmetric_loss(logits, labels, focus=0) if several else F.cross_entropy(logits, labels)
            return SEPClassifierOutput(_share(loss, labels, num_items_in_batch), logits)
        embeds = image, frozen_image, weights.text_embeds, weights.frozen_text_embeds
        if self.sigmoids is None:
            parts = sep_loss(logits, labels, *embeds, self.prototypes, **self.recipe.loss_weights)
        else:
            own = self.prototypes, self.sigmoids.prototype_biases
            parts = label_loss(
                logits, labels, *embeds, *own, focus=self.recipe.negative_focus, **self.recipe.loss_weights
            )
        if others := self.recipe.regularizer_weights:
            zero_shot = zero_shot_logits(self.vision_tower, frozen_image, weights.frozen_text_embeds)
            parts = SEPLoss(parts.total + regularizers(logits, zero_shot, *embeds, **others), *parts[1:])
        return SEPClassifierOutput(_share(parts.total, labels, num_items_in_batch), logits, parts)

    def _weights(self, labels: torch.Tensor | None) -> ClassWeights:
        """What the classes give to logits; in a training step perhaps those of a sample of their texts."""
        if not self.training or labels is None:
            return self.encoder.weights(training=self.training)
        drawn = self.drawn_classes(self.recipe)
        if drawn == len(self.classes):
            return self.encoder.weights(training=True)
        return self.encoder.sampled_weights(labels, drawn, self.recipe.seed)

    def drawn_classes(self, recipe: Recipe) -> int:
        """Class texts that a training step by a recipe draws, as its `class_sample` says; C where it encodes all.

        Raises:
            ValueError: a number was asked for, and the adapter is `batch_coupled` or an image may have several classes.
        """
        settings, count = self.encoder.tower.active_settings, len(self.classes)
        if self.classes.multi_label:
            if recipe.class_sample:
                raise ValueError(
                    f"class_sample={recipe.class_sample} draws beside the one class of an image, but it may have "
                    "several of these. Pass a recipe with class_sample=0."
                )
            return count
        if settings is None:
            return count  # the texts of the frozen model are encoded once
        drawn = recipe.drawn_classes(count)
        if settings.batch_coupled and recipe.class_sample and drawn < count:
            raise ValueError(
                f"class_sample={recipe.class_sample} cannot be used with batch_coupled=True, where every class text "
                "sees every other. Pass a recipe with class_sample=0."
            )
        return count if settings.batch_coupled else drawn

    def steps_state(self) -> dict[str, torch.Tensor]:
        """What a training that goes on needs beside parameters: name -> tensor, for `take_steps_state`.

        It is the state of the `ClassSample`, which `state_dict` has as well; empty where no step has drawn classes.
        """
        return self.encoder.sample.state()

    def take_steps_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `steps_state` gave; an empty one begins anew.

        Raises:
            ValueError: it is of other classes.
        """
        self.encoder.sample.take_state(state)

    def image_embeds(self, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """SEP's and the frozen image embeddings, each (B, E), of unit length, in fp32 or wider."""
        return image_embeds(self.vision_tower, {"pixel_values": pixel_values, **kwargs})

    # prediction

    @torch.no_grad()
    def predict(
        self,
        images: Any,
        top_k: int | None = None,
        batch_size: int = 32,
        task: str | Sequence[str] | None = None,
        *,
        min_score: float | None = None,
        unknown: bool = False,
        coverage: float | None = None,
    ) -> list:
        """Classify images, in evaluation whatever the mode of the classifier; threads may predict at the same time.

        Where an image may have several of the classes, those are named whose score reaches the threshold that was
        chosen for each on held-out images; the list may be empty.

        Args:
            images: one image as `sep_peft.classifier.images.read_image` takes it (a path, an address, a `PIL.Image`,
                bytes, an open file, an array or tensor), or several: a list or another iterable of them, such as a
                generator or a column of the package datasets, or an array or tensor (B, ...).
            top_k: how many classes to return an image, best first; None for all. Of several labels: at most so many.
            batch_size: images encoded at a time.
            task: a task of `add_task` or `load_task`, or one for each image; None: the classifier's own classes with
                the active adapter.
            min_score: from 0 to 1; where the best class has less, the list is empty: none of these. None: no limit.
                Of several labels: all with at least this score, whatever their thresholds; 0 names every class.
            unknown: empty as well for images that look like no trained class. In training it was found out, on
                held-out images, where 95 % of those that belong to a class lie; see `sep_peft.classifier.answers`.
            coverage: above 0 and below 1; the list is the set of classes that holds the image's own with this chance,
                best first, in the place of `top_k`; see `sep_peft.classifier.answers`.

        Returns:
            for each image a list of ``{"label": name, "score": probability}``; for one image its list alone.

        Raises:
            ValueError: an image cannot be read, `top_k` is larger than the number of classes, `batch_size` is below 1,
                a task is unknown, `min_score` or `coverage` is out of range, `coverage` comes with `top_k`, or
                `unknown` or `coverage` is asked for classes that were not calibrated on held-out images.
        """
        check_batch_size(batch_size)
        images, single = as_images(images)
        own = Task(None, self.encoder)  # looked up once: another thread may set other classes meanwhile
        tasks = [own] * len(images) if task is None else self.tasks.of_samples(task, len(images))
        answers = Answers(top_k, min_score, unknown, coverage)
        check_answers(answers, [own] if task is None else tasks)
        processor = processor_part(self.processor, "image_processor", ImageProcessingMixin, "to read images")
        images, predictions = [read_image(image) for image in images], []
        with evaluating(self.model):
            for start in range(0, len(images), batch_size):
                batch = slice(start, start + batch_size)
                inputs = processor(images[batch], return_tensors="pt").to(self.device)
                predictions += predict_batch(self.vision_tower, inputs, tasks[batch], answers)
        return predictions[0] if single else predictions

    def fit_whitening(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> SEPClassifier:
        """Teach `embed(..., whiten=True)` by training images to tell those of one class from others. Returns self.

        It belongs to the weights of the adapter and is saved with it; `fit` drops it, as `set_frozen_weight` does.

        Args:
            batches: dicts with `pixel_values`, what else the image tower takes, and `labels` (B,).

        Raises:
            ValueError: there are no batches, a label is no class, or all images are of one.
        """
        self.whitening = whitening_of(self.model, batches, len(self.classes))
        return self

    def explain(self, image: Any, label: str | None = None, task: str | None = None) -> Explanation:
        """What in an image decided for a class, and which of its patches SEP selected to make its prompts from.

        Evaluation is used whatever the mode of the classifier; threads may ask at the same time. It takes the time of
        some fifty predictions.

        Args:
            image: one image as `predict` takes it.
            label: the class whose score is explained; None: the best one.
            task: as for `predict`; None: the classifier's own classes with the active adapter.

        Returns:
            an `Explanation`, which notebooks show as a drawing and whose `plot` writes it into a file.

        Raises:
            ValueError: the image cannot be read, there is no such class or task, or the image tower has no grid of
                patches.

        Example:
            >>> classifier.explain("image.jpg").plot("explanation.png")
        """
        found = Task(None, self.encoder) if task is None else self.tasks.of_samples(task, 1)[0]
        processor = processor_part(self.processor, "image_processor", ImageProcessingMixin, "to read images")
        return explain_label(self.model, found, processor, image, label)

    # files

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        details: CardDetails | None = None,
        save_dtype: torch.dtype | None = None,
        *,
        save_processor: bool = False,
    ) -> None:
        """Save the active adapter, the classes and a model card: safetensors, JSON and Markdown. Prototypes are saved
        where `keep_prototypes` kept them.

        Files are written to a temporary folder first and then moved, so a failure leaves what was there before. What
        its owner wrote into a model card stays.

        Args:
            folder: where to; made where it is missing.
            details: for the model card. Scores belong to the weights, so they are left out unless given again.
            save_dtype: of the weights in the file, `torch.float32`, `torch.bfloat16` or `torch.float16`; None: as they
                are. Loaded again they are rounded fp32.
            save_processor: save tokenizer and image processor as well, 3.6 MB for CLIP's, for those who load the folder
                without this package.

        Raises:
            TypeError: the model is no `PeftModel`.
            ValueError: the metadata of the model card in the folder cannot be read, the weights cannot have
                `save_dtype`, or there is no processor that can be saved.
        """
        options = {"whitening": self.whitening, "processor": processor_to_save(self.processor, save_processor)}
        save_files(self.model, self._saved_classes, folder, details or CardDetails(), save_dtype, **options)

    def push_to_hub(
        self,
        repo_id: str,
        details: CardDetails | None = None,
        *,
        subfolder: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        save_dtype: torch.dtype | None = None,
        save_processor: bool = False,
        commit_message: str = "Upload SEP adapter",
        **commit_options,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hub, in one commit; what an earlier adapter left there goes.

        Args:
            repo_id: "user/name"; made where it is missing.
            details: for the model card; as for `save_pretrained`.
            subfolder: where in the repository, for several adapters in one.
            private: whether a new repository is private.
            token: of the Hub; None: the one of ``hf auth login``.
            revision: branch to commit to; made where it is missing.
            save_dtype, save_processor: as for `save_pretrained`.
            commit_options: what else `HfApi.upload_folder` takes, such as `create_pr`.

        Returns:
            address of the commit.

        Raises:
            TypeError: the model is no `PeftModel`.
            ValueError: the base model came from a folder and `details` do not name it on the Hub.
        """
        options = {"subfolder": subfolder, "private": private, "token": token, "revision": revision}
        options |= {"save_dtype": save_dtype, "commit_message": commit_message, "whitening": self.whitening}
        options["processor"] = processor_to_save(self.processor, save_processor)
        return push_files(
            self.model, self._saved_classes, repo_id, details or CardDetails(), **options, **commit_options
        )

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write the model card in a folder anew, as `PeftModel` does for Trainer; what others wrote into it stays.

        Raises:
            TypeError: the model is no `PeftModel`.
            ValueError: the metadata of the model card in the folder cannot be read.
        """
        update_card(self.model, self._saved_classes, output_dir)

    @property
    def _saved_classes(self) -> TaskClasses:
        sigmoids = None if self.sigmoids is None else self.sigmoids.keep()
        return replace(self.classes, new_class_margin=self.recipe.zero_shot_margin, sigmoids=sigmoids)

    @classmethod
    @path_first
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        model: nn.Module | None = None,
        processor=None,
        adapter_name: str = "default",
        is_trainable: bool = False,
        subfolder: str | None = None,
        low_cpu_mem_usage: bool = False,
        trust_remote_code: bool = False,
        options: Mapping[str, Any] | None = None,
        **hub_options,
    ) -> SEPClassifier:
        """Load what `save_pretrained` or `push_to_hub` wrote.

        Args:
            path: a folder or the id of a repository on the Hub.
            model: the base model, or a `PeftModel` that takes the adapter in as a further one; None: the base model
                that the adapter names, which is loaded with its processor.
            processor: for `predict` and `set_classes`; None: the one beside the adapter, else that of the base model,
                where the base model is loaded.
            adapter_name: name of the adapter in the model.
            is_trainable: whether the adapter is to be trained on; otherwise it is frozen and no prototypes are made.
            subfolder: below `path`.
            low_cpu_mem_usage: make the adapter's parameters only when they are read.
            trust_remote_code: whether code that comes with the base model that the adapter names may run. Default
                False.
            options: keyword arguments of the class.
            hub_options: `revision`, `token`, `cache_dir` and so on, for the Hub.

        Raises:
            TypeError: no path, something else in its place, or two models.
            ValueError: the classes are missing or of a newer format, the base model is not named, or an adapter from
                the Hub names a path on this machine, or the weights hold numbers that are not finite.
            AdapterMismatchError: the weights do not fit the model.
        """
        path = os.fspath(path)
        SEPConfig.of_adapter(path, subfolder, **hub_options)  # before PEFT reads it, whose errors name no file
        classes = load_classes(path, subfolder, hub_options)  # before the model is touched
        whitening = load_whitening(path, subfolder, hub_options)
        if model is None:
            model, found = load_base(path, subfolder, hub_options, trust_remote_code)
            processor = processor or found
        arguments = {"is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage, **hub_options}
        options = {**({} if is_trainable else {"prototype_weight": 0.0}), **(options or {})}
        with unchanged_on_error(model):
            if isinstance(model, PeftModel):
                with walked_adapter.set(adapter_name):  # whatever walks through the model meets no other adapter
                    model.load_adapter(path, adapter_name, subfolder=subfolder, **arguments)
                model.set_adapter(adapter_name, inference_mode=not is_trainable)
            else:
                model = PeftModel.from_pretrained(model, path, adapter_name, subfolder=subfolder, **arguments)
            classifier = cls(model, classes, processor=processor, **options).train(is_trainable)
            if classifier.sigmoids is not None:
                classifier.sigmoids.requires_grad_(is_trainable)
        classifier.trained, classifier.whitening = classes, whitening
        return classifier


def _share(loss: torch.Tensor, labels: torch.Tensor, whole: torch.Tensor | int | None) -> torch.Tensor:
    """The share that a mean over `labels` (B,) has in the mean over the images of a whole step."""
    if whole is None:
        return loss
    if isinstance(whole, torch.Tensor):  # Trainer hands the count to replicas of DataParallel as (1, 1) -> ()
        whole = send(whole, loss.device).reshape(())
    return loss * (len(labels) / whole)


def _recipe_of(class_inputs: TextInputs | TaskClasses) -> Recipe:
    """The default one, with the margin of the recipe that saved classes were trained by."""
    margin = class_inputs.new_class_margin if isinstance(class_inputs, TaskClasses) else None
    return Recipe() if margin is None else Recipe(zero_shot_margin=margin)
