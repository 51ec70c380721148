"""Training and measuring: data, recipes and the loop.

`fit` does all of it. A loop of one's own has the same images, in the same order, and the same losses::

    plain = LabelledImages(samples, classifier.class_names, processor)
    classifier.reset_prototypes(DataLoader(plain, recipe.batch_size))
    images = LabelledImages(samples, classifier.class_names, processor, recipe)
    loader = DataLoader(images, recipe.batch_size, sampler=EpochSampler(images, recipe.seed))
    optimizer = make_optimizer(classifier, recipe)
    schedule = make_schedule(optimizer, recipe, len(loader))
    classifier.train()
    for _ in range(recipe.epochs):
        for batch in loader:
            classifier(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    classifier.finish_training()

So has transformers' Trainer with ``train_dataset=images``, ``optimizers=(optimizer, schedule)``, ``max_grad_norm=0``
and ``seed=recipe.seed``; in several processes it needs ``callbacks=[EpochCallback()]`` to tell the images the epoch.
"""

from ..method.pairs_recipe import PairsRecipe
from ..method.recipe import Recipe
from .calibrate import calibrate
from .cross_validation import cross_validate
from .data import CachedImages, EpochCallback, EpochDataset, EpochSampler, LabelledImages
from .evaluation import Evaluation, evaluate
from .fit import fit
from .fit_pairs import fit_pairs
from .history import History, TrainingInterrupted
from .label_evaluation import LabelEvaluation, evaluate_labels
from .label_files import label_samples, read_label_file
from .limits import Limits
from .loop import train
from .optimizer import make_optimizer, make_schedule
from .pair_files import read_pairs
from .pairs import Pair
from .pairs_report import write_pairs_report
from .report import write_report
from .retrieval import PairEvaluation, evaluate_pairs
from .sharding import shard_base


__all__ = [
    "CachedImages",
    "EpochCallback",
    "EpochDataset",
    "EpochSampler",
    "Evaluation",
    "History",
    "LabelEvaluation",
    "LabelledImages",
    "Limits",
    "Pair",
    "PairEvaluation",
    "PairsRecipe",
    "Recipe",
    "TrainingInterrupted",
    "calibrate",
    "cross_validate",
    "evaluate",
    "evaluate_labels",
    "evaluate_pairs",
    "fit",
    "fit_pairs",
    "label_samples",
    "make_optimizer",
    "make_schedule",
    "read_label_file",
    "read_pairs",
    "shard_base",
    "train",
    "write_pairs_report",
    "write_report",
]
