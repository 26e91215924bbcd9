"""Time what a model computes before it decodes: accel's, PyTorch's eager and PyTorch's compiled.

    python -m scripts.prompt_latency DEPLOYABLE --checkpoint FOLDER [--shapes 1x512 1x2048] [--padded] [--device cuda]

Milliseconds of the host's clock, with the device synchronized at both ends. Of a decoder-only model, from the call with
random ids to the logits of the last token and the caches. Of an encoder-decoder, the call of its encoder; a speech
model's reads random features of its fixed length, whatever length the shape names. Each model is opened in a process of
its own, one after the other, since a compiler's threads would slow the others. PyTorch's model computes attention by
SDPA, in the dtype of the deployable. "Compiled" is `torch.compile(model, dynamic=False)`, with graphs of its own for
each shape. With the fused engine, "plan" and "onnxruntime" are accel with all prompts of a decoder-only model computed
by one of the two (`runtime.fused_prefill`).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from accel.models.loading import load
from accel.models.model_class import model_class

ACCEL: dict[str, dict[str, Any]] = {  # options to load the deployable with
    "accel": {},
    "plan": {"fused_prefill": 0},
    "onnxruntime": {"fused_prefill": 1_000_000},
}
USUAL = ("accel", "eager", "compiled")
BACKENDS = (*ACCEL, "eager", "compiled")
WARM_UP = 3  # calls of each shape before the timed ones
PADDING = 100  # at most so many tokens of the last row are hidden with --padded

Model = Callable[..., Any]


@dataclass(frozen=True)
class Latency:
    """Latency of one shape, in milliseconds."""

    shape: str
    median: float
    fastest: float
    slowest: float


@dataclass(frozen=True)
class Work:
    """What is timed: calls of `model` with `inputs(batch, length)` and the arguments `options`."""

    model: Model
    inputs: Callable[[int, int], dict[str, Tensor]]
    options: dict[str, Any]


def open_backend(name: str, options: argparse.Namespace) -> Work:
    """Return the work of a backend, by its name, one of `BACKENDS`."""
    config = AutoConfig.from_pretrained(options.checkpoint)
    model: Any = load(options.deployable, **ACCEL.get(name, {}))
    dtype = model.dtype
    if name not in ACCEL:
        model.close()
        model = model_class(config).from_pretrained(options.checkpoint, dtype=dtype, attn_implementation="sdpa")
        model = model.to(options.device).eval()
    arguments: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
    if config.is_encoder_decoder:
        model, arguments = model.get_encoder(), {}
    if name == "compiled":
        model = torch.compile(model, dynamic=False)
    if getattr(config, "num_mel_bins", None):
        return Work(model, lambda batch, _: features(batch, config, dtype, options.device), arguments)
    vocabulary, padded = config.vocab_size, options.padded
    return Work(model, lambda batch, length: prompt(batch, length, vocabulary, padded, options.device), arguments)


def features(batch: int, config: PretrainedConfig, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return random features [batch, mel bins, frames] of a speech model, whose encoder halves the frames."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    return {"input_features": frames.to(device, dtype)}


def prompt(batch: int, length: int, vocabulary: int, padded: bool, device: str) -> dict[str, Tensor]:
    """Return random ids [batch, length] and their mask, which hides the beginning of the last row where `padded`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, : min(PADDING, length // 2)] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def time_calls(work: Work, batch: int, length: int, repeats: int) -> list[float]:
    """Return the milliseconds of each of `repeats` calls, after `WARM_UP` others."""
    inputs = work.inputs(batch, length)
    synchronize = torch.cuda.synchronize if next(iter(inputs.values())).is_cuda else lambda: None
    times = []
    with torch.inference_mode():
        for _ in range(WARM_UP + repeats):
            synchronize()
            start = time.perf_counter()
            output = work.model(**inputs, **work.options)
            synchronize()
            times.append((time.perf_counter() - start) * 1000)
            del output  # its caches, before the next call allocates others
    return times[WARM_UP:]


def measure(name: str, options: argparse.Namespace) -> list[Latency]:
    """Return the latency of a backend at every shape."""
    work = open_backend(name, options)
    found = []
    for shape in options.shapes:
        batch, length = map(int, shape.split("x"))
        times = time_calls(work, batch, length, options.repeats)
        found.append(Latency(shape, statistics.median(times), min(times), max(times)))
    return found


def table(found: dict[str, Sequence[Latency]]) -> str:
    """Return a table in Markdown: shapes by backends, and the ratio of the first backend to each of the others."""
    first, *others = found
    lines = [
        f"| batch x length | {' | '.join(found)} | {' | '.join(f'{first} / {name}' for name in others)} |",
        "|---" * (len(found) + len(others) + 1) + "|",
    ]
    for row in zip(*found.values(), strict=True):
        cells = [f"{each.median:.3g} [{each.fastest:.3g}-{each.slowest:.3g}]" for each in row]
        ratios = [f"{row[0].median / each.median:.2f}" for each in row[1:]]
        lines.append(f"| {row[0].shape} | {' | '.join(cells + ratios)} |")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deployable", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint, for PyTorch")
    parser.add_argument(
        "--shapes", nargs="+", default=["1x512", "1x2048", "8x512", "8x2048"], help="batch x prompt or source"
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(USUAL))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--padded", action="store_true", help="hide the beginning of the last row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each backend in a process of its own, and print the table."""
    options = parse_arguments(arguments)
    found: dict[str, Sequence[Latency]] = {}
    for name in options.backends:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found[name] = process.submit(measure, name, options).result()
    print(table(found))
    if options.json is not None:
        figures = {name: [asdict(each) for each in latencies] for name, latencies in found.items()}
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
