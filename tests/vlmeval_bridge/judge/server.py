"""A real HTTP server on this machine that behaves as it is told, for whoever asks OpenAI-compatible servers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server does with one request.

    Attributes:
        cut: sends only that many bytes of the body it promised. repeat: how often the body is sent.
        pause_s: seconds before each server-sent event of the body.
        drip_s: seconds before each byte of a body that takes a minute; with ``drip_head``, of the headers before it.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut: int | None = None
    repeat: int = 1
    pause_s: float = 0.0
    drip_s: float = 0.0
    drip_head: bool = False


def completion(text: str | None, finish_reason: str = "stop") -> Reply:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
    }
    return Reply(body=json.dumps(body).encode())


def error(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    """An OpenAI error."""
    body = json.dumps({"error": {"message": message, "type": "t", "param": None, "code": code}}).encode()
    return Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Server:
    """Attributes: requests: bodies in the order of arrival. headers: theirs. most_at_once: requests under way.
    sent: bytes of bodies. models: what it lists; None: it does not."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0
    sent: int = 0
    models: tuple[str, ...] | None = None

    @property
    def prompts(self) -> list[str]:
        """What was asked, the probe left out."""
        asked = [request["messages"][-1]["content"] for request in self.requests]
        return [prompt for prompt in asked if not prompt.startswith("Reply with the word")]


@contextmanager
def serve(respond: Callable[[dict[str, Any], int], Reply]) -> Iterator[Server]:
    """Run a server; ``respond(body, n)`` answers the n-th request (from 0)."""
    lock = threading.Lock()
    under_way = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal under_way
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                under_way += 1
                server.most_at_once = max(server.most_at_once, under_way)
                number = len(server.requests)
                server.requests.append(body)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                server.times.append(time.monotonic())
            try:
                self._send(respond(body, number))
            finally:
                with lock:
                    under_way -= 1

        def do_GET(self) -> None:
            listed = [{"id": name, "object": "model", "owned_by": "test"} for name in server.models or ()]
            known = server.models is not None and self.path == "/v1/models"
            self._send(Reply(200, json.dumps({"data": listed}).encode()) if known else error(404, "no such page"))

        def _send(self, reply: Reply) -> None:
            time.sleep(reply.delay_s)
            try:
                if reply.drip_s:
                    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
                    for i, byte in enumerate(head + b" " * int(60 / reply.drip_s)):
                        time.sleep(reply.drip_s if reply.drip_head or i > len(head) else 0)
                        self.wfile.write(bytes([byte]))
                self.send_response(reply.status)
                length = str(len(reply.body) * reply.repeat)
                headers = {"Content-Type": "application/json", "Content-Length": length, **reply.headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for event in reply.body.split(b"\n\n")[:-1] if reply.pause_s else ():
                    time.sleep(reply.pause_s)
                    self.wfile.write(event + b"\n\n")
                for _ in range(0 if reply.pause_s else reply.repeat):
                    self.wfile.write(reply.body if reply.cut is None else reply.body[: reply.cut])
                    server.sent += len(reply.body)
                if reply.cut is not None:
                    self.close_connection = True
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up waiting, as it should

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
