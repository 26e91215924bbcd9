"""The libraries that are compared, each behind one function: open a model, then generate greedily or with beams.

Imports every library inside its own function, since no environment has them all.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Ids: TypeAlias = list[list[int]]
"""Token ids, [rows][tokens]; all rows have the same length."""

Generate: TypeAlias = Callable[[Ids, int, int], Ids]
"""Function of the source or prompt ids, the number of beams and of new tokens, that returns the new tokens."""


class NotOfferedError(Exception):
    """A library can't run this workload, for the reason in the message."""


@dataclass(frozen=True)
class Request:
    """What a worker opens.

    Attributes:
        library: A name in `OPENERS`.
        precision: `fp32`, `int8` or `int4`.
        checkpoint: Folder of the Hugging Face checkpoint.
        deployable: accel's folder; None for other libraries.
        converted: Folder for the library's own files, converted from the checkpoint when it doesn't exist.
        threads: Threads that compute.
        new_tokens: Largest number of new tokens, of which some libraries need to know when a model is opened.
    """

    library: str
    precision: str
    checkpoint: Path
    deployable: Path | None
    converted: Path
    threads: int
    new_tokens: int

    @property
    def decoder_only(self) -> bool:
        """Whether the model has no encoder."""
        config: dict[str, Any] = json.loads((self.checkpoint / "config.json").read_text())
        return not config.get("is_encoder_decoder", False)


def transformers_generate(model: Any, decoder_only: bool) -> Generate:
    """Return a function that calls transformers' `generate`, or one with its interface."""
    import torch

    def generate(ids: Ids, beams: int, new_tokens: int) -> Ids:
        source = torch.tensor(ids)
        options = {"num_beams": beams, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
        with torch.inference_mode():
            output = model.generate(input_ids=source, attention_mask=torch.ones_like(source), **options)
        start = source.shape[1] if decoder_only else 1
        new: Ids = output[:, start:].tolist()
        return new

    return generate


def open_transformers(request: Request) -> Generate:
    """Open the checkpoint with transformers, in eager mode and FP32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.set_num_threads(request.threads)
    loader: Any = AutoModelForCausalLM if request.decoder_only else AutoModelForSeq2SeqLM
    model = loader.from_pretrained(request.checkpoint, dtype=torch.float32)
    return transformers_generate(model.eval(), request.decoder_only)


def open_accel(request: Request) -> Generate:
    """Open accel's deployable."""
    import torch

    from accel import load

    torch.set_num_threads(request.threads)
    if request.deployable is None:
        raise NotOfferedError(f"no deployable in {request.precision}")
    return transformers_generate(load(request.deployable, "cpu", threads=request.threads), request.decoder_only)


def open_openvino(request: Request) -> Generate:
    """Open the checkpoint with Optimum Intel, converted by it once; int8 are its weights in 8 bits.

    In FP32, computation and caches are FP32 as well; otherwise they are what OpenVINO chooses by itself.
    """
    import torch
    from optimum.intel import OVModelForCausalLM, OVModelForSeq2SeqLM

    torch.set_num_threads(request.threads)
    loader: Any = OVModelForCausalLM if request.decoder_only else OVModelForSeq2SeqLM
    if not request.converted.exists():
        exported = loader.from_pretrained(
            request.checkpoint, export=True, compile=False, load_in_8bit=request.precision == "int8"
        )
        exported.save_pretrained(request.converted)
    options = {"INFERENCE_NUM_THREADS": str(request.threads), "PERFORMANCE_HINT": "LATENCY", "CACHE_DIR": ""}
    if request.precision == "fp32":
        options |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    model = loader.from_pretrained(request.converted, ov_config=options)
    return transformers_generate(model, request.decoder_only)


def open_ctranslate2(request: Request) -> Generate:
    """Open the checkpoint with CTranslate2, converted by it once."""
    import ctranslate2

    if request.decoder_only:
        raise NotOfferedError("compared on encoder-decoders only")
    compute_type = {"fp32": "float32", "int8": "int8"}[request.precision]
    if not request.converted.exists():
        converter = ctranslate2.converters.TransformersConverter(str(request.checkpoint))
        converter.convert(str(request.converted), quantization=compute_type)
    words = json.loads((request.converted / "shared_vocabulary.json").read_text())
    numbers = {word: number for number, word in enumerate(words)}
    translator = ctranslate2.Translator(
        str(request.converted), intra_threads=request.threads, inter_threads=1, compute_type=compute_type
    )

    def generate(ids: Ids, beams: int, new_tokens: int) -> Ids:
        sources = [[words[number] for number in row] for row in ids]
        results = translator.translate_batch(
            sources, beam_size=beams, min_decoding_length=new_tokens, max_decoding_length=new_tokens
        )
        return [[numbers[word] for word in result.hypotheses[0]] for result in results]

    return generate


def open_onnxruntime_genai(request: Request) -> Generate:
    """Open the checkpoint with ONNX Runtime GenAI, converted by its own model builder once."""
    import onnxruntime_genai

    if not request.decoder_only:
        raise NotOfferedError("its model builder knows no encoder-decoders but Whisper")
    folder = request.converted
    if not folder.exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(request.checkpoint)]
        command += ["-o", str(folder), "-p", request.precision, "-e", "cpu", "-c", str(folder) + "-cache"]
        # S603: a fixed command over the user's own folders
        built = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if built.returncode:
            raise NotOfferedError(f"its model builder failed: {last_line(built.stderr)}")
    config_file = folder / "genai_config.json"
    config = json.loads(config_file.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = request.threads
    config_file.write_text(json.dumps(config, indent=1))
    model = onnxruntime_genai.Model(str(folder))

    def generate(ids: Ids, beams: int, new_tokens: int) -> Ids:
        length = len(ids[0]) + new_tokens
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(
            batch_size=len(ids), num_beams=beams, do_sample=False, min_length=length, max_length=length
        )
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(ids if len(ids) > 1 else ids[0])
        while not generator.is_done():
            generator.generate_next_token()
        return [generator.get_sequence(row)[len(ids[0]) :].tolist() for row in range(len(ids))]

    return generate


def open_llama_cpp(request: Request) -> Generate:
    """Open the checkpoint with llama.cpp, as a GGUF file in Q8_0 that is written once."""
    import llama_cpp

    from scripts.peers.gguf_file import write_gguf

    if not request.decoder_only:
        raise NotOfferedError("its Python package has no call for encoder-decoders")
    if not request.converted.exists():
        write_gguf(request.checkpoint, request.converted)
    model = llama_cpp.Llama(
        str(request.converted),
        n_ctx=1024,
        n_threads=request.threads,
        n_threads_batch=request.threads,
        verbose=False,
    )

    def generate(ids: Ids, beams: int, new_tokens: int) -> Ids:
        if beams > 1 or len(ids) > 1:
            raise NotOfferedError("its Python package generates one sequence at a time, without beams")
        model.reset()
        tokens = model.generate(ids[0], temp=0.0, repeat_penalty=1.0)
        return [[int(next(tokens)) for _ in range(new_tokens)]]

    return generate


OPENERS: dict[str, Callable[[Request], Generate]] = {
    "transformers": open_transformers,
    "accel": open_accel,
    "openvino": open_openvino,
    "ctranslate2": open_ctranslate2,
    "onnxruntime-genai": open_onnxruntime_genai,
    "llama.cpp": open_llama_cpp,
}


def last_line(text: str, limit: int = 160) -> str:
    """Return the last line of a text that isn't blank, cut to `limit` characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "no message")[:limit]


def limit_threads(threads: int) -> None:
    """Set the number of threads that libraries read from the environment, before the first of them is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
