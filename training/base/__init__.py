"""The tiny Whisper of the demo, trained from scratch on synthetic speech."""
