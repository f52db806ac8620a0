"""The tiny Whisper and how it is run in training: short windows, and a CTC head over phonemes that teaches the encoder.

transformers' encoder takes full windows only. Training on windows as long as the audio is about three times as fast, so
the encoder's forward pass is written out here over its own layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

__all__ = ["Shape", "TinyWhisper", "make_config"]


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; the default has 4.6 M parameters."""

    width: int = 192
    layers: int = 4  # of the encoder and of the decoder
    heads: int = 6
    mels: int = 80
    audio_positions: int = 400  # 8 s
    text_positions: int = 96


def make_config(shape: Shape, vocabulary: int, end_of_text: int, start: int) -> WhisperConfig:
    """The transformers configuration of a shape."""
    return WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=shape.mels,
        d_model=shape.width,
        encoder_layers=shape.layers,
        decoder_layers=shape.layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=4 * shape.width,
        decoder_ffn_dim=4 * shape.width,
        max_source_positions=shape.audio_positions,
        max_target_positions=shape.text_positions,
        init_std=0.05,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


class TinyWhisper(nn.Module):
    """A Whisper with a CTC head that is left out of the saved checkpoint."""

    def __init__(self, config: WhisperConfig, phonemes: int) -> None:
        super().__init__()
        # The backward pass of SDPA on CPU costs half of a step; plain attention is up to twice as fast.
        config._attn_implementation = "eager"
        self.whisper = WhisperForConditionalGeneration(config)
        self.end_of_text = int(config.bos_token_id or 0)
        self.phonemes = nn.Linear(config.d_model, phonemes + 1)  # index 0 is CTC's blank

    def encode(self, features: Tensor) -> Tensor:
        """Features f32 [B, mels, frames], an even number of frames -> states [B, frames // 2, width]."""
        encoder = self.whisper.model.encoder
        states = nn.functional.gelu(encoder.conv1(features))
        states = nn.functional.gelu(encoder.conv2(states)).transpose(1, 2)
        states = states + encoder.embed_positions.weight[: states.shape[1]]
        for layer in encoder.layers:
            states = layer(states, None)
        normed: Tensor = encoder.layer_norm(states)
        return normed

    def forward(self, features: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features f32 [B, mels, frames] and token ids i64 [B, n] -> (logits [B, n, V], phoneme logits [B, S, P])."""
        states = self.encode(features)
        decoded = self.whisper.model.decoder(input_ids=inputs, encoder_hidden_states=states, use_cache=False)
        logits = self.whisper.proj_out(decoded.last_hidden_state)
        return logits, self.phonemes(states)

    def losses(
        self, features: Tensor, frames: Tensor, tokens: Tensor, noisy: Tensor, phonemes: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(cross-entropy of the next token, CTC of the phonemes), both means per target.

        Args:
            features: f32 [B, mels, frames].
            frames: i64 [B], frames of each utterance before padding.
            tokens: i64 [B, n + 1], prompt, text and end of text; -100 behind the end.
            noisy: i64 [B, n], what the decoder is fed: tokens[:, :-1], a few of them exchanged.
            phonemes: i64 [B, p], from 1 on, 0 behind the end.
            lengths: i64 [B], phonemes of each utterance.
        """
        logits, spoken = self(features, noisy)
        targets = tokens[:, 1:]
        entropy = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
        log_probs = spoken.float().log_softmax(-1).transpose(0, 1)  # [S, B, P]
        steps = ((frames + 1) // 2).clamp(max=log_probs.shape[0])
        ctc = nn.functional.ctc_loss(log_probs, phonemes, steps, lengths, zero_infinity=True)
        return entropy, ctc

    @torch.no_grad()
    def greedy(self, features: Tensor, prompt: list[int], end: int, most: int) -> list[list[int]]:
        """Greedy token ids of each utterance, without prompt and end; for the learning curve."""
        states = self.encode(features)
        ids = torch.tensor([prompt] * len(features))
        ended = torch.zeros(len(features), dtype=torch.bool)
        past = None
        fed = ids
        for _ in range(most):
            out = self.whisper.model.decoder(
                input_ids=fed, encoder_hidden_states=states, past_key_values=past, use_cache=True
            )
            past = out.past_key_values
            fed = self.whisper.proj_out(out.last_hidden_state[:, -1:]).argmax(-1)  # [B, 1]
            fed = fed.masked_fill(ended[:, None], end)
            ids = torch.cat([ids, fed], 1)
            ended |= fed[:, 0] == end
            if bool(ended.all()):
                break
        return [row[: row.index(end)] if end in row else row for row in ids[:, len(prompt) :].tolist()]
