"""What code around a transformers model calls works on ours, or is refused in words that name it."""

import copy
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from transformers import CompileConfig, GenerationMixin, StaticCache, T5ForConditionalGeneration

from accel import testing
from accel.errors import AccelError
from accel.models.generation import AcceleratedModel
from accel.models.loading import load

UNIQUE = {"max_new_tokens": 12, "no_repeat_ngram_size": 1}
IDS = torch.tensor([[5, 9, 7, 21, 4], [8, 3, 11, 0, 0]])
MASK = (IDS != 0).long()


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.eval(),
        lambda model: model.train(False),
        lambda model: model.requires_grad_(False),
        lambda model: model.cpu(),
        lambda model: model.float(),
        lambda model: model.to("cpu"),
        lambda model: model.to(torch.device("cpu"), torch.float32),
        lambda model: model.to(torch.zeros(1)),
        lambda model: model.to(device="cpu", non_blocking=True),
        lambda model: model.get_decoder(),
    ],
    ids=[
        "eval",
        "train off",
        "gradients off",
        "cpu",
        "float",
        "to name",
        "to both",
        "to tensor's",
        "to device",
        "decoder",
    ],
)
def test_what_asks_for_the_model_as_it_is_returns_it(model: AcceleratedModel, call: Callable[[Any], Any]) -> None:
    """So that calls can be chained as on a PyTorch model."""
    assert call(model) is model
    assert model.training is False


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.train(), "can't be trained"),
        (lambda model: model.requires_grad_(), "have no gradients"),
        (lambda model: model.cuda(), "sessions of this model run on cpu"),
        (lambda model: model.to("meta"), "run on cpu"),
        (lambda model: model.half(), "built for torch.float32"),
        (lambda model: model.bfloat16(), "built for torch.float32"),
        (lambda model: model.double(), "built for torch.float32"),
        (lambda model: model.get_input_embeddings(), "constants of ONNX graphs"),
        (lambda model: model.resize_token_embeddings(7), "vocabulary is fixed"),
        (lambda model: model.gradient_checkpointing_enable(), "can't be trained"),
        (lambda model: model.forward(IDS, MASK), "decoder_input_ids is missing"),
        (lambda model: model(IDS, MASK, IDS, inputs_embeds=torch.zeros(1)), "inputs_embeds is not supported"),
        (lambda model: model(IDS, MASK, IDS, token_type_ids=IDS), "token_type_ids is not supported"),
        (lambda model: model(IDS, MASK, IDS, output_attentions=True), "output_attentions is not supported"),
        (lambda model: model(IDS, MASK, IDS, decoder_attention_mask=MASK), "decoder_attention_mask has zeros"),
        (lambda model: model.get_encoder()(IDS, output_hidden_states=True), "output_hidden_states is not supported"),
        (lambda model: model.get_encoder()(inputs_embeds=torch.zeros(1)), "inputs_embeds is not supported"),
        (lambda model: model.generate(IDS, output_attentions=True), "output_attentions is not supported"),
        (lambda model: model(IDS, MASK[:, :3], IDS), r"attention_mask has shape \[2, 3\], expected \[2, 5\]"),
        (lambda model: model(IDS, MASK[:, None, None], IDS), r"shape \[2, 1, 1, 5\], expected \[batch, length\]"),
        (lambda model: model(IDS - 6, MASK, IDS), "input_ids contains -6, expected ids from 0 to 119"),
        (lambda model: model(IDS, MASK, IDS + 111), "decoder_input_ids contains 132, expected ids from 0 to 119"),
        (lambda model: model(IDS.float(), MASK, IDS), "input_ids has dtype torch.float32, expected integers"),
        (lambda model: model(IDS[0], MASK, IDS), r"input_ids has shape \[5\], expected \[batch, length\]"),
        (lambda model: model.generate(IDS * 99, max_new_tokens=2), "input_ids contains 2079"),
        (lambda model: model.save_pretrained("x", max_shard_size="1GB"), "max_shard_size can't be honoured"),
    ],
)
def test_what_can_not_be_is_refused_in_words(
    model: AcceleratedModel, call: Callable[[Any], Any], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A `ValueError` that names the argument or method, and the value."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        call(model)
    assert not list(tmp_path.iterdir())


def test_an_unknown_argument_is_named(model: AcceleratedModel) -> None:
    """With those there are."""
    with pytest.raises(TypeError, match=r"no argument 'atention_mask'.*attention_mask"):
        model(IDS, MASK, IDS, atention_mask=MASK)


def test_what_describes_the_model(model: AcceleratedModel, eager: T5ForConditionalGeneration) -> None:
    """Counts and names are PyTorch's; there are no parameters here."""
    assert list(model.parameters()) == []
    assert len(model.state_dict()) == 0
    assert model.num_parameters() == eager.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == eager.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == 0
    assert (model.dtype, model.device, model.main_input_name) == (eager.dtype, eager.device, "input_ids")
    assert model.name_or_path
    assert model.get_encoder()(IDS, attention_mask=MASK).last_hidden_state.shape == (2, 5, 64)
    hidden = model.get_encoder()(IDS, attention_mask=MASK, return_dict=False)
    assert isinstance(hidden, tuple)
    assert model.get_compiled_call()(IDS, MASK, IDS).logits.shape == (2, 5, 120)


def test_forward_with_labels_and_int32_ids(model: AcceleratedModel, eager: T5ForConditionalGeneration) -> None:
    """Loss, logits and the tuple are PyTorch's, whatever the type of the ids."""
    labels = IDS.masked_fill(IDS == 0, -100)
    with torch.inference_mode():
        expected = eager(input_ids=IDS, attention_mask=MASK, labels=labels)
        actual = model(input_ids=IDS.int(), attention_mask=MASK.int(), labels=labels)
        as_tuple = model(input_ids=IDS, attention_mask=MASK, labels=labels, return_dict=False)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(as_tuple[0], actual.loss)
    expected_tokens = eager.generate(IDS, attention_mask=MASK, **UNIQUE)
    assert torch.equal(model.generate(IDS.int(), attention_mask=MASK.int(), **UNIQUE), expected_tokens)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_opens_the_folder_again(model: AcceleratedModel, again: Callable[[Any], Any]) -> None:
    """It has sessions of its own: closing it leaves the first one open."""
    expected = model.generate(IDS, attention_mask=MASK, **UNIQUE)
    with again(model) as other:
        assert other.runtime is not model.runtime
        assert torch.equal(other.generate(IDS, attention_mask=MASK, **UNIQUE), expected)
    assert torch.equal(model.generate(IDS, attention_mask=MASK, **UNIQUE), expected)


def test_saved_as_a_folder_that_loads(model: AcceleratedModel, deployable: Path, tmp_path: Path) -> None:
    """With every file of the deployable."""
    model.save_pretrained(tmp_path / "copy")
    names = [sorted(path.name for path in folder.iterdir()) for folder in (deployable, tmp_path / "copy")]
    assert names[0] == names[1]
    with load(tmp_path / "copy", runtime="cpu") as other:
        expected = model.generate(IDS, attention_mask=MASK, **UNIQUE)
        assert torch.equal(other.generate(IDS, attention_mask=MASK, **UNIQUE), expected)


def test_pushed_to_the_hub(model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder goes up as it is, into a repository that is created if need be."""
    calls: list[tuple[str, Any]] = []

    class Created:
        repo_id = "someone/small"

    def create(self: HfApi, repo_id: str, **options: Any) -> Created:
        calls.append((repo_id, options))
        return Created()

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.append(("upload", options)) or "done")
    assert model.push_to_hub("small", private=True, revision="main") == "done"
    assert calls[0] == ("small", {"private": True, "exist_ok": True})
    name, options = calls[1]
    assert (name, options["repo_id"], options["revision"]) == ("upload", "someone/small", "main")
    assert Path(options["folder_path"]) == model.folder


def test_threads_on_one_model(model: AcceleratedModel) -> None:
    """Each call has its own tokens, whatever runs beside it, and at whatever instruction it is interrupted."""
    prompts = [torch.randint(2, 60, (1 + number % 3, 2 + number % 4)) for number in range(24)]
    expected = [model.generate(ids, **UNIQUE) for ids in prompts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            actual = list(pool.map(lambda ids: model.generate(ids, **UNIQUE), prompts))
    finally:
        sys.setswitchinterval(interval)
    assert all(map(torch.equal, actual, expected))


def test_calls_on_static_caches_take_turns(gpt2: testing.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share one pool of buffers, so no decode step of one call runs during another's."""
    static = gpt2.static
    assert static is not None
    prompts = [gpt2.ids(1, 3 + number, seed=number) for number in range(6)]
    expected = [static.generate(ids, **UNIQUE) for ids in prompts]
    decode, running, most = static.runtime.decode, [], [0]

    def slow_decode(*inputs: Any) -> Any:
        running.append(1)
        most[0] = max(most[0], len(running))
        sleep(0.005)
        running.pop()
        return decode(*inputs)

    monkeypatch.setattr(static.runtime, "decode", slow_decode)
    with ThreadPoolExecutor(3) as pool:
        actual = list(pool.map(lambda ids: static.generate(ids, **UNIQUE), prompts))
    assert all(map(torch.equal, actual, expected))
    assert most == [1]


def test_a_closed_model_says_so(deployable: Path) -> None:
    """Every call, and closing twice is no error."""
    model = load(deployable, runtime="cpu")
    model.close()
    model.close()
    for call in (lambda: model.generate(IDS), lambda: model(IDS, MASK, IDS), lambda: model.get_encoder()(IDS)):
        with pytest.raises(RuntimeError, match=r"this model is closed: open its folder again with accel.load"):
            call()


def test_closing_waits_for_calls_of_other_threads(deployable: Path) -> None:
    """The call in progress ends with its tokens, and the next one is refused."""
    model = load(deployable, runtime="cpu")
    expected = model.generate(IDS, attention_mask=MASK, **UNIQUE)
    begun, release = Event(), Event()
    decode = model.runtime.decode

    def slow_decode(*inputs: Any) -> Any:
        begun.set()
        release.wait(10)
        return decode(*inputs)

    model.runtime.decode = slow_decode
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(model.generate, IDS, attention_mask=MASK, **UNIQUE)
        begun.wait(10)
        closing = pool.submit(model.close)
        assert not closing.done()
        release.set()
        assert torch.equal(running.result(20), expected)
        closing.result(20)
    with pytest.raises(RuntimeError, match="closed"):
        model.generate(IDS)


def test_only_a_model_from_a_folder_can_be_copied(model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model put together in Python doesn't know how it was."""
    monkeypatch.setattr(model, "reopen", None)
    with pytest.raises(TypeError, match=r"only a model that accel\.load opened"):
        copy.deepcopy(model)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/no/such/folder", "is neither a folder nor the id of a repository"),
        ("a/b/c", "is neither a folder nor the id of a repository"),
        ("nobody/nothing", "can't be downloaded from the Hugging Face hub"),
    ],
)
def test_folders_and_repositories_that_do_not_exist(name: str, words: str) -> None:
    """One message each."""
    with pytest.raises(AccelError, match=words):
        load(name)


def test_a_plain_checkpoint_is_refused_with_the_call_that_builds(tiny: Path) -> None:
    """It holds PyTorch weights, not graphs."""
    with pytest.raises(AccelError, match=r"is a plain checkpoint.*\n.*accel\.build\(checkpoint="):
        load(tiny)


def test_a_repository_on_the_hub(
    deployable: Path, model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Downloaded at its revision, of which only the subfolder."""
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        (tmp_path / "snapshot").mkdir()
        (tmp_path / "snapshot" / "fp32").symlink_to(deployable)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("accel.models.loading.snapshot_download", download)
    with load("someone/small", "cpu", revision="v1", subfolder="fp32", token="secret") as opened:
        assert asked == {"name": "someone/small", "revision": "v1", "token": "secret", "allow_patterns": ["fp32/*"]}
        expected = model.generate(IDS, attention_mask=MASK, **UNIQUE)
        assert torch.equal(opened.generate(IDS, attention_mask=MASK, **UNIQUE), expected)


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "continued"])
def test_a_static_cache_used_twice(gpt2: testing.Subject, reset: bool) -> None:
    """It stays one that transformers compiles calls for, and is empty after `reset()`."""
    ids = gpt2.ids(2, 5)
    logits = []
    for model in (gpt2.eager, gpt2.model):
        cache = StaticCache(config=gpt2.eager.config, max_cache_len=16)
        with torch.inference_mode():
            first = model(ids, past_key_values=cache, use_cache=True).logits
            assert cache.is_compileable
            if reset:
                cache.reset()
                assert int(cache.get_seq_length()) == 0
            logits.append(model(ids[:, :3], past_key_values=cache, use_cache=True).logits)
        if reset:
            torch.testing.assert_close(logits[-1], first[:, :3], rtol=2e-3, atol=2e-3)
        assert int(cache.get_seq_length()) == (3 if reset else 8)
    torch.testing.assert_close(logits[1], logits[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scores", [True, False], ids=["transformers' loop", "accel's loop"])
def test_a_compile_config_is_accepted(gpt2: testing.Subject, scores: bool) -> None:
    """Graphs are compiled when a session opens, so that `generate` gets the model's call as it is."""
    vars(gpt2.model).pop("_compiled_call", None)
    compile_config = CompileConfig(fullgraph=True)
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compile_config, "output_scores": scores}
    ids = gpt2.ids(2, 5)
    expected = gpt2.model.generate(ids, **UNIQUE, return_dict_in_generate=True)
    actual = gpt2.model.generate(ids, **UNIQUE, **options, return_dict_in_generate=True)
    assert torch.equal(actual.sequences, expected.sequences)
    assert isinstance(actual.past_key_values, StaticCache)
    assert gpt2.model._compiled_call == gpt2.model.__call__
    assert GenerationMixin in type(gpt2.model).__bases__
