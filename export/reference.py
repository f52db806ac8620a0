"""The oracle of the parity gate: transformers and PEFT in float32, one row at a time.

The only file here that runs torch, and it shares no code with the graphs. Row 0 is the untouched base. PEFT injects an
adapter into the model in place, so each row is opened for the length of a `with` and taken out again behind it: two
adapters are never in the model together, and none while the base runs.

    reference = load_reference(checkpoint_directory, [peft_row(directory) for directory in adapter_directories])
    encoded = reference.encode(reference.features(audio))
    with reference.row(1):
        logits = reference.logits(encoded[0], ids)
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from das_asr.runtime.adapters import Adapter
from das_asr.runtime.errors import ParityError
from das_asr.runtime.manifest import AudioFrontEnd

__all__ = ["Reference", "RowOpener", "RowTrace", "delta_row", "load_reference", "peft_row"]

RowOpener: TypeAlias = Callable[[Any], AbstractContextManager[None]]
"""Turns the model (a `WhisperForConditionalGeneration`) into one row for the length of a `with`."""

_PROJECTIONS = {
    "sq": "self_attn.q_proj",
    "sv": "self_attn.v_proj",
    "cq": "encoder_attn.q_proj",
    "cv": "encoder_attn.v_proj",
}


@dataclass(frozen=True)
class RowTrace:
    """What one row of the oracle would write at each of n steps of a given history."""

    token: NDArray[np.int64]  # [n]
    logprob: NDArray[np.float64]  # [n], natural logarithm, after suppression
    margin: NDArray[np.float64]  # [n]: how far, in logits, the best token is ahead of the second


@dataclass(frozen=True)
class Reference:
    """A base in torch with its feature extractor, and how to open each adapter's row."""

    model: Any
    extractor: Any
    adapters: tuple[RowOpener, ...]
    suppressed: tuple[int, ...]  # never written
    suppressed_first: tuple[int, ...]  # not written directly behind the prompt

    @property
    def rows(self) -> int:
        """R = K + 1."""
        return len(self.adapters) + 1

    def features(self, audio: NDArray[np.float32], front_end: AudioFrontEnd) -> NDArray[np.float32]:
        """Samples [n] -> features [mels, frames] by transformers' own extractor."""
        extracted = self.extractor(audio, sampling_rate=front_end.sample_rate, return_tensors="np")
        return np.asarray(extracted["input_features"][0], np.float32)

    def encode(self, features: NDArray[np.float32]) -> list[Any]:
        """Features [B, mels, frames] -> a tensor [1, S, D] for each utterance. Adapters never touch the encoder."""
        import torch

        windows = torch.from_numpy(features).to(self.model.dtype)
        with torch.inference_mode():
            return [self.model.model.encoder(window[None]).last_hidden_state for window in windows]

    def row(self, index: int) -> AbstractContextManager[None]:
        """Turns the model into row `index` for the length of a `with`."""
        return contextlib.nullcontext() if index == 0 else self.adapters[index - 1](self.model)

    def logits(self, encoded: Any, ids: Sequence[int], start: int) -> NDArray[np.floating[Any]]:
        """Logits [len(ids) - start, V] behind each of `ids[start:]`, in one pass and so without a cache."""
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        with torch.inference_mode():
            output = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                decoder_input_ids=torch.tensor([list(ids)]),
                use_cache=False,
            )
        return np.asarray(output.logits[0, start:])

    def in_float64(self) -> Reference:
        """The same base in float64, to see how exact float32 is; takes twice its memory."""
        return dataclasses.replace(self, model=copy.deepcopy(self.model).double())

    def trace(self, encoded: Any, prompt: Sequence[int], tokens: Sequence[int]) -> RowTrace:
        """What the open row would write in place of each of `tokens`, given those before it."""
        import torch

        logits = torch.from_numpy(self.logits(encoded, [*prompt, *tokens[:-1]], len(prompt) - 1)).double()
        logits[:, list(self.suppressed)] = -torch.inf
        logits[0, list(self.suppressed_first)] = -torch.inf
        best = logits.topk(2, dim=-1)
        logprob = best.values[:, 0] - logits.logsumexp(-1)
        margin = best.values[:, 0] - best.values[:, 1]
        return RowTrace(best.indices[:, 0].numpy(), logprob.numpy(), margin.numpy())


