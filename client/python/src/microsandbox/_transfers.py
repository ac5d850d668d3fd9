"""Reads and writes the files of this machine for uploads and downloads. Everything here blocks."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Callable

from .errors import UnexpectedAnswerError

if TYPE_CHECKING:
    import tarfile

_logger = logging.getLogger("microsandbox")

# Gets the number of bytes that were transferred.
Progress = Callable[[int], Any]

_CHUNK = 256 << 10
# The maximum size of the name of an entry in an archive, which is held in memory.
_MAX_NAME = 1 << 20


class Reader:
    """A file that reads the body of a response."""

    def __init__(self, chunk: Callable[[], bytes]) -> None:
        """Return a file of the chunks that a function returns, until it returns no bytes."""
        self._chunk = chunk
        self._buffer = b""

    def read(self, size: int = -1) -> bytes:
        """Return up to size bytes, b"" at the end of the body. Without a size, return everything."""
        if size < 0:
            return b"".join(iter(lambda: self.read(_CHUNK), b""))
        if not self._buffer:
            self._buffer = self._chunk()
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data


def is_directory(path: str) -> bool:
    """Report whether a path of this machine is a directory. Raises FileNotFoundError if it does not exist."""
    return stat.S_ISDIR(os.stat(path).st_mode)


def file_mode(path: str) -> str:
    """Return the permissions of a file of this machine, in octal."""
    return f"{stat.S_IMODE(os.stat(path).st_mode) & 0o777:04o}"


def read_file(path: str) -> Iterator[bytes]:
    """Read a file in chunks."""
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def read_tree(root: str) -> Iterator[bytes]:
    """Read the files below a directory as a tar archive. Pipes, sockets and devices are left out."""
    import tarfile

    hard_links: dict[tuple[int, int], str] = {}  # the first name of each file that has several
    directories = [""]
    while directories:
        directory = directories.pop()
        for name in sorted(os.listdir(os.path.join(root, directory))):
            path = os.path.join(root, directory, name)
            info = os.lstat(path)
            entry = tarfile.TarInfo(os.path.join(directory, name).replace(os.sep, "/"))
            entry.mode = stat.S_IMODE(info.st_mode)
            entry.mtime = int(info.st_mtime)
            identity = (info.st_dev, info.st_ino)
            if stat.S_ISDIR(info.st_mode):
                entry.type = tarfile.DIRTYPE
                directories.append(os.path.join(directory, name))
            elif stat.S_ISLNK(info.st_mode):
                entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(path)
            elif identity in hard_links:
                entry.type, entry.linkname = tarfile.LNKTYPE, hard_links[identity]
            elif stat.S_ISREG(info.st_mode):
                entry.size = info.st_size
                if info.st_nlink > 1:
                    hard_links[identity] = entry.name
            else:
                continue
            yield entry.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
            if entry.isreg():
                yield from _content(path, entry.size)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _content(path: str, size: int) -> Iterator[bytes]:
    """Read the given number of bytes of a file, and the padding that follows them in an archive."""
    remaining = size
    with open(path, "rb") as file:
        while remaining:
            chunk = file.read(min(_CHUNK, remaining))
            if not chunk:
                raise OSError(f"{path} became shorter during the upload: try again")
            remaining -= len(chunk)
            yield chunk
    yield bytes(-size % 512)


def write_file(reader: Reader, path: str, mode: int) -> None:
    """Write a file. If it exists, it is replaced when everything was received."""
    import tempfile

    directory, name = os.path.split(os.path.abspath(path))
    descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
    try:
        with open(descriptor, "wb") as file:
            while chunk := reader.read(_CHUNK):
                file.write(chunk)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_tree(reader: Reader, root: str) -> None:
    """Extract a tar archive into a directory, which is created if necessary. Files that exist are replaced.

    The archive may be hostile. Nothing is written outside of the directory, because no entry passes through a symbolic
    link. Symbolic links that lead out of the directory are left out, with a warning in the log.
    """
    import tarfile

    class Entry(tarfile.TarInfo):
        """An entry of an archive."""

        @classmethod
        def frombuf(cls, *args: Any) -> Entry:
            """Parse a header, and check the size that follows it. tarfile reads names into memory."""
            entry = super().frombuf(*args)
            is_name = entry.type not in (*tarfile.REGULAR_TYPES, *_NO_CONTENT)
            if entry.size < 0 or (is_name and entry.size > _MAX_NAME):
                raise tarfile.ReadError("an entry has an invalid size")
            return entry

    os.makedirs(root, exist_ok=True)
    directories: list[tuple[str, int, float]] = []
    try:
        with tarfile.open(fileobj=reader, mode="r|", tarinfo=Entry, encoding="utf-8") as archive:  # type: ignore[call-overload]
            while (entry := archive.next()) is not None:
                archive.members.clear()  # which would otherwise hold all entries in memory
                parts = _parts(entry.name)
                if entry.isdir():
                    path = _make_directory(root, parts)
                    if parts:  # the directory itself keeps its mode
                        directories.append((path, entry.mode, entry.mtime))
                else:
                    _extract(archive, entry, root, parts)
        while reader.read(_CHUNK):  # the end of the archive is not the end of the response
            pass
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UnexpectedAnswerError(f"the archive is damaged: {error}") from None
    # From the innermost to the outermost, because a directory may then be read-only.
    for path, mode, mtime in sorted(directories, reverse=True):
        os.chmod(path, mode & 0o777)
        os.utime(path, (mtime, mtime))


_NO_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories and pipes


def _refused(name: str, why: str) -> UnexpectedAnswerError:
    return UnexpectedAnswerError(f"the archive is refused, because its entry {name!r} {why}")


def _parts(name: str) -> list[str]:
    """Return the components of the name of an entry, which must not lead out of the directory."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or not all(map(_is_name, parts)):
        raise _refused(name, "leads out of the directory")
    return parts


