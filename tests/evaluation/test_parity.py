"""Divergence of a bundle's next-token distributions from PyTorch's: recorded, and refused beyond the limit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from accel.evaluation import parity
from accel.evaluation.reference_data import PATH

TEXTS, TOKENS, VOCABULARY = 3, 4, 7


@pytest.mark.parametrize(("noise", "passes"), [(0.0, True), (0.1, True), (1.0, False), (float("nan"), False)])
def test_divergence_along_texts(noise: float, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens of all texts count, and the message has the figures and the key that allows more."""
    generator = torch.Generator().manual_seed(0)
    for number in range(TEXTS):
        logits = 3 * torch.randn(1, TOKENS, VOCABULARY, generator=generator)
        ids = torch.arange(TOKENS)[None]
        save_file({"ids": ids, "inputs.input_ids": ids.clone(), "logits": logits}, tmp_path / PATH.format(number))

    def noisy(_model: Any, _architecture: Any, path: Any, at_once: bool) -> torch.Tensor:
        assert at_once
        found: torch.Tensor = path.logits + noise * torch.randn(path.logits.shape, generator=generator)
        return found

    monkeypatch.setattr(parity, "_path_logits", noisy)
    verification = parity.VerificationResult()
    model: Any = None
    parity.compare_distributions(model, model, tmp_path, 0.02, verification)
    assert (verification.divergence["tokens"], verification.divergence["texts"]) == (TEXTS * TOKENS, TEXTS)
    assert (verification.divergence["mean"] == 0) == (noise == 0)
    assert (not verification.failures) == passes
    if not passes:
        assert "on 12 tokens of 3 texts, allowed precision.max_divergence=0.02" in verification.failures[0]
