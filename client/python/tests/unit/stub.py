"""A stub server for the tests. It uses real HTTP on this machine, and each test sets its responses."""

from __future__ import annotations

import base64
import json
import logging
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable
from urllib.parse import parse_qsl, urlsplit

from websockets.frames import Frame, Opcode
from websockets.http11 import Request as HandshakeRequest
from websockets.server import ServerProtocol

TEST_KEY = "msb_v2.public.canary-of-the-unit-tests"

# Seconds after which a test gives up. No operation takes this long, even on a slow machine.
LONG = 300.0

SANDBOX = {"sandbox", "namespace"}
PROCESS = {*SANDBOX, "pid"}
RUN = {*SANDBOX, "timeout", "cwd", "envs", "user", "stdin", "encoding"}

# The required and the known parameters of each of the server's methods.
METHODS: dict[str, tuple[set[str], set[str]]] = {
    "sandbox.start": ({"sandbox"}, {"sandbox", "namespace", "config"}),
    "sandbox.stop": ({"sandbox"}, {"sandbox", "namespace"}),
    "sandbox.repl.run": ({"sandbox", "code"}, {*RUN, "language", "context", "code", "results"}),
    "sandbox.command.run": ({"sandbox", "command"}, {*RUN, "command", "args"}),
    "sandbox.process.start": ({"sandbox", "command"}, {*RUN, "command", "args", "tag", "open_stdin", "terminal"}),
    "sandbox.process.connect": ({"sandbox", "pid", "replay", "encoding"}, {*PROCESS, "replay", "encoding"}),
    "sandbox.process.logs": ({"sandbox", "pid", "encoding"}, {*PROCESS, "encoding"}),
    "sandbox.process.get": ({"sandbox"}, {*PROCESS, "tag"}),
    "sandbox.process.list": ({"sandbox"}, SANDBOX),
    "sandbox.process.signal": ({"sandbox", "pid", "signal"}, {*PROCESS, "signal", "all"}),
    "sandbox.process.input": ({"sandbox", "pid"}, {*PROCESS, "data", "encoding", "close"}),
    "sandbox.process.resize": ({"sandbox", "pid", "cols", "rows"}, {*PROCESS, "cols", "rows"}),
    "sandbox.fs.list": ({"sandbox", "path"}, {*SANDBOX, "path", "depth"}),
    "sandbox.fs.stat": ({"sandbox", "path"}, {*SANDBOX, "path"}),
    "sandbox.fs.exists": ({"sandbox", "path"}, {*SANDBOX, "path"}),
    "sandbox.fs.mkdir": ({"sandbox", "path"}, {*SANDBOX, "path", "mode", "user"}),
    "sandbox.fs.move": ({"sandbox", "from", "to"}, {*SANDBOX, "from", "to"}),
    "sandbox.fs.remove": ({"sandbox", "path"}, {*SANDBOX, "path", "recursive"}),
    "sandbox.fs.watch": ({"sandbox", "path"}, {*SANDBOX, "path", "recursive"}),
    "sandbox.context.create": ({"sandbox", "language"}, {*SANDBOX, "language", "context", "cwd", "user"}),
    "sandbox.context.list": ({"sandbox"}, SANDBOX),
    "sandbox.context.restart": ({"sandbox", "context"}, {*SANDBOX, "context"}),
    "sandbox.context.remove": ({"sandbox", "context"}, {*SANDBOX, "context"}),
    "sandbox.list": (set(), {"namespace", "after", "limit"}),
    "sandbox.get": ({"sandbox"}, {"sandbox", "namespace"}),
    "sandbox.metrics.get": (set(), {"sandbox", "namespace"}),
}

INFO: dict[str, Any] = {
    "namespace": "default",
    "name": "my-env",
    "id": "1f0c9a2b5d6e7f803a4b",
    "state": "failed",
    "reason": "its start failed",
    "image": "microsandbox/python",
    "cpus": 1,
    "memory": 512,
    "disk": 4096,
    "created_at": "2026-01-02T03:04:05Z",
}

PROCESS_INFO: dict[str, Any] = {
    "pid": 42,
    "command": "sh",
    "args": [],
    "cwd": "/root",
    "user": "root",
    "tag": "worker",
    "terminal": False,
    "started_at": "2026-01-02T03:04:05Z",
    "running": True,
    "output_bytes": 6,
}

FILE_INFO: dict[str, Any] = {
    "path": "/tmp/a",
    "type": "file",
    "size": 6,
    "mode": "0640",
    "uid": 0,
    "gid": 0,
    "user": "root",
    "group": "root",
    "modified_at": "2026-01-02T03:04:05Z",
}

