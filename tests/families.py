"""Configurations of a tiny model of every family: two decoder layers, a width of 64, and the family's peculiarities."""

from typing import Any

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {"vocab_size": 120, "decoder_start_token_id": 0} | IDS
T5 = SEQ2SEQ | {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
GATED = T5 | {"feed_forward_proj": "gated-gelu"}
BART = SEQ2SEQ | {
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 512,
    "forced_eos_token_id": None,
}
LLAMA = IDS | {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
GPT = IDS | {"vocab_size": 120, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
SLIDING = ["sliding_attention", "full_attention"]
GEMMA = LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": SLIDING}
T5GEMMA = {name: GEMMA[name] for name in GEMMA if name not in IDS} | IDS

FAMILIES: dict[str, dict[str, Any]] = {
    "t5": T5 | {"model_type": "t5"},
    "t5-v1.1": GATED | {"model_type": "t5", "tie_word_embeddings": False},
    "byt5": GATED | {"model_type": "t5", "tie_word_embeddings": False, "vocab_size": 384, "num_layers": 3},
    "mt5": GATED | {"model_type": "mt5", "tie_word_embeddings": False},
    "umt5": GATED | {"model_type": "umt5", "tie_word_embeddings": False},
    "longt5": T5 | {"model_type": "longt5", "local_radius": 7, "encoder_attention_type": "local"},
    "longt5-tglobal": T5 | {"model_type": "longt5", "local_radius": 7, "encoder_attention_type": "transient-global"},
    "bart": BART | {"model_type": "bart"},
    "mbart": BART | {"model_type": "mbart", "scale_embedding": True},
    "marian": BART | {"model_type": "marian", "scale_embedding": True, "decoder_vocab_size": 120, "init_std": 0.15},
    "pegasus": BART | {"model_type": "pegasus", "scale_embedding": True},
    "m2m_100": BART | {"model_type": "m2m_100", "pad_token_id": 1, "bos_token_id": 0, "scale_embedding": True},
    "blenderbot": BART | {"model_type": "blenderbot"},
    "t5gemma": IDS
    | {
        "model_type": "t5gemma",
        "vocab_size": 120,
        "encoder": T5GEMMA | {"model_type": "t5_gemma_module"},
        "decoder": T5GEMMA | {"model_type": "t5_gemma_module", "cross_attention_hidden_size": 64},
        "decoder_start_token_id": 1,
    },
    "whisper": BART
    | {
        "model_type": "whisper",
        "num_mel_bins": 8,
        "init_std": 0.15,
        "max_source_positions": 50,
        "max_target_positions": 448,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
    "gpt2": GPT | {"model_type": "gpt2"},
    "gptj": GPT | {"model_type": "gptj", "rotary_dim": 8},
    "gpt_neox": {name: LLAMA[name] for name in LLAMA if name != "num_key_value_heads"} | {"model_type": "gpt_neox"},
    "opt": IDS
    | {
        "model_type": "opt",
        "vocab_size": 120,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 64,
    },
    "bloom": IDS | {"model_type": "bloom", "vocab_size": 120, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "llama": LLAMA | {"model_type": "llama"},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 8},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "gemma2": GEMMA | {"model_type": "gemma2", "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": GEMMA | {"model_type": "gemma3_text"},
    "phi3": LLAMA | {"model_type": "phi3"},
    "phi3-longrope": LLAMA
    | {
        "model_type": "phi3",
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 16.0},
    },
    "falcon": IDS
    | {
        "model_type": "falcon",
        "vocab_size": 120,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "falcon-alibi": IDS
    | {
        "model_type": "falcon",
        "vocab_size": 120,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "multi_query": True,
        "alibi": True,
    },
    "granite": LLAMA
    | {"model_type": "granite", "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    "smollm3": LLAMA | {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "mixtral": LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
