"""Tests the archives of uploads, and that an archive from the sandbox changes nothing outside of its directory."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from microsandbox import UnexpectedAnswerError
from microsandbox._transfers import Reader, read_tree, write_tree

from ..trees import described, make_tree


def reader(data: bytes, chunk: int = 7000) -> Reader:
    """Return a Reader that gets some data in chunks."""
    pieces = iter([data[begin : begin + chunk] for begin in range(0, len(data), chunk)])
    return Reader(lambda: next(pieces, b""))


def archive(*entries: tuple[str, bytes, Any], **options: Any) -> bytes:
    """Return an archive of entries with a name, a type, and their content or the target of a link."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, kind, content in entries:
            entry = tarfile.TarInfo(name)
            entry.type = kind
            entry.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
            if kind == tarfile.REGTYPE:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            else:
                entry.linkname = content
                tar.addfile(entry)
    return file.getvalue()


def test_a_tree_is_the_same_afterwards(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    make_tree(source)
    data = b"".join(read_tree(str(source)))
    write_tree(reader(data), str(target))
    assert described(target) == described(source)
    assert (target / "large").samefile(target / "sub" / "hard")
    assert (target / "run.sh").stat().st_mtime == 1e9
    # Other programs can read the archive, and it does not say who owns the files.
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {(entry.uid, entry.gid, entry.uname, entry.gname) for entry in tar} == {(0, 0, "", "")}
    # A second download replaces what is there, also files that are read-only, and keeps other files.
    (target / "large").chmod(0o400)
    (target / "run.sh").write_text("changed")
    (target / "mine").touch()
    if os.geteuid() == 0:  # others cannot write to the directory that is read-only
        write_tree(reader(data), str(target))
        (target / "mine").unlink()
        assert described(target) == described(source)


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    chunks = read_tree(str(tmp_path))
    next(chunks)
    os.truncate(tmp_path / "file", 10)
    with pytest.raises(OSError, match="became shorter during the upload"):
        b"".join(chunks)


FILE, DIRECTORY, LINK, HARD_LINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE

# Each attack has archives, which are extracted into the same directory one after the other.
ATTACKS: dict[str, list[list[tuple[str, bytes, Any]]]] = {
    "parent": [[("../victim/file", FILE, b"x")]],
    "parent in the middle": [[("a/../../victim/file", FILE, b"x")]],
    "parent of a directory": [[("a/..", DIRECTORY, "")], [("..", DIRECTORY, "")]],
    "absolute": [[("VICTIM/file", FILE, b"x")]],
    "several slashes": [[("//VICTIM/file", FILE, b"x")]],
    "absolute link": [[("link", LINK, "VICTIM"), ("link/file", FILE, b"x")]],
    "relative link": [[("link", LINK, "../victim"), ("link/file", FILE, b"x")]],
    "link to a file": [[("link", LINK, "VICTIM/file"), ("link", FILE, b"x")]],
    "link inside, then through it": [[("sub", DIRECTORY, ""), ("link", LINK, "sub"), ("link/file", FILE, b"x")]],
    "links that add up": [
        [
            ("d", LINK, "."),
            ("e", LINK, "d/d/d/../../../victim"),
            ("e/file", FILE, b"x"),
        ]
    ],
    "link of an earlier download": [[("link", LINK, "../victim")], [("link/file", FILE, b"x")]],
    "directory over a link": [[("link", LINK, "VICTIM")], [("link", DIRECTORY, ""), ("link/file", FILE, b"x")]],
    "existing link": [[("theirs/file", FILE, b"x")]],
    "existing link to a file": [[("theirfile", FILE, b"x")]],
    "existing link as a directory": [[("theirs", DIRECTORY, "")]],
    "hard link outside": [[("hard", HARD_LINK, "../victim/file"), ("hard", FILE, b"x")]],
    "absolute hard link": [[("hard", HARD_LINK, "VICTIM/file")]],
    "hard link through a link": [[("hard", HARD_LINK, "theirs/file"), ("hard", FILE, b"x")]],
    "hard link to a link": [[("hard", HARD_LINK, "theirfile"), ("hard", FILE, b"x")]],
    "hard link to itself": [[("hard", HARD_LINK, "hard")]],
    "device": [[("device", tarfile.CHRTYPE, "")]],
    "pipe": [[("pipe", tarfile.FIFOTYPE, "")]],
    "not a directory": [[("a", FILE, b""), ("a/b", FILE, b"")]],
    "the directory itself as a file": [[(".", FILE, b"x")]],
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_nothing_outside_is_changed(tmp_path: Path, attack: str, form: int) -> None:
    victim, target = tmp_path / "all" / "victim", tmp_path / "all" / "target"
    for directory in (victim, target):
        directory.mkdir(parents=True)
    (victim / "file").write_text("theirs")
    (target / "theirs").symlink_to(victim)
    (target / "theirfile").symlink_to(victim / "file")
    before = described(victim), victim.stat().st_mode, (victim / "file").stat().st_nlink
    for entries in ATTACKS[attack]:
        named = [
            (name.replace("VICTIM", str(victim)), kind, str(content).replace("VICTIM", str(victim)))
            if kind != FILE
            else (name.replace("VICTIM", str(victim)), kind, content)
            for name, kind, content in entries
        ]
        with contextlib.suppress(UnexpectedAnswerError):
            write_tree(reader(archive(*named, format=form)), str(target))
    assert (described(victim), victim.stat().st_mode, (victim / "file").stat().st_nlink) == before
    assert sorted(os.listdir(tmp_path / "all")) == ["target", "victim"]
    for path in target.rglob("*"):  # no new link leads out of the directory
        if path.name not in ("theirs", "theirfile"):
            assert path.resolve().is_relative_to(target.resolve())
            assert path.is_symlink() or path.is_dir() or path.is_file()


def test_links_out_of_the_directory_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    links = {"a": "b/c", "sub/b": "../a", "sub/c": "..", "absolute": "/etc", "sub/up": "../../x", "turn": "sub/../a"}
    write_tree(reader(archive(*((name, LINK, target) for name, target in links.items()))), str(tmp_path / "t"))
    kept = {path.relative_to(tmp_path / "t").as_posix() for path in (tmp_path / "t").rglob("*") if path.is_symlink()}
    assert kept == {"a", "sub/b", "sub/c"}
    assert [text.split(", ")[1] for text in caplog.messages] == ["because it leads out of the directory"] * 3
    # A hard link to a link is a copy of that link, if it still leads to a path in the directory.
    write_tree(reader(archive(("s", LINK, "x"), ("t", HARD_LINK, "s"))), str(tmp_path / "u"))
    assert os.readlink(tmp_path / "u" / "t") == "x"


def broken_archives() -> dict[str, bytes]:
    good = archive(("file", FILE, bytes(10000)))
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    negative = bytearray(archive(("file", FILE, b"")))
    negative[124:136] = b"\xff" * 12
    negative[148:156] = b"%06o\0 " % (256 + sum(negative[:148]) + sum(negative[156:512]))
    return {
        "not an archive": b"hello" * 1000,
        "cut off": good[:5000],
        "huge name": name.tobuf(tarfile.GNU_FORMAT) + bytes(1024),
        "huge header": header.tobuf(tarfile.GNU_FORMAT) + bytes(1024),
        "negative size": bytes(negative),
        "NUL": archive(("a", FILE, b""), format=tarfile.PAX_FORMAT, pax_headers={"path": "a\0b"}),
    }


@pytest.mark.parametrize("name", broken_archives())
def test_broken_archives(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnexpectedAnswerError, match="the archive is"):
        write_tree(reader(broken_archives()[name]), str(tmp_path))
