"""Text and decoder prompts to token ids and back, over a checkpoint's `tokenizer.json`.

    special = special_tokens(directory / "tokenizer.json", generation_config, config)    # when exporting
    tokenizer = Tokenizer.from_file(bundle / "tokenizer.json", manifest.tokens)          # when transcribing
    ids, start = tokenizer.prompt("en", "transcribe", previous=None, max_previous=223)

Tokens are told apart by their content: a token written `<|...|>` steers the decoder and is never text, and text that
merely looks like one is encoded as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers

from das_asr.runtime.errors import BundleError, CheckpointError, DasError, OptionError
from das_asr.runtime.manifest import SpecialTokens

__all__ = [
    "LANGUAGES",
    "TASKS",
    "Tokenizer",
    "Word",
    "language_code",
    "special_tokens",
]

TASKS = ("transcribe", "translate")

_NAMES = """
en=english zh=chinese de=german es=spanish ru=russian ko=korean fr=french ja=japanese pt=portuguese tr=turkish pl=polish
ca=catalan nl=dutch ar=arabic sv=swedish it=italian id=indonesian hi=hindi fi=finnish vi=vietnamese he=hebrew
uk=ukrainian el=greek ms=malay cs=czech ro=romanian da=danish hu=hungarian ta=tamil no=norwegian th=thai ur=urdu
hr=croatian bg=bulgarian lt=lithuanian la=latin mi=maori ml=malayalam cy=welsh sk=slovak te=telugu fa=persian lv=latvian
bn=bengali sr=serbian az=azerbaijani sl=slovenian kn=kannada et=estonian mk=macedonian br=breton eu=basque is=icelandic
hy=armenian ne=nepali mn=mongolian bs=bosnian kk=kazakh sq=albanian sw=swahili gl=galician mr=marathi pa=punjabi
si=sinhala km=khmer sn=shona yo=yoruba so=somali af=afrikaans oc=occitan ka=georgian be=belarusian tg=tajik sd=sindhi
gu=gujarati am=amharic yi=yiddish lo=lao uz=uzbek fo=faroese ht=haitian_creole ps=pashto tk=turkmen nn=nynorsk
mt=maltese sa=sanskrit lb=luxembourgish my=myanmar bo=tibetan tl=tagalog mg=malagasy as=assamese tt=tatar haw=hawaiian
ln=lingala ha=hausa ba=bashkir jw=javanese su=sundanese yue=cantonese
"""

LANGUAGES: dict[str, str] = {
    code: name.replace("_", " ") for code, name in (entry.split("=") for entry in _NAMES.split())
}
"""Whisper's languages: code -> English name."""

_CODES = {name: code for code, name in LANGUAGES.items()}

_UNSPACED = frozenset({"zh", "ja", "th", "lo", "my", "yue"})  # languages written without spaces between words

Ids: TypeAlias = Iterable[int]


@dataclass(frozen=True)
class Word:
    """A word as written, spaces included, and where its tokens stand in the ids it was split from."""

    text: str
    tokens: tuple[int, ...]  # indices, increasing


