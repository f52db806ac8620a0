"""Other programs that run Whisper, side by side with the runtime on the same checkpoint and audio."""
