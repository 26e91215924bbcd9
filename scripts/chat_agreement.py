"""Compare what a chat model writes as a deployable with what PyTorch writes, chat by chat, and how fast.

    python -m scripts.chat_agreement CHECKPOINT DEPLOYABLE [DEPLOYABLE ...] [--runtime cuda-graph] [--chats 50]

Every chat is one question in the model's template, continued greedily by exactly `--new-tokens` tokens unless it ends.
The reference is PyTorch in FP32. Prints one line a contender: chats with equal tokens, tokens a second (the median over
the chats, after one that is not counted), and the first chat that differs.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from accel import load
from accel.data import texts

SUBJECTS = ("rain", "bread", "bicycles", "the moon", "volcanoes", "chess", "whales", "glass", "the heart", "bridges")
QUESTIONS = (
    "Explain {} to a child of six.",
    "What are three common mistakes people make about {}?",
    "Write four lines of verse about {}.",
    "Give a short history of {}.",
    "Which words come to mind when you think of {}? Say why.",
)


def questions(count: int) -> list[str]:
    """`count` questions, all different, up to 50."""
    return [question.format(subject) for subject in SUBJECTS for question in QUESTIONS][:count]


def written(
    generate: Callable[..., Any], chats: list[dict[str, torch.Tensor]], device: str, new: int
) -> tuple[list[list[int]], float]:
    """The new tokens of every chat, and the median of tokens a second."""
    found, speeds = [], []
    for number, chat in enumerate([chats[0], *chats]):
        given = {name: tensor.to(device) for name, tensor in chat.items()}
        start = time.perf_counter()
        ids = generate(**given, max_new_tokens=new, do_sample=False)[0, given["input_ids"].shape[1] :].tolist()
        seconds = time.perf_counter() - start
        if number:
            found.append(ids)
            speeds.append(len(ids) / seconds)
    return found, statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("deployables", type=Path, nargs="+")
    parser.add_argument("--runtime", nargs="+", default=["auto"], help="one for all, or one for each")
    parser.add_argument("--chats", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float16", help="of PyTorch's contender")
    parser.add_argument("--compiled", action="store_true", help="PyTorch with a compiled static cache as well")
    given = parser.parse_args()
    tokenizer = texts.load_tokenizer(given.checkpoint)
    if tokenizer is None:
        raise SystemExit(f"{given.checkpoint} has no tokenizer")
    chats = [texts.encode(tokenizer, [question], chat=True) for question in questions(given.chats)]

    def torch_model(dtype: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype=dtype).eval().to(given.device)

    def run(name: str, generate: Callable[..., Any]) -> list[list[int]]:
        with torch.inference_mode():
            found, speed = written(generate, chats, given.device, given.new_tokens)
        same = [ours == theirs for ours, theirs in zip(found, expected or found, strict=True)]
        first = "" if all(same) else f", the first to differ is chat {same.index(False) + 1}"
        print(f"{name:<44} {sum(same):>3} of {len(same)} equal, {speed:8.1f} tokens/s{first}", flush=True)
        return found

    expected: list[list[int]] = []
    expected = run("PyTorch float32", torch_model("float32").generate)
    other = torch_model(given.dtype)
    run(f"PyTorch {given.dtype}", other.generate)
    runtimes = given.runtime * (len(given.deployables) if len(given.runtime) == 1 else 1)
    for folder, runtime in zip(given.deployables, runtimes, strict=True):
        with load(folder, runtime=runtime) as model:
            run(f"accel {model.dtype}, {runtime}".replace("torch.", ""), model.generate)
        gc.collect()
    if given.compiled:
        run(
            f"PyTorch {given.dtype}, static, compiled",
            lambda **options: other.generate(**options, cache_implementation="static"),
        )


if __name__ == "__main__":
    main()
