"""Answers: questions get the model's own continuation, and everything else stays as it is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from accel.config.schema import Config, ModelConfig
from accel.data import texts
from accel.data.texts import Prompt
from accel.stages import answers
from accel.stages.prompts import PROMPTS

PASSAGE = Prompt("page", "a passage", [3, 4, 5], 2)
QUESTIONS = [Prompt("chat", "why?", [1, 2], 2), Prompt("chat", "how?", [7], 1)]


def run(prompts: list[Prompt], folder: Path) -> list[Prompt]:
    texts.write_prompts(prompts, folder / PROMPTS)
    artifact: Any = SimpleNamespace(folder=folder)
    config = Config(model=ModelConfig(name="m"))
    answers.run(config, {"checkpoint": artifact, "prompts": artifact}, Any, folder)
    return answers.read_answers(folder)


def test_questions_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[list[int]]:
        return [[*ids, 40 + number] for number, ids in enumerate(prompts)]

    monkeypatch.setattr(answers, "sample", sample)
    monkeypatch.setattr(answers, "load_on", lambda device, folder: None)
    monkeypatch.setattr(answers, "load_tokenizer", lambda folder: None)
    found = run([QUESTIONS[0], PASSAGE, QUESTIONS[1]], tmp_path)
    assert [(list(prompt.ids), prompt.length) for prompt in found] == [([1, 2, 40], 2), ([3, 4, 5], 2), ([7, 41], 1)]


def test_no_model_is_loaded_without_questions(tmp_path: Path) -> None:
    """The folder holds no model here."""
    assert [prompt.text for prompt in run([PASSAGE], tmp_path)] == ["a passage"]
