"""Compare accel on a CPU with other libraries that run the same checkpoint, in turns in one run.

    python -m scripts.peers FOLDER [--model t5-small | CHECKPOINT] [--deployable int8=DEPLOYABLE ...]
        [--backends accel-fp32 openvino-int8 ...] [--threads 2] [--repeats 7]

FOLDER keeps what later runs use again: a virtual environment of the peers with pinned versions, the models as each
library converts them, and accel's artifacts. pip's environment variables apply, such as an index that has CPU builds of
torch. `t5-small` is a model of T5-small's dimensions with random weights. CHECKPOINT is the folder of a T5 or a Llama.

Every library has a process of its own, and computes with the same number of threads. The tokens of each are compared
with those of transformers in FP32: a library that generates something else can't be compared. accel's models are built
up to `merge`, without verification, unless `--deployable` names a folder. The table is printed, and written to
FOLDER/comparison-MODEL.json.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from accel import build
from accel.benchmark.timer import BackgroundLoad
from accel.data.corpus import SAMPLES
from accel.errors import AccelError
from accel.system.environment import commit, machine
from scripts.peers.checkpoint import save_random_t5
from scripts.peers.comparison import DECODER_ONLY, ENCODER_DECODER, Row, Workload, table, take_turns
from scripts.peers.environment import PACKAGES, WITHOUT_DEPENDENCIES, install, python_of
from scripts.peers.libraries import OPENERS, Ids, Request
from scripts.peers.worker import Worker, WorkerError

RANDOM_T5 = "t5-small"
REFERENCE = "transformers-fp32"
OURS = ("accel-fp32", "accel-int8", "accel-int4")
PEERS = {
    False: ("openvino-fp32", "ctranslate2-fp32", "openvino-int8", "ctranslate2-int8"),
    True: ("openvino-fp32", "openvino-int8", "onnxruntime-genai-int4", "llama.cpp-int8"),
}
"""Whether the model is decoder-only -> the peers that are compared by default. llama.cpp's 8 bits are Q8_0."""
BUILT_STAGES = "stage=[export,optimize,convert,merge]"
OWN_ENVIRONMENT = ("accel", "transformers")  # run by the interpreter that runs accel


def split_backend(name: str) -> tuple[str, str]:
    """Return library and precision of a backend such as `openvino-int8`.

    Raises:
        AccelError: There is no such library or precision.
    """
    library, _, precision = name.rpartition("-")
    if library not in OPENERS or precision not in ("fp32", "int8", "int4"):
        raise AccelError(
            f"backend {name!r} is unknown: give LIBRARY-PRECISION, with a library of {', '.join(OPENERS)} and a "
            "precision of fp32, int8, int4"
        )
    return library, precision


def prepare_checkpoint(model: str, folder: Path) -> Path:
    """Return the folder of the checkpoint, made first if it is the one with random weights.

    Raises:
        AccelError: It is no folder of a checkpoint.
    """
    if model == RANDOM_T5:
        checkpoint = folder / RANDOM_T5
        if not (checkpoint / "tokenizer.json").exists():  # written last
            save_random_t5(checkpoint)
        return checkpoint
    if not (Path(model) / "config.json").is_file():
        raise AccelError(f"--model {model}: give {RANDOM_T5} or the folder of a checkpoint, with a config.json")
    return Path(model).resolve()


def deployable(precision: str, checkpoint: Path, folder: Path, given: dict[str, Path]) -> Path:
    """Return accel's folder in a precision: the one that the user gave, or one that is built or was built before."""
    if precision in given:
        return given[precision]
    overrides = [f"precision={precision}", "runtime=cpu", BUILT_STAGES, f"artifacts={folder / 'artifacts'}"]
    return build(str(checkpoint), overrides).folder


def make_inputs(workload: Workload, vocabulary: int) -> Ids:
    """Return random ids, all rows distinct, without the first ids, which are special tokens in most vocabularies."""
    source = random.Random(0)  # noqa: S311 - not for secrets
    return [[source.randrange(3, vocabulary) for _ in range(workload.source)] for _ in range(workload.batch)]


