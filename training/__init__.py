"""Adapters from a domain's name: synthetic text, synthetic speech, LoRA, full and Bayesian fine-tuning of Whisper."""
