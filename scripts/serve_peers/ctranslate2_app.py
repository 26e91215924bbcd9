"""CTranslate2 behind a small FastAPI application: what its users write to serve an encoder-decoder.

    python ctranslate2_app.py CHECKPOINT CONVERTED --port 8001 --threads 2

Requests that wait when a batch ends form the next batch, up to `BATCH` of them. It runs in an environment of its own,
which has neither accel nor its other scripts.
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import ctranslate2
import uvicorn
from fastapi import FastAPI

BATCH = 32  # as many as the clients, and as accel's `serve.max_rows`
END = "</s>"

Waiting = asyncio.Queue[tuple[list[str], int, asyncio.Future[list[str]]]]


def create_app(translator: Any, words: list[str]) -> FastAPI:
    """Return the application.

    Args:
        translator: The model.
        words: Id -> token.
    """
    app = FastAPI()
    waiting: Waiting = asyncio.Queue()
    tasks: list[asyncio.Task[None]] = []

    async def decode() -> None:
        while True:
            jobs = [await waiting.get()]
            while len(jobs) < BATCH and not waiting.empty():
                jobs.append(waiting.get_nowait())
            sources, limits, futures = zip(*jobs, strict=True)
            try:
                results = await asyncio.to_thread(
                    translator.translate_batch, list(sources), beam_size=1, max_decoding_length=max(limits)
                )
            except Exception as error:  # the clients of this batch are told, later ones are served
                for future in futures:
                    future.set_exception(error)
                continue
            for result, limit, future in zip(results, limits, futures, strict=True):
                future.set_result(result.hypotheses[0][:limit])

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.post("/v1/completions")
    async def complete(body: dict[str, Any]) -> dict[str, Any]:
        if not tasks:
            tasks.append(asyncio.create_task(decode()))
        future: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        await waiting.put(([words[number] for number in body["prompt"]], body["max_tokens"], future))
        tokens = await future
        text = " ".join(token for token in tokens if token != END)
        return {"choices": [{"text": text}], "usage": {"completion_tokens": len(tokens)}}

    return app


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("converted", type=Path, help="made from the checkpoint when it doesn't exist")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not options.converted.exists():
        ctranslate2.converters.TransformersConverter(str(options.checkpoint)).convert(str(options.converted))
    words = json.loads((options.converted / "shared_vocabulary.json").read_text())
    translator = ctranslate2.Translator(str(options.converted), intra_threads=options.threads, compute_type="float32")
    uvicorn.run(create_app(translator, words), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