def text_inputs(workload: Workload, checkpoint: Path) -> Ids:
    """Return the first ids of a text, for a trained model, which repeats itself after random ids.

    Raises:
        AccelError: The checkpoint has no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise AccelError(f"{checkpoint} has no tokenizer, which a decoder-only model's prompt needs") from error
    ids: list[int] = tokenizer((SAMPLES / "page.txt").read_text()).input_ids
    length = workload.source
    return [ids[row * length : (row + 1) * length] for row in range(workload.batch)]


def open_workers(
    stack: ExitStack, requests: dict[str, Request], missing: dict[str, str], folder: Path
) -> tuple[dict[str, Worker], list[Row]]:
    """Open a model for each backend, one after the other. Return the workers, and rows of those that failed."""
    workers: dict[str, Worker] = {}
    failed = []
    for name, request in requests.items():
        reason = missing.get(request.library)
        if reason is None:
            python = Path(sys.executable) if request.library in OWN_ENVIRONMENT else python_of(folder)
            worker = stack.enter_context(Worker(python, request.threads))
            print(f"opening {name}", file=sys.stderr, flush=True)
            try:
                worker.open(request)
                workers[name] = worker
            except WorkerError as error:
                reason = str(error)
        if reason is not None:
            failed.append(Row(name, reason=reason))
    return workers, failed


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare everything, measure, and print a table for each workload. Return the figures as JSON."""
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = prepare_checkpoint(options.model, folder)
    config = json.loads((checkpoint / "config.json").read_text())
    decoder_only = not config.get("is_encoder_decoder", False)
    workloads = DECODER_ONLY if decoder_only else ENCODER_DECODER
    names = list(dict.fromkeys([REFERENCE, *(options.backends or (*OURS, *PEERS[decoder_only]))]))
    backends = {name: split_backend(name) for name in names}
    installed = sorted({library for library, _ in backends.values()} - set(OWN_ENVIRONMENT))
    missing = dict(install(folder, installed)) if installed else {}
    given = dict(options.deployable)
    requests = {
        name: Request(
            library,
            precision,
            checkpoint,
            deployable(precision, checkpoint, folder, given) if library == "accel" else None,
            folder / "converted" / f"{checkpoint.name}-{name}",
            options.threads,
            max(workload.new_tokens for workload in workloads),
        )
        for name, (library, precision) in backends.items()
    }
    (folder / "converted").mkdir(exist_ok=True)
    tables: list[dict[str, Any]] = []
    with ExitStack() as stack:
        workers, failed = open_workers(stack, requests, missing, folder)
        load_before = os.getloadavg()[0]
        stack.enter_context(background := BackgroundLoad())
        for workload in workloads:
            ids = text_inputs(workload, checkpoint) if decoder_only else make_inputs(workload, config["vocab_size"])
            generates = {
                name: partial(worker.generate, ids, workload.beams, workload.new_tokens)
                for name, worker in workers.items()
            }
            measured = {row.name: row for row in [*failed, *take_turns(generates, options.repeats)]}
            rows = [measured[name] for name in names]
            print(f"\n{table(workload, rows, REFERENCE)}", flush=True)
            tables.append({"workload": vars(workload), "rows": [row.record() for row in rows]})
    facts = machine("cpu", options.threads) | {
        "load_average": [load_before, os.getloadavg()[0]],
        "background_load": background.share,
        "commit": commit(),
        "packages": [*(name for group in PACKAGES.values() for name in group), *sum(WITHOUT_DEPENDENCIES.values(), ())],
    }
    print(
        f"\n{facts['processor']}, {options.threads} threads, {options.repeats} repeats in turns; load average "
        f"{load_before:.1f} before and {facts['load_average'][1]:.1f} after; other processes took "
        f"{background.share:.0%} of the processor"
    )
    return {"model": checkpoint.name, "machine": facts, "tables": tables}


def parse_deployable(value: str) -> tuple[str, Path]:
    """Return precision and folder of `PRECISION=FOLDER`."""
    precision, equals, path = value.partition("=")
    if not equals or precision not in ("fp32", "int8", "int4"):
        raise argparse.ArgumentTypeError(f"{value!r}: give fp32=FOLDER, int8=FOLDER or int4=FOLDER")
    return precision, Path(path)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="keeps the environment and all models; created if missing")
    parser.add_argument("--model", default=RANDOM_T5, help="t5-small, or the folder of a checkpoint")
    parser.add_argument("--deployable", type=parse_deployable, action="append", default=[], metavar="PRECISION=FOLDER")
    parser.add_argument("--backends", nargs="+", help="LIBRARY-PRECISION; default: all that run the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    for name in ("threads", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison. Return the exit status."""
    options = parse_arguments(arguments)
    try:
        figures = compare(options)
    except AccelError as error:
        print(error, file=sys.stderr)
        return 2
    output = options.folder / f"comparison-{figures['model']}.json"
    output.write_text(json.dumps(figures, indent=1))
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