def load_reference(directory: Path, adapters: Sequence[RowOpener], never: Sequence[int] = ()) -> Reference:
    """Loads a base checkpoint into torch, as float32.

    The suppressed tokens are those that transformers reads from the checkpoint, whatever the exporter read.

    Args:
        directory: local folder of the checkpoint.
        adapters: openers of the rows 1 .. K, see `peft_row` and `delta_row`.
        never: further tokens that are never written, such as timestamps.
    """
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    with _quiet():
        model = WhisperForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        extractor = WhisperFeatureExtractor.from_pretrained(directory, local_files_only=True)
    size = model.config.vocab_size
    always, first = (
        tuple(token for token in getattr(model.generation_config, name, None) or () if 0 <= token < size)
        for name in ("suppress_tokens", "begin_suppress_tokens")
    )
    return Reference(model.eval(), extractor, tuple(adapters), (*always, *never), first)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what transformers and PEFT say about themselves from the user of the exporter."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# --- Rows ---


def peft_row(directory: Path) -> RowOpener:
    """Opens a row with the PEFT checkpoint in `directory`, loaded and applied by PEFT itself.

    Raises:
        ParityError: when opened, if PEFT did not load every tensor of the checkpoint as it is stored.
    """

    @contextlib.contextmanager
    def opened(model: Any) -> Iterator[None]:
        from peft import PeftModel
        from safetensors.torch import load_file

        stored = load_file(directory / "adapter_model.safetensors")
        # An adapter trained on the bare WhisperModel names its tensors without the outer `model.`.
        outer = all(name.startswith("base_model.model.model.") for name in stored)
        with _quiet():
            wrapped = PeftModel.from_pretrained(model if outer else model.model, directory).eval()
        try:
            _check_loaded(wrapped, stored, directory)
            yield
        finally:
            wrapped.unload()

    return opened


def _check_loaded(wrapped: Any, stored: dict[str, Any], directory: Path) -> None:
    """PEFT only warns about tensors that it found no place for."""
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(wrapped, save_embedding_layers=False)  # "auto" would ask the hub about the base
    different = stored.keys() ^ loaded.keys()
    common = stored.keys() & loaded.keys()
    different |= {name for name in common if not stored[name].float().equal(loaded[name].float())}
    if different:
        raise ParityError(
            f"{directory}: PEFT itself does not load {sorted(different)[0]} as stored, so there is nothing to compare "
            "with. Save the adapter again with the installed version of PEFT."
        )


def delta_row(adapter: Adapter) -> RowOpener:
    """Opens a row by adding A B to the projections' weights, for an adapter whose PEFT checkpoint is gone.

    The scale is folded into the stored B. Weaker than PEFT as an oracle: an adapter that was misread when the bundle
    was made is misread here too; all that comes after it is still checked.
    """

    @contextlib.contextmanager
    def opened(model: Any) -> Iterator[None]:
        import torch

        layers = model.model.decoder.layers
        weights = [
            (layers[int(layer)].get_submodule(_PROJECTIONS[target]).weight, delta)
            for target, layer, delta in _deltas(adapter)
        ]
        originals = [weight.detach().clone() for weight, _ in weights]
        try:
            with torch.no_grad():
                for weight, delta in weights:
                    weight += torch.from_numpy(delta.T)
            yield
        finally:
            with torch.no_grad():
                for (weight, _), original in zip(weights, originals, strict=True):
                    weight.copy_(original)

    return opened


def _deltas(adapter: Adapter) -> Iterator[tuple[str, str, NDArray[np.float32]]]:
    """Target, layer and A B [D in, D out] of every module of an adapter."""
    for name, a in adapter.weights.items():
        _, target, part = name.split("_")
        if part.startswith("a"):
            yield target, part[1:], a @ adapter.weights[f"lora_{target}_b{part[1:]}"]
