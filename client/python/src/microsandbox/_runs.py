"""Collects the output of runs and processes, from streams of events and from ordinary responses."""

from __future__ import annotations

import base64
import codecs
from collections.abc import Iterable, Mapping
from typing import Any, Callable, Generic, TypeVar, Union

from ._results import Output, OutputLine, Piece, Result
from ._rpc import Call
from .errors import MicrosandboxError, UnexpectedAnswerError

T = TypeVar("T", bound=Output)

Callback = Callable[[Any], Any]
Callbacks = dict[str, Union[Callback, None]]

# The callback for the output of each stream.
_CALLBACKS = {"stdout": "on_stdout", "terminal": "on_stdout", "stderr": "on_stderr"}


class Pieces:
    """Decodes pieces of output."""

    def __init__(self) -> None:
        self._decoders: dict[str, codecs.IncrementalDecoder] = {}

    def decode(self, data: Any) -> Piece:
        """Return the piece in an event, or in an element of output."""
        try:
            stream = str(data["stream"])
            if "base64" not in data:
                return Piece(stream, b"", data["text"])
            raw = base64.b64decode(data["base64"])
        except (KeyError, TypeError, ValueError):
            raise UnexpectedAnswerError("a piece of output has an unexpected format") from None
        if stream not in self._decoders:
            self._decoders[stream] = codecs.getincrementaldecoder("utf-8")("replace")
        return Piece(stream, raw, self._decoders[stream].decode(raw))

    def event(self, name: str, data: Any) -> Iterable[Piece]:
        """Return the pieces in an event. The last event may have the rest of an incomplete character."""
        if name == "output":
            return [self.decode(data)]
        return self.rest() if name == "result" else ()

    def rest(self) -> list[Piece]:
        """Return a piece for each stream that ends in the middle of a character."""
        rest = [Piece(stream, b"", decoder.decode(b"", True)) for stream, decoder in self._decoders.items()]
        self._decoders.clear()
        return [piece for piece in rest if piece.text]


class Lines:
    """Makes lines of pieces of text. A line stands where it began."""

    def __init__(self) -> None:
        self.lines: list[OutputLine] = []
        self._open: dict[str, tuple[OutputLine, list[str]]] = {}  # the unfinished line of each stream

    def add(self, stream: str, text: str) -> None:
        """Add a piece of the output of a stream."""
        pieces = text.split("\n")
        for number, piece in enumerate(pieces):
            is_last = number == len(pieces) - 1
            if is_last and not piece:
                return
            if stream not in self._open:
                line: OutputLine = {"stream": stream, "text": ""}
                self.lines.append(line)
                self._open[stream] = (line, [])
            self._open[stream][1].append(piece)
            if not is_last:
                self.end(stream)

    def end(self, stream: str) -> None:
        """End the unfinished line of a stream, if there is one."""
        line, pieces = self._open.pop(stream, ({"stream": stream, "text": ""}, []))
        line["text"] = "".join(pieces)

    def add_lines(self, stream: str, text: str) -> None:
        """Add lines that a program has not printed itself."""
        self.end(stream)
        self.add(stream, text)
        self.end(stream)

    def complete(self) -> list[OutputLine]:
        """Return the lines."""
        for stream in list(self._open):
            self.end(stream)
        return self.lines


class Run(Generic[T]):
    """A run of code or of a command, or a wait for a process."""

    def __init__(
        self,
        call: Call,
        kind: Callable[[dict[str, Any]], T],
        callbacks: Callbacks | None = None,
        *,
        text: bool = True,
    ) -> None:
        """Describe a run. kind is the class of its result. text: callbacks get text, not bytes."""
        callbacks = callbacks or {}
        self.call = call
        self.result: Any = None  # the last event of a stream
        self._kind = kind
        self._text = text
        self._on_output = {stream: callbacks.get(name) for stream, name in _CALLBACKS.items()}
        self._on_result = callbacks.get("on_result")
        self._pieces = Pieces()
        self._lines = Lines()
        self._bytes: dict[str, bytearray] = {}
        self._results: list[Any] = []
        self._exception: Any = None
        self._is_begun = False

    def feed(self, name: str, data: Any) -> Iterable[tuple[Callback, Any]]:
        """Take an event. Return the callbacks to call, each with its argument."""
        self._is_begun = True
        calls: list[tuple[Callback | None, Any]] = []
        for piece in self._pieces.event(name, data):
            self._add(piece)
            value = piece.text if self._text else piece.data
            calls.append((self._on_output.get(piece.stream) if value else None, value))
        if name == "display":
            calls.append((self._on_result, self._show(data)))
        elif name == "exception":
            self._raised(data)
        elif name == "result":
            self.result = data
        return [(callback, value) for callback, value in calls if callback is not None]

    def finish(self, result: Any) -> T:
        """Return the result of the run. result is that of the server."""
        streamed = self.call.stream
        if not isinstance(result, dict) or not (streamed or isinstance(result.get("output"), list)):
            raise UnexpectedAnswerError(
                "the result of the run has an unexpected format; the server may be newer than this package"
            )
        if not streamed:
            self._output(result["output"])
            for value in result.get("results") or ():
                self._show(value)
            self._raised(result.get("error"))
        return self._build(result)

    def fail(self, error: MicrosandboxError) -> None:
        """Give an error the output of the run, if the run had begun."""
        output = error._data.get("output")
        if error.execution is not None or not (self._is_begun or isinstance(output, list)):
            return
        if not self._is_begun:
            self._output(output)
        params = self.call.params
        known = {key: params[key] for key in ("language", "command", "args") if key in params}
        error.execution = self._build({**known, "status": "error", "truncated": error._data.get("truncated")})

    def _output(self, elements: Any) -> None:
        if all(isinstance(element, dict) and "base64" not in element for element in elements):
            self._lines.lines += elements
            return
        for element in elements:
            self._add(self._pieces.decode(element))

    def _add(self, piece: Piece) -> None:
        self._lines.add(piece.stream, piece.text)
        if piece.data:
            self._bytes.setdefault(piece.stream, bytearray()).extend(piece.data)

    def _show(self, value: Any) -> Result:
        self._results.append(value)
        shown = Result(value if isinstance(value, Mapping) else {})
        if shown.text is not None:
            self._lines.add_lines("stdout", shown.text)
        return shown

    def _raised(self, exception: Any) -> None:
        if isinstance(exception, Mapping):
            self._exception = exception
            self._lines.add_lines("stderr", str(exception.get("traceback", "")))

    def _build(self, data: dict[str, Any]) -> T:
        for piece in self._pieces.rest():
            self._add(piece)
        result = self._kind(
            {**data, "output": self._lines.complete(), "results": self._results, "error": self._exception}
        )
        if self._bytes or self.call.params.get("encoding") == "base64":
            result._bytes = {stream: bytes(data) for stream, data in self._bytes.items()}
        return result
