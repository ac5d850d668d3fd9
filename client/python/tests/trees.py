"""A tree of files for the tests of transfers."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

ODD_NAMES = ["with space", "é 😀", "line\nbreak", "-rf", "*", "a" * 200]
if sys.platform == "linux":
    ODD_NAMES.append(os.fsdecode(b"not-utf8-\xff"))


def make_tree(root: Path) -> None:
    """Create a tree with odd names, modes, links, and a large file."""
    (root / "sub" / "deep").mkdir(parents=True)
    for number, name in enumerate(ODD_NAMES):
        (root / "sub" / name).write_text(str(number))
    (root / "empty").touch()
    (root / "large").write_bytes(os.urandom(1 << 10) * 1000)
    (root / "run.sh").write_text("echo hello\n")
    (root / "run.sh").chmod(0o750)
    (root / "secret").write_text("s")
    (root / "secret").chmod(0o600)
    (root / "link").symlink_to("sub/deep")
    (root / "sub" / "deep" / "up").symlink_to("../../run.sh")
    (root / "dangling").symlink_to("nothing")
    os.link(root / "large", root / "sub" / "hard")
    os.utime(root / "run.sh", (1e9, 1e9))
    (root / "closed").mkdir()
    (root / "closed" / "file").touch()
    (root / "closed").chmod(0o500)


def described(root: Path) -> dict[str, tuple[Any, ...]]:
    """Describe a tree: the mode of everything in it, and its content or target."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        content: Any = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        mode = None if path.is_symlink() else stat.S_IMODE(info.st_mode)
        found[str(path.relative_to(root))] = (stat.S_IFMT(info.st_mode), mode, content)
    return found