def _is_name(part: str) -> bool:
    # On Windows, the basename of a\b is b, and of C:a it is a.
    return part != ".." and "\0" not in part and os.path.basename(part) == part


def _make_directory(root: str, parts: list[str]) -> str:
    """Create a directory below root and its missing parents. None of them may be a symbolic link."""
    path = root
    for part in parts:
        path = os.path.join(path, part)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise _refused("/".join(parts), f"needs a directory, but {path} is a link or a file") from None
    return path


def _extract(archive: tarfile.TarFile, entry: tarfile.TarInfo, root: str, parts: list[str]) -> None:
    """Extract a file or a link."""
    if not parts:
        raise _refused(entry.name, "is not a directory")
    path = os.path.join(_make_directory(root, parts[:-1]), parts[-1])
    target = entry.linkname if entry.issym() else None
    if entry.islnk():
        original = _parts(entry.linkname)
        if not original or original == parts:
            raise _refused(entry.name, "is a link to itself")
        first = os.path.join(_make_directory(root, original[:-1]), original[-1])
        if not os.path.islink(first):
            _remove(path)
            os.link(first, path)
            return
        target = os.readlink(first)
    if target is not None:
        if _stays_inside(target, len(parts) - 1):
            _remove(path)
            os.symlink(target, path)
        else:
            _logger.warning("left out the link %s to %s, because it leads out of the directory", path, target)
        return
    content = archive.extractfile(entry) if entry.isreg() and not entry.issparse() else None
    if content is None:
        raise _refused(entry.name, "is not a file, a directory or a link")
    _remove(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with content, open(os.open(path, flags, 0o600), "wb") as file:
        shutil.copyfileobj(content, file, _CHUNK)
    os.chmod(path, entry.mode & 0o777)
    os.utime(path, (entry.mtime, entry.mtime))


def _stays_inside(target: str, depth: int) -> bool:
    """Report whether a symbolic link leads to a path below the root. depth is the number of directories above it.

    Only ".." at the beginning is accepted, because what precedes ".." may be another link.
    """
    parts = [part for part in target.split("/") if part not in ("", ".")]
    while parts and parts[0] == ".." and depth > 0:
        del parts[0]
        depth -= 1
    return not target.startswith("/") and all(map(_is_name, parts))


def _remove(path: str) -> None:
    """Remove a file that an entry replaces."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
