"""The calls of processes, terminals, files and contexts, which asyncio and blocking code share."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Callable, Union
from urllib.parse import quote, urlencode

from . import _transfers
from ._core import (
    CHANGE_LIMIT,
    QUERY_LIMIT,
    as_bytes,
    checked,
    context_name,
    described,
    encoded,
    optional,
    program,
    seconds,
)
from ._results import Context, FileChange, FileInfo, Piece, ProcessInfo, ProcessResult
from ._rpc import Call, Transfer
from ._runs import Callback, Pieces, Run
from .errors import ConflictError, InvalidParamsError, UnexpectedAnswerError

if TYPE_CHECKING:
    from ._core import SandboxCore
    from ._transfers import Reader

Path = Union[str, "os.PathLike[str]"]

# How much is sent in one call to the standard input of a process. A request has at most 1 MiB.
_MAX_INPUT = 512 << 10

_TAR = "application/x-tar"


def _object(result: Any, member: str | None = None, kind: type = str) -> Any:
    """Check that a result is an object, and has a member of some type. Return it."""
    if not isinstance(result, dict) or (member is not None and not isinstance(result.get(member), kind)):
        raise UnexpectedAnswerError("the result has an unexpected format; the server may be newer than this package")
    return result


def start_call(
    sandbox: SandboxCore,
    command: str,
    args: Sequence[str] | None,
    timeout: float | None,
    tag: str | None,
    options: dict[str, Any],
    open_stdin: bool | None = None,
    size: tuple[int, int] | None = None,
) -> Call:
    """Return the call that starts a process, with a terminal of a size, in columns and rows, if one is given."""
    params = {
        **program(command, args),
        **options,
        "timeout": seconds(timeout),
        "tag": optional("tag", tag, str),
        "open_stdin": optional("open_stdin", open_stdin, bool),
        "terminal": None if size is None else _size(*size),
    }
    return sandbox._call("sandbox.process.start", params, CHANGE_LIMIT)


def _size(cols: int, rows: int) -> dict[str, int]:
    return {"cols": checked("cols", cols, int), "rows": checked("rows", rows, int)}


def process_list_call(sandbox: SandboxCore) -> Call:
    """Return the call for the processes of a sandbox."""
    return sandbox._call("sandbox.process.list", {}, QUERY_LIMIT, idempotent=True)


def process_list(result: Any) -> list[ProcessInfo]:
    """Check the result of process_list_call."""
    processes: list[ProcessInfo] = _object(result, "processes", list)["processes"]
    return processes


def find_call(sandbox: SandboxCore, process: int | str) -> Call:
    """Return the call for a process with a pid or a tag."""
    name = "tag" if isinstance(process, str) else "pid"
    params = {name: process if name == "tag" else checked("process", process, int)}
    return sandbox._call("sandbox.process.get", params, QUERY_LIMIT, idempotent=True)


def process_identity(result: Any) -> tuple[int, str | None]:
    """Return the pid and the tag in a result that describes a process."""
    return _object(result, "pid", int)["pid"], result.get("tag") or None


class ProcessCore:
    """A process in a sandbox, and the calls for it."""

    _sandbox: SandboxCore

    def __init__(self, sandbox_instance: Any, pid: int, tag: str | None) -> None:
        self._sandbox = sandbox_instance
        self._pid = pid
        self._tag = tag

    @property
    def pid(self) -> int:
        """The number of the process in the sandbox."""
        return self._pid

    @property
    def tag(self) -> str | None:
        """The name that was given to the process."""
        return self._tag

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._pid} in {self._sandbox.name!r}>"

    def _call(self, action: str, limit: float | None, params: dict[str, Any] | None = None, **options: Any) -> Call:
        return self._sandbox._call(f"sandbox.process.{action}", {"pid": self._pid, **(params or {})}, limit, **options)

    def _output_call(self, replay: bool, limit: float | None = None) -> Call:
        params = {"replay": checked("replay", replay, bool), "encoding": "base64"}
        return self._call("connect", limit, params, stream=True, overdue="the process has not ended")

    def _wait_run(
        self, timeout: float | None, on_stdout: Callback | None, on_stderr: Callback | None
    ) -> Run[ProcessResult]:
        callbacks = self._sandbox._callbacks(on_stdout=on_stdout, on_stderr=on_stderr)
        return Run(self._output_call(True, seconds(timeout) or None), ProcessResult, callbacks)

    def _logs_run(self) -> Run[ProcessResult]:
        return Run(self._call("logs", QUERY_LIMIT, {"encoding": "base64"}, idempotent=True), ProcessResult)

    def _info_call(self) -> Call:
        return self._call("get", QUERY_LIMIT, idempotent=True)

    def _signal_call(self, name: str, everything: bool) -> Call:
        params = {"signal": checked("signal", name, str), "all": checked("all", everything, bool)}
        return self._call("signal", QUERY_LIMIT, params)

    def _input_calls(self, data: str | bytes, close: bool = False) -> list[Call]:
        """Return the calls that send input, in their order. Each waits until the process has read what it sends."""
        raw = as_bytes("data", data)
        pieces = [raw[begin : begin + _MAX_INPUT] for begin in range(0, len(raw), _MAX_INPUT)] or [b""]
        calls = [self._call("input", None, encoded("data", piece, "base64")) for piece in pieces]
        if close:
            calls[-1].params["close"] = True
        return calls

    def _resize_call(self, cols: int, rows: int) -> Call:
        return self._call("resize", QUERY_LIMIT, _size(cols, rows), idempotent=True)


def process_info(result: Any) -> ProcessInfo:
    """Check the result of a call for a process."""
    info: ProcessInfo = _object(result, "pid", int)
    return info


def output_pieces() -> Callable[[str, Any], Iterable[Piece]]:
    """Return a function that converts the events of a process to pieces of its output."""
    return Pieces().event


def output_bytes() -> Callable[[str, Any], Iterable[bytes]]:
    """Return a function that converts the events of a process to bytes."""
    pieces = Pieces()
    return lambda name, data: [piece.data for piece in pieces.event(name, data) if piece.data]


class FilesCore:
    """The calls for the files of a sandbox."""

    _sandbox: SandboxCore

    def _call(self, action: str, params: dict[str, Any], limit: float | None = CHANGE_LIMIT, **options: Any) -> Call:
        return self._sandbox._call(f"sandbox.fs.{action}", params, limit, **options)

    def _query(self, action: str, path: Path, **params: Any) -> Call:
        return self._call(action, {"path": _remote(path), **params}, idempotent=True)

    def _transfer(self, name: str, verb: str, path: Path, fields: dict[str, str], **params: str | None) -> Transfer:
        """Return a request for a file. Unlike in JSON, a path may contain bytes that are not UTF-8."""
        self._sandbox._require_start()
        query = {
            "path": _remote(path).encode("utf-8", "surrogateescape"),
            "namespace": self._sandbox.namespace,
            **params,
        }
        text = urlencode({name: value for name, value in query.items() if value is not None}, quote_via=quote)
        target = f"/api/v1/sandboxes/{quote(self._sandbox.name, safe='')}/files?{text}"
        return Transfer(f"files.{name}", {}, None, verb=verb, path=target, fields=fields)

    def _read(self, path: Path, form: str) -> tuple[Transfer, Callable[[Reader], str | bytes]]:
        if form not in ("text", "bytes"):
            raise InvalidParamsError(f"format {form!r}: use 'text' or 'bytes'")

        def consume(reader: Reader) -> str | bytes:
            data = reader.read()
            try:
                return data.decode() if form == "text" else data
            except UnicodeDecodeError:
                raise ConflictError(f"{path} is not UTF-8 text: read it with format='bytes'") from None

        return self._transfer("read", "GET", path, {}), consume

    def _write(
        self, path: Path, data: str | bytes, mode: int | str | None, user: str | None
    ) -> tuple[Transfer, Callable[[], Any]]:
        raw = as_bytes("data", data)
        fields = {"Content-Length": str(len(raw)), "Content-Type": "application/octet-stream"}
        call = self._transfer("write", "PUT", path, fields, mode=_mode(mode), user=optional("user", user, str))
        return call, lambda: iter([raw] if raw else [])

    def _upload(self, local: Path, remote: Path) -> tuple[Transfer, Callable[[], Any]]:
        path = _local(local)
        if _transfers.is_directory(path):
            return self._transfer("upload", "PUT", remote, {"Content-Type": _TAR}), lambda: _transfers.read_tree(path)
        fields = {"Content-Type": "application/octet-stream"}
        call = self._transfer("upload", "PUT", remote, fields, mode=_transfers.file_mode(path))
        return call, lambda: _transfers.read_file(path)

    def _download(self, info: FileInfo, remote: Path, local: Path) -> tuple[Transfer, Callable[[Reader], None]]:
        """Return what downloads a file or a tree. info describes it."""
        path = _local(local)
        found: Any = info.get("target") or info
        if found["type"] == "directory":
            call = self._transfer("download", "GET", remote, {"Accept": _TAR})
            return call, lambda reader: _transfers.write_tree(reader, path)
        call = self._transfer("download", "GET", remote, {})
        return call, lambda reader: _transfers.write_file(reader, path, int(found["mode"], 8) & 0o777)

    def _list_call(self, path: Path, depth: int) -> Call:
        return self._query("list", path, depth=checked("depth", depth, int))

    def _mkdir_call(self, path: Path, mode: int | str | None, user: str | None) -> Call:
        return self._call("mkdir", {"path": _remote(path), "mode": _mode(mode), "user": optional("user", user, str)})

    def _move_call(self, source: Path, target: Path) -> Call:
        return self._call("move", {"from": _remote(source), "to": _remote(target)}, None)

    def _remove_call(self, path: Path, recursive: bool) -> Call:
        return self._call("remove", {"path": _remote(path), "recursive": checked("recursive", recursive, bool)}, None)

    def _watch_call(self, path: Path, recursive: bool) -> Call:
        params = {"path": _remote(path), "recursive": checked("recursive", recursive, bool)}
        return self._call("watch", params, None, stream=True)


def _remote(path: Path) -> str:
    return checked("path", os.fspath(path) if isinstance(path, os.PathLike) else path, str)


def _local(path: Path) -> str:
    return checked("local", os.fspath(path) if isinstance(path, os.PathLike) else path, str)


def _mode(mode: int | str | None) -> str | None:
    """Return permissions in octal. A number is as for os.chmod, such as 0o755."""
    if mode is None or isinstance(mode, str):
        return mode
    if isinstance(mode, bool) or not isinstance(mode, int) or mode < 0:
        raise InvalidParamsError(
            f"mode must be a number such as 0o644, or a string such as '0644', not {described(mode)}"
        )
    return f"{mode:04o}"


def _path(data: dict[str, Any]) -> str:
    """Return the path in a result. Bytes that are not UTF-8 become surrogates, as with os.fsdecode."""
    encoded_path = data.get("path_base64")
    return base64.b64decode(encoded_path).decode("utf-8", "surrogateescape") if encoded_path else data["path"]


def file_info(result: Any) -> FileInfo:
    """Check the description of a file."""
    info = dict(_object(result, "path"))
    info["path"] = _path(info)
    info.pop("path_base64", None)
    if isinstance(info.get("target"), dict):
        info["target"] = file_info(info["target"])
    return info  # type: ignore[return-value]


def file_list(result: Any) -> list[FileInfo]:
    """Check the result of a call for a directory."""
    return [file_info(entry) for entry in _object(result, "entries", list)["entries"]]


def file_exists(result: Any) -> bool:
    """Check the result of a call for the existence of a file."""
    return bool(_object(result, "exists", bool)["exists"])


def file_changes(name: str, data: Any) -> Iterable[FileChange]:
    """Convert an event of a watch."""
    if name != "change":
        return ()
    change = _object(data, "path")
    return [FileChange(str(change.get("type")), _path(change))]


class ContextsCore:
    """The calls for contexts."""

    _sandbox: SandboxCore

    def _create_call(self, language: str | None, name: str | None, cwd: str | None, user: str | None) -> Call:
        params = {
            "language": self._sandbox._language if language is None else checked("language", language, str),
            "context": optional("name", name, str),
            "cwd": optional("cwd", cwd, str),
            "user": optional("user", user, str),
        }
        return self._sandbox._call("sandbox.context.create", params, CHANGE_LIMIT)

    def _list_call(self) -> Call:
        return self._sandbox._call("sandbox.context.list", {}, QUERY_LIMIT, idempotent=True)

    def _change_call(self, action: str, which: Context | str) -> Call:
        params = {"context": context_name(which)}
        return self._sandbox._call(f"sandbox.context.{action}", params, CHANGE_LIMIT)


def context(result: Any) -> Context:
    """Check the description of a context."""
    data = _object(result, "context")
    language, cwd, pid = str(data.get("language")), data.get("cwd"), data.get("pid")
    return Context(data["context"], language, cwd, pid, data.get("count", 0), bool(data.get("busy")))


def context_list(result: Any) -> list[Context]:
    """Check the list of contexts."""
    return [context(element) for element in _object(result, "contexts", list)["contexts"]]
