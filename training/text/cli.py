"""`das-synth text`, `init`, `report` and `filter`.

    das-synth text music --output music.jsonl
    das-synth text music --output music.jsonl --backend openai --model gpt-4o-mini --count 1000
    das-synth init pizza
    das-synth report music.jsonl --exclude test.txt
    das-synth filter speech/music --bundle bundle --output hard.jsonl

Nothing is done here that `das_asr.training.text` does not offer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from das_asr.runtime.console import Command, Shard

__all__ = ["filter_command", "init", "report", "text"]

_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}
_PATH = click.Path(path_type=Path)


@click.command(cls=Command, context_settings=_SETTINGS)
@click.argument("domain")
@click.option("--output", required=True, type=_PATH, help="JSON Lines file to write, or to go on with.")
@click.option("--count", type=int, default=44_000, help="Sentences.")
@click.option("--backend", type=click.Choice(("grammar", "openai", "transformers")), default="grammar", help="Writer.")
@click.option("--grammar", type=_PATH, help="grammar: YAML file.  [default: the shipped one of the domain]")
@click.option("--model", help="openai: its name at the endpoint; transformers: folder or hub id.")
@click.option("--base-url", help="openai: address of the endpoint.  [default: OPENAI_BASE_URL]")
@click.option("--concurrency", type=int, default=8, help="openai: requests at a time.")
@click.option("--timeout", type=float, default=120.0, help="openai: seconds that an answer may take.")
@click.option("--batch-size", type=int, default=8, help="transformers: prompts at a time.")
@click.option("--device", default="auto", help="transformers: cpu, cuda, or auto.")
@click.option("--temperature", type=float, default=1.0, help="Of the model; the higher, the more varied.")
@click.option("--max-tokens", type=int, help="Longest answer.  [default: the endpoint's; 1024 with transformers]")
@click.option("--instructions", type=int, default=5, help="Instructions per skill, from a model.")
@click.option("--iterations", type=int, default=4, help="Rewritings of each (Self-Rubrics), 0 to 4.")
@click.option("--per-request", type=int, default=10, help="Sentences that a model is asked for at once.")
@click.option("--answers", type=_PATH, help="File of the model's answers.  [default: beside the output]")
@click.option("--similarity", type=float, default=0.9, help="Shared words, from which on sentences are the same.")
@click.option("--max-seconds", type=float, default=30.0, help="Of a sentence when spoken.")
@click.option("--words-per-second", type=float, default=2.0, help="Rate of the speaker that --max-seconds assumes.")
@click.option("--case", type=click.Choice(("lower", "keep")), default="keep", help="Of the letters.")
@click.option("--wake-words", type=float, default=0.0, help="Share of sentences with a wake word in front.")
@click.option("--exclude", multiple=True, type=_PATH, help="Evaluation sentences to keep out; repeatable.")
@click.option("--seed", type=int, default=0, help="The same seed gives the same file.")
@click.option("--shard", type=Shard(), default="0/1", help="Write only the i-th of n parts, counted from 0.")
@click.option("--quiet", is_flag=True, help="No progress, and a single line at the end.")
def text(domain: str, output: Path, quiet: bool, **flags: Any) -> None:
    """Write sentences of DOMAIN, a shipped one or a YAML file, with their lineage.

    Started again after a stop, it goes on where it was. The key of an endpoint is taken from OPENAI_API_KEY.
    """
    from das_asr.training.text.domain import load_domain
    from das_asr.training.text.generation import generate_text
    from das_asr.training.text.options import TextOptions

    report = generate_text(load_domain(domain), TextOptions(**flags), output, quiet=quiet)
    lines = report.as_text()
    click.echo(lines.partition("\n")[0] if quiet else lines)


@click.command(cls=Command, context_settings=_SETTINGS)
@click.argument("name")
@click.option("--output", type=_PATH, help="YAML file to write.  [default: NAME.yaml]")
@click.option("--grammar", type=_PATH, help="Also write a small grammar to start from.")
def init(name: str, output: Path | None, grammar: Path | None) -> None:
    """Write a commented file for a new domain NAME, to be edited and given to `das-synth text`."""
    from das_asr.training.text.new_domain import write_domain, write_grammar

    path = output or Path(f"{name}.yaml")
    write_domain(name, path)
    click.echo(f"{path}: edit it, then das-synth text {path} --output {name}.jsonl")
    if grammar is not None:
        write_grammar(name, grammar)
        click.echo(f"{grammar}: its grammar, for das-synth text --grammar {grammar}")


@click.command(cls=Command, context_settings=_SETTINGS)
@click.argument("file", type=_PATH)
@click.option("--exclude", multiple=True, type=_PATH, help="Evaluation sentences to compare with; repeatable.")
@click.option("--grammar", help="Shipped grammar or YAML file, for the coverage of its slots.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def report(file: Path, exclude: tuple[Path, ...], grammar: str | None, as_json: bool) -> None:
    """Say how varied the sentences of FILE are, and what they share with evaluation sentences."""
    from das_asr.training.text.grammar import load_grammar
    from das_asr.training.text.report import report_on

    measured = report_on(file, load_grammar(grammar) if grammar else None, exclude)
    click.echo(json.dumps(measured.as_json(), ensure_ascii=False, indent=2) if as_json else measured.as_text())


@click.command("filter", cls=Command, context_settings=_SETTINGS)
@click.argument("speech", type=_PATH)
@click.option("--bundle", required=True, type=_PATH, help="Folder that das-export onnx wrote.")
@click.option("--output", required=True, type=_PATH, help="Manifest of what was misrecognised.")
@click.option("--language", help="Spoken language, for a model that knows several.")
@click.option("--adapter", "adapters", multiple=True, help="Adapter to decode along; repeatable.  [the base alone]")
@click.option("--above", type=float, default=0.0, help="Keep utterances with a higher word error rate than this.")
@click.option("--batch-size", type=int, default=8, help="Utterances at a time.")
@click.option("--device", default="cpu", help="cpu, cuda or cuda:N.")
@click.option("--threads", type=int, help="Threads.  [default: all cores]")
@click.option("--quiet", is_flag=True, help="No progress.")
def filter_command(speech: Path, bundle: Path, output: Path, quiet: bool, **flags: Any) -> None:
    """Keep the utterances of SPEECH, an AudioFolder or manifest, that the model of a bundle misrecognises."""
    from das_asr.training.text.filtering import FilterOptions, filter_speech

    done = filter_speech(speech, bundle, output, FilterOptions(**flags), quiet=quiet)
    click.echo(f"{done.output}: {done.kept} of {done.heard} utterances kept; word error rate of all {done.wer:.2%}")
