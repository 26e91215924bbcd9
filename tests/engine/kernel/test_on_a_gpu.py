"""The kernel on a GPU: its decode steps beside ONNX Runtime's and PyTorch's, over deployables of whole families."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import accel
from accel.config.engines import FUSED
from accel.data.pretrained import load_config
from accel.models.model_class import model_class
from accel.testing.subject import random_model
from tests.families import FAMILIES

pytestmark = pytest.mark.gpu

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "t5": FAMILIES["t5"] | {"d_model": 256, "d_kv": 64, "d_ff": 1280},
    "bart": FAMILIES["bart"],
    "llama": FAMILIES["llama"] | WIDE,
    "llama-80": FAMILIES["llama"] | WIDE | {"head_dim": 80},  # a size that doesn't divide a slot
    "gemma2": FAMILIES["gemma2"] | {"head_dim": 32},
    "falcon-alibi": FAMILIES["falcon-alibi"],
    "gptj": FAMILIES["gptj"],
    "t5-int8": FAMILIES["t5"] | {"d_model": 256, "d_kv": 64, "d_ff": 1280},
    "llama-int8": FAMILIES["llama"] | WIDE | {"tie_word_embeddings": True},
    "llama-int4": FAMILIES["llama"] | WIDE | {"tie_word_embeddings": True},
}
FEW_BITS = ("int8", "int4")  # end the names of those whose weights have so many, the table of embeddings among them
OVERRIDES = (
    "runtime=cuda-graph",
    "stage=merge",
    "audit.batches=1",
    "audit.max_batches=1",
    "audit.trials=0",
    "precision.plan=blanket",
)
PLANNED = ("llama", "llama-80", "falcon-alibi")  # whose prompts the plan may compute
ROWS, LENGTH = 3, 9


@pytest.fixture(scope="module", params=list(CONFIGS))
def folders(request: pytest.FixtureRequest, shared: Path, artifacts: Path) -> tuple[Path, Path]:
    """The checkpoint of one tiny model, and its bundle in 16 bits, or in 8 or 4, with a static decode graph."""
    checkpoint = shared / "kernel" / request.param / "checkpoint"
    if not checkpoint.is_dir():
        random_model(CONFIGS[request.param]).save_pretrained(checkpoint)
    bits = request.param.rpartition("-")[2]
    precision = f"{bits}-fp16" if bits in FEW_BITS else "fp16-blanket"
    overrides = [*OVERRIDES, f"precision={precision}", f"artifacts={artifacts}", f"model.name=k-{request.param}"]
    return checkpoint, accel.build(str(checkpoint), overrides).folder


@pytest.fixture(scope="module")
def models(folders: tuple[Path, Path]) -> Iterator[dict[str, Any]]:
    """The model by both engines, captured, and PyTorch's in FP32."""
    source, folder = folders
    eager = model_class(load_config(source)).from_pretrained(source, dtype=torch.float32).eval().cuda()
    with (
        accel.load(folder, "cuda-graph", check=False) as plain,
        accel.load(folder, "cuda-graph", check=False, engine=FUSED, fused_prefill=0) as fused,
    ):
        assert (plain.runtime.engine, fused.runtime.engine) == ("onnxruntime", FUSED)
        yield {"eager": eager, "onnxruntime": plain, "fused": fused}


