"""A chat endpoint on loopback that answers every stage of the pipeline, and misbehaves when told to."""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VERBS = ("play", "find", "show me", "stop", "repeat", "save", "skip", "shuffle", "rate", "mute")
THINGS = ("the blue song", "my list", "that old record", "a waltz", "some jazz", "the radio", "this band", "her album")
PLACES = ("in the kitchen", "upstairs", "for my sister", "before dinner", "at nine", "right now", "on monday", "again")


@dataclass(frozen=True)
class Reply:
    """What the server does with one request."""

    status: int = 200
    content: str | None = None  # None: a good answer
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # in place of a completion
    cut: bool = False  # promise more bytes than are sent
    seconds: float = 0.0  # before the answer


GOOD = Reply()


@dataclass
class ChatServer:
    """`requests` in the order of arrival; `behave` is asked with the number of each request and its body."""

    url: str = ""
    behave: Callable[[int, dict[str, Any]], Reply] = lambda _number, _body: GOOD
    requests: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def prompts(self) -> list[tuple[str, int]]:
        """(prompt, seed) of all requests."""
        return [(body["messages"][0]["content"], body["seed"]) for body in self.requests]


def good_answer(body: dict[str, Any]) -> str:
    """Depends on the prompt and its seed alone."""
    prompt = body["messages"][0]["content"]
    rng = random.Random(hashlib.sha256(f"{prompt}{body.get('seed')}".encode()).digest())
    count = int(found[1]) if (found := re.search(r"Write (\d+) ", prompt)) else 1
    if "numbered list" in prompt:
        return "\n".join(f"{i}. They want {rng.choice(THINGS)} {rng.choice(PLACES)}." for i in range(1, count + 1))
    if "4 criteria" in prompt:
        actions = ["add a place", "add a time", "be short", "ask"]
        return f"```json\n{json.dumps({'rubrics': list('abcd'), 'actions': actions})}\n```"
    if "Rewrite the brief" in prompt:
        return f"New brief: They ask for {rng.choice(THINGS)} {rng.choice(PLACES)} and are in a hurry."
    if "use_case" in prompt:
        return '{"use_case": "An assistant for records.", "skills": ["find records", "Play Records"]}'
    numbers = rng.sample(range(1, 1000), count)
    lines = [f"{rng.choice(VERBS)} {rng.choice(THINGS)} {rng.choice(PLACES)} {number}" for number in numbers]
    return json.dumps(lines)


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append({**body, "authorization": self.headers.get("Authorization")})
                number = len(server.requests)
                server.at_once += 1
                server.most_at_once = max(server.at_once, server.most_at_once)
            reply = server.behave(number, body)
            time.sleep(reply.seconds)
            try:
                self._send(reply, body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client was killed, or has lost its patience
            finally:
                with server.lock:
                    server.at_once -= 1

        def _send(self, reply: Reply, body: dict[str, Any]) -> None:
            data = reply.body if reply.body is not None else json.dumps(_completion(reply, body)).encode()
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data) + 100 * reply.cut))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = reply.cut

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _completion(reply: Reply, body: dict[str, Any]) -> dict[str, Any]:
    if reply.status != 200:
        return {"error": {"message": f"told to answer {reply.status}", "type": "test"}}
    content = good_answer(body) if reply.content is None else reply.content
    message = {"role": "assistant", "content": content}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


@contextmanager
def serve() -> Iterator[ChatServer]:
    """Runs a server in threads."""
    state = ChatServer()
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield state
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
