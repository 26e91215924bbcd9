"""Evaluation with transformers' `Seq2SeqTrainer`: loss, metrics and predictions are those of the PyTorch model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments, T5ForConditionalGeneration

from accel.models.generation import AcceleratedModel

ROWS = [
    {"input_ids": [5, 9, 7, 21, 4], "attention_mask": [1, 1, 1, 1, 1], "labels": [3, 8, 9]},
    {"input_ids": [8, 3, 11, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "labels": [4, 17, -100]},
    {"input_ids": [40, 13, 2, 7, 0], "attention_mask": [1, 1, 1, 1, 0], "labels": [90, 5, 6]},
]
UNIQUE = {"max_new_tokens": 9, "no_repeat_ngram_size": 1}


def label_share(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of labels that count, and the sum of the predictions."""
    predictions = prediction.predictions
    first = predictions[0] if isinstance(predictions, tuple) else predictions
    return {"share": float(np.mean(prediction.label_ids > 0)), "sum": float(np.sum(first))}


def trainer(model: Any, folder: Path, generate: bool) -> Seq2SeqTrainer:
    """Return a trainer that evaluates in batches of two, the last one smaller."""
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        predict_with_generate=generate,
        per_device_eval_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Seq2SeqTrainer(
        model=model, args=arguments, eval_dataset=ROWS, train_dataset=ROWS, compute_metrics=label_share
    )


@pytest.mark.parametrize("generate", [True, False], ids=["generate", "teacher forced"])
def test_predict_and_evaluate(
    model: AcceleratedModel, eager: T5ForConditionalGeneration, generate: bool, tmp_path: Path
) -> None:
    """Tokens are equal; losses, logits and metrics are close."""
    options: dict[str, Any] = UNIQUE if generate else {}
    expected, actual = (trainer(each, tmp_path, generate).predict(ROWS, **options) for each in (eager, model))
    if generate:
        assert np.array_equal(actual.predictions, expected.predictions)
        assert len(set(actual.predictions[0].tolist())) > 7
    else:
        np.testing.assert_allclose(actual.predictions[0], expected.predictions[0], rtol=1e-3, atol=1e-3)
    assert np.array_equal(actual.label_ids, expected.label_ids)
    assert actual.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-4)
    assert actual.metrics["test_sum"] == pytest.approx(expected.metrics["test_sum"], rel=1e-3)
    metrics = trainer(model, tmp_path, generate).evaluate(**options)
    assert metrics["eval_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-4)
    assert metrics["eval_sum"] == pytest.approx(expected.metrics["test_sum"], rel=1e-3)


def test_an_evaluation_loop(model: AcceleratedModel, eager: T5ForConditionalGeneration) -> None:
    """A loop written by hand, with `eval()`, `torch.no_grad()` and batches moved to the model's device."""
    losses = []
    for each in (eager, model):
        each.eval()
        total = 0.0
        with torch.no_grad():
            for row in ROWS:
                batch = {name: torch.tensor([values]).to(each.device) for name, values in row.items()}
                total += each(**batch).loss.item()
        losses.append(total)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_training_is_refused(model: AcceleratedModel, tmp_path: Path) -> None:
    """With the reason, before a step is done."""
    with pytest.raises(ValueError, match="can't be trained"):
        trainer(model, tmp_path, generate=False).train()
