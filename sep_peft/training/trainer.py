"""`SEPTrainer`: transformers' `Trainer` that trains a `SEPClassifier` by its recipe and saves what will be shipped."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from ..classifier.classifier import SEPClassifier
from ..method.recipe import Recipe
from .calibrate import calibrate
from .data import EpochCallback, EpochDataset, LabelledImages
from .evaluation import check_samples
from .fit import check_recipe
from .folders import Samples
from .optimizer import count_steps, make_optimizer, make_schedule
from .shipping import as_shipped, ship


class SEPTrainer(Trainer):
    """Trains by a recipe, measures and saves the classifier as it would be shipped, and goes on from its checkpoints.

    The recipe says how to train: epochs, steps, batch size, learning rates and their schedule, seed, no clipping of
    gradients; what `args` say of these does not count. `args` say where, how often to measure and to save, and what
    else Trainer can. A checkpoint holds the adapter, the classes and the prototypes, as `SEPClassifier.from_pretrained`
    and `PeftModel.from_pretrained` load them, beside what Trainer needs to go on; it is as large as four adapters.

    While it trains, images are measured with the prototypes that predict. `train` ends like `fit`: in evaluation, with
    the prototypes kept, and calibrated on `eval_dataset` where that is a list of samples or `LabelledImages`.

    Args:
        model: the classifier, with a processor.
        args: of Trainer; None: its defaults, in the folder "outputs".
        recipe: how to train; it becomes the classifier's. None: the one that the classifier has.
        train_dataset: images and names of their classes, which are augmented as the recipe says and whose means the
            prototypes start at; or a data set of entries with `pixel_values` and `labels`, whose prototypes start where
            the classifier's are.
        eval_dataset: the same, not augmented; None: nothing is measured.
        compute_metrics: as for Trainer; None: "accuracy" in percent.
        callbacks, options: as for Trainer.

    Raises:
        TypeError: `model` is no `SEPClassifier`.
        ValueError: an image may have several classes, the recipe averages over epochs or whitens, its batch cannot be
            shared out evenly among devices and accumulated steps, a sample does not fit, or the recipe's `class_sample`
            does not suit the adapter.

    Example:
        >>> arguments = TrainingArguments("run", eval_strategy="epoch", save_strategy="epoch")
        >>> trainer = SEPTrainer(classifier, arguments, train_dataset=images.train, eval_dataset=images.tests["val"])
        >>> trainer.train(resume_from_checkpoint=True)
        >>> classifier.save_pretrained("my-task")
    """

    def __init__(
        self,
        model: SEPClassifier,
        args: TrainingArguments | None = None,
        *,
        recipe: Recipe | None = None,
        train_dataset: Samples | torch.utils.data.Dataset | None = None,
        eval_dataset: Samples | torch.utils.data.Dataset | None = None,
        compute_metrics=None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **options: Any,
    ):
        if not isinstance(model, SEPClassifier):
            raise TypeError(f"SEPTrainer trains a SEPClassifier, but got {type(model).__name__}.")
        if model.classes.multi_label:
            raise ValueError("SEPTrainer trains classes of which an image has one, but it may have several. Use fit.")
        self.recipe = recipe = model.recipe if recipe is None else recipe
        check_recipe(model, recipe)
        model.drawn_classes(recipe)
        if recipe.average_center is not None:
            raise ValueError(
                "SEPTrainer averages no weights over epochs, but the recipe has "
                f"average_center={recipe.average_center!r}. Train by fit, or pass a recipe with average_center=None."
            )
        if recipe.whiten:
            raise ValueError(
                "SEPTrainer fits no whitening, but the recipe has whiten=True. Train by fit, or pass a recipe with "
                "whiten=False and call classifier.fit_whitening after training."
            )
        images: Any = _as_images(model, train_dataset, "train on", recipe)
        args = by_recipe(args or TrainingArguments("outputs"), recipe)
        self._steps_per_epoch = 0 if images is None else -(-len(images) // recipe.batch_size)
        if recipe.max_steps is not None:
            args.max_steps = count_steps(recipe, self._steps_per_epoch)
        super().__init__(
            model,
            args,
            train_dataset=images,
            eval_dataset=_as_images(model, eval_dataset, "evaluate on", None),
            compute_metrics=compute_metrics or accuracy,
            callbacks=[*([EpochCallback()] if isinstance(images, EpochDataset) else []), *(callbacks or ())],
            **options,
        )
        model.recipe = recipe

    @property
    def classifier(self) -> SEPClassifier:
        return cast(SEPClassifier, self.model)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW of the recipe, with a group of its own for the prototypes, unless `optimizers` were given."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.classifier, self.recipe)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Learning rates of the recipe, unless `optimizers` were given."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.create_optimizer()
            self.lr_scheduler = make_schedule(optimizer, self.recipe, self._steps_per_epoch)
            self._created_lr_scheduler = True  # Trainer makes both anew when it trains again
        return self.lr_scheduler

    def train(self, resume_from_checkpoint: str | bool | None = None, **options):
        """Train, or go on from a checkpoint; see `Trainer.train` and the class."""
        classifier, images = self.classifier, self.train_dataset
        classifier.whitening = None  # of the weights before
        if not self.recipe.prototype_weight:
            classifier.prototypes = None
        elif not resume_from_checkpoint and isinstance(images, LabelledImages):
            loader = torch.utils.data.DataLoader(
                images.plain(), self.recipe.batch_size, num_workers=self.args.dataloader_num_workers
            )
            classifier.reset_prototypes(loader)
        elif classifier.prototypes is None:
            classifier.reset_prototypes()
        result = super().train(resume_from_checkpoint, **options)
        ship(classifier)
        if isinstance(self.eval_dataset, LabelledImages):
            calibrate(classifier, self.eval_dataset, workers=self.args.dataloader_num_workers)
        return result

    def evaluate(self, eval_dataset: Any = None, *args, **options) -> dict[str, float]:
        """Measure the classifier as it would be shipped, also while it trains; see `Trainer.evaluate`."""
        if isinstance(eval_dataset, Sequence) and not isinstance(eval_dataset, str):
            eval_dataset = _as_images(self.classifier, eval_dataset, "evaluate on", None)
        with self._as_shipped():
            return super().evaluate(cast(Any, eval_dataset), *args, **options)

    def predict(self, test_dataset, *args, **options):
        """Predict as the classifier would that is shipped; see `Trainer.predict`."""
        with self._as_shipped():
            return super().predict(test_dataset, *args, **options)

    @contextmanager
    def _as_shipped(self) -> Iterator[None]:
        if not self.is_in_train:
            yield
            return
        with as_shipped(self.classifier):
            yield

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """What Trainer saves, which it goes on from, and beside it what is shipped."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            with self._as_shipped():
                self.classifier.save_pretrained(cast(str, output_dir or self.args.output_dir))


