"""Compare accel's server with others under load: a closed loop of clients over HTTP, mixed lengths, greedy, FP32.

    python -m scripts.serve_peers FOLDER [--model CHECKPOINT] [--deployable DEPLOYABLE] [--requests 128] [--rounds 3]

A decoder-only model is compared with `transformers serve`, as it is and with `--continuous-batching`; an
encoder-decoder with CTranslate2 behind a small FastAPI application. By default, T5-small's dimensions with random
weights. Both are installed into an environment in FOLDER, which also keeps accel's artifacts and the servers' logs.
All servers stay open and are loaded in turns, so that each sees the same machine. Prints, for each round, throughput
and latencies, and how many replies are those of transformers' `generate` for the prompt alone.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from accel.data.corpus import SAMPLES, read_texts
from accel.data.pretrained import load_config
from accel.errors import AccelError
from scripts.peers.checkpoint import save_random_t5
from scripts.peers.environment import install, python_of
from scripts.scheduler_load import Load, run_clients
from scripts.serve_peers.server import Reply, Server, Work

SERVER = ("fastapi==0.165.0", "uvicorn==0.54.0", "pydantic==2.14.3", "starlette==1.10.0")
PACKAGES = {
    "transformers": ("torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", *SERVER),
    # what the extra `serving` of transformers asks for besides
    "transformers serve": ("openai==3.57.0", "accelerate==1.15.0", "rich==15.0.0"),
    "ctranslate2": ("ctranslate2==4.8.5",),
}
PROMPT_TOKENS = (4, 24)  # fewest and most
NEW_TOKENS = (8, 40)
BUILD_S, START_S = 3600.0, 300.0  # accel builds its folder at the first run
TEXTS = "page.txt"  # of accel's samples
WARM_UP = 8  # requests of each server before the first round


def mixed_work(checkpoint: Path, decoder_only: bool, count: int) -> list[Work]:
    """Return requests of uniformly random lengths: texts for a decoder-only model, otherwise token ids."""
    generator = torch.Generator().manual_seed(0)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    words = " ".join(read_texts(SAMPLES / TEXTS)).split()
    vocabulary = load_config(checkpoint).vocab_size
    work = []
    for _ in range(count):
        length, new = pick(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1), pick(NEW_TOKENS[0], NEW_TOKENS[1] + 1)
        if decoder_only:  # a word has somewhat more than one token
            start = pick(0, len(words) - length)
            work.append(Work(" ".join(words[start : start + length]), new))
        else:
            work.append(Work(torch.randint(3, vocabulary, (length,), generator=generator).tolist(), new))
    return work


def expected_texts(checkpoint: Path, decoder_only: bool, work: Sequence[Work]) -> list[str]:
    """Return the texts of transformers' `generate` in FP32, one prompt at a time."""
    loader: Any = AutoModelForCausalLM if decoder_only else AutoModelForSeq2SeqLM
    tokenizer, model = (
        AutoTokenizer.from_pretrained(checkpoint),
        loader.from_pretrained(checkpoint, dtype=torch.float32),
    )
    texts = []
    for each in work:
        ids = torch.tensor([tokenizer(each.prompt)["input_ids"] if isinstance(each.prompt, str) else each.prompt])
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=each.new_tokens
            )
        new_ids = output[0, ids.shape[1] if decoder_only else 1 :]
        texts.append(str(tokenizer.decode(new_ids, skip_special_tokens=True)))
    return texts


