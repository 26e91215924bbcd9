"""Speech in padded batches."""

from pathlib import Path

import pytest
import torch

from accel import testing
from accel.serve.protocol import Request
from accel.serve.scheduling.batch_scheduler import BatchScheduler
from accel.serve.scheduling.limits import SchedulerLimits
from accel.serve.scheduling.opening import open_scheduler
from tests.families import FAMILIES
from tests.serve.collector import Collector


@pytest.mark.slow
def test_features(shared: Path, artifacts: Path) -> None:
    """Three sounds in one batch have the tokens that each has alone."""
    folder = shared / "families" / "whisper"
    folder.mkdir(parents=True, exist_ok=True)
    with testing.prepare(FAMILIES["whisper"], folder, artifacts=artifacts) as subject:
        model = subject.model
        name = model.main_input_name
        torch.manual_seed(0)
        features = [torch.randn_like(subject.inputs(1)[name]) * (3 + number) for number in range(3)]
        options = {"max_new_tokens": 8, "no_repeat_ngram_size": 1}
        alone = [model.generate(each, **options)[0].tolist() for each in features]
        scheduler = open_scheduler(model, SchedulerLimits(rows=4, window_s=0.5))
        assert isinstance(scheduler, BatchScheduler)
        scheduler.warm_up()
        found = [Collector() for _ in features]
        for each, collector in zip(features, found, strict=True):
            scheduler.submit(Request({name: each}, options), collector)
        tokens = [each.tokens() for each in found]
        scheduler.close()
    assert len({tuple(each) for each in alone}) == 3
    assert [right[-len(each) :] for each, right in zip(tokens, alone, strict=True)] == tokens