def by_recipe(args: TrainingArguments, recipe: Recipe) -> TrainingArguments:
    """A copy of Trainer's arguments that trains by a recipe.

    Raises:
        ValueError: the batch cannot be shared out evenly among devices and accumulated steps.
    """
    shares = args.world_size * max(1, args.n_gpu) * args.gradient_accumulation_steps
    size, rest = divmod(recipe.batch_size, shares)
    if rest:
        raise ValueError(
            f"A batch of {recipe.batch_size} images cannot be shared out evenly among {shares} devices and accumulated "
            "steps. Pass a recipe with a multiple of that as its batch_size."
        )
    args = copy.copy(args)
    args.num_train_epochs, args.max_steps = float(recipe.epochs), -1
    args.per_device_train_batch_size = size
    args.learning_rate, args.weight_decay = recipe.learning_rate, recipe.weight_decay
    args.adam_epsilon, args.max_grad_norm = recipe.adam_epsilon, 0.0
    args.seed = args.data_seed = recipe.seed
    return args


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose class was told, in percent."""
    told = torch.as_tensor(prediction.predictions).argmax(dim=-1)
    return {"accuracy": 100 * (told == torch.as_tensor(prediction.label_ids)).float().mean().item()}


def _as_images(classifier: SEPClassifier, images: Any, purpose: str, recipe: Recipe | None) -> Any:
    """Samples as a data set; what is one stays."""
    if not isinstance(images, Sequence):
        return images
    samples = cast(Samples, images)
    check_samples(classifier, samples, purpose)
    return LabelledImages(samples, classifier.class_names, classifier.processor, recipe)
