"""The files of a sandbox."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Literal, overload

from ._abilities import FilesCore, Path, file_changes, file_exists, file_info, file_list
from ._http import AsyncStream
from ._results import FileChange, FileInfo
from ._transfers import Progress

if TYPE_CHECKING:
    from .base_sandbox import BaseSandbox


class Files(FilesCore):
    """The files of a sandbox.

    A relative path begins at the workdir of the sandbox, and ~ is the home directory of the user. If a file does not
    exist, the error is SandboxNotFoundError; if it has the wrong type, it is ConflictError.
    """

    _sandbox: BaseSandbox

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    @overload
    async def read(self, path: Path, format: Literal["text"] = "text") -> str: ...

    @overload
    async def read(self, path: Path, format: Literal["bytes"]) -> bytes: ...

    async def read(self, path: Path, format: str = "text") -> str | bytes:  # noqa: A002
        """Return the content of a file, as text in UTF-8 or as bytes. Symbolic links are followed."""
        return await self._sandbox._http.receive(*self._read(path, format))

    async def write(
        self, path: Path, data: str | bytes, mode: int | str | None = None, user: str | None = None
    ) -> FileInfo:
        """Write a file in one step, and create missing directories.

        mode: the permissions, such as 0o755 or "0755"; None means those of the file that is replaced, or 0644.
        user: the owner; None means the user that the sandbox was started with or, without one, the owner of the file
            that is replaced, or the user of the image.
        """
        call, chunks = self._write(path, data, mode, user)
        return file_info(await self._sandbox._http.send(call, chunks, None))

    async def list(self, path: Path, depth: int = 1) -> builtins.list[FileInfo]:
        """Return the entries of a directory, sorted by name. depth is the number of levels to list."""
        return file_list(await self._sandbox._http.call(self._list_call(path, depth)))

    async def stat(self, path: Path) -> FileInfo:
        """Describe a file. A symbolic link is described itself, and its target in info["target"]."""
        return file_info(await self._sandbox._http.call(self._query("stat", path)))

    async def exists(self, path: Path) -> bool:
        """Report whether a file exists. A symbolic link exists even if it leads nowhere."""
        return file_exists(await self._sandbox._http.call(self._query("exists", path)))

    async def mkdir(self, path: Path, mode: int | str | None = None, user: str | None = None) -> FileInfo:
        """Create a directory and its missing parents. info["created"] is False if it existed."""
        return file_info(await self._sandbox._http.call(self._mkdir_call(path, mode, user)))

    async def move(self, source: Path, target: Path) -> FileInfo:
        """Rename a file or a directory. A file at the new path is replaced, and missing directories are created."""
        return file_info(await self._sandbox._http.call(self._move_call(source, target)))

    async def remove(self, path: Path, recursive: bool = False) -> None:
        """Remove a file or an empty directory. recursive: also remove everything in a directory."""
        await self._sandbox._http.call(self._remove_call(path, recursive))

    def watch(self, path: Path, recursive: bool = False) -> AsyncStream[FileChange]:
        """Report the changes of a file, or of the files in a directory.

            async with sandbox.files.watch("/tmp") as changes:
                async for change in changes:
                    print(change.type, change.path)

        Changes are reported from the beginning of the block. recursive: include everything below the path.
        """
        return AsyncStream(self._sandbox._http, self._watch_call(path, recursive), file_changes, announced=True)

    async def upload(self, local: Path, remote: Path, *, on_progress: Progress | None = None) -> None:
        """Copy a file or a directory of this machine to the path remote in the sandbox.

        A file keeps its permissions. The files in a directory are added to those in the directory remote, which is
        created if necessary. They keep their permissions, their times, and their symbolic and hard links. Pipes,
        sockets and devices are left out.

        on_progress: called with the number of bytes that were sent so far.
        """
        self._sandbox._callbacks(on_progress=on_progress)
        call, chunks = self._upload(local, remote)
        await self._sandbox._http.send(call, chunks, on_progress)

    async def download(self, remote: Path, local: Path, *, on_progress: Progress | None = None) -> None:
        """Copy a file or a directory of the sandbox to the path local of this machine.

        It is the opposite of upload. Nothing is written outside of a directory local, whatever the sandbox contains:
        symbolic links that lead out of it are left out, with a warning in the log.

        on_progress: called with the number of bytes that were received so far.
        """
        self._sandbox._callbacks(on_progress=on_progress)
        call, consume = self._download(await self.stat(remote), remote, local)
        await self._sandbox._http.receive(call, consume, on_progress)