CONTEXT: dict[str, Any] = {"context": "report", "language": "python", "cwd": "/tmp", "count": 0, "busy": False}

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
    "sandbox.process.start": {"pid": 42, "tag": "worker"},
    "sandbox.process.logs": {"output": [{"stream": "stdout", "base64": "w6k="}], "skipped_bytes": 3, "running": True},
    "sandbox.process.get": PROCESS_INFO,
    "sandbox.process.list": {"processes": [PROCESS_INFO]},
    "sandbox.process.signal": {},
    "sandbox.process.input": {},
    "sandbox.process.resize": {},
    "sandbox.fs.list": {"entries": [FILE_INFO]},
    "sandbox.fs.stat": FILE_INFO,
    "sandbox.fs.exists": {"exists": True},
    "sandbox.fs.mkdir": {**FILE_INFO, "type": "directory", "created": True},
    "sandbox.fs.move": FILE_INFO,
    "sandbox.fs.remove": {},
    "sandbox.context.create": CONTEXT,
    "sandbox.context.list": {"contexts": [CONTEXT]},
    "sandbox.context.restart": CONTEXT,
    "sandbox.context.remove": {},
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


@dataclass
class Events:
    """A stream of events, each with a name and data. It ends after the last one."""

    events: list[tuple[str, Any]]

    def __call__(self, handler: Handler) -> None:
        """Send the events byte by byte, as a slow network may deliver them."""
        text = ": keep-alive\n\n" + "".join(
            f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in self.events
        )
        handler.begin("text/event-stream")
        for byte in text.encode():
            handler.chunk(bytes([byte]))
        handler.chunk(b"")


def printed(stream: str, text: str) -> tuple[str, Any]:
    return ("output", {"stream": stream, "text": text})


def printed_bytes(stream: str, data: bytes) -> tuple[str, Any]:
    return ("output", {"stream": stream, "base64": base64.b64encode(data).decode()})


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
        self.answer(reply)

    def do_GET(self) -> None:
        """Serve a file or an archive of server.files, or a WebSocket that echoes."""
        if self.headers.get("Upgrade") == "websocket":
            self.echo()
            return
        path = self.file_request()
        reply = self.server.files.get(path)
        if callable(reply):
            reply(self)
        elif reply is None:
            self.reply(error_reply(404, -32003))
        else:
            self.begin("application/octet-stream", str(len(reply)))
            self.wfile.write(reply)

    def do_PUT(self) -> None:
        """Store a file or an archive in server.files, unless there is an error for the path."""
        path = self.file_request()
        reply = self.server.files.get(path)
        if callable(reply):
            reply(self)
            return
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.files[path] = content
        self.reply(Reply(201, json.dumps({**FILE_INFO, "path": path})))

    def file_request(self) -> str:
        """Note a request for a file. Return the path of the file."""
        address = urlsplit(self.path)
        params = dict(parse_qsl(address.query, errors="surrogateescape", strict_parsing=True))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.server.lock:
            self.server.requests.append(Request(address.path, headers, self.command, params))
        if address.path != "/api/v1/sandboxes/my-env/files" or "path" not in params:
            self.server.violations.append({"path": self.path})
        return params["path"]

    def begin(self, kind: str, length: str | None = None) -> None:
        """Send the headers of a response whose body follows in chunks, or has a length."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header(*("Transfer-Encoding", "chunked") if length is None else ("Content-Length", length))
        self.send_header("X-Request-Id", "REQUEST-ID")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        """Send a chunk; an empty one ends the body."""
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def echo(self) -> None:
        """Serve a WebSocket that returns each message, and closes after the message quit or fail."""
        with self.server.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.server.requests.append(Request(self.path, headers, "WebSocket", {}))
        reply = self.server.files.get(self.path)
        if callable(reply):
            reply(self)
            return
        protocol = ServerProtocol(logger=logging.Logger("stub", logging.CRITICAL))  # its log has headers
        protocol.receive_data(
            f"{self.requestline}\r\n{self.headers}".replace("\n", "\r\n").replace("\r\r", "\r").encode()
        )
        for request in protocol.events_received():
            assert isinstance(request, HandshakeRequest)
            protocol.send_response(protocol.accept(request))
        while True:
            for data in protocol.data_to_send():
                self.connection.sendall(data) if data else self.connection.shutdown(socket.SHUT_WR)
            received = self.connection.recv(65536)
            if not received:
                break
            protocol.receive_data(received)
            for frame in protocol.events_received():
                if isinstance(frame, Frame) and frame.opcode is Opcode.BINARY:
                    protocol.send_binary(frame.data)
                    if frame.data == b"quit":
                        protocol.send_close(1000)
                    elif frame.data == b"fail":
                        protocol.send_text(b'{"error":{"code":-32010,"message":"it failed"}}')
                        protocol.send_close(1011)
        self.close_connection = True
        self.server.ended.set()

    def answer(self, reply: Reply | Answer) -> None:
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
        # What is stored at a path, or what answers a request for it.
        self.files: dict[str, bytes | Answer] = {}
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
