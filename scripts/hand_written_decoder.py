"""Time a decoder that is written by hand and compiled: the baseline of an engineer who writes a model's code anew.

    python -m scripts.hand_written_decoder --model t5-large [--batch 1] [--source 16] [--new-tokens 256] [--device cuda]

In the way of gpt-fast (https://github.com/meta-pytorch/gpt-fast): packed products, static caches at constant addresses,
`torch.compile` with `max-autotune`, and on a GPU one CUDA graph for each token, choice of the id included. It knows two
models, T5 and Llama, of the dimensions in `conf/model` with random weights. Encoder and prompt are not timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import linear, relu, rms_norm, scaled_dot_product_attention, silu
from transformers import AutoConfig
from transformers.models.t5.modeling_t5 import T5Attention

from accel.models.model_class import model_class
from accel.runtime.cuda_graph import CudaGraphCallable
from accel.runtime.streams import on_shared_stream
from accel.system.memory_bandwidth import measure_bandwidth

CONF = Path(__file__).parents[1] / "conf" / "model"
MODELS = ("t5-large", "llama-1b")
MODE = "max-autotune-no-cudagraphs"  # the whole token is captured here, which Inductor's own graphs would split
WARM_UP, REPEATS = 3, 5


@dataclass(frozen=True)
class Heads:
    """How a decoder's attention is cut: `count` heads of `size` features for queries, `shared` for keys and values."""

    count: int
    shared: int
    size: int


