"""openai-whisper: the original program. It has no converter from the Hugging Face layout; the tensors are renamed here.

Its tokenizer and special tokens are those of the published models, so only checkpoints with their ids can run.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from das_asr.benchmarks.models import read_json
from das_asr.benchmarks.peers.ctranslate import starts_with_words, suppressed
from das_asr.benchmarks.peers.engines import UnavailableError
from das_asr.benchmarks.systems import System, Work
from das_asr.benchmarks.timing import Utterance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ENGINE", "check_vocabulary"]

END_OF_TEXT = {True: 50257, False: 50256}  # multilingual, English only
RENAMED = (
    ("model.", ""),
    ("layers.", "blocks."),
    ("encoder_attn_layer_norm.", "cross_attn_ln."),
    ("self_attn_layer_norm.", "attn_ln."),
    ("final_layer_norm.", "mlp_ln."),
    ("encoder_attn.", "cross_attn."),
    ("self_attn.", "attn."),
    ("q_proj.", "query."),
    ("k_proj.", "key."),
    ("v_proj.", "value."),
    ("out_proj.", "out."),
    ("fc1.", "mlp.0."),
    ("fc2.", "mlp.2."),
    ("embed_positions.weight", "positional_embedding"),
    ("embed_tokens.", "token_embedding."),
    ("encoder.layer_norm.", "encoder.ln_post."),
    ("decoder.layer_norm.", "decoder.ln."),
)
WEIGHTS = "model.pt"


def check_vocabulary(checkpoint: Path) -> None:
    """Refuses checkpoints whose special tokens are not where the published models have them.

    Raises:
        UnavailableError: they are not.
    """
    end = int(read_json(checkpoint / "generation_config.json")["eos_token_id"])
    if end not in END_OF_TEXT.values():
        raise UnavailableError(f"its token ids are fixed to those of the published models; end-of-text is {end} here")


class _System:
    def __init__(self, work: Work, folder: Path) -> None:
        import whisper

        self._whisper: Any = whisper
        torch.set_num_threads(work.threads)
        self._model: Any = whisper.load_model(str(folder / WEIGHTS), device="cpu")
        self._options = whisper.DecodingOptions(
            language="en",
            without_timestamps=True,
            sample_len=work.tokens,
            suppress_tokens=suppressed(work.checkpoint, work.tokens),
            suppress_blank=starts_with_words(work.checkpoint),
            fp16=False,
        )

    def transcribe(self, audio: NDArray[np.float32]) -> Utterance:
        started = perf_counter()
        whole = self._whisper.pad_or_trim(audio)
        features = self._whisper.log_mel_spectrogram(whole, self._model.dims.n_mels)[None]
        extracted = perf_counter()
        with torch.inference_mode():
            states = self._model.embed_audio(features)
            seen = perf_counter()
            (result,) = self._model.decode(states, self._options)
        ended = perf_counter()
        return Utterance(tuple(result.tokens), (), ended - started, extracted - started, seen - extracted, 0.0, ())

    def close(self) -> None:
        del self._model


class _OpenAiWhisper:
    def convert(self, checkpoint: Path, precision: str, folder: Path, whisper_cpp: Path | None) -> None:  # noqa: ARG002
        from transformers import WhisperForConditionalGeneration

        check_vocabulary(checkpoint)
        model = WhisperForConditionalGeneration.from_pretrained(checkpoint, local_files_only=True, dtype=torch.float32)
        tensors = {_renamed(name): tensor for name, tensor in model.model.state_dict().items()}
        torch.save({"dims": _dimensions(checkpoint), "model_state_dict": tensors}, folder / WEIGHTS)

    def open(self, work: Work, folder: Path) -> System:
        return _System(work, folder)


def _renamed(name: str) -> str:
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name


def _dimensions(checkpoint: Path) -> dict[str, int]:
    config = read_json(checkpoint / "config.json")
    names = {
        "n_mels": "num_mel_bins",
        "n_audio_ctx": "max_source_positions",
        "n_audio_state": "d_model",
        "n_audio_head": "encoder_attention_heads",
        "n_audio_layer": "encoder_layers",
        "n_vocab": "vocab_size",
        "n_text_ctx": "max_target_positions",
        "n_text_state": "d_model",
        "n_text_head": "decoder_attention_heads",
        "n_text_layer": "decoder_layers",
    }
    return {ours: int(config[theirs]) for ours, theirs in names.items()}


ENGINE = _OpenAiWhisper()
