"""The base checkpoint: every shape of Whisper is read, every broken or foreign one is refused with its reason."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from das_asr.export.checkpoint import Checkpoint, expected_tensors, load_checkpoint, tokenizer_json
from das_asr.runtime.errors import CheckpointError
from tests.checkpoints import edit_config, front_end, make_base, quiet

WEIGHTS = "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("plain") / "plain", d_model=32, seconds=5)


@pytest.fixture
def broken(plain: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(plain, tmp_path / "broken"))


def edit_weights(directory: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)
    return directory


def check_weights(checkpoint: Checkpoint) -> None:
    """Compares every tensor with what transformers loads."""
    import torch
    from transformers import WhisperForConditionalGeneration

    with quiet():
        model = WhisperForConditionalGeneration.from_pretrained(checkpoint.directory, dtype=torch.float32)
    expected = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "proj_out.weight"}
    assert dict(expected_tensors(checkpoint.dimensions)) == {name: tensor.shape for name, tensor in expected.items()}
    for name, tensor in expected.items():
        weight = checkpoint.weight(name)
        assert weight.dtype == np.float32
        assert weight.flags.c_contiguous
        assert checkpoint.has(name)
        np.testing.assert_array_equal(weight, tensor)


# --- Every shape of Whisper ---

SHAPES: dict[str, dict[str, Any]] = {
    "multilingual": {},
    "English only": {"multilingual": False, "timestamps": False},
    "128 mels, 30 seconds": {"mels": 128, "seconds": 30},
    "5 seconds": {"seconds": 5},
    "turbo": {"encoder_layers": 4, "decoder_layers": 1, "mels": 128},
    "distil": {"encoder_layers": 3, "decoder_layers": 2},
    "other encoder heads": {"heads": 2, "encoder_heads": 8, "ffn": 96},
    "large vocabulary": {"vocabulary": 900},
    "fp16": {"dtype": "float16"},
    "bf16": {"dtype": "bfloat16"},
    "sharded": {"shard": "100KB"},
    "sharded bf16": {"shard": "60KB", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read_as_transformers_reads_it(shape: str, tmp_path: Path) -> None:
    arguments = SHAPES[shape]
    directory = make_base(tmp_path / "base", d_model=32, **arguments)
    checkpoint = load_checkpoint(directory)
    seconds = arguments.get("seconds", 8)
    dims = checkpoint.dimensions
    assert (dims.mels, dims.audio_positions) == (arguments.get("mels", 80), 50 * seconds)
    assert (dims.encoder_layers, dims.decoder_layers) == (
        arguments.get("encoder_layers", 2),
        arguments.get("decoder_layers", 2),
    )
    assert dims.vocabulary == len(json.loads(tokenizer_json(checkpoint))["model"]["vocab"]) + added(checkpoint)
    assert checkpoint.audio.window_seconds == seconds
    assert checkpoint.audio.window_samples == 16000 * seconds
    assert (checkpoint.id, checkpoint.revision, checkpoint.directory) == (str(directory), None, directory)
    assert (directory / WEIGHTS).exists() != ("shard" in arguments)
    check_weights(checkpoint)


def added(checkpoint: Checkpoint) -> int:
    return len(json.loads(tokenizer_json(checkpoint))["added_tokens"])


def test_the_sizes_come_from_the_config(tmp_path: Path) -> None:
    directory = make_base(
        tmp_path / "b", d_model=48, heads=6, encoder_heads=3, ffn=72, text_positions=40, vocabulary=800
    )
    assert dataclasses.astuple(load_checkpoint(str(directory)).dimensions) == (80, 400, 40, 800, 48, 2, 3, 72, 2, 6, 72)


def test_opening_a_checkpoint_needs_neither_torch_nor_transformers(plain: Path) -> None:
    code = (
        "import sys; from das_asr.export.checkpoint import load_checkpoint, tokenizer_json\n"
        f"c = load_checkpoint({str(plain)!r}); c.sha256; tokenizer_json(c); c.weight('model.encoder.conv1.bias')\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_of_a_bare_whisper_model_have_no_prefix(plain: Path, broken: Path) -> None:
    from transformers import WhisperModel

    with quiet():
        WhisperModel.from_pretrained(plain).save_pretrained(broken)
    assert "decoder.layer_norm.weight" in load_file(broken / WEIGHTS)
    checkpoint = load_checkpoint(broken)
    check_weights(checkpoint)
    assert checkpoint.sha256 == load_checkpoint(plain).sha256


# --- Identity ---


def test_the_hash_does_not_depend_on_the_files(plain: Path, broken: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    with quiet():
        model = WhisperForConditionalGeneration.from_pretrained(plain)
        (broken / WEIGHTS).unlink()
        model.save_pretrained(broken, max_shard_size="70KB")
    assert len(list(broken.glob("model-*-of-*.safetensors"))) > 2
    assert load_checkpoint(broken).sha256 == load_checkpoint(plain).sha256


def test_the_hash_is_the_documented_one(plain: Path) -> None:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(plain / WEIGHTS).items()):
        digest.update(f"{name} F32 {'x'.join(map(str, tensor.shape))}\n".encode() + tensor.tobytes())
    assert load_checkpoint(plain).sha256 == digest.hexdigest()


def test_the_hash_changes_with_one_bit(plain: Path, broken: Path) -> None:
    data = bytearray((broken / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (broken / WEIGHTS).write_bytes(data)
    assert load_checkpoint(broken).sha256 != load_checkpoint(plain).sha256


# --- Suppressed tokens ---


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([3, 4], [9], (3, 4)),
        ([-1], [9], ()),
        ([3, -1, 100_000, 5], None, (3, 5)),
        ([], [9], ()),
        (None, [9], ()),  # the file exists, so transformers does not look into config.json
        (..., [9], ()),
        ("no file", [9, -1], (9,)),
        ("no file", None, ()),
    ],
)
@pytest.mark.parametrize("name", ["suppress_tokens", "begin_suppress_tokens"])
def test_suppressed_tokens(
    name: str, generation: object, config: object, expected: tuple[int, ...], broken: Path
) -> None:
    edit_config(broken, "config.json", **{name: config})
    if generation == "no file":
        (broken / "generation_config.json").unlink()
    else:
        edit_config(broken, "generation_config.json", **{name: generation})
    checkpoint = load_checkpoint(broken)
    assert getattr(checkpoint, name) == expected
    assert (checkpoint.generation_config == {}) == (generation == "no file")


def test_transformers_ignores_the_lists_of_config_json_beside_a_generation_config(broken: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    edit_config(broken, "config.json", suppress_tokens=[9])
    edit_config(broken, "generation_config.json", suppress_tokens=...)
    with quiet():
        assert not WhisperForConditionalGeneration.from_pretrained(broken).generation_config.suppress_tokens


@pytest.mark.parametrize("value", ["abc", [1.5], [True], {"a": 1}])
def test_suppressed_tokens_that_are_not_ids(value: object, broken: Path) -> None:
    edit_config(broken, "generation_config.json", suppress_tokens=value)
    with pytest.raises(CheckpointError, match="suppress_tokens is"):
        load_checkpoint(broken)


# --- The front end ---


def combine(directory: Path) -> None:
    """What newer processors save: one file with the feature extractor as a section."""
    section = json.loads((directory / PREPROCESSOR).read_text())
    (directory / "processor_config.json").write_text(json.dumps({"feature_extractor": section}))
    (directory / PREPROCESSOR).unlink()


def test_the_front_end_may_be_a_section_of_the_processor(plain: Path, broken: Path) -> None:
    combine(broken)
    assert load_checkpoint(broken).audio == load_checkpoint(plain).audio


def test_a_processor_saved_by_transformers_is_read(plain: Path, broken: Path) -> None:
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    (broken / PREPROCESSOR).unlink()
    with quiet():
        tokenizer = WhisperTokenizer.from_pretrained(plain)
        WhisperProcessor(WhisperFeatureExtractor.from_pretrained(plain), tokenizer).save_pretrained(broken)
    assert load_checkpoint(broken).audio == load_checkpoint(plain).audio


def test_derived_fields_may_be_missing(broken: Path) -> None:
    edit_config(broken, PREPROCESSOR, n_samples=..., nb_max_frames=..., padding_value=..., dither=...)
    assert load_checkpoint(broken).audio.window_samples == 80000


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"feature_size": 128}, "feature_size is 128, but num_mel_bins is 80"),
        ({"n_samples": 480000}, "n_samples is 480000, but chunk_length . sampling_rate is 80000"),
        ({"chunk_length": 30}, "n_samples is 80000, but .* is 480000"),
        (front_end(80, 30), "frames of one window is 3000.*max_source_positions is 500"),
        ({"hop_length": 320}, "frames of one window is 250"),
        ({"nb_max_frames": 3000}, "nb_max_frames is 3000.* is 500"),
        ({"padding_value": 1.0}, "padding_value is 1.0"),
        ({"dither": 0.1}, "dither is 0.1"),
        ({"n_fft": ...}, "n_fft"),
        ({"hop_length": 0}, "hop_length"),
        ({"chunk_length": "8"}, "chunk_length is '8'"),
        ({"chunk_length": 5.0}, "chunk_length is 5.0"),
        ({"sampling_rate": ...}, "sampling_rate"),
    ],
)
def test_a_front_end_that_does_not_fit(changes: dict[str, Any], named: str, broken: Path) -> None:
    edit_config(broken, PREPROCESSOR, **changes)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(broken)


# --- The tokenizer ---


def slow_tokenizer(directory: Path, table: str = "tokenizer_config.json") -> Path:
    """Leaves only vocab.json and merges.txt of the tokenizer, with the special tokens in one of the two old places."""
    saved = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(saved["model"]["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in saved["model"]["merges"])]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokens = {token.pop("id"): token for token in saved["added_tokens"]}
    if table == "tokenizer_config.json":
        return edit_config(directory, table, added_tokens_decoder=tokens)
    (directory / table).write_text(json.dumps({token["content"]: index for index, token in tokens.items()}))
    return directory


def test_the_tokenizer_is_given_as_it_is(plain: Path) -> None:
    assert tokenizer_json(load_checkpoint(plain)) == (plain / "tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", ["tokenizer_config.json", "added_tokens.json"])
def test_a_slow_tokenizer_is_converted(table: str, plain: Path, broken: Path) -> None:
    from tokenizers import Tokenizer

    with quiet():
        converted = Tokenizer.from_str(tokenizer_json(load_checkpoint(slow_tokenizer(broken, table))))
    original = Tokenizer.from_file(str(plain / "tokenizer.json"))
    assert converted.get_vocab() == original.get_vocab()
    text = "the weather in müNCHEN"
    ids = original.encode(text, add_special_tokens=False).ids
    assert converted.encode(text, add_special_tokens=False).ids == ids
    assert converted.decode(ids) == text


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("vocab.json", b"{", "vocab.json cannot be read"),
        ("vocab.json", b"[]", "vocab.json holds a list"),
        ("merges.txt", b"\xff", "merges.txt cannot be read"),
        ("merges.txt", b"#version: 0.2\na b c\n", "line 2 .'a b c'"),
        ("merges.txt", b"t hx\n", "line 1 .'t hx'"),
    ],
)
def test_a_slow_tokenizer_that_is_damaged(name: str, content: bytes, named: str, broken: Path) -> None:
    (slow_tokenizer(broken) / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=named):
        tokenizer_json(load_checkpoint(broken))


def test_a_damaged_tokenizer_json(broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        tokenizer_json(load_checkpoint(broken))


# --- Refusals ---


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "wav2vec2"}, "model_type is 'wav2vec2', only 'whisper'"),
        ({"model_type": ...}, "model_type is None"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"scale_embedding": True}, "scale_embedding is True"),
        ({"tie_word_embeddings": False}, r"proj_out\.weight is not tied"),
        ({"d_model": ...}, "d_model in config.json is None"),
        ({"vocab_size": "51865"}, "vocab_size in config.json is '51865'"),
        ({"decoder_layers": 0}, "decoder_layers in config.json is 0"),
        ({"encoder_layers": True}, "encoder_layers in config.json is True"),
        ({"decoder_attention_heads": 5}, "d_model 32 .* 5 decoder heads"),
        ({"encoder_attention_heads": 3}, "d_model 32 .* 3 encoder heads"),
        ({"decoder_layers": 3}, r"model\.decoder\.layers\.2\.self_attn\.q_proj\.weight is missing.*\[32, 32\]"),
        ({"encoder_layers": 3}, r"model\.encoder\.layers\.2\.self_attn\.q_proj\.weight is missing"),
        ({"vocab_size": 51865}, r"embed_tokens\.weight has shape \[558, 32\].*\[51865, 32\]"),
        ({"max_target_positions": 448}, r"decoder\.embed_positions\.weight has shape \[64, 32\].*\[448, 32\]"),
        ({"encoder_ffn_dim": 64}, r"encoder\.layers\.0\.fc1\.weight has shape"),
        ({"num_mel_bins": 128}, r"conv1\.weight has shape \[32, 80, 3\].*\[32, 128, 3\]"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], named: str, broken: Path) -> None:
    edit_config(broken, "config.json", **changes)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(broken)


def test_fields_with_the_usual_default_may_be_missing(broken: Path) -> None:
    edit_config(broken, "config.json", activation_function=..., scale_embedding=..., tie_word_embeddings=...)
    load_checkpoint(broken)


FC1 = "model.decoder.layers.1.fc1.bias"
EMBEDDING = "model.decoder.embed_tokens.weight"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop(FC1), f"tensor {FC1} is missing"),
        (lambda t: t.pop("model.encoder.layer_norm.weight"), r"encoder\.layer_norm\.weight is missing"),
        (lambda t: t.update({FC1: t[FC1][:-1]}), rf"{FC1} has shape \[127\].*\[128\]"),
        (lambda t: t.update({FC1: t[FC1].astype(np.int8)}), f"{FC1} has dtype I8.*quantised"),
        (lambda t: t.update({"proj_out.weight": t[EMBEDDING] + 1}), r"proj_out\.weight is not tied"),
        (lambda t: t.update({"proj_out.weight": t[EMBEDDING][:-1]}), r"proj_out\.weight is not tied"),
    ],
)
def test_weights_that_are_refused(edit: Callable[[dict[str, Any]], object], named: str, broken: Path) -> None:
    edit_weights(broken, edit)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(broken)


@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_output_layer_that_equals_the_embedding_is_tied(tie: bool, broken: Path) -> None:
    edit_config(broken, "config.json", tie_word_embeddings=tie)
    edit_weights(broken, lambda t: t.update({"proj_out.weight": t[EMBEDDING].copy()}))
    assert load_checkpoint(broken).has("proj_out.weight")


def test_weights_that_are_not_finite_are_refused_when_read(broken: Path) -> None:
    edit_weights(broken, lambda t: t[FC1].fill(np.nan))
    checkpoint = load_checkpoint(broken)
    with pytest.raises(CheckpointError, match=f"{FC1} holds NaN"):
        checkpoint.weight(FC1)
    with pytest.raises(CheckpointError, match="no tensor surprise"):
        checkpoint.weight("surprise")
    assert not checkpoint.has("surprise")


def cut(name: str, keep: int) -> Damage:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:keep])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda d: (d / "config.json").write_text("[1]"), "config.json holds a list"),
        (lambda d: (d / "generation_config.json").write_text("?"), "generation_config.json cannot be read"),
        (lambda d: (d / PREPROCESSOR).unlink(), "neither preprocessor_config.json nor"),
        (lambda d: (d / PREPROCESSOR).write_text("null"), "holds a NoneType"),
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda d: (d / WEIGHTS).unlink(), "found no weights"),
        (lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"), r"found pytorch_model\.bin.*save_pretrained"),
        (lambda d: (d / WEIGHTS).write_bytes(b"PK\x03\x04 a pickle"), "cannot be read as safetensors"),
        (cut(WEIGHTS, 4), "cannot be read as safetensors"),
        (cut(WEIGHTS, 100), "cannot be read as safetensors"),
        (cut(WEIGHTS, -1), "cannot be read as safetensors"),
    ],
)
def test_files_that_are_missing_or_damaged(damage: Damage, named: str, broken: Path) -> None:
    damage(broken)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(broken)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: min(d.glob("model-*")).unlink(), r"model-00001-of-\d+\.safetensors cannot be read"),
        (lambda d: cut(min(d.glob("model-*")).name, -8)(d), "cannot be read as safetensors"),
        (lambda d: edit_config(d, f"{WEIGHTS}.index.json", weight_map=...), "has no weight_map"),
        (lambda d: edit_config(d, f"{WEIGHTS}.index.json", weight_map={"a": 1}), "has no weight_map"),
    ],
)
def test_shards_that_are_missing_or_damaged(damage: Damage, named: str, tmp_path: Path) -> None:
    directory = make_base(tmp_path / "base", d_model=32, seconds=5, shard="100KB")
    damage(directory)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(directory)


# --- The hub ---

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(plain: Path, cache: Path) -> None:
    """Lays a checkpoint out as the hub's local cache does."""
    repository = cache / "models--someone--whisper-small"
    shutil.copytree(plain, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_a_hub_id_is_taken_from_the_local_cache(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(plain, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "main", COMMIT):
        checkpoint = load_checkpoint("someone/whisper-small", revision)
        assert (checkpoint.id, checkpoint.revision) == ("someone/whisper-small", COMMIT)
        assert checkpoint.sha256 == load_checkpoint(plain).sha256
    with pytest.raises(CheckpointError, match=r"someone/other is not in the local cache.* Give a local folder"):
        load_checkpoint("someone/other")
    with pytest.raises(CheckpointError, match="not in the local cache"):
        load_checkpoint("someone/whisper-small", "v2")


def test_what_is_neither_a_folder_nor_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither an existing folder nor a valid hub id"):
        load_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="local folder, which has no revision 'main'"):
        load_checkpoint(tmp_path, "main")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs, for one repository; the others fail in the ways a hub fails."""

    root: Path
    errors: ClassVar = {
        "gated/model": (403, "GatedRepo"),
        "missing/model": (404, "RepoNotFound"),
        "down/model": (503, ""),
    }

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models/").strip("/")
        for repository, (status, code) in self.errors.items():
            if path.startswith(repository):
                return self.reply(status, b"{}", {"X-Error-Code": code} if code else {})
        if path in ("some/model", "some/model/revision/main"):
            return self.reply(200, json.dumps({"id": "some/model", "sha": COMMIT, "siblings": []}).encode())
        if path.startswith("some/model/revision/"):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path == "flaky/model/revision/main":
            return self.reply(200, json.dumps({"id": "flaky/model", "sha": COMMIT, "siblings": []}).encode())
        if path.startswith("flaky/model/resolve") and self.command == "GET":
            return self.reply(410, b"{}")
        if path.endswith(f"/tree/{COMMIT}"):
            files = sorted(self.root.iterdir())
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)} for f in files]
            return self.reply(200, json.dumps(entries).encode())
        file = self.root / path.rpartition("/")[2]
        if not file.is_file():  # the hub library also asks for things that have nothing to do with a repository
            return self.reply(404, b"{}")
        head = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(file)}"'}
        return self.reply(200, file.read_bytes(), head)

    do_HEAD = do_GET  # noqa: N815 (the name is the base class's)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name is the base class's)
        pass


def etag(file: Path) -> str:
    return hashlib.sha1(file.name.encode()).hexdigest()  # noqa: S324 (a name, not a secret)


@pytest.fixture
def hub(plain: Path, tmp_path: Path) -> Iterator[str]:
    """Address of a hub on this machine that has `some/model`."""
    root = Path(shutil.copytree(plain, tmp_path / "remote"))
    for unwanted in ("pytorch_model.bin", "model.fp32-00001-of-00002.safetensors", "flax_model.msgpack"):
        (root / unwanted).write_bytes(b"unwanted")
    handler = type("Handler", (Hub,), {"root": root})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


TRY_ALL = """
import json, sys
from das_asr.export.checkpoint import load_checkpoint
from das_asr.runtime.errors import CheckpointError
for name, revision in json.loads(sys.argv[1]):
    try:
        checkpoint = load_checkpoint(name, revision)
        files = sorted(path.name for path in checkpoint.directory.iterdir())
        print(json.dumps([checkpoint.revision, checkpoint.sha256, files]))
    except CheckpointError as error:
        print(json.dumps(str(error)))
"""


def try_all(endpoint: str, cache: Path, *requests: tuple[str, str | None]) -> list[Any]:
    """Loads each (id, revision) in a process of its own, which may use the network; errors come as their message."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", TRY_ALL, json.dumps(requests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_id_is_downloaded_and_a_hub_that_refuses_says_why(hub: str, plain: Path, tmp_path: Path) -> None:
    others = ("gated/model", "missing/model", "down/model", "flaky/model")
    requests = [("some/model", None), ("some/model", "v9"), *((name, None) for name in others)]
    loaded, revision, gated, missing, down, flaky = try_all(hub, tmp_path / "cache", *requests)
    assert loaded == [COMMIT, load_checkpoint(plain).sha256, sorted(path.name for path in plain.iterdir())]
    assert "some/model has no revision 'v9'" in revision
    assert "gated/model is gated" in gated
    assert "missing/model is neither an existing folder nor a repository you can see" in missing
    assert "down/model" in down
    assert "hub cannot be reached or refuses" in down
    assert "flaky/model cannot be downloaded from the hub" in flaky


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    (message,) = try_all("http://127.0.0.1:9", tmp_path, ("some/model", None))
    assert "some/model is not in the local cache, and the hub cannot be reached" in message