class Layer(nn.Module):
    """One decoder layer with its caches.

    Args:
        heads: Heads of both attentions.
        weights: Name -> weight [out, in] or norm [in]: `norm`, `qkv`, `out`, `ffn_norm`, `up` (with a gate first where
            there is one), `down`; beside an encoder `cross_norm`, `cross_q`, `cross_out`.
        caches: Self-attention keys and values, each [batch, shared, length, size].
        cross: Cross-attention keys and values, each [batch, count, source, size]; None without an encoder.
        gated: The feed-forward network is gated, by SiLU; else it has ReLU.
        scale: Factor of the scores; None: one over the root of a head's size.
    """

    norm: Tensor
    qkv: Tensor
    out: Tensor
    cross_norm: Tensor
    cross_q: Tensor
    cross_out: Tensor
    ffn_norm: Tensor
    up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor
    cross_keys: Tensor
    cross_values: Tensor

    def __init__(
        self,
        heads: Heads,
        weights: dict[str, Tensor],
        caches: tuple[Tensor, Tensor],
        cross: tuple[Tensor, Tensor] | None,
        gated: bool,
        scale: float | None,
    ) -> None:
        super().__init__()
        self.heads, self.gated, self.scale, self.has_cross = heads, gated, scale, cross is not None
        for name, tensor in weights.items():
            self.register_buffer(name, tensor)
        for name, tensor in zip(("keys", "values"), caches, strict=True):
            self.register_buffer(name, tensor)
        for name, tensor in zip(("cross_keys", "cross_values"), cross or (), strict=False):
            self.register_buffer(name, tensor)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        bias: Tensor,
        cross_bias: Tensor | None,
        rotate: Callable[[Tensor], Tensor],
        norm: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the hidden states [batch, new, width] after this layer; write keys and values at `positions` [new]."""
        batch, new, _ = x.shape
        heads, sizes = self.heads, (self.heads.count, self.heads.shared, self.heads.shared)
        rows = linear(norm(x, self.norm), self.qkv).view(batch, new, -1, heads.size).transpose(1, 2)
        q, k, v = rows.split(sizes, dim=1)  # each [batch, heads, new, size]
        self.keys.index_copy_(2, positions, rotate(k))
        self.values.index_copy_(2, positions, v)
        attended = scaled_dot_product_attention(
            rotate(q), self.keys, self.values, bias, scale=self.scale, enable_gqa=heads.count != heads.shared
        )
        x = x + linear(attended.transpose(1, 2).reshape(batch, new, -1), self.out)
        if self.has_cross:
            q = linear(norm(x, self.cross_norm), self.cross_q).view(batch, new, -1, heads.size).transpose(1, 2)
            attended = scaled_dot_product_attention(q, self.cross_keys, self.cross_values, cross_bias, scale=self.scale)
            x = x + linear(attended.transpose(1, 2).reshape(batch, new, -1), self.cross_out)
        up = linear(norm(x, self.ffn_norm), self.up)
        if self.gated:
            gate, up = up.chunk(2, dim=-1)
            return x + linear(silu(gate) * up, self.down)
        return x + linear(relu(up), self.down)


class Decoder(nn.Module):
    """A decoder over caches of a fixed length.

    Args:
        embedding: Rows of ids, [vocabulary, width].
        layers: The layers.
        norm: The last norm's weight, [width].
        head: The head's weight, [vocabulary, width], with all scaling in it.
        epsilon: Of all norms.
        distances: Bias by head and distance to the key, [heads, length]; None with rotary embeddings.
        angles: Cosines and sines by position, [length, size] each; None with a bias.
        cross_bias: Added to the scores of cross-attention, [batch, 1, 1, source]; None without an encoder.
    """

    embedding: Tensor
    norm: Tensor
    head: Tensor
    indices: Tensor
    distances: Tensor | None
    cross_bias: Tensor | None
    cos: Tensor | None
    sin: Tensor | None

    def __init__(
        self,
        embedding: Tensor,
        layers: list[Layer],
        norm: Tensor,
        head: Tensor,
        epsilon: float,
        distances: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        cross_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.epsilon = nn.ModuleList(layers), epsilon
        tensors = {"embedding": embedding, "norm": norm, "head": head, "distances": distances, "cross_bias": cross_bias}
        tensors |= dict(zip(("cos", "sin"), angles or (None, None), strict=True))
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("indices", torch.arange(layers[0].keys.shape[2], device=embedding.device))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the logits [batch, new, vocabulary] of ids [batch, new] at positions [new]."""
        x = self.embedding[ids]
        away = positions[:, None] - self.indices  # [new, length]
        known = torch.zeros_like(away, dtype=x.dtype) if self.distances is None else self.distances[:, away.clamp(0)]
        bias = known.masked_fill(away < 0, -torch.inf).view(1, -1, *away.shape)  # [1, heads or 1, new, length]
        for layer in self.layers:
            x = layer(x, positions, bias, self.cross_bias, lambda rows: self._rotated(rows, positions), self._normed)
        return linear(self._normed(x, self.norm), self.head)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self.epsilon)

    def _rotated(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Rotate heads [batch, heads, new, size] by their positions [new]."""
        if self.cos is None or self.sin is None:
            return rows
        first, second = rows.chunk(2, dim=-1)
        return rows * self.cos[positions] + torch.cat([-second, first], dim=-1) * self.sin[positions]


def _caches(batch: int, heads: int, length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty keys and values."""
    return like.new_zeros(batch, heads, length, size), like.new_zeros(batch, heads, length, size)


def of_llama(model: Any, batch: int, length: int) -> Decoder:
    """Return a Llama of transformers as a decoder with caches for `length` tokens of `batch` sequences."""
    config, base = model.config, model.model
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, size)
    layers = []
    for each in base.layers:
        attention, ffn = each.self_attn, each.mlp
        weights = {
            "norm": each.input_layernorm.weight,
            "qkv": torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
            "out": attention.o_proj.weight,
            "ffn_norm": each.post_attention_layernorm.weight,
            "up": torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight]),
            "down": ffn.down_proj.weight,
        }
        weights = {name: weight.detach() for name, weight in weights.items()}
        caches = _caches(batch, heads.shared, length, size, weights["norm"])
        layers.append(Layer(heads, weights, caches, None, True, None))
    positions = torch.arange(length, device=model.device)[None]
    embedding = base.embed_tokens.weight.detach()
    cos, sin = base.rotary_emb(embedding[:1], positions)
    head = model.lm_head.weight.detach()
    norm = base.norm.weight.detach()
    return Decoder(embedding, layers, norm, head, config.rms_norm_eps, angles=(cos[0], sin[0]))


