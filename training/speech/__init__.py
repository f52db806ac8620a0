"""Sentences spoken by text-to-speech engines, as a Hugging Face AudioFolder.

    rows = read_sentences(Path("music.jsonl"))
    report = synthesize(rows, SpeechOptions(engine="flite", voices=("slt",)), "speech/music")

One file per engine; `engines.create_engine` chooses.
"""

from das_asr.training.speech.engines import EngineFailure, Voice, create_engine, speak_16k
from das_asr.training.speech.merge import merge_shards
from das_asr.training.speech.options import SpeechOptions
from das_asr.training.speech.sentences import read_sentences
from das_asr.training.speech.synthesis import SpeechReport, synthesize

__all__ = [
    "EngineFailure",
    "SpeechOptions",
    "SpeechReport",
    "Voice",
    "create_engine",
    "merge_shards",
    "read_sentences",
    "speak_16k",
    "synthesize",
]