def servers(
    folder: Path, checkpoint: Path, deployable: Path | None, decoder_only: bool, threads: int
) -> list[dict[str, Any]]:
    """Return the arguments of each `Server`; accel's own builds the deployable where none is given."""
    python = str(python_of(folder))
    overrides = [f"runtime.threads={threads}", "serve.log_requests=false", "stage=serve", "serve.port={port}"]
    if deployable is None:
        overrides += ["model=auto", f"model.checkpoint='{checkpoint}'", f"artifacts='{folder / 'artifacts'}'"]
    else:
        overrides += [f"serve.models={{{{model: '{deployable.absolute()}'}}}}"]
    accel = {
        "name": "accel",
        "command": [sys.executable, "-m", "accel", *overrides],
        "ready": "/ready",
        "model": None,
        "start_s": BUILD_S,
    }
    if not decoder_only:
        app = str(Path(__file__).with_name("ctranslate2_app.py"))
        command = [python, app, str(checkpoint), str(folder / f"{checkpoint.name}-ctranslate2"), "--port", "{port}"]
        command += ["--threads", str(threads)]
        return [accel, {"name": "CTranslate2", "command": command, "ready": "/health", "model": "", "start_s": START_S}]
    command = [python, "-m", "transformers.cli.transformers", "serve", str(checkpoint), "--host", "127.0.0.1"]
    command += ["--port", "{port}", "--dtype", "float32", "--device", "cpu"]
    plain = {"name": "transformers serve", "command": command, "ready": "/health", "start_s": START_S}
    plain["model"] = str(checkpoint)
    batching = plain | {"name": "transformers serve, batching", "command": [*command, "--continuous-batching"]}
    return [accel, plain, batching]


def report(name: str, load: Load[Reply], expected: Sequence[str]) -> str:
    """Return a line of the table."""
    tokens = sum(reply.tokens for reply in load.replies)
    equal = sum(reply.text == text for reply, text in zip(load.replies, expected, strict=True))
    latencies = statistics.quantiles(load.latencies, n=100, method="inclusive")
    return (
        f"{name:30} {load.requests_per_second:7.2f} requests/s {tokens / load.seconds:8.1f} tokens/s  "
        f"latency p50 {latencies[49]:6.2f} s, p99 {latencies[98]:6.2f} s  {equal} of {len(expected)} equal"
    )


def compare(options: argparse.Namespace) -> None:
    """Start the servers and run the rounds."""
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "random-t5" if options.model is None else options.model.absolute()
    if options.model is None and not checkpoint.exists():
        save_random_t5(checkpoint)
    decoder_only = not load_config(checkpoint).is_encoder_decoder
    failed = install(folder, ["transformers serve" if decoder_only else "ctranslate2"], packages=PACKAGES)
    for library, reason in failed.items():
        raise AccelError(f"{library}: {reason}")
    torch.set_num_threads(options.threads)
    work = mixed_work(checkpoint, decoder_only, options.requests)
    expected = expected_texts(checkpoint, decoder_only, work)
    with ExitStack() as stack:
        opened = []
        for arguments in servers(folder, checkpoint, options.deployable, decoder_only, options.threads):
            log = folder / f"{arguments['name'].replace(' ', '-')}.log"
            try:
                server = stack.enter_context(Server(**arguments, log=log, threads=options.threads))
                run_clients(server.answer, work[:WARM_UP], options.clients)
                opened.append(server)
            except AccelError as error:
                print(error, file=sys.stderr, flush=True)
        if not opened:
            raise AccelError(f"no server answers; their logs are in {folder}")
        for number in range(options.rounds):
            for server in opened[number % len(opened) :] + opened[: number % len(opened)]:
                load = run_clients(server.answer, work, options.clients)
                print(f"round {number + 1}: {report(server.name, load, expected)}", flush=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps the environment, models and logs; created if missing")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; default: a random T5")
    parser.add_argument(
        "--deployable", type=Path, help="accel's folder, built with runtime.static=true; default: build it"
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="that compute, of each server")
    options = parser.parse_args(arguments)
    for name in ("clients", "requests", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give at least 1")
    for name, folder in (("model", options.model), ("deployable", options.deployable)):
        if folder is not None and not (folder / "config.json").is_file():
            parser.error(f"--{name} {folder}: no such model, config.json is missing")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison. Return the exit status."""
    try:
        compare(parse_arguments(arguments))
    except AccelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
