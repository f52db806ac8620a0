"""Text from language models: prompts, answers in every form, endpoints that misbehave, and local models."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from das_asr.runtime.errors import SynthesisError
from das_asr.runtime.jsonl import read_rows
from das_asr.training.text.chat import Answer, Failure
from das_asr.training.text.domain import Domain
from das_asr.training.text.endpoint import EndpointModel
from das_asr.training.text.generation import generate_text
from das_asr.training.text.instructions import Instruction, Lane
from das_asr.training.text.local_model import LocalModel
from das_asr.training.text.options import TextOptions
from das_asr.training.text.prompt_file import PROMPTS, Request, render
from das_asr.training.text.reading import read_list, read_object, read_text
from das_asr.training.text.report import TextReport
from das_asr.training.text.sentences import tasks
from tests.chat_server import GOOD, ChatServer, Reply, serve

DOMAIN = Domain(
    name="records",
    use_case="An assistant for records.",
    skills=("play a record", "find a record", "sell a record"),
    personas=("a collector", "a child"),
    seeds=("play the blue one", "where is my list"),
    wake_words=(),
    styles=("request", "question"),
    words_min=2,
    words_max=16,
)
SEEDS_ONLY = Domain(**{**vars(DOMAIN), "use_case": "", "skills": ()})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with serve() as running:
        yield running


def _options(server: ChatServer, **changes: Any) -> TextOptions:
    defaults = {"count": 60, "backend": "openai", "model": "tiny", "base_url": server.url, "iterations": 1}
    return TextOptions(**{**defaults, "instructions": 2, "concurrency": 4, **changes})


def _generate(server: ChatServer, output: Path, domain: Domain = DOMAIN, **changes: Any) -> TextReport:
    options = _options(server, **changes)
    return generate_text(domain, options, output, model=EndpointModel(options, first_pause=0.01))


# answers

LISTS = {
    "json": '["play it", "stop it"]',
    "prose around": 'Sure! Here you are:\n["play it", "stop it"]\nAnything else?',
    "fenced": 'Here:\n```json\n["play it", "stop it"]\n```',
    "fenced, not closed": '```\n["play it", "stop it"]',
    "trailing comma": '["play it", "stop it",]',
    "objects": '[{"id": 1, "sentence": "play it"}, {"id": 2, "sentence": "stop it"}]',
    "inside an object": '{"sentences": ["play it", "stop it"]}',
    "python": "['play it', 'stop it']",
    "curly quotes": "[\u201cplay it\u201d, \u201cstop it\u201d]",
    "cut off": '["play it", "stop it", "and the',
    "missing comma": '["play it"\n "stop it"]',
    "numbered": "1. play it\n2. stop it",
    "numbered with quotes": 'Sentences:\n1) "play it"\n2) **stop it**\n',
    "bullets": "- play it\n* stop it",
    "thoughts first": '<think>["no", "not this"]</think>["play it", "stop it"]',
    "newlines in strings": '["play\nit", "stop it"]',
    "brackets before": 'As asked [10 sentences]: ["play it", "stop it"]',
}


@pytest.mark.parametrize("answer", LISTS.values(), ids=list(LISTS))
def test_lists_are_read_in_every_form(answer: str) -> None:
    assert read_list(answer) == ["play it", "stop it"]


def test_bare_lines_are_a_list() -> None:
    assert read_list("Here you are:\nplay it\nstop it\nfind it") == ["play it", "stop it", "find it"]


@pytest.mark.parametrize(
    "answer", ["", "I'm sorry, I cannot help.", "[]", "{}", "[1, 2]", "<think>hm", "a\nb", "```\n```"]
)
def test_what_is_no_list(answer: str) -> None:
    assert read_list(answer) is None


def test_objects_are_read() -> None:
    expected = {"use_case": "a", "skills": ["b"]}
    for answer in (
        json.dumps(expected),
        f"Sure:\n```json\n{json.dumps(expected, indent=1)}\n```",
        "{'use_case': 'a', 'skills': ['b']}",
        '{"use_case": "a", "skills": ["b",],}',
    ):
        assert read_object(answer) == expected
    assert read_object("no object") is None


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "Ask for it.",
            '"Ask for it."',
            "New brief: Ask for it.",
            "**Brief:** Ask for it.",
            '{"brief": "Ask for it."}',
        ),
        *("Here is the new brief:\n\nAsk for it.", "```\nAsk for it.\n```", "<think>x</think>\nAsk for it.\n\nI hope."),
    ],
)
def test_paragraphs_are_read(answer: str) -> None:
    assert read_text(answer) == "Ask for it."


# prompts


def test_prompts_have_no_names_left() -> None:
    names: dict[str, object] = dict.fromkeys(
        ("request", "use_case", "skill", "count", "instruction", "action", "persona", "style", "examples"), "VALUE"
    )
    for name in PROMPTS:
        text = render(name, {**names, "shortest": 1, "longest": 2})
        assert "VALUE" in text
        assert not re.search(r"\$\w", text)


def test_tasks_are_a_fixed_sequence() -> None:
    lane = Lane("use", "skill")
    instructions = [Instruction(lane, f"brief {index}", "instructions") for index in range(5)]

    def first(count: int, seed: int, shard: tuple[int, int] = (0, 1)) -> list[Any]:
        planned = tasks(DOMAIN, instructions, 10, seed, shard)
        return [next(planned) for _ in range(count)]

    whole = first(20, seed=3)
    assert whole == first(20, seed=3) != first(20, seed=4)
    assert first(10, 3, (1, 2)) == whole[1::2]
    assert all(Counter(task.instruction.text for task in whole[i : i + 5]).most_common(1)[0][1] == 1 for i in (0, 5))
    assert {task.persona for task in whole} == set(DOMAIN.personas)
    assert len({(task.request.prompt, task.request.seed) for task in whole}) == 20
    assert not {task.request.again.seed for task in whole} & {task.request.seed for task in whole}


# the pipeline on an endpoint


def test_the_pipeline_goes_through_all_stages(server: ChatServer, tmp_path: Path) -> None:
    report = _generate(server, tmp_path / "r.jsonl", count=200, iterations=2, api_key="secret")
    rows = list(read_rows(tmp_path / "r.jsonl"))
    assert len(rows) == len({row["id"] for row in rows}) == 200
    prompts = {Request("sentences", prompt, 0).prompt_sha256: prompt for prompt, _ in server.prompts()}
    for row in rows:
        prompt = prompts[row["prompt_sha256"]]
        assert all(row[column] in prompt for column in ("skill", "persona", "instruction"))
        assert (row["backend"], row["model"], row["template"]) == ("openai", "tiny", None)
        assert not re.search(r"\d", row["text"])  # the server writes digits
    assert {row["stage"] for row in rows} == {"instructions", "rubrics 1", "rubrics 2"}
    assert {body["authorization"] for body in server.requests} == {"Bearer secret"}
    assert {body["temperature"] for body in server.requests} == {1.0}
    assert report.run["requests"] == len(server.requests)
    assert report.run["prompt_tokens"] == 7 * len(server.requests)
    assert "tokens of this run: " in report.as_text()
    actions = [prompt for prompt, _ in server.prompts() if "Rewrite the brief" in prompt]
    assert len({re.findall(r"own: (.*)", prompt)[0] for prompt in actions}) > 1  # drawn at random
    assert server.most_at_once > 1


def test_metadata_come_from_seeds_where_there_are_none(server: ChatServer, tmp_path: Path) -> None:
    _generate(server, tmp_path / "r.jsonl", SEEDS_ONLY, count=30)
    asked = [prompt for prompt, _ in server.prompts() if "Somebody said" in prompt]
    assert len(asked) == len(SEEDS_ONLY.seeds)
    assert {row["skill"] for row in read_rows(tmp_path / "r.jsonl")} <= {"find records", "play records"}


def test_metadata_that_cannot_be_found_are_an_error(server: ChatServer, tmp_path: Path) -> None:
    server.behave = lambda _number, _body: Reply(content="no idea")
    with pytest.raises(SynthesisError, match="no use case and skills in any of the 2 seeds"):
        _generate(server, tmp_path / "r.jsonl", SEEDS_ONLY)
    assert len(server.requests) == 4  # each once more


def test_the_same_seed_gives_the_same_file(server: ChatServer, tmp_path: Path) -> None:
    server.behave = lambda number, _body: Reply(seconds=0.01 * (number % 3))  # answers overtake each other
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        _generate(server, tmp_path / f"{name}.jsonl", seed=seed)
    contents = [(tmp_path / f"{name}.jsonl").read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]


def test_answers_are_asked_for_once(server: ChatServer, tmp_path: Path) -> None:
    first = _generate(server, tmp_path / "r.jsonl")
    asked = len(server.requests)
    (tmp_path / "r.jsonl").rename(tmp_path / "before.jsonl")
    again = _generate(server, tmp_path / "r.jsonl")
    assert len(server.requests) == asked
    assert (again.run["requests"], again.run["reused"]) == (0, first.run["requests"])
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "before.jsonl").read_bytes()
    _generate(server, tmp_path / "more.jsonl", count=70, answers=tmp_path / "r.answers.jsonl")
    assert len(server.requests) < 2 * asked


def test_shards_ask_for_different_sentences(server: ChatServer, tmp_path: Path) -> None:
    for index in range(2):
        _generate(server, tmp_path / f"{index}.jsonl", shard=(index, 2), count=41)
    texts = [{row["text"] for row in read_rows(tmp_path / f"{index}.jsonl")} for index in range(2)]
    assert [len(part) for part in texts] == [21, 20]
    assert len(texts[0] & texts[1]) <= 2


def test_a_malformed_answer_costs_one_more_request(server: ChatServer, tmp_path: Path) -> None:
    def behave(_number: int, body: dict[str, Any]) -> Reply:
        prompt, seed = body["messages"][0]["content"], body["seed"]
        if "JSON list of" in prompt and (seed >> 1) % 2:
            again = seed % 2  # half of them are as bad the second time
            return GOOD if again and (seed >> 2) % 2 else Reply(content="Sorry, I would rather not.")
        return GOOD

    server.behave = behave
    report = _generate(server, tmp_path / "r.jsonl", count=300)
    run = report.run
    assert run["asked_again"] == sum(seed % 2 for _, seed in server.prompts()) > 0
    assert run["requests"] == len(server.requests) == len(set(server.prompts()))
    assert 0 < run["malformed"] < run["asked_again"]
    assert {problem["detail"] for problem in run["problems"]} == {"Sorry, I would rather not."}
    assert len(list(read_rows(tmp_path / "r.jsonl"))) == 300
    asked = len(server.requests)
    (tmp_path / "r.jsonl").unlink()
    again = _generate(server, tmp_path / "r.jsonl", count=300)
    assert len(server.requests) == asked
    assert (again.diversity, again.run["malformed"]) == (report.diversity, run["malformed"])


def test_rubrics_that_cannot_be_read_leave_the_instructions(server: ChatServer, tmp_path: Path) -> None:
    server.behave = lambda _number, body: (
        Reply(content="{}") if "4 criteria" in body["messages"][0]["content"] else GOOD
    )
    _generate(server, tmp_path / "r.jsonl")
    assert {row["stage"] for row in read_rows(tmp_path / "r.jsonl")} == {"instructions"}


def test_nothing_but_nonsense_is_an_error(server: ChatServer, tmp_path: Path) -> None:
    server.behave = lambda _number, body: (
        Reply(content="no") if "JSON list of" in body["messages"][0]["content"] else GOOD
    )
    with pytest.raises(SynthesisError, match=r"after 0 distinct ones nothing new came in 50 x requests"):
        _generate(server, tmp_path / "r.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.answers.jsonl"]


# endpoints that misbehave


def _misbehaving(number: int, body: dict[str, Any]) -> Reply:
    """The first requests go wrong in every way; then all is well."""
    bad = {
        2: Reply(429, headers={"Retry-After": "0.3"}),
        3: Reply(500),
        4: Reply(body=b'{"id": "1", "choices": [{"mess'),
        5: Reply(cut=True),
        6: Reply(seconds=1.5),
        7: Reply(503),
        8: Reply(body=b'{"choices": []}'),
        9: Reply(body=b"null"),
        10: Reply(529),
    }
    return bad.get(number, GOOD)


def test_a_misbehaving_endpoint_changes_nothing(server: ChatServer, tmp_path: Path) -> None:
    _generate(server, tmp_path / "well.jsonl")
    good = len(server.requests)
    server.requests.clear()
    server.behave = _misbehaving
    report = _generate(server, tmp_path / "badly.jsonl", timeout=0.75)
    assert (tmp_path / "badly.jsonl").read_bytes() == (tmp_path / "well.jsonl").read_bytes()
    assert len(server.requests) == good + 9
    assert (report.run["failed"], report.run["malformed"]) == (0, 0)


def test_the_pause_grows_and_heeds_what_the_endpoint_asks(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.behave = lambda number, _body: (
        Reply(429, headers={"Retry-After": "7"}) if number == 3 else Reply(500) if number < 6 else GOOD
    )
    pauses: list[float] = []
    pause = EndpointModel._pause

    def record(self: EndpointModel, attempt: int, asked: float | None) -> float:
        pauses.append(pause(self, attempt, asked))
        return 0.0

    monkeypatch.setattr(EndpointModel, "_pause", record)
    kept: list[Answer] = []
    model = EndpointModel(_options(server), first_pause=1.0)
    replies = list(model.ask([Request("sentences", "Write 1 JSON list of", 2)], lambda _request, one: kept.append(one)))
    assert replies == kept
    assert len(server.requests) == 6
    assert pauses[2] == 7.0
    assert [0.5 * 2**k <= pause <= 2**k for k, pause in enumerate(pauses)] == [True, True, False, True, True]


def test_a_refused_prompt_is_skipped_for_good(server: ChatServer, tmp_path: Path) -> None:
    def behave(_number: int, body: dict[str, Any]) -> Reply:
        prompt = body["messages"][0]["content"]
        return Reply(400) if "JSON list of" in prompt and (body["seed"] >> 1) % 4 == 0 else GOOD

    server.behave = behave
    report = _generate(server, tmp_path / "r.jsonl", count=150)
    assert report.run["failed"] >= 1
    (tmp_path / "r.jsonl").rename(tmp_path / "before.jsonl")
    server.behave = lambda _number, _body: GOOD
    _generate(server, tmp_path / "r.jsonl", count=150)
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "before.jsonl").read_bytes()


def test_an_endpoint_that_breaks_down_stops_the_run_which_goes_on_later(server: ChatServer, tmp_path: Path) -> None:
    _generate(server, tmp_path / "well.jsonl", count=120)
    server.requests.clear()
    server.behave = lambda number, _body: GOOD if number < 20 else Reply(500)
    with pytest.raises(
        SynthesisError, match="3 requests in a row got no answer from tiny; the last: status 500, 7 times"
    ):
        _generate(server, tmp_path / "r.jsonl", count=120, concurrency=1)
    server.behave = lambda _number, _body: GOOD
    before = set(server.prompts()[:19])
    server.requests.clear()
    report = _generate(server, tmp_path / "r.jsonl", count=120, concurrency=1)
    assert not before & set(server.prompts())  # what was paid for is not asked again
    assert report.run["reused"] >= 19
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "well.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(401), "refuses requests .status 401.*Check the key;"),
        (Reply(403), "status 403.*Check the key's rights"),
        (Reply(404), "status 404.*Check the address and the model"),
        (Reply(400), "refuses the first request .status 400"),
        (
            Reply(429, body=b'{"error": {"code": "insufficient_quota", "message": "pay"}}'),
            "status 429.*Check the account",
        ),
    ],
)
def test_what_cannot_be_mended_by_waiting_is_one_error(
    server: ChatServer, tmp_path: Path, reply: Reply, message: str
) -> None:
    server.behave = lambda _number, _body: reply
    with pytest.raises(SynthesisError, match=message):
        _generate(server, tmp_path / "r.jsonl")
    assert len(server.requests) == 1
    assert not list(tmp_path.iterdir())


def test_a_key_that_expires_stops_all_requests(server: ChatServer, tmp_path: Path) -> None:
    server.behave = lambda number, _body: GOOD if number < 10 else Reply(401)
    with pytest.raises(SynthesisError, match="status 401"):
        _generate(server, tmp_path / "r.jsonl")
    assert len(server.requests) <= 9 + 2 * 4  # those that were under way


def test_an_endpoint_that_is_not_there_is_one_error(server: ChatServer, tmp_path: Path) -> None:
    with pytest.raises(SynthesisError, match=r"127.0.0.1:9/v1/ cannot be reached"):
        _generate(server, tmp_path / "r.jsonl", base_url="http://127.0.0.1:9/v1")
    assert not list(tmp_path.iterdir())


def test_a_key_or_an_address_is_needed(server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SynthesisError, match="OPENAI_API_KEY"):
        generate_text(DOMAIN, _options(server, base_url=None), tmp_path / "r.jsonl")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "from the environment")
    generate_text(DOMAIN, _options(server, base_url=None, count=10), tmp_path / "r.jsonl")
    assert {body["authorization"] for body in server.requests} == {"Bearer from the environment"}


def test_temperature_and_tokens_are_sent_where_they_are_given(server: ChatServer) -> None:
    model = EndpointModel(_options(server, temperature=None, max_tokens=99))
    assert isinstance(next(iter(model.ask([Request("sentences", "x", 0)], lambda *_: None))), Answer)
    assert server.requests[0]["max_tokens"] == 99
    assert "temperature" not in server.requests[0]


# a model in this process


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; its tokens are whole lines of a list, so that whatever it writes is one."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    lines = [f"- {verb} the {thing} now\n" for verb in ("play", "stop", "find", "sell") for thing in "abcdefghijklmnop"]
    vocabulary = {token: index for index, token in enumerate(["<end>", "<unknown>", *lines])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n"), "merged_with_previous")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    folder = tmp_path_factory.mktemp("chat")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=256, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    model.generation_config.suppress_tokens = [0, 1]
    model.save_pretrained(folder)
    return folder


def _local(model: Path, **changes: Any) -> TextOptions:
    defaults = {"count": 20, "backend": "transformers", "model": str(model), "iterations": 0, "instructions": 1}
    return TextOptions(**{**defaults, "max_tokens": 6, "batch_size": 2, "device": "cpu", **changes})


def test_a_local_model_writes_text(tiny_model: Path, tmp_path: Path) -> None:
    report = generate_text(DOMAIN, _local(tiny_model), tmp_path / "a.jsonl")
    rows = list(read_rows(tmp_path / "a.jsonl"))
    assert len(rows) == 20
    assert all(re.fullmatch(r"(play|stop|find|sell) the \w now", row["text"]) for row in rows)
    assert {row["model"] for row in rows} == {str(tiny_model)}
    assert report.run["completion_tokens"] == 6 * report.run["requests"]
    # Killed while the answers of a batch were written: the batch is asked again as a whole.
    answers = (tmp_path / "a.answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.answers.jsonl").write_bytes(b"".join(answers[:4]) + b'{"key": "to')
    generate_text(DOMAIN, _local(tiny_model), tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_local_model_is_seeded(tiny_model: Path) -> None:
    model = LocalModel(_local(tiny_model))

    def contents(seed: int) -> list[str]:
        requests = [Request("sentences", "Say something", seed), Request("sentences", "Say more\nof it", seed)]
        replies = list(model.ask(requests, lambda *_: None))
        assert not any(isinstance(reply, Failure) for reply in replies)
        return [reply.content for reply in replies if isinstance(reply, Answer)]

    assert contents(2) == contents(2) != contents(4)


def test_a_local_model_must_be_a_chat_model(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(SynthesisError, match=r"The chat model .*absent cannot be loaded"):
        generate_text(DOMAIN, _local(tmp_path / "absent"), tmp_path / "r.jsonl")
    folder = tmp_path / "plain"
    folder.mkdir()
    for file in tiny_model.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SynthesisError, match="has no chat template"):
        generate_text(DOMAIN, _local(folder), tmp_path / "r.jsonl")
