"""Inputs of a decoder, put together from its calls."""

import torch

from accel.runtime.token_history import MAX_CALLS, TokenHistory

AXES = {
    "input_ids": ["batch_size", "new"],
    "position_ids": ["batch_size", "new"],
    "attention_mask": ["batch_size", "total"],
    "encoder": ["batch_size", 3],
}


def call(ids: list[list[int]], total: int) -> dict[str, torch.Tensor]:
    """The inputs of a call; the first token of the second sequence is padding."""
    mask = torch.ones(len(ids), total, dtype=torch.int64)
    mask[1:, 0] = 0
    positions = torch.arange(total)[-len(ids[0]) :] - (torch.arange(len(ids)) > 0)[:, None].long()
    return {
        "input_ids": torch.tensor(ids),
        "position_ids": positions,
        "attention_mask": mask,
        "encoder": torch.ones(len(ids), 3),
    }


def test_calls() -> None:
    """A prompt, repeated for beams, with tokens of other beams, without the last ones, and with new ones."""
    history = TokenHistory(AXES)
    history.append(call([[0, 1, 2], [0, 0, 3]], 3))
    history.select(torch.tensor([0, 0, 1]))
    assert history.inputs()["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 1]]
    history.append(call([[4], [5], [6]], 4))
    history.reorder(torch.tensor([1, 1, 2]))
    history.append(call([[7], [8], [9]], 5))
    copy = history.copy()
    history.crop(4)
    assert history.inputs()["input_ids"].tolist() == [[0, 1, 2, 5], [0, 1, 2, 5], [0, 0, 3, 6]]
    assert history.inputs()["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    history.append(call([[1], [2], [3]], 5))
    assert history.inputs()["input_ids"].tolist() == [[0, 1, 2, 5, 1], [0, 1, 2, 5, 2], [0, 0, 3, 6, 3]]
    assert copy.inputs()["input_ids"].tolist() == [[0, 1, 2, 5, 7], [0, 1, 2, 5, 8], [0, 0, 3, 6, 9]]
    assert set(copy.inputs()) == {"input_ids", "position_ids", "attention_mask"}


def test_ids_that_are_selected_on_the_device() -> None:
    """Their positions and masks follow, and both may be written over."""
    history, ids, parents = TokenHistory(AXES), torch.zeros(2, 1, dtype=torch.int64), torch.tensor([1, 1])
    history.append(call([[0, 1, 2], [0, 0, 3]], 3))
    for _ in range(4):
        history.reorder(parents)
        history.append({"input_ids": ids})
        ids += 10
        parents.copy_(torch.arange(2))
    assert history.inputs()["input_ids"].tolist() == [[0, 0, 3, 0, 10, 20, 30]] * 2
    assert history.inputs()["position_ids"].tolist() == [[-1, 0, 1, 2, 3, 4, 5]] * 2
    assert history.inputs()["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]
    history.crop(5)
    history.append(call([[1], [2]], 6))
    assert history.inputs()["input_ids"].tolist() == [[0, 0, 3, 0, 10, 1], [0, 0, 3, 0, 10, 2]]
    assert history.inputs()["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]


def test_many_calls() -> None:
    """They are joined from time to time, and tokens may be written over by their owner."""
    history, ids = TokenHistory(AXES), torch.zeros(1, 1, dtype=torch.int64)
    for number in range(3 * MAX_CALLS):
        history.append({"input_ids": ids.fill_(number)})
    assert history.inputs()["input_ids"].tolist() == [list(range(3 * MAX_CALLS))]
    assert len(history._calls) <= MAX_CALLS
