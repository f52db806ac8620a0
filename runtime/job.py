"""One batch on its way: options resolved against the bundle, prompts, what the first logits tell, and the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.adapter_sets import AdapterSet
from das_asr.runtime.backends.base import Control, LoadedStack
from das_asr.runtime.contract import RULE_CODES, SUPPRESSED
from das_asr.runtime.decoding import DecodedBatch, Plan, Prompt
from das_asr.runtime.errors import OptionError
from das_asr.runtime.manifest import Manifest
from das_asr.runtime.options import DecodingOptions
from das_asr.runtime.pruning import Pruning
from das_asr.runtime.results import Timings, Transcription
from das_asr.runtime.selection import HYPOTHESIS
from das_asr.runtime.tokenizer import Tokenizer, language_code
from das_asr.runtime.transcript import (
    Transcript,
    compression_ratio,
    empty_transcript,
    read_own_histories,
    read_shared_history,
)

__all__ = ["Job"]


class Job:
    """A batch of B utterances decoded with the same options and adapters."""

    def __init__(
        self, manifest: Manifest, tokenizer: Tokenizer, adapters: AdapterSet, options: DecodingOptions, batch: int
    ) -> None:
        self._manifest, self._tokenizer, self._adapters, self._options = manifest, tokenizer, adapters, options
        self._batch = batch
        self.rule = manifest.rule if options.rule is None else options.rule
        self._tau = manifest.tau if options.tau is None else options.tau
        language = self._known_language()
        self._languages: list[str | None] = [language] * batch
        self._detect = language is None and len(manifest.tokens.languages) > 1
        self._no_speech: list[float | None] = [None] * batch
        self._check(language)

    def _check(self, language: str | None) -> None:
        """Refuses options that do not fit the bundle, also where there is nothing to decode."""
        self._options.check_scoring(self.rule)
        if not (self._options.include_base or self._adapters.names):
            raise OptionError("include_base=False leaves nothing to choose from: no adapters are loaded. Load one.")
        vocabulary = self._manifest.dimensions.vocabulary
        if outside := [token for token in self._options.suppress_tokens if not 0 <= token < vocabulary]:
            raise OptionError(f"suppress_tokens has {outside[0]}, but this model's ids go from 0 to {vocabulary - 1}.")
        self._prompt(language)

    # --- Before the loop ---

    def prompts(self) -> list[Prompt]:
        """The decoder prompt of every utterance; a language still to be detected is stood in for by any other."""
        return [self._prompt(language) for language in self._languages]

    def _prompt(self, language: str | None) -> Prompt:
        if language is None:  # an English-only model takes no other than English; another still has to detect it
            language = self._options.language or next(iter(self._manifest.tokens.languages), None)
        # Half of the positions are left to the transcription, as Whisper was trained; one goes to <|startofprev|>.
        room = self._manifest.dimensions.text_positions // 2 - 1
        ids, start = self._tokenizer.prompt(language, self._options.task, self._options.prompt, room)
        return Prompt(tuple(ids), start)

    def plan(self, subset: Callable[[tuple[int, ...]], LoadedStack] | None = None) -> Plan:
        """How the loop shall run; `subset` see `Plan`."""
        measures_silence = self._options.no_speech_threshold is not None and self._manifest.tokens.no_speech is not None
        return Plan(
            rule=self.rule,
            control=self._control(),
            end_of_text=self._manifest.tokens.end_of_text,
            max_tokens=self._options.max_tokens,
            text_positions=self._manifest.dimensions.text_positions,
            probe=self._probe if self._detect or measures_silence else None,
            pruning=Pruning.of(self._options, self.rule),
            subset=subset,
        )

    def _control(self) -> Control:
        bias = self._bias((*self._manifest.suppress_tokens, *self._never(), *self._options.suppress_tokens))
        # A rule on the host needs the rows' candidates only; the graph's own choice is then ignored.
        code = RULE_CODES[self.rule] if isinstance(self.rule, str) else RULE_CODES["base"]
        return Control(
            rule=np.full(self._batch, code, np.int64),
            tau=np.full(self._batch, self._tau, np.float32),
            token_bias=bias,
            first_token_bias=self._bias(self._manifest.begin_suppress_tokens),
            row_mask=np.ones((self._batch, len(self._adapters.rows)), np.bool_),
            first_valid=self._padding(),
        )

    def _padding(self) -> NDArray[np.int64]:
        """First cache slot [B] that is not padding: prompts are padded on the left to one length."""
        lengths = np.array([len(prompt.ids) for prompt in self.prompts()], np.int64)
        padding: NDArray[np.int64] = lengths.max() - lengths
        return padding

    def _never(self) -> Sequence[int]:
        """Timestamps: without their grammar they would be noise in the text."""
        first = self._manifest.tokens.first_timestamp
        return () if first is None else range(first, self._manifest.dimensions.vocabulary)

    def _bias(self, suppressed: Sequence[int]) -> NDArray[np.float32]:
        bias = np.zeros((self._batch, self._manifest.dimensions.vocabulary), np.float32)
        bias[:, list(suppressed)] = SUPPRESSED
        return bias

    def _known_language(self) -> str | None:
        languages = self._manifest.tokens.languages
        if self._options.language is not None and languages:
            return language_code(self._options.language)
        return next(iter(languages)) if len(languages) == 1 else None

    # --- In the loop ---

    def _probe(self, logits: NDArray[np.float32]) -> list[Prompt] | None:
        """Reads the base's logits [B, R, V] at start-of-transcript: no-speech probability, and an unknown language."""
        base = logits[:, 0].astype(np.float64)
        if (silence := self._manifest.tokens.no_speech) is not None:
            shifted = np.exp(base - base.max(axis=1, keepdims=True))
            self._no_speech = (shifted[:, silence] / shifted.sum(axis=1)).tolist()
        if not self._detect:
            return None
        codes, ids = zip(*self._manifest.tokens.languages.items(), strict=True)
        self._languages = [codes[best] for best in base[:, ids].argmax(axis=1)]
        return self.prompts()

    # --- After the loop ---

    def transcript(self, decoded: DecodedBatch, index: int) -> Transcript:
        """What utterance `index` of the batch says; empty if it holds no speech."""
        language, rows = self._languages[index], self._adapters.rows
        if self.rule == HYPOTHESIS:
            transcript = read_own_histories(decoded, index, rows, self._tokenizer, language, self._options)
        else:
            transcript = read_shared_history(decoded, index, rows, self._tokenizer, language)
        threshold, no_speech = self._options.no_speech_threshold, self._no_speech[index]
        unsure = transcript.avg_logprob < self._options.logprob_threshold
        if threshold is not None and no_speech is not None and no_speech > threshold and unsure:
            return empty_transcript(transcript.avg_logprob)
        return transcript

    def result(self, transcript: Transcript, index: int, duration: float, timings: Timings) -> Transcription:
        """The public result of utterance `index`; `duration` in seconds."""
        return self._result(transcript, self._languages[index], self._no_speech[index], duration, timings)

    def silence(self, duration: float, timings: Timings) -> Transcription:
        """The result for digital silence, which is not decoded at all."""
        return self._result(empty_transcript(0.0), self._known_language(), 1.0, duration, timings)

    def _result(
        self, transcript: Transcript, language: str | None, no_speech: float | None, duration: float, timings: Timings
    ) -> Transcription:
        return Transcription(
            **vars(transcript),
            language=language,
            duration=duration,
            no_speech_prob=no_speech,
            compression_ratio=compression_ratio(transcript.text),
            rule=self.rule if isinstance(self.rule, str) else self.rule.name,
            tau=self._tau,
            rows=self._adapters.rows,
            timings=timings,
        )
