"""Whisper + LoRA checkpoints -> a bundle for `das_asr.runtime`.

    from das_asr.export import AdapterSource, ExportOptions, export_bundle

    manifest = export_bundle(
        ExportOptions(base="base", adapters=(AdapterSource("music", Path("adapters/music")),), output=Path("bundle"))
    )

The command line is `das-export`; everything it does is here.
"""

from das_asr.export.bundle import export_bundle
from das_asr.export.engines import build_engines
from das_asr.export.options import AdapterSource, EngineOptions, ExportOptions
from das_asr.export.verify import Verification, inspect_bundle, verify_bundle

__all__ = [
    "AdapterSource",
    "EngineOptions",
    "ExportOptions",
    "Verification",
    "build_engines",
    "export_bundle",
    "inspect_bundle",
    "verify_bundle",
]