def of_t5(model: Any, hidden: Tensor, mask: Tensor, length: int) -> Decoder:
    """Return the decoder of a T5 of transformers, with caches for `length` tokens.

    Args:
        model: The model, with ReLU.
        hidden: Its encoder's output, [batch, source, width].
        mask: The encoder's mask, [batch, source].
        length: Tokens.
    """
    config, batch = model.config, len(hidden)
    heads = Heads(config.num_heads, config.num_heads, config.d_kv)
    layers = []
    for block in model.decoder.block:
        own, cross, ffn = block.layer
        attention, other = own.SelfAttention, cross.EncDecAttention
        weights = {
            "norm": own.layer_norm.weight,
            "qkv": torch.cat([attention.q.weight, attention.k.weight, attention.v.weight]),
            "out": attention.o.weight,
            "cross_norm": cross.layer_norm.weight,
            "cross_q": other.q.weight,
            "cross_out": other.o.weight,
            "ffn_norm": ffn.layer_norm.weight,
            "up": ffn.DenseReluDense.wi.weight,
            "down": ffn.DenseReluDense.wo.weight.to(hidden.dtype),  # transformers keeps it in FP32
        }
        weights = {name: weight.detach() for name, weight in weights.items()}
        keys, values = (
            linear(hidden, weight.detach()).view(batch, -1, heads.count, heads.size).transpose(1, 2).contiguous()
            for weight in (other.k.weight, other.v.weight)
        )
        caches = _caches(batch, heads.count, length, heads.size, hidden)
        layers.append(Layer(heads, weights, caches, (keys, values), False, 1.0))
    head = model.lm_head.weight.detach()
    if config.scale_decoder_outputs:
        head = head * config.d_model**-0.5
    return Decoder(
        model.shared.weight.detach(),
        layers,
        model.decoder.final_layer_norm.weight.detach(),
        head,
        config.layer_norm_epsilon,
        distances=_distances(model, length),
        cross_bias=None
        if bool(mask.all())
        else hidden.new_zeros(mask.shape).masked_fill(mask == 0, -torch.inf)[:, None, None],
    )


