"""`das-train`: adapters and bases from spoken sentences.

    das-train lora --base openai/whisper-base --data synthetic/music --language en --output adapters/music
    das-train full --base openai/whisper-base --data synthetic/music --language en --output music-full
    das-train compress adapters/music --rank 32 --output adapters/music-32
    das-train blora --base openai/whisper-base --data synthetic/music --language en --output adapters/music
    das-train base --work build/base-work --output build/base

Nothing is done here that `das_asr.training` does not offer.
"""

from __future__ import annotations

import click

from das_asr.runtime.console import Group
from das_asr.training.base.cli import base
from das_asr.training.blora.cli import blora
from das_asr.training.finetune.cli import compress, full, lora

__all__ = ["main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="das-asr")
def main() -> None:
    """Train adapters and bases for das-export."""


for _command in (lora, full, compress, blora, base):
    main.add_command(_command)