def given(model: Any) -> dict[str, Tensor]:
    """Return inputs of three rows, one padded; of an encoder-decoder with the tokens that were generated so far."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 119, (ROWS, LENGTH), generator=generator).cuda()
    mask = torch.ones_like(ids)
    if model.config.is_encoder_decoder:
        mask[1, 6:] = 0
    else:
        mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def step_logits(model: Any, forced: Tensor) -> Tensor:
    """Return the logits of decode steps that are fed `forced` [rows, new], [new, rows, vocabulary], in FP32."""
    inputs = given(model)
    if model.config.is_encoder_decoder:
        encoded = model.get_encoder()(**inputs)
        shared = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"]}
        start = torch.full((ROWS, 1), model.config.decoder_start_token_id).cuda()
        output = model(**shared, decoder_input_ids=start, use_cache=True)
        name = "decoder_input_ids"
    else:
        shared, name = {}, "input_ids"
        output = model(**inputs, use_cache=True)
    mask, found = inputs["attention_mask"], []
    for step in range(forced.shape[1]):
        ids = forced[:, step : step + 1]
        if not model.config.is_encoder_decoder:
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = mask.sum(1, keepdim=True) - 1
            shared = {"attention_mask": mask, "position_ids": positions}
        output = model(**shared, **{name: ids}, past_key_values=output.past_key_values, use_cache=True)
        found.append(output.logits[:, -1].float().clone())
    return torch.stack(found)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to that of what is expected."""
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def test_logits(models: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Steps 0 to 149, over more keys than a slot of the ring holds, are as near to FP32 as ONNX Runtime's."""
    forced = torch.randint(3, 119, (ROWS, 150), generator=torch.Generator().manual_seed(5)).cuda()
    expected = step_logits(models["eager"], forced)
    errors = {name: error(step_logits(models[name], forced), expected) for name in ("onnxruntime", "fused")}
    assert "run in torch" not in caplog.text
    assert errors["fused"] <= max(1.5 * errors["onnxruntime"], 2e-3), errors
    assert errors["fused"] > 0


@torch.inference_mode()
def test_engines_agree(models: dict[str, Any]) -> None:
    """The kernel reads the bytes that ONNX Runtime reads: their results differ by rounding alone, few bits or not."""
    forced = torch.randint(3, 119, (ROWS, 40), generator=torch.Generator().manual_seed(8)).cuda()
    by_engine = [step_logits(models[name], forced) for name in ("fused", "onnxruntime")]
    assert error(*by_engine) < 5e-3


@torch.inference_mode()
def test_prompts(models: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Prompts by the plan, with padding and without, are as near to PyTorch's in FP32 as ONNX Runtime's."""
    model = models["fused"]
    planned = model.runtime.dynamic.planned_prefill is not None
    assert planned == (request.node.callspec.params["folders"] in PLANNED)
    if not planned:
        pytest.skip("ONNX Runtime computes the prompts of this model")
    inputs = given(model)
    for each in (inputs, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}):
        expected = models["eager"](**each, use_cache=True)
        shown = each["attention_mask"] != 0
        errors = {}
        for name in ("onnxruntime", "fused"):
            output = models[name](**each, use_cache=True)
            pairs = [(output.logits, expected.logits)]
            for mine, theirs in zip(output.past_key_values.layers, expected.past_key_values.layers, strict=True):
                pairs += [(mine.keys.transpose(1, 2), theirs.keys.transpose(1, 2))]
                pairs += [(mine.values.transpose(1, 2), theirs.values.transpose(1, 2))]
            errors[name] = max(error(found[shown].float(), right[shown]) for found, right in pairs)
        assert 0 < errors["fused"] <= max(1.5 * errors["onnxruntime"], 2e-3), errors


@torch.inference_mode()
def test_repeated_steps_are_identical(models: dict[str, Any]) -> None:
    """The same steps give the same bits, however often they run: no block reads what another one still writes."""
    forced = torch.randint(3, 119, (ROWS, 20), generator=torch.Generator().manual_seed(6)).cuda()
    first = step_logits(models["fused"], forced)
    for _ in range(20):
        assert torch.equal(step_logits(models["fused"], forced), first)


@torch.inference_mode()
def test_positions_that_are_in_no_table(models: dict[str, Any]) -> None:
    """A caller may choose positions of tokens beyond the cache's length, of which the kernel has no angles.

    Both engines compute angles of such positions in 16 bits here, unlike PyTorch.
    """
    model = models["fused"]
    if model.config.model_type not in ("llama", "gemma2"):
        pytest.skip("positions are not a caller's, or the model has a table of them")
    ids = given(model)["input_ids"]
    found = {}
    for name in ("onnxruntime", "fused"):
        output = models[name](input_ids=ids, position_ids=torch.arange(LENGTH).cuda()[None] + 5000, use_cache=True)
        steps = []
        for step in range(4):
            positions = torch.full((ROWS, 1), LENGTH + step + 5000).cuda()
            chosen, past = ids[:, step : step + 1], output.past_key_values
            output = models[name](input_ids=chosen, position_ids=positions, past_key_values=past, use_cache=True)
            steps.append(output.logits[:, -1].float().clone())
        found[name] = torch.stack(steps)
    assert error(found["fused"], found["onnxruntime"]) < 5e-3


def test_rows_at_different_positions(models: dict[str, Any]) -> None:
    """A row's tokens are those of that row alone, beside rows at other positions."""
    model = models["fused"]
    prompts = [torch.randint(3, 119, (length,), generator=torch.Generator().manual_seed(length)) for length in (5, 9)]
    alone = [tokens(model, [prompt.cuda()], 1)[0] for prompt in prompts]
    together = tokens(model, [prompt.cuda() for prompt in prompts], 3)
    assert together == alone


def tokens(model: Any, prompts: list[Tensor], capacity: int) -> list[list[int]]:
    """Return 8 greedy tokens of each prompt, which begin one step after another in rows of one batch."""
    found: list[list[int]] = [[] for _ in prompts]
    options = {"source_length": 16} if model.config.is_encoder_decoder else {}
    with model.rows(capacity=capacity, max_length=32, **options) as rows:
        claimed: list[int] = []
        last = torch.zeros(capacity, dtype=torch.int64, device="cuda")
        for step in range(8 + len(prompts)):
            if claimed:
                logits = rows.step(last)
                for index, row in enumerate(claimed):
                    last[row] = logits[row].argmax()
                    found[index].append(int(last[row]))
            if step < len(prompts):
                row = rows.claim()
                logits = rows.prefill(row, input_ids=prompts[step][None])
                last[row] = logits.argmax()
                found[step].append(int(last[row]))
                claimed.append(row)
    return [each[:8] for each in found]
