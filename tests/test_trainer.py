"""transformers' `Trainer` trains, evaluates and predicts with a `SEPClassifier`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_classifier import IMAGES, LABELS, logits_of, make_classifier
from transformers import Trainer, TrainingArguments


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": IMAGES[index], "labels": LABELS[index]}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_trainer(save_strategy, tmp_path):
    classifier = make_classifier()
    before = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy=save_strategy,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )

    def compute_metrics(prediction) -> dict:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = Trainer(
        classifier, arguments, train_dataset=Images(), eval_dataset=Images(), compute_metrics=compute_metrics
    )
    result = trainer.train()
    assert result.global_step == 2
    assert torch.tensor(result.training_loss).isfinite()
    changed = {name for name, p in classifier.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in classifier.named_parameters() if p.requires_grad}

    metrics = trainer.evaluate()
    logits = logits_of(classifier)
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, LABELS).item(), abs=1e-4)
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(-1) == LABELS).float().mean().item())
    torch.testing.assert_close(torch.tensor(trainer.predict(Images()).predictions), logits, rtol=1e-4, atol=1e-5)
