"""The tiny Whisper of the demo, trained from scratch on synthetic speech."""

__all__: list[str] = []
