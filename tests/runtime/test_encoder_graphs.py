"""An encoder over padded buffers at constant addresses returns what an ordinary run returns."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from accel.runtime import encoder_graphs
from accel.runtime.encoder_graphs import CapturedEncoder
from accel.runtime.io_binding import BoundSession
from accel.runtime.layout import first_variant
from accel.runtime.session import SessionSettings, open_session


@pytest.fixture(scope="module")
def session(deployable: Path) -> BoundSession:
    return BoundSession(open_session(first_variant(deployable).encoder, SessionSettings()), torch.device("cpu"))


def inputs(rows: int, length: int) -> dict[str, Tensor]:
    """Return ids and a mask, the last row padded if there are several."""
    ids = torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(rows * length))
    mask = torch.ones_like(ids)
    mask[-1, length - (rows > 1) * length // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "unknown": ids}


def test_the_same_at_any_length(session: BoundSession) -> None:
    """Lengths that are padded or not, in buffers that still hold a longer input from before."""
    encoder = CapturedEncoder(session)
    for length in (16, 15, 3, 17, 16, 32, 1):
        for rows in (1, 3):
            given = inputs(rows, length)
            (expected,) = session(given, ["last_hidden_state"])
            found = encoder(given)["last_hidden_state"]
            assert found.shape == expected.shape
            kept = given["attention_mask"].bool()
            torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-5)
    assert len(encoder.graphs) == 4  # 16 and 32, of one row and of three


def test_outputs_are_not_overwritten(session: BoundSession) -> None:
    encoder = CapturedEncoder(session)
    first = encoder(inputs(1, 5))["last_hidden_state"]
    kept = first.clone()
    encoder(inputs(1, 7))
    assert torch.equal(first, kept)


def test_buffers_outlive_inference_mode(session: BoundSession) -> None:
    """Those allocated in inference mode serve a later call outside of it."""
    encoder = CapturedEncoder(session)
    with torch.inference_mode():
        expected = encoder(inputs(2, 5))["last_hidden_state"]
    assert torch.equal(encoder(inputs(2, 5))["last_hidden_state"], expected)
    assert len(encoder.graphs) == 1


def test_few_shapes_are_kept(session: BoundSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only graphs of the shapes used last are kept, each for all numbers of sequences up to a power of 2."""
    monkeypatch.setattr(encoder_graphs, "MAX_GRAPHS", 3)
    encoder = CapturedEncoder(session)
    for rows in (1, 2, 3, 4, 1, 5, 8):
        encoder(inputs(rows, 4))
    assert [kind[0][1] for kind in encoder.graphs] == [(4, 16), (1, 16), (8, 16)]


def test_large_outputs_are_not_kept(session: BoundSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large outputs come from an ordinary run, without padding."""
    size = 2 * 16 * session.outputs["last_hidden_state"].shape[2] * 4
    given = inputs(2, 11)
    (expected,) = session(given, ["last_hidden_state"])
    for largest, kept in ((size - 1, 0), (size, 1)):
        monkeypatch.setattr("accel.runtime.encoder_graphs.MAX_OUTPUT_BYTES", largest)
        encoder = CapturedEncoder(session)
        torch.testing.assert_close(encoder(given)["last_hidden_state"][0], expected[0], rtol=1e-4, atol=1e-5)
        assert len(encoder.graphs) == kept


def test_supported_sessions(session: BoundSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session must be capturable, and every output axis must be an input axis."""
    assert not CapturedEncoder.supports(session)
    monkeypatch.setattr(session.session, "capturable", True)
    assert CapturedEncoder.supports(session)
    monkeypatch.setattr(session, "inputs", {"input_ids": session.inputs["input_ids"]})
    assert CapturedEncoder.supports(session)
    monkeypatch.setattr(session, "inputs", {})
    assert not CapturedEncoder.supports(session)
