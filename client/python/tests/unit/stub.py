"""A stub server for the tests. It uses real HTTP on this machine, and each test sets its responses."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable

TEST_KEY = "msb_v2.public.canary-of-the-unit-tests"

# Seconds after which a test gives up. No operation takes this long, even on a slow machine.
LONG = 300.0

# The required and the known parameters of each of the server's methods.
METHODS: dict[str, tuple[set[str], set[str]]] = {
    "sandbox.start": ({"sandbox"}, {"sandbox", "namespace", "config"}),
    "sandbox.stop": ({"sandbox"}, {"sandbox", "namespace"}),
    "sandbox.repl.run": ({"sandbox", "language", "code"}, {"sandbox", "namespace", "language", "code", "timeout"}),
    "sandbox.command.run": ({"sandbox", "command"}, {"sandbox", "namespace", "command", "args", "timeout"}),
    "sandbox.list": (set(), {"namespace", "after", "limit"}),
    "sandbox.get": ({"sandbox"}, {"sandbox", "namespace"}),
    "sandbox.metrics.get": (set(), {"sandbox", "namespace"}),
}

INFO: dict[str, Any] = {
    "namespace": "default",
    "name": "my-env",
    "id": "sb-1",
    "state": "failed",
    "reason": "its start failed",
    "image": "microsandbox/python",
    "cpus": 1,
    "memory": 512,
    "created_at": "2026-01-02T03:04:05Z",
}

RESULTS: dict[str, Any] = {
    "sandbox.start": "Sandbox my-env started successfully",
    "sandbox.stop": "Sandbox my-env stopped successfully",
    "sandbox.repl.run": {"status": "success", "language": "python", "output": [{"stream": "stdout", "text": "42"}]},
    "sandbox.command.run": {
        "command": "sh",
        "args": ["-c", "echo hello; echo no >&2; exit 3"],
        "exit_code": 3,
        "success": False,
        "output": [{"stream": "stdout", "text": "hello"}, {"stream": "stderr", "text": "no"}],
    },
    "sandbox.list": {"sandboxes": [INFO]},
    "sandbox.get": INFO,
    "sandbox.metrics.get": {
        "sandboxes": [
            {
                "namespace": "default",
                "name": "my-env",
                "state": "running",
                "running": True,
                "cpu_usage": 12.5,
                "memory_usage": 256,
                "disk_usage": 1099511627776,
            }
        ]
    },
}


@dataclass
class Reply:
    """A response: its status, body and additional headers. A body that begins with { or [ is sent as JSON."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)


def ok(result: Any) -> Reply:
    return Reply(200, json.dumps({"jsonrpc": "2.0", "result": result, "id": 1}))


def error_reply(status: int, code: int, **headers: str) -> Reply:
    body = {"jsonrpc": "2.0", "error": {"code": code, "message": "it is so"}, "id": 1}
    return Reply(status, json.dumps(body), {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Request:
    """A request from a client."""

    path: str
    headers: dict[str, str]
    method: str
    params: dict[str, Any]


Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # send headers and body together; otherwise each response takes 40 ms
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])).decode("utf-8", "surrogatepass"))
        request = Request(self.path, {k.lower(): v for k, v in self.headers.items()}, body["method"], body["params"])
        with self.server.lock:
            self.server.requests.append(request)
            replies = self.server.replies.get(request.method) or [ok(RESULTS[request.method])]
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        self.check(request, body)
        if callable(reply):
            reply(self)
        else:
            self.reply(reply)

    def check(self, request: Request, body: dict[str, Any]) -> None:
        """Record a violation if a real server would refuse the request."""
        required, known = METHODS[request.method]
        valid = (
            set(body) == {"jsonrpc", "method", "params", "id"}
            and body["jsonrpc"] == "2.0"
            and required <= set(request.params) <= known
            and request.headers["content-type"] == "application/json"
            and request.path.endswith("/api/v1/rpc")
            and None not in request.params.values()
        )
        if not valid:
            self.server.violations.append(body)

    def reply(self, reply: Reply) -> None:
        data = reply.body.encode()
        self.send_response(reply.status)
        if reply.body[:1] in ("{", "["):
            self.send_header("Content-Type", "application/json")
        self.send_header("X-Request-Id", "REQUEST-ID")
        self.send_header("Content-Length", str(len(data)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Answers the calls of each method with its replies in order, repeating the last; the default is RESULTS."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: list[Request] = []
        self.replies: dict[str, list[Reply | Answer]] = {}
        self.violations: list[dict[str, Any]] = []
        self.began = threading.Event()  # a request arrived that is not answered yet
        self.ended = threading.Event()  # the client of that request closed the connection
        self.go = threading.Event()  # that request may be answered

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, method: str, *replies: Reply | Answer) -> None:
        self.replies[method] = list(replies)

    def hang(self, handler: Handler) -> None:
        """Do not answer. Waits until the client closes the connection."""
        self.began.set()
        if handler.connection.recv(1) == b"":
            self.ended.set()
        handler.close_connection = True

    def wait(self, handler: Handler) -> None:
        """Answer when the test sets go."""
        self.began.set()
        assert self.go.wait(LONG)
        handler.reply(ok(RESULTS["sandbox.repl.run"]))

    def drip(self, handler: Handler) -> None:
        """Answer byte by byte, so slowly that the response does not end within the test."""
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 10000\r\n\r\n")
        try:
            for _ in range(10000):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(LONG / 10000)
        except OSError:
            self.ended.set()
        handler.close_connection = True

    def drop(self, handler: Handler) -> None:
        """Close the connection without a response."""
        handler.close_connection = True

    def sent(self) -> list[tuple[str, dict[str, Any]]]:
        return [(request.method, request.params) for request in self.requests]
