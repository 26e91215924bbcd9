"""All passes on whole models: far fewer nodes, and the same results at shapes other than the exported ones."""

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from accel.evaluation.component_runner import ComponentRunner, component_inputs, signatures, torch_run
from accel.graph import files
from accel.graph.fusion.fuse_attention import FuseAttention
from accel.graph.passes import GraphPass, run_pass
from accel.graph.registry import OPTIMIZE
from accel.graph.weights import initializers, shared_bytes
from accel.stages import export
from tests.conftest import Build
from tests.graph import text

COMPONENTS = ("encoder", "prefill", "decode")
# batch, source, past, new
SHAPES = ((1, 1, 1, 1), (1, 9, 0, 1), (3, 6, 4, 2), (2, 30, 2, 1), (4, 3, 5, 7))
BART = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """Set norms and biases to values other than 1 and 0, so that a lost or exchanged one changes the results."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.uniform_(0.5, 1.5)
            elif "weight" in name:
                parameter.mul_(8)
    return model.eval()


@pytest.fixture(scope="session")
def bart(shared: Path) -> Path:
    """Export the three graphs of a tiny BART: norms and products with bias, scaled scores."""
    folder = shared / "bart-graphs"
    with FileLock(shared / "bart-graphs.lock"):
        if not (folder / "decode.onnx").exists():
            folder.mkdir(exist_ok=True)
            torch.manual_seed(0)
            model = shaken(BartForConditionalGeneration(BartConfig(**BART)))
            adapter = importlib.import_module("accel.architectures.seq2seq").Seq2Seq(["bart"])
            chain = ComponentRunner(signatures(adapter, model.config), torch_run(adapter, model))
            given = component_inputs(adapter, model.config, export.EXAMPLE, torch.Generator().manual_seed(0))
            for component, signature in chain.signatures.items():
                wrapper, example = adapter.wrap(model, component), export.example(chain, component, given)
                graph = export.export_component(wrapper, signature, example, 20)
                export.name_weights(graph, wrapper, model)
                files.save(graph, folder / f"{component}.onnx")
    return folder


def random_inputs(model: ir.Model) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield random inputs at every shape, part of the source masked."""
    generator = np.random.default_rng(0)
    for lengths in SHAPES:
        known = dict(zip(("batch_size", "source", "past", "new"), lengths, strict=True))
        made: dict[str, np.ndarray] = {}
        for value in model.graph.inputs:
            shape = [dim if isinstance(dim, int) else known[str(dim)] for dim in value.shape or ()]
            if value.dtype != ir.DataType.INT64:
                made[value.name or ""] = generator.standard_normal(shape).astype(np.float32)
            elif "mask" in (value.name or ""):
                made[value.name or ""] = np.ones(shape, np.int64)
                made[value.name or ""][-1, shape[1] // 2 + 1 :] = 0
            else:
                made[value.name or ""] = generator.integers(0, 100, shape)
        yield made


def optimized(folder: Path, *more: type[GraphPass]) -> dict[str, ir.Model]:
    """Run all passes and `more`, and compare every output with that of the graphs before."""
    models = {component: files.load(folder / f"{component}.onnx") for component in COMPONENTS}
    inputs = {component: list(random_inputs(model)) for component, model in models.items()}
    before = {component: [text.run(model, each) for each in inputs[component]] for component, model in models.items()}
    for graph_pass in (*OPTIMIZE.values(), *more):
        run_pass(graph_pass(), [models["encoder"]])
        run_pass(graph_pass(), [models["prefill"], models["decode"]])
    for component, model in models.items():
        for each, right in zip(inputs[component], before[component], strict=True):
            found = text.run(model, each)
            assert list(found) == list(right)
            for name, array in right.items():
                assert found[name].shape == array.shape, name
                assert np.isfinite(array).all()
                np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-5 * np.abs(array).max(initial=1e-3))
    return models


