"""Model card of a deployable: README.md, whose front matter the Hugging Face hub reads."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PretrainedConfig

from accel.data.pretrained import load_config
from accel.evaluation.verification_result import how_verified
from accel.runtime.layout import README, variants

HUB_ID = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
JS_DTYPES = {"float16": "fp16", "int8": "int8", "int4": "q4"}  # variant -> dtype of Transformers.js
TAGS = ["onnx", "accel", "optimum", "transformers.js"]
SPEECH, SEQ2SEQ, CAUSAL = "automatic-speech-recognition", "text2text-generation", "text-generation"
CLASSES = {
    SPEECH: ("ORTModelForSpeechSeq2Seq", "AutoModelForSpeechSeq2Seq"),
    SEQ2SEQ: ("ORTModelForSeq2SeqLM", "AutoModelForSeq2SeqLM"),
    CAUSAL: ("ORTModelForCausalLM", "AutoModelForCausalLM"),
}
BODY = """# {title}

{source} as ONNX graphs with KV caches, made and verified by accel.

| dtype | computed | {columns} |
|---|---|{lines}|
{rows}

A figure is the share of sequences that are identical to PyTorch's in FP32, by way of generating; random ids or sample
texts were the inputs. The certificates, `certificate*.html`, hold all comparisons.

```python
import accel
model = accel.load("{folder}")
```

```python
from optimum.onnxruntime import {optimum}
model = {optimum}.from_pretrained("{folder}")
```

```js
import {{ {js} }} from '@huggingface/transformers';
const model = await {js}.from_pretrained('{folder}', {{ dtype: '{js_dtype}' }});
```
"""


def source_of(checkpoint: str | None, folder: Path) -> dict[str, Any]:
    """Return what the card names of a checkpoint: its id on the hub, and the licence and task of its own card.

    Args:
        checkpoint: Folder or id that the user named.
        folder: Folder of the checkpoint's files.

    Returns:
        `id`, `license`, `license_name`, `license_link` and `pipeline_tag`, each None where it isn't known.
    """
    is_id = checkpoint is not None and HUB_ID.fullmatch(checkpoint) and not Path(checkpoint).exists()
    path = folder / README
    data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}
    keys = ("license", "license_name", "license_link", "pipeline_tag")
    return {"id": checkpoint if is_id else None, **{key: data.get(key) for key in keys}}


def write(folder: Path) -> None:
    """Write the card of a deployable, from the certificates of its variants.

    Args:
        folder: Folder that holds at least one variant with a certificate.
    """
    files = [each for each in variants(folder) if each.certificate.is_file()]
    certificates = [json.loads(each.certificate.read_text()) for each in files]
    source, model = certificates[0]["checkpoint"], certificates[0]["model"]
    default_task = task_of(load_config(folder))
    task = source.get("pipeline_tag") or default_task
    data = ModelCardData(
        base_model=source["id"],
        base_model_relation=_relation(source),
        pipeline_tag=task,
        library_name="transformers.js",
        license=source["license"],
        license_name=source["license_name"],
        license_link=source["license_link"],
        tags=TAGS,
        model_name=model,
        eval_results=[result for certificate in certificates for result in _results(task, certificate)],
    )
    columns = list(certificates[0]["verification"]["identical"])
    optimum, js = CLASSES[default_task]
    body = BODY.format(
        title=model,
        source=_named(source, model),
        columns=" | ".join(columns),
        lines="|".join("---" for _ in columns),
        rows="\n".join(_row(certificate["verification"], columns) for certificate in certificates),
        folder="FOLDER",
        optimum=optimum,
        js=js,
        js_dtype=JS_DTYPES.get(files[0].dtype, "fp32"),
    )
    (folder / README).write_text(f"---\n{data.to_yaml()}\n---\n\n{body}", encoding="utf-8")


def _relation(source: Mapping[str, Any]) -> str | None:
    """Return what the model is to the checkpoint on the hub, in the hub's terms; None where it isn't from the hub."""
    if not source["id"]:
        return None
    return "finetune" if source.get("adapter") else "quantized"


def _named(source: Mapping[str, Any], model: str) -> str:
    """Return the checkpoint, and the adapter merged into it, as Markdown."""
    name = f"[{source['id']}](https://huggingface.co/{source['id']})" if source["id"] else f"`{model}`"
    return f"{name}, with the PEFT adapter `{source['adapter']}` merged in," if source.get("adapter") else name


def task_of(config: PretrainedConfig) -> str:
    """Return the hub's name of the task that a model of this config can do."""
    if not config.is_encoder_decoder:
        return CAUSAL
    return SPEECH if hasattr(config, "num_mel_bins") else SEQ2SEQ


def _row(verification: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Return a variant's row of the table."""
    shares = " | ".join(f"{verification['identical'][name]:.1%}" for name in columns)
    return f"| {verification['precision']} | {how_verified(verification)} | {shares} |"


def _results(task: str, certificate: Mapping[str, Any]) -> list[EvalResult]:
    """Return a certificate's figures for the front matter's `model-index`."""
    verification = certificate["verification"]
    dtype, kind = verification["precision"], certificate["compared"]["kind"]
    results = []
    for name, share in verification["identical"].items():
        sequences = verification.get("sequences", {}).get(name, verification["inputs"])  # older ones compare all inputs
        results.append(_result(task, kind, sequences, dtype, f"identical_to_pytorch_{name}", share))
    for name, score in verification["metrics"].get("ours", {}).items():
        results.append(_result(task, "references", verification["references"], dtype, name, score))
    return results


def _result(task: str, kind: str, inputs: int, dtype: str, name: str, value: float) -> EvalResult:
    """Return one figure, computed on a number of inputs of one kind."""
    return EvalResult(
        task_type=task,
        dataset_type=kind.replace(" ", "-"),
        dataset_name=f"{inputs} {kind}",
        dataset_config=dtype,
        metric_type=name,
        metric_name=f"{name.replace('_', ' ')}, {dtype}",
        metric_value=value,
    )
