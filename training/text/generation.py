"""Text of a domain: proposed by a grammar or a language model, screened, and written with its lineage.

report = generate_text(load_domain("music"), TextOptions(count=44_000), Path("music.jsonl"))
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from das_asr.runtime.errors import OptionError, SynthesisError
from das_asr.runtime.jsonl import JsonLines, Row
from das_asr.training.text.candidate import Candidate, Source
from das_asr.training.text.chat import Answers, Asker, ChatModel
from das_asr.training.text.diversity import measure_diversity
from das_asr.training.text.domain import Domain
from das_asr.training.text.endpoint import EndpointModel
from das_asr.training.text.evaluation_list import EvaluationList
from das_asr.training.text.grammar import Grammar
from das_asr.training.text.grammar_source import GrammarSource, domain_grammar
from das_asr.training.text.local_model import LocalModel
from das_asr.training.text.model_source import ModelSource
from das_asr.training.text.options import TextOptions
from das_asr.training.text.progress import progress_bar
from das_asr.training.text.prompt_file import prompts_sha256
from das_asr.training.text.report import TextReport
from das_asr.training.text.screening import Screened, Screening
from das_asr.training.text.sentence_file import SentenceFile, beside, write_json

__all__ = ["chat_model", "generate_text"]


def generate_text(
    domain: Domain, options: TextOptions, output: Path, *, quiet: bool = True, model: ChatModel | None = None
) -> TextReport:
    """Writes `options.count` sentences, or this shard's part of them; killed and started again, it goes on.

    Args:
        domain: what the sentences are about.
        options: how they are made; the same options give the same file, given the same answers of a model.
        output: the JSON Lines file.
        quiet: show no progress.
        model: a chat model to ask in place of the one that the options name.

    Raises:
        DataError: there is no grammar for the domain, or a file cannot be read.
        OptionError: the options do not go with the domain.
        SynthesisError: the file belongs to another run, the model cannot be had, or there are not as many sentences.
    """
    _check(domain, options)
    grammar = domain_grammar(domain, options) if options.backend == "grammar" else None
    excluded = EvaluationList(options.exclude, domain.wake_words, options.similarity)
    with ExitStack() as stack:
        file = stack.enter_context(SentenceFile.open(output, _settings(domain, options, grammar)))
        if file.complete:
            return TextReport.read(beside(output, "report.json"), output)
        source = _source(domain, options, grammar, output, stack, model)
        screening = Screening(domain, options, excluded)
        bar = stack.enter_context(progress_bar(options.part, "sentences", quiet=quiet))
        for row in _rows(domain, options, source, screening, file):
            file.put(row)
            bar.update()
        diversity = measure_diversity(file.rows, grammar, excluded if options.exclude else None)
        run = {"resumed_rows": file.resumed, **screening.facts(), **source.facts()}
        report = TextReport(str(output), asdict(diversity), run)
        # Before the rows: a finished file always has its report.
        write_json(beside(output, "report.json"), report.as_json())
        file.finish()
    return report


def chat_model(options: TextOptions) -> ChatModel:
    """The language model of the options.

    Raises:
        SynthesisError: the package is missing, or there is neither a key nor an address.
    """
    return EndpointModel(options) if options.backend == "openai" else LocalModel(options)


def _check(domain: Domain, options: TextOptions) -> None:
    if options.wake_words and not domain.wake_words:
        raise OptionError(
            f"wake_words={options.wake_words} was given, but the domain {domain.name} has no wake words. Add some."
        )
    if options.max_seconds * options.words_per_second < domain.words_min:
        raise OptionError(
            f"max_seconds={options.max_seconds} at {options.words_per_second} words per second leaves no room for the "
            f"{domain.words_min} words that a sentence of {domain.name} has at least."
        )


def _settings(domain: Domain, options: TextOptions, grammar: Grammar | None) -> Mapping[str, Any]:
    made_of = {"grammar": grammar.sha256} if grammar is not None else {"prompts": prompts_sha256()}
    return {"domain": domain.name, "domain_sha256": domain.sha256, **made_of, **options.identity()}


def _source(
    domain: Domain,
    options: TextOptions,
    grammar: Grammar | None,
    output: Path,
    stack: ExitStack,
    model: ChatModel | None,
) -> Source:
    if grammar is not None:
        return GrammarSource(grammar, options.seed)
    path = options.answers or beside(output, "answers.jsonl")
    stack.callback(_remove_empty, path)
    file = stack.enter_context(JsonLines.open(path))
    scope = f"{options.model}:{options.temperature}:{options.max_tokens}"
    return ModelSource(domain, options, Asker(model or chat_model(options), Answers(file, scope)))


def _remove_empty(path: Path) -> None:
    if path.exists() and not path.stat().st_size:
        path.unlink()


def _rows(
    domain: Domain, options: TextOptions, source: Source, screening: Screening, file: SentenceFile
) -> Iterator[Row]:
    """The rows of this shard. A grammar's shard is every n-th row of the whole, so that all shards together are it."""
    part, parts = options.shard if options.backend == "grammar" else (0, 1)
    wanted = options.count if options.backend == "grammar" else options.part
    accepted = fruitless = 0
    with closing(source.batches(lambda: wanted - accepted)) as batches:
        while accepted < wanted:
            before = accepted
            for candidate in next(batches):
                screened = screening.passes(candidate)
                if screened is None:
                    continue
                if accepted % parts == part:
                    yield _row(domain, options, source, candidate, screened)
                accepted += 1
                if accepted == wanted:
                    return
            fruitless = 0 if accepted > before else fruitless + 1
            if fruitless >= source.patience:
                _give_up(accepted, wanted, source, file, screening)


def _give_up(accepted: int, wanted: int, source: Source, file: SentenceFile, screening: Screening) -> None:
    file.discard()
    reasons = ", ".join(f"{count} {reason}" for reason, count in screening.rejected.most_common()) or "nothing came"
    raise SynthesisError(
        f"{wanted} sentences were asked for, but after {accepted} distinct ones nothing new came in "
        f"{source.patience} x {source.unit} (turned away: {reasons}). Ask for at most {accepted}, or give more "
        "variety: templates and slots, skills and personas, or a model that answers in lists."
    )


def _row(domain: Domain, options: TextOptions, source: Source, candidate: Candidate, screened: Screened) -> Row:
    text = _with_wake_word(screened.text, domain, options)
    return {
        "id": f"{domain.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}",
        "text": text,
        "domain": domain.name,
        "skill": candidate.skill,
        "persona": candidate.persona,
        "style": candidate.style,
        "stage": candidate.stage,
        "backend": options.backend,
        "model": source.model,
        "seed": options.seed,
        "prompt_sha256": candidate.prompt_sha256,
        "instruction": candidate.instruction,
        "template": candidate.template,
    }


def _with_wake_word(text: str, domain: Domain, options: TextOptions) -> str:
    """The draw depends on the sentence alone, so that one more or less before it changes nothing."""
    rng = random.Random(f"{options.seed} wake word {text}")  # noqa: S311
    if rng.random() >= options.wake_words:
        return text
    return f"{rng.choice(domain.wake_words)} {text}"