class Tokenizer:
    """Encodes text and prompts, decodes ids; knows which ids are text."""

    def __init__(self, description: Mapping[str, Any], special: SpecialTokens) -> None:
        steering = [token for token in description["added_tokens"] if token.get("special") or _steers(token["content"])]
        # Checkpoints declare their timestamps as ordinary tokens; then text could spell one.
        marked = [
            {**token, "special": True} if _steers(token["content"]) else token for token in description["added_tokens"]
        ]
        self._backend = tokenizers.Tokenizer.from_str(json.dumps({**description, "added_tokens": marked}))
        self._backend.encode_special_tokens = True  # that is: as the text they are made of
        self._silent = frozenset(token["id"] for token in steering) | frozenset(_ids_of(special))
        self.special = special

    @classmethod
    def from_file(cls, path: str | Path, special: SpecialTokens) -> Tokenizer:
        """Loads a `tokenizer.json`.

        Raises:
            BundleError: the file is missing, damaged or not a byte-level BPE tokenizer.
        """
        return cls(_read(Path(path), BundleError), special)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special tokens added and none recognised in it; half a surrogate pair becomes U+FFFD."""
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = self._backend.encode(valid, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Ids) -> str:
        """The text of ids; special tokens and timestamps are dropped, incomplete UTF-8 shows as U+FFFD."""
        return b"".join(content for _, content in self._spoken(ids)).decode("utf-8", "replace")

    def prompt(self, language: str | None, task: str, previous: str | None, max_previous: int) -> tuple[list[int], int]:
        """The ids the decoder starts from: [previous text], start of transcript, [language, task], no timestamps.

        Args:
            language: code or English name; None is enough for a model that knows only one language.
            task: "transcribe" or "translate" (into English).
            previous: what was said before, or words to expect; its last `max_previous` tokens are used.
            max_previous: tokens; the room that the model's history leaves for previous text.

        Returns:
            The ids, and the index of start-of-transcript among them.

        Raises:
            OptionError: the model does not know the language, the task or previous text.
        """
        history = self._history(previous, max_previous)
        ids = [*history, self.special.start_of_transcript, *self._steering(language, task)]
        if self.special.no_timestamps is not None:
            ids.append(self.special.no_timestamps)
        return ids, len(history)

    def split_words(self, ids: Ids, language: str | None = None) -> list[Word]:
        """Splits ids into words; their texts joined are the decoded text.

        Languages written with spaces are split before each space, so punctuation stays with its word; Chinese,
        Japanese, Thai, Lao, Burmese and Cantonese are split at every token that begins a character.

        Args:
            ids: token ids; those that are not text belong to no word.
            language: code or English name; None splits on spaces.
        """
        characters = self._characters(ids)
        unspaced = language is not None and language_code(language) in _UNSPACED
        return list(characters if unspaced else _join_words(characters))

    def _spoken(self, ids: Ids) -> Iterator[tuple[int, bytes]]:
        """(index, bytes) of the ids that are text."""
        for index, token in enumerate(ids):
            content = None if token in self._silent else self._backend.id_to_token(token)
            if content is not None:
                yield index, _to_bytes(content)

    def _characters(self, ids: Ids) -> Iterator[Word]:
        """The smallest groups of tokens whose borders lie between characters.

        Only a continuation byte (10xxxxxx) can belong to the character before it.
        """
        group: list[int] = []
        content = b""
        for index, part in self._spoken(ids):
            if content and part and part[0] & 0xC0 != 0x80:
                yield Word(content.decode("utf-8", "replace"), tuple(group))
                group, content = [], b""
            group.append(index)
            content += part
        if content:
            yield Word(content.decode("utf-8", "replace"), tuple(group))

    def _history(self, previous: str | None, max_previous: int) -> list[int]:
        if max_previous < 0:
            raise OptionError(f"max_previous is {max_previous}; 0 or more tokens were expected.")
        if previous is None or not previous.strip() or max_previous == 0:
            return []
        if self.special.start_of_previous is None:
            raise OptionError("This model has no <|startofprev|> token and takes no previous text. Leave it out.")
        return [self.special.start_of_previous, *self.encode(" " + previous.strip())[-max_previous:]]

    def _steering(self, language: str | None, task: str) -> list[int]:
        """Language and task tokens; empty for an English-only model."""
        if task not in TASKS:
            raise OptionError(f"Task {task!r} is unknown; {' or '.join(TASKS)} was expected.")
        if not self.special.languages:
            _check_english(language, task)
            return []
        task_id = self.special.transcribe if task == "transcribe" else self.special.translate
        if task_id is None:
            raise OptionError(f"This model has no <|{task}|> token and cannot {task}. Choose another task or model.")
        return [self._language_id(language), task_id]

    def _language_id(self, language: str | None) -> int:
        known = self.special.languages
        if language is None and len(known) == 1:
            return next(iter(known.values()))
        if language is None:
            raise OptionError(f"This model knows {len(known)} languages. Say which is spoken: {_some(known)}.")
        if (code := language_code(language)) not in known:
            raise OptionError(f"Language {language!r} is unknown to this model, which knows {_some(known)}.")
        return known[code]


def language_code(language: str) -> str:
    """The code of a language given as code or English name in any case; what is neither comes back as it is."""
    plain = language.strip().lower()
    return _CODES.get(plain, plain)


def special_tokens(
    tokenizer_file: str | Path, generation_config: Mapping[str, Any], config: Mapping[str, Any]
) -> SpecialTokens:
    """Finds the ids that steer a Hugging Face checkpoint's decoder, by what the tokens say.

    Args:
        tokenizer_file: the checkpoint's `tokenizer.json`.
        generation_config: content of its `generation_config.json`, {} where there is none.
        config: content of its `config.json`.

    Raises:
        CheckpointError: the tokenizer is damaged, lacks a token that every Whisper has, or contradicts the configs.
    """
    found = _contents(_read(Path(tokenizer_file), CheckpointError))
    multilingual = _is_multilingual(generation_config, config)
    tokens = SpecialTokens(
        end_of_text=_required(found, "<|endoftext|>"),
        start_of_transcript=_required(found, "<|startoftranscript|>"),
        start_of_previous=found.get("<|startofprev|>"),
        no_timestamps=found.get("<|notimestamps|>"),
        no_speech=found.get("<|nospeech|>", found.get("<|nocaptions|>")),
        transcribe=found.get("<|transcribe|>") if multilingual else None,
        translate=found.get("<|translate|>") if multilingual else None,
        languages=_languages(found, generation_config) if multilingual else {},
        first_timestamp=found.get("<|0.00|>"),
    )
    _check_range(tokens, config)
    return tokens


def _is_multilingual(generation_config: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """English-only tokenizers hold language tokens too, so only the configs can tell."""
    said = generation_config.get("is_multilingual", config.get("is_multilingual"))
    return bool(generation_config.get("lang_to_id")) if said is None else bool(said)


def _languages(found: Mapping[str, int], generation_config: Mapping[str, Any]) -> dict[str, int]:
    """Code -> id, from `lang_to_id` where there is one, otherwise from the languages that Whisper has."""
    listed: Mapping[str, int] = generation_config.get("lang_to_id") or {
        content: found[content] for content in (f"<|{code}|>" for code in LANGUAGES) if content in found
    }
    if not listed:
        raise CheckpointError(
            "generation_config.json calls the checkpoint multilingual, but neither its lang_to_id nor tokenizer.json "
            "names a language token such as <|en|>. Mend them."
        )
    for content, token in listed.items():
        if found.get(content) != token:
            raise CheckpointError(
                f"generation_config.json gives {content} the id {token}, tokenizer.json gives it {found.get(content)}. "
                "They belong to different checkpoints; take both from the one that was trained."
            )
    return {content.removeprefix("<|").removesuffix("|>"): token for content, token in listed.items()}


def _required(found: Mapping[str, int], content: str) -> int:
    if content not in found:
        raise CheckpointError(f"tokenizer.json has no {content} token, which every Whisper has. Is this a Whisper?")
    return found[content]


def _check_range(tokens: SpecialTokens, config: Mapping[str, Any]) -> None:
    size = config.get("vocab_size")
    largest = max(_ids_of(tokens))
    if size is not None and largest >= size:
        raise CheckpointError(
            f"tokenizer.json has a special token with id {largest}, but config.json says vocab_size {size}. "
            "The tokenizer belongs to another checkpoint."
        )


def _ids_of(tokens: SpecialTokens) -> Iterator[int]:
    """Every id of `tokens`."""
    for value in vars(tokens).values():
        if isinstance(value, dict):
            yield from value.values()
        elif value is not None:
            yield value


def _contents(description: Mapping[str, Any]) -> dict[str, int]:
    """Content -> id of the tokens that steer, wherever the file lists them."""
    found = {content: token for content, token in description["model"]["vocab"].items() if _steers(content)}
    found.update({token["content"]: token["id"] for token in description["added_tokens"] if _steers(token["content"])})
    return found


def _steers(content: str) -> bool:
    return content.startswith("<|") and content.endswith("|>") and len(content) > len("<||>")


def _read(path: Path, error: type[DasError]) -> dict[str, Any]:
    """Reads a tokenizer.json and checks what this file relies on."""
    if not path.is_file():
        raise error(f"{path} is missing. A fast tokenizer's tokenizer.json was expected.")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as reason:
        raise error(f"{path} is not valid JSON ({reason}). Copy or save it again.") from reason
    if not _is_byte_level_bpe(description):
        raise error(f"{path} does not describe a byte-level BPE tokenizer as Whisper's is. Save the tokenizer again.")
    return {**description, "added_tokens": description.get("added_tokens") or []}


def _is_byte_level_bpe(description: object) -> bool:
    if not isinstance(description, dict):
        return False
    model, decoder = description.get("model"), description.get("decoder")
    return (
        isinstance(model, dict)
        and isinstance(model.get("vocab"), dict)
        and isinstance(model.get("merges"), list)
        and isinstance(decoder, dict)
        and decoder.get("type") == "ByteLevel"
    )


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself, or the next free one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


def _to_bytes(content: str) -> bytes:
    """Bytes that a token stands for; a token added later may be plain text instead."""
    if all(character in _ALPHABET for character in content):
        return bytes(_ALPHABET[character] for character in content)
    return content.encode()


def _join_words(characters: Iterable[Word]) -> Iterator[Word]:
    """Joins groups into words that begin with their spaces; spaces at the very end stay with the last word."""
    word, spaces = Word("", ()), Word("", ())
    for part in characters:
        if not part.text.strip():
            spaces = _joined(spaces, part)
        elif word.text.strip() and (spaces.text or part.text[0].isspace() or word.text[-1].isspace()):
            yield word
            word, spaces = _joined(spaces, part), Word("", ())
        else:
            word, spaces = _joined(_joined(word, spaces), part), Word("", ())
    if word.text or spaces.text:
        yield _joined(word, spaces)


def _joined(left: Word, right: Word) -> Word:
    return Word(left.text + right.text, left.tokens + right.tokens)


def _check_english(language: str | None, task: str) -> None:
    if language is not None and language_code(language) != "en":
        raise OptionError(f"This model knows English only, not {language!r}. Leave the language out.")
    if task != "transcribe":
        raise OptionError(f"This model knows English only and cannot {task}. Choose a multilingual model.")


def _some(languages: Mapping[str, int]) -> str:
    """A few language codes for a message."""
    shown = list(languages)[:6]
    more = len(languages) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
