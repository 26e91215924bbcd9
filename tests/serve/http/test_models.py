"""Replies of real models, asked by OpenAI's own client: equal to what the model's `generate` and `forward` return."""

import json
from typing import Any

import openai
import pytest
import torch

from tests.serve.servers import Running

WORDS = ["speculative", "ice", "photosynthesis", "Ünïcödé"]
GREEDY = {"temperature": 0, "max_tokens": 24}
VARIED = {"extra_body": {"no_repeat_ngram_size": 1}}  # random weights repeat a token otherwise


def alone(server: Running, name: str, prompt: str, **options: Any) -> torch.Tensor:
    """Return the new ids of one prompt, [new], by the model's own `generate`."""
    served = server.models[name]
    inputs = served.tokenizer([prompt], return_tensors="pt")
    ids = served.model.generate(**{key: inputs[key] for key in ("input_ids", "attention_mask")}, **options)
    return ids[0, 1 if served.has_encoder else inputs["input_ids"].shape[1] :]


def text_of(server: Running, name: str, ids: torch.Tensor) -> str:
    """Return the text of ids."""
    return str(server.models[name].tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("name", ["g2p", "llama"])
def test_completions_are_those_of_generate(name: str, real: Running) -> None:
    """Several prompts in one request, as a whole and streamed; the numbers of tokens are right."""
    options = {"do_sample": False, "max_new_tokens": 24, "no_repeat_ngram_size": 1}
    ids = [alone(real, name, word, **options) for word in WORDS]
    assert len({tuple(row.tolist()) for row in ids}) == len(WORDS)
    whole = real.openai.completions.create(model=name, prompt=WORDS, **GREEDY, **VARIED)
    assert [choice.text for choice in whole.choices] == [text_of(real, name, row) for row in ids]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == sum(map(len, ids))
    tokenizer = real.models[name].tokenizer
    assert whole.usage.prompt_tokens == sum(len(tokenizer(word)["input_ids"]) for word in WORDS)
    stream = real.openai.completions.create(
        model=name, prompt=WORDS, stream=True, stream_options={"include_usage": True}, **GREEDY, **VARIED
    )
    texts, reasons, usage = [""] * len(WORDS), [""] * len(WORDS), None
    for event in stream:
        for choice in event.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or ""
        usage = event.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_prompts_of_ids(real: Running) -> None:
    ids = real.models["g2p"].tokenizer("ice")["input_ids"]
    by_ids = real.openai.completions.create(model="g2p", prompt=ids, **GREEDY)
    assert by_ids.choices[0].text == "AY1 S"


def test_chat(real: Running) -> None:
    """The prompt is the chat template's text, with tools and the template's own variables; parts of text are joined."""
    tools: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    messages: list[Any] = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "are you"}]},
    ]
    prompt = "[weather]system: brief\nuser: how are you\nassistant: dictate"
    prompt = prompt.replace("assistant: dictate", "assistant:dictate")
    expected = text_of(
        real, "llama", alone(real, "llama", prompt, do_sample=False, max_new_tokens=12, no_repeat_ngram_size=1)
    )
    body = {**VARIED["extra_body"], "chat_template_kwargs": {"dictate": True}}
    options: dict[str, Any] = {"model": "llama", "messages": messages, "tools": tools, "temperature": 0}
    reply = real.openai.chat.completions.create(**options, max_completion_tokens=12, extra_body=body)
    assert reply.choices[0].message.content == expected
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt)
    stream = real.openai.chat.completions.create(**options, max_completion_tokens=12, extra_body=body, stream=True)
    deltas = [event.choices[0].delta for event in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("g2p", {}, "no chat template"),
        ("llama", {"messages": [{"role": "bad", "content": "x"}]}, "no such role"),
        ("llama", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ("llama", {"tool_choice": "required"}, "tool_choice"),
        ("llama", {"top_logprobs": 2}, "logprobs: true"),
        ("llama", {"extra_body": {"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}}, "chat_template"),
    ],
)
def test_chats_that_cannot_be_had(name: str, changes: dict[str, Any], part: str, real: Running) -> None:
    options: dict[str, Any] = {"model": name, "messages": [{"role": "user", "content": "hello"}]} | changes
    with pytest.raises(openai.BadRequestError, match=part):
        real.openai.chat.completions.create(**options)


@pytest.mark.parametrize("name", ["g2p", "llama"])
def test_seeds(name: str, real: Running) -> None:
    """Choice `i` of a seed is the only choice of `seed + i`, each time; different seeds differ."""
    options: dict[str, Any] = {"model": name, "prompt": "ice", "temperature": 2.0, "max_tokens": 16}
    together = real.openai.completions.create(**options, n=3, seed=5)
    single = [real.openai.completions.create(**options, seed=5 + i).choices[0].text for i in range(3)]
    assert [choice.text for choice in together.choices] == single
    assert len(set(single)) == 3


def test_temperature_zero_is_greedy_and_bias_decides(real: Running) -> None:
    """A large bias makes a token win."""
    (token,) = real.models["llama"].tokenizer("Q")["input_ids"]
    reply = real.openai.completions.create(
        model="llama", prompt="ice", temperature=0, max_tokens=3, logit_bias={str(token): 100}
    )
    assert reply.choices[0].text == "QQQ"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_across_tokens(stream: bool, real: Running) -> None:
    """The text ends before the first stop string, which lies across several tokens."""
    options: dict[str, Any] = {"model": "g2p", "prompt": "photosynthesis", "temperature": 0}
    full = "F OW2 T OW0 S IH1 N TH AH0 S IH0 S"
    assert real.openai.completions.create(**options).choices[0].text == full
    reply = real.openai.completions.create(**options, stop=["nothing", "S IH1 N"], stream=stream)
    events = list(reply) if stream else [reply]
    assert "".join(event.choices[0].text for event in events) == "F OW2 T OW0 "
    assert events[-1].choices[0].finish_reason == "stop"


def forward_logprobs(server: Running, name: str, prompt: str, new: torch.Tensor) -> torch.Tensor:
    """Return log probabilities of all tokens at each new position by one forward pass, [new, vocabulary]."""
    served = server.models[name]
    ids = served.tokenizer([prompt], return_tensors="pt")["input_ids"]
    if served.has_encoder:
        start = torch.full((1, 1), served.model.config.decoder_start_token_id)
        logits = served.model(input_ids=ids, decoder_input_ids=torch.cat([start, new[None, :-1]], 1)).logits[0]
    else:
        logits = served.model(input_ids=torch.cat([ids, new[None, :-1]], 1)).logits[0, ids.shape[1] - 1 :]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("name", ["g2p", "llama"])
def test_logprobs_are_those_of_a_forward_pass(name: str, real: Running) -> None:
    """Those of the chosen tokens and of the most likely ones, before temperature and filters."""
    options = {"model": name, "prompt": "ice", "max_tokens": 6, "logprobs": 4, "temperature": 0}
    reply = real.openai.completions.create(**options, **VARIED)  # type: ignore[call-overload]
    logprobs = reply.choices[0].logprobs
    new = alone(real, name, "ice", do_sample=False, max_new_tokens=6, no_repeat_ngram_size=1)
    expected = forward_logprobs(real, name, "ice", new)
    ends = real.models[name].model.generation_config.eos_token_id
    shown = [place for place, token in enumerate(new.tolist()) if token != ends]
    assert len(shown) >= 2
    assert logprobs.tokens == [real.models[name].tokenizer.decode([token]) for token in new[shown].tolist()]
    chosen = expected[shown, new[shown]]
    assert logprobs.token_logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
    for place, top in zip(shown, logprobs.top_logprobs, strict=True):
        best = expected[place].topk(4).values.tolist()
        assert sorted(top.values(), reverse=True)[0] == pytest.approx(best[0], abs=1e-4)
        assert all(any(abs(value - one) < 1e-4 for one in best) for value in top.values())


def test_logprobs_of_chat(real: Running) -> None:
    """As OpenAI's chat has them: text, bytes and log probability of each token and of the most likely ones."""
    reply = real.openai.chat.completions.create(
        model="llama",
        messages=[{"role": "user", "content": "ice"}],
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["celsius", "kelvin"]},
        "degrees": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["unit", "degrees"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_output_follows_a_schema(seed: int, real: Running) -> None:
    """Random weights at a high temperature, which write no JSON by themselves."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    reply = real.openai.chat.completions.create(
        model="llama",
        messages=[{"role": "user", "content": "weather?"}],
        response_format=form,
        temperature=1.5,
        max_tokens=200,
        seed=seed,
    )
    assert reply.choices[0].finish_reason == "stop"
    value = json.loads(reply.choices[0].message.content or "")
    assert set(value) == {"unit", "degrees"}
    assert value["unit"] in ("celsius", "kelvin")
    assert type(value["degrees"]) is int
    assert 0 <= value["degrees"] <= 99


@pytest.mark.parametrize(
    ("name", "schema", "part"),
    [
        ("llama", {"type": "thing"}, "schema"),
        ("llama", {"$ref": "https://example.com/schema.json"}, "schema"),
        ("g2p", SCHEMA, "tokenizer of g2p"),
    ],
)
def test_schemas_that_cannot_be_used(name: str, schema: dict[str, Any], part: str, real: Running) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=part):
        real.openai.completions.create(model=name, prompt="ice", extra_body={"response_format": form})


def test_generate_takes_any_option(real: Running) -> None:
    """Beam search, and sampling with `num_return_sequences`, equal to `generate` alone."""
    reply = real.post("/v1/generate", model="g2p", inputs=WORDS[:2], parameters={"num_beams": 4, "length_penalty": 0.3})
    expected = [text_of(real, "g2p", alone(real, "g2p", word, num_beams=4, length_penalty=0.3)) for word in WORDS[:2]]
    assert [output["generated_text"] for output in reply.json()["outputs"]] == expected
    sampled = {"do_sample": True, "num_return_sequences": 2, "seed": 3, "temperature": 2.0, "top_k": 40}
    reply = real.post("/v1/generate", model="g2p", inputs="ice", parameters=sampled)
    texts = [output["generated_text"] for output in reply.json()["outputs"]]
    for index, text in enumerate(texts):
        torch.manual_seed(3 + index)
        alone_ids = alone(real, "g2p", "ice", do_sample=True, temperature=2.0, top_k=40)
        assert text == text_of(real, "g2p", alone_ids)
    assert len(set(texts)) == 2
    for parameters, part in (({"num_beam": 2}, "num_beams"), ({"seed": "x"}, "seed"), ({"max_length": 9}, "max_new")):
        reply = real.post("/v1/generate", model="g2p", inputs="ice", parameters=parameters)
        assert reply.status_code == 400
        assert part in reply.json()["error"]["message"]


def test_no_reply_names_a_path(real: Running, g2p_folder: Any) -> None:
    """Models are described without the folders that they were read from."""
    for path in ("/v1/models", "/metrics", "/openapi.json", "/", "/v1/models/g2p"):
        text = real.http.get(path).text
        assert text
        assert str(g2p_folder.parent) not in text
    assert [model.id for model in real.openai.models.list()] == ["llama", "g2p"]
