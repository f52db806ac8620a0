"""`das-synth`: text and speech of a domain.

    das-synth text music --output music.jsonl
    das-synth speech music.jsonl --output speech/music

Nothing is done here that `das_asr.training` does not offer.
"""

from __future__ import annotations

import importlib
import importlib.util

import click

from das_asr.runtime.console import Group
from das_asr.training.text.cli import filter_command, init, report, text

__all__ = ["main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="das-asr")
def main() -> None:
    """Make training data for a domain: sentences, then speech."""


for _command in (init, text, report, filter_command):
    main.add_command(_command)
if importlib.util.find_spec("das_asr.training.speech.cli") is not None:
    _speech = importlib.import_module("das_asr.training.speech.cli")
    for _command in (_speech.speech, _speech.merge):
        main.add_command(_command)
