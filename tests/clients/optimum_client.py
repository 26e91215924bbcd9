"""Generate with Optimum, in its own virtual environment: prints input ids and generated ids of each case as JSON.

Arguments: the deployable's folder, and a JSON file of cases, name -> {"texts" or "features", "options"}; optionally the
name of each graph as arguments of `from_pretrained`, as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM, ORTModelForSpeechSeq2Seq
from transformers import AutoConfig, AutoTokenizer


def main(folder: str, cases: str, files: str = "{}") -> None:
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "whisper":
        cls = ORTModelForSpeechSeq2Seq
    else:
        cls = ORTModelForSeq2SeqLM if config.is_encoder_decoder else ORTModelForCausalLM
    model = cls.from_pretrained(folder, **json.loads(files))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results: dict[str, Any] = {}
    for name, case in json.loads(Path(cases).read_text()).items():
        if "features" in case:
            inputs = {"input_features": torch.tensor(case["features"])}
        else:
            inputs = dict(tokenizer(case["texts"], padding=True, return_tensors="pt"))
            inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        tokens = model.generate(**inputs, **case["options"]).tolist()
        results[name] = {"inputs": inputs["input_ids"].tolist() if "texts" in case else None, "tokens": tokens}
    print(json.dumps(results))


main(*sys.argv[1:])
