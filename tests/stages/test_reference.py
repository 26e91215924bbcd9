"""Which inputs each decoding method decodes, in which batches, and what is kept of a padded batch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from accel.data import texts
from accel.models.checkpoints import BUILT_IN, load_model
from accel.stages.reference import PATHS, batches, generate_ids

PAD, END = 9, 8


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("padded", 8, [4, 4]),
        ("beams", 8, [4]),
        ("sampling", 13, [4, 3]),
        ("greedy", 8, [1] * 4),
        ("greedy", 200, [1] * 100),
        ("beams", 5, [4]),  # never fewer than `PATHS`
        ("greedy", 2, [1, 1]),
        ("sampling", 1, [1]),
    ],
)
def test_batches(name: str, count: int, expected: list[int]) -> None:
    """`padded` decodes all inputs, the others half of them, from the first on, `greedy` each by itself."""
    ranges = batches(name, count, 4)
    assert [len(batch) for batch in ranges] == expected
    assert [number for batch in ranges for number in batch] == list(range(sum(expected)))
    assert sum(expected) >= min(PATHS, count)


class Fixed:
    """A model that generates the same ids for every row, after the prompt if it is decoder-only."""

    device = torch.device("cpu")
    generation_config = GenerationConfig(pad_token_id=PAD)

    def __init__(self, is_encoder_decoder: bool) -> None:
        self.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any) -> Tensor:
        new = torch.tensor([[5, END, PAD]]).expand(len(input_ids), -1)
        return new if self.config.is_encoder_decoder else torch.cat([input_ids, new], dim=1)


def test_padding_is_removed() -> None:
    """A prompt that holds the padding id keeps it; a sequence is as long as without the batch."""
    inputs = [texts.unpadded([1, 2, 3, 4]), texts.unpadded([PAD, 7])]
    assert generate_ids(Fixed(False), inputs, {}) == [[1, 2, 3, 4, 5, END], [PAD, 7, 5, END]]
    assert generate_ids(Fixed(True), inputs, {}) == [[5, END], [5, END]]


def test_beams_have_the_ends_that_they_have_alone() -> None:
    """transformers fills shorter texts of a beam search with the id that ends them, where the padding's is 0."""
    model = load_model(BUILT_IN / "t5-g2p")
    tokenizer = texts.load_tokenizer(BUILT_IN / "t5-g2p")
    inputs = [texts.encode(tokenizer, [word]) for word in ("a", "photosynthesis", "queue")]
    options = {"num_beams": 4, "do_sample": False, "max_new_tokens": 24}
    together = generate_ids(model, inputs, options)
    assert together == [generate_ids(model, [single], options)[0] for single in inputs]
    assert len({len(ids) for ids in together}) == 3
    assert all(ids.count(1) == 1 for ids in together)