def _distances(model: Any, length: int) -> Tensor:
    """Return T5's bias of each head for keys at distances from 0, [heads, length]."""
    attention = model.decoder.block[0].layer[0].SelfAttention
    buckets = T5Attention._relative_position_bucket(
        -torch.arange(length, device=model.device),
        bidirectional=False,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    distances: Tensor = attention.relative_attention_bias(buckets).detach().T.contiguous()
    return distances


class Generation:
    """Greedy generation by a compiled decoder, whose ids, position and tokens stay on the device.

    Args:
        decoder: The decoder, whose caches hold the tokens before `position`.
        ids: The ids at `position`, [batch, 1].
        position: Their position.
        new_tokens: Tokens to generate.
    """

    def __init__(self, decoder: Decoder, ids: Tensor, position: int, new_tokens: int) -> None:
        self._first, self._start = ids.clone(), position
        self.ids, self.position = ids.clone(), torch.full((1,), position, device=ids.device)
        self.tokens = ids.new_zeros(len(ids), new_tokens)
        self.new_tokens = new_tokens

        def token() -> None:
            self.ids.copy_(decoder(self.ids, self.position)[:, -1].argmax(-1, keepdim=True))
            self.tokens.index_copy_(1, self.position - position, self.ids)
            self.position.add_(1)

        compiled = torch.compile(token, mode=MODE, fullgraph=True, dynamic=False)
        self._token = CudaGraphCallable(compiled, ids.device, "a token")

    def run(self) -> Tensor:
        """Return the tokens, [batch, new_tokens]."""
        self.ids.copy_(self._first)
        self.position.fill_(self._start)
        for _ in range(self.new_tokens):
            self._token()
        return self.tokens


@torch.no_grad()
def begin(model: Any, ids: Tensor, mask: Tensor, new_tokens: int) -> Generation:
    """Return a generation for ids [batch, source], whose mask [batch, source] may have zeros for a T5 only."""
    if model.config.is_encoder_decoder:
        hidden = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        start = torch.full((len(ids), 1), model.config.decoder_start_token_id, device=ids.device)
        return Generation(of_t5(model, hidden, mask, new_tokens), start, 0, new_tokens)
    source = ids.shape[1]
    decoder = of_llama(model, len(ids), source + new_tokens)
    if source > 1:
        decoder(ids[:, :-1], torch.arange(source - 1, device=ids.device))
    return Generation(decoder, ids[:, -1:], source - 1, new_tokens)


def bytes_read(model: Any, batch: int, source: int, new_tokens: int) -> int:
    """Return the bytes of weights and caches that a token reads once, with half of the new tokens in the caches."""
    decoder = model.decoder if model.config.is_encoder_decoder else model.model
    skipped = ("embed_tokens", "shared", "EncDecAttention.k", "EncDecAttention.v")
    count = sum(
        parameter.numel() for name, parameter in decoder.named_parameters() if not any(part in name for part in skipped)
    )
    count += model.lm_head.weight.numel()
    config = model.config
    if config.is_encoder_decoder:
        entry, entries = config.num_heads * config.d_kv, source + new_tokens // 2
        layers = config.num_decoder_layers
    else:
        entry = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        entries, layers = source + new_tokens // 2, config.num_hidden_layers
    return int(model.lm_head.weight.element_size() * (count + 2 * batch * layers * entry * entries))


def measure(model: Any, batch: int, source: int, new_tokens: int) -> dict[str, Any]:
    """Time generations, and return figures as JSON: seconds of compilation, ms a token, and the multiple of the limit.

    The limit is the time that reading weights and caches once takes at the bandwidth measured now.
    """
    device = model.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch, source), generator=generator).to(device)
    with torch.no_grad(), on_shared_stream(device):
        start = time.perf_counter()
        generation = begin(model, ids, torch.ones_like(ids), new_tokens)
        for _ in range(WARM_UP):
            generation.run().tolist()
        compiled = time.perf_counter() - start
        milliseconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            generation.run().tolist()  # the only wait for the device
            milliseconds.append(1000 * (time.perf_counter() - start) / new_tokens)
    size = bytes_read(model, batch, source, new_tokens)
    _, bandwidth = measure_bandwidth(device)
    median = statistics.median(milliseconds)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "compile_s": compiled,
        "ms_per_token": {"median": median, "min": min(milliseconds), "max": max(milliseconds)},
        "bytes": size,
        "bandwidth": bandwidth,
        "multiple_of_limit": median / (1000 * size / bandwidth),
    }


def random_model(name: str, device: str, dtype: str) -> Any:
    """Return a model of the dimensions in `conf/model` with random weights."""
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml").config)
    config = AutoConfig.for_model(**values)  # type: ignore[arg-type]
    torch.manual_seed(0)
    return model_class(config)(config).eval().to(device, getattr(torch, dtype))


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description="Time a decoder that is written by hand and compiled.")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--source", type=int, default=16, help="tokens of the source or prompt")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default=None)
    arguments = parser.parse_args()
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "float16")
    model = random_model(arguments.model, arguments.device, dtype)
    figures = measure(model, arguments.batch, arguments.source, arguments.new_tokens)
    print(json.dumps({**vars(arguments), "dtype": dtype, **figures}))


if __name__ == "__main__":
    main()
