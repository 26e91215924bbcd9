"""Compare a chat model's deployables with PyTorch: how many chats have equal tokens, and how fast they are.

    python -m scripts.chat_agreement CHECKPOINT DEPLOYABLE [DEPLOYABLE ...] [--runtime cuda-graph] [--chats 50]

Each chat is one question in the model's template, continued greedily by `--new-tokens` tokens unless it ends earlier.
The reference is PyTorch in FP32. Prints one line per model: chats with equal tokens, tokens per second (the median over
the chats, after a warm-up), and the first chat that differs.
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
    """Return `count` different questions, at most 50."""
    return [question.format(subject) for subject in SUBJECTS for question in QUESTIONS][:count]


def generate_chats(
    generate: Callable[..., Any], chats: list[dict[str, torch.Tensor]], device: str, new_tokens: int
) -> tuple[list[list[int]], float]:
    """Continue every chat greedily, after one warm-up.

    Args:
        generate: A model's `generate`.
        chats: Inputs of `generate`, [1, length] each.
        device: torch's name of the model's device.
        new_tokens: Tokens to generate at most.

    Returns:
        New tokens of every chat, and the median of their tokens per second.
    """
    generated, speeds = [], []
    for number, chat in enumerate([chats[0], *chats]):
        inputs = {name: tensor.to(device) for name, tensor in chat.items()}
        start = time.perf_counter()
        ids = generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        seconds = time.perf_counter() - start
        if number > 0:  # the first is the warm-up
            generated.append(ids)
            speeds.append(len(ids) / seconds)
    return generated, statistics.median(speeds)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("deployables", type=Path, nargs="+")
    parser.add_argument("--runtime", nargs="+", default=["auto"], help="one for all deployables, or one for each")
    parser.add_argument("--chats", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float16", help="dtype of the PyTorch model beside the FP32 reference")
    parser.add_argument("--compiled", action="store_true", help="also run PyTorch with a compiled static cache")
    return parser.parse_args()


def main() -> None:
    """Run all models on all chats, and print a line for each model."""
    arguments = parse_arguments()
    tokenizer = texts.load_tokenizer(arguments.checkpoint)
    if tokenizer is None:
        raise SystemExit(f"{arguments.checkpoint} has no tokenizer: give the folder of a chat model's checkpoint")
    chats = [texts.encode(tokenizer, [question], chat=True) for question in questions(arguments.chats)]

    def torch_model(dtype: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=dtype).eval().to(arguments.device)

    def run(name: str, generate: Callable[..., Any], expected: list[list[int]] | None) -> list[list[int]]:
        with torch.inference_mode():
            generated, speed = generate_chats(generate, chats, arguments.device, arguments.new_tokens)
        if expected is None:
            expected = generated
        equal = [tokens == reference for tokens, reference in zip(generated, expected, strict=True)]
        first = "" if all(equal) else f", the first to differ is chat {equal.index(False) + 1}"
        print(f"{name:<44} {sum(equal):>3} of {len(equal)} equal, {speed:8.1f} tokens/s{first}", flush=True)
        return generated

    expected = run("PyTorch float32", torch_model("float32").generate, None)
    other = torch_model(arguments.dtype)
    run(f"PyTorch {arguments.dtype}", other.generate, expected)
    runtimes = arguments.runtime
    if len(runtimes) == 1:
        runtimes = runtimes * len(arguments.deployables)
    for folder, runtime in zip(arguments.deployables, runtimes, strict=True):
        with load(folder, runtime=runtime) as model:
            run(f"accel {model.dtype}, {runtime}".replace("torch.", ""), model.generate, expected)
        gc.collect()
    if arguments.compiled:

        def generate_static(**options: Any) -> Any:
            return other.generate(**options, cache_implementation="static")

        run(f"PyTorch {arguments.dtype}, static, compiled", generate_static, expected)


if __name__ == "__main__":
    main()
