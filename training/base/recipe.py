"""`das-train base` as a function: text, speech, features, training, checkpoint; each goes on where it was stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from das_asr.runtime.errors import OptionError, TrainingError
from das_asr.runtime.jsonl import Row, read_rows
from das_asr.training.base.corpus import CorpusOptions, write_corpus
from das_asr.training.base.prepared import load_prepared, prepare

if TYPE_CHECKING:
    from transformers import WhisperTokenizer

    from das_asr.training.base.batches import Example
    from das_asr.training.base.network import TinyWhisper
    from das_asr.training.base.pretrain import Progress

__all__ = ["BaseOptions", "is_held_out", "train_base"]

_CORPUS, _PREPARED, _OPTIONS, _TOKENIZER = "corpus.jsonl", "prepared", "options.json", "tokenizer"
_HELD_OUT = 200  # one sentence of so many is kept for evaluation


@dataclass(frozen=True)
class BaseOptions:
    """What `train_base` does; `work` keeps everything that a stopped run goes on from."""

    output: Path
    work: Path
    sentences: int = 72_000
    heard: int = 200_000  # utterances, repetitions included
    vocabulary: int = 1200
    seed: int = 0
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        for name, least in (("sentences", 1000), ("heard", 1), ("vocabulary", 300), ("workers", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"{name}={getattr(self, name)} was given; at least {least} is needed.")
        if self.output.exists():
            raise OptionError(f"{self.output} exists. Name a folder that does not, or remove it.")


def is_held_out(row: Row) -> bool:
    """Whether a sentence of the corpus is kept for evaluation."""
    return int(str(row["id"])[1:]) % _HELD_OUT == 0


def train_base(options: BaseOptions, say: Callable[[str], None]) -> Path:
    """Trains the tiny Whisper and writes a Hugging Face checkpoint, float16, to `options.output`.

    Args:
        options: where and how.
        say: called with a line of progress now and then.

    Raises:
        TrainingError: `work` belongs to a run with other options.
        DataError: texts to train on are not installed.
        SynthesisError: a speech engine is not installed, or fails.
    """
    _claim(options)
    corpus = options.work / _CORPUS
    if not corpus.exists():
        write_corpus(corpus, CorpusOptions(options.sentences, options.seed))
        say(f"{options.sentences} sentences written to {corpus}")
    rows = list(read_rows(corpus))
    from das_asr.training.base.network import Shape

    shape = Shape()
    seconds = shape.audio_positions / 50 - 0.1
    for done in prepare(rows, options.work / _PREPARED, mels=shape.mels, seconds=seconds, workers=options.workers):
        say(f"{done} of {len(rows)} sentences spoken")
    return _train(options, rows, say)


def _claim(options: BaseOptions) -> None:
    """Makes the working folder, or checks that it was made with the same options."""
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / _OPTIONS
    # `heard` may change: a run can be made longer while its learning rate is still constant.
    given = {"sentences": options.sentences, "vocabulary": options.vocabulary, "seed": options.seed}
    if not path.exists():
        path.write_text(json.dumps(given))
    elif (found := json.loads(path.read_text())) != given:
        raise TrainingError(f"{options.work} was made with {found}; {given} was given. Use another working folder.")


def _train(options: BaseOptions, rows: list[Row], say: Callable[[str], None]) -> Path:
    import torch

    from das_asr.training.base.pretrain import Schedule, train

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.workers)
    tokenizer = _tokenizer(options, rows)
    examples, symbols = _examples(options, tokenizer)
    model = _model(tokenizer, len(symbols))

    def report(progress: Progress) -> None:
        say(
            f"{progress.seen} of {options.heard} heard, {progress.seconds / 60:.1f} min: "
            f"cross-entropy {progress.entropy:.3f}, CTC {progress.ctc:.3f}, rate {progress.rate:.2f}"
        )

    train(model, examples, Schedule(total=options.heard, seed=options.seed), options.work, report)
    _save(model, tokenizer, options, len(examples))
    return options.output


def _tokenizer(options: BaseOptions, rows: list[Row]) -> WhisperTokenizer:
    from transformers import WhisperTokenizer

    from das_asr.training.base.tokens import train_tokenizer

    folder = options.work / _TOKENIZER
    if not folder.is_dir():
        # Random words would spend merges on letters that no sentence has.
        made = train_tokenizer((row["text"] for row in rows if row["source"] != "words"), options.vocabulary)
        made.save_pretrained(folder)
    loaded: WhisperTokenizer = WhisperTokenizer.from_pretrained(folder)
    return loaded


def _examples(options: BaseOptions, tokenizer: WhisperTokenizer) -> tuple[list[Example], list[str]]:
    """(training set, the phonemes' names)."""
    from das_asr.training.base.batches import Example
    from das_asr.training.base.tokens import prompt_ids

    prepared = load_prepared(options.work / _PREPARED)
    symbols = sorted({symbol for row in prepared.rows for symbol in row["phonemes"]})
    number = {symbol: index for index, symbol in enumerate(symbols, start=1)}
    prompt, end = prompt_ids(tokenizer), [tokenizer.eos_token_id]
    examples = []
    for row, features in zip(prepared.rows, prepared.features, strict=True):
        if not is_held_out(row):
            tokens = tokenizer(f" {row['text']}", add_special_tokens=False).input_ids
            examples.append(Example(features, prompt + tokens + end, [number[symbol] for symbol in row["phonemes"]]))
    return examples, symbols


def _model(tokenizer: WhisperTokenizer, phonemes: int) -> TinyWhisper:
    from das_asr.training.base.network import Shape, TinyWhisper, make_config
    from das_asr.training.base.tokens import SPECIAL_TOKENS, token_ids

    end, start = token_ids(tokenizer, SPECIAL_TOKENS[:2])
    return TinyWhisper(make_config(Shape(), len(tokenizer), end, start), phonemes)


def _save(model: TinyWhisper, tokenizer: WhisperTokenizer, options: BaseOptions, utterances: int) -> None:
    """Writes the checkpoint beside its destination and renames it."""
    import torch
    from transformers import WhisperFeatureExtractor, WhisperProcessor

    temporary = options.output.with_name(f".{options.output.name}.{os.getpid()}")
    try:
        whisper: Any = model.whisper
        whisper.to(torch.float16)
        whisper.generation_config = _generation_config(tokenizer, whisper.config)
        whisper.save_pretrained(temporary)
        seconds = whisper.config.max_source_positions // 50
        extractor = WhisperFeatureExtractor(feature_size=whisper.config.num_mel_bins, chunk_length=seconds)
        extractor.save_pretrained(temporary)
        WhisperProcessor(extractor, tokenizer).save_pretrained(temporary)
        (temporary / "training.json").write_text(json.dumps(_lineage(options, utterances), indent=2) + "\n")
        temporary.replace(options.output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _generation_config(tokenizer: WhisperTokenizer, config: Any) -> Any:
    from transformers import GenerationConfig

    ids = tokenizer.convert_tokens_to_ids
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        max_length=config.max_target_positions,
        is_multilingual=True,
        language="en",
        task="transcribe",
        lang_to_id={"<|en|>": ids("<|en|>")},
        task_to_id={"transcribe": ids("<|transcribe|>"), "translate": ids("<|translate|>")},
        no_timestamps_token_id=ids("<|notimestamps|>"),
        prev_sot_token_id=ids("<|startofprev|>"),
        return_timestamps=False,
    )


def _lineage(options: BaseOptions, utterances: int) -> dict[str, Any]:
    path = options.work / "curve.jsonl"
    curve = list(read_rows(path)) if path.exists() else []
    settings = {name: value for name, value in asdict(options).items() if name not in {"output", "work", "workers"}}
    thinned = curve[:: max(1, len(curve) // 40)]
    return {"recipe": "das-train base", "options": settings, "utterances": utterances, "learning_curve": thinned}