def layer_ops(model: ir.Model, layers: int = 2) -> dict[str, float]:
    """Return the number of the operators that layers consist of, per layer."""
    found = Counter(node.op_type for node in model.graph)
    heavy = ("MatMul", "Softmax", "Reshape", "Split", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
    return {op: found[op] / layers for op in heavy if found[op]}


def test_rms_norms_and_position_bias(build: Build, tiny: Path) -> None:
    """T5: norms are fused, bias and mask are added once, and both decoders share all weights."""
    models = optimized(build(tiny, "export")[1]["export"].folder)
    decode = models["decode"]
    found = Counter(node.op_type for node in decode.graph)
    assert found["SkipSimplifiedLayerNormalization"] == 6
    assert found["SimplifiedLayerNormalization"] == 1  # behind the embedding, where there is no sum to fuse
    assert not {"Pow", "ReduceMean", "Sqrt", "Reciprocal"} & found.keys()
    assert sum(node.op_type == "Add" and node.outputs[0].dtype == ir.DataType.FLOAT for node in decode.graph) == 5
    assert files.node_count(decode) < 150
    assert shared_bytes(initializers(models["prefill"]), initializers(decode)) == files.weight_bytes(decode)
    prefill = models["prefill"].graph.initializers
    assert any("SelfAttention.q+k+v" in name for name in prefill)
    assert "decoder.block.0.layer.1.EncDecAttention.k.weight" in prefill  # not packed: the decode graph lacks it


def test_norms_and_products_with_bias(bart: Path) -> None:
    """BART: biases become part of the packed product and of the norm behind the sum."""
    models = optimized(bart)
    decode = models["decode"]
    assert layer_ops(decode)["SkipLayerNormalization"] == 3
    assert all(len(node.inputs) == 5 for node in decode.graph if node.op_type == "SkipLayerNormalization")
    assert any("self_attn.q+k+v_proj.bias" in name for name in decode.graph.initializers)
    assert files.node_count(decode) < 140
    assert shared_bytes(initializers(models["prefill"]), initializers(decode)) == files.weight_bytes(decode)


@pytest.mark.parametrize("family", ["T5", "BART"])
def test_attention_is_one_node(build: Build, tiny: Path, bart: Path, family: str) -> None:
    """Attention with position bias or scale, over self- or cross-attention caches or none, has no transposes."""
    folder = bart if family == "BART" else build(tiny, "export")[1]["export"].folder
    models = optimized(folder, FuseAttention)
    found = {component: Counter(node.op_type for node in model.graph) for component, model in models.items()}
    layers = {"T5": (3, 4, 4), "BART": (2, 4, 4)}[family]
    assert tuple(found[component]["MultiHeadAttention"] for component in COMPONENTS) == layers
    assert all(found[component]["Softmax"] == 0 for component in COMPONENTS)
    assert found["decode"]["Reshape"] <= 5  # of lengths
    assert shared_bytes(initializers(models["prefill"]), initializers(models["decode"])) > 0.99 * files.weight_bytes(
        models["decode"]
    )


class Logits(nn.Module):
    """Decoder-only model from ids to logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def test_grouped_queries() -> None:
    """Llama: fused RMS norms, and one product for queries, keys and values with rotary embedding and GQA."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 100}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")
    wrapper = Logits(shaken(LlamaForCausalLM(config)))
    program = torch.onnx.export(
        wrapper,
        (torch.randint(100, (2, 5)),),
        opset_version=20,
        dynamo=True,
        optimize=False,
        dynamic_shapes=({0: "batch", 1: "new"},),
        verbose=False,
    )
    assert program is not None
    model = program.model
    for graph_pass in OPTIMIZE.values():
        run_pass(graph_pass(), [model])
    name = model.graph.inputs[0].name or ""
    for rows, length in ((1, 1), (3, 4), (2, 9)):
        ids = torch.randint(100, (rows, length))
        with torch.no_grad():
            right = wrapper(ids).numpy()
        (found,) = text.run(model, {name: ids.numpy()}).values()
        np.testing.assert_allclose(found, right, rtol=0, atol=2e-5 * np.abs(right).max())
    per_layer = layer_ops(model)
    assert per_layer["SkipSimplifiedLayerNormalization"] == 2
    assert per_layer["Split"] == 1
    assert not {"Pow", "ReduceMean"} & {node.op_type for node in model.graph}
