"""Reads .env files as msb does, and as the popular dotenv tools agree."""

from __future__ import annotations

import re

# A line before its value: NAME=, with an optional export before it.
_ASSIGNMENT = re.compile(r"[ \t]*(?:export[ \t]+)?([A-Za-z0-9_.-]+)[ \t]*(=?)[ \t]*")
_QUOTED = re.compile(r""""((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'""", re.DOTALL)
_COMMENT = re.compile(r"(?:^|[ \t])#.*")

# What a backslash and this character mean. Any other pair stays as it is.
_DOUBLE = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "'": "'", "\\": "\\", "$": "$"}
_SINGLE = {"'": "'", "\\": "\\"}


def lookup(text: str, name: str) -> str:
    """Find a variable in the text of a .env file; empty if it is not there.

    Values are bare or in quotes, quoted ones over several lines, comments are behind a #, and the last one of
    a name counts. Nothing is interpolated. A line in no such form is passed over, unless it is for the name
    that is asked for: then it is a ValueError that names the line, and has nothing of its text.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    found = ""
    at = 0
    while at < len(text):
        end = _line_end(text, at)
        match = _ASSIGNMENT.match(text, at, end)
        if match:
            value, problem, end = _value(text, match.end(), end, assigned=bool(match[2]))
            if match[1] == name:
                if problem:
                    raise ValueError(f"line {text.count(chr(10), 0, at) + 1}: {problem}")
                found = value
        at = end + 1
    return found


def _value(text: str, at: int, end: int, *, assigned: bool) -> tuple[str, str, int]:
    """Read the value that begins at a place. Returns it, what is wrong with it, and where its last line ends."""
    if not assigned:
        return "", "there is no = behind the name", end
    if text[at : at + 1] not in ('"', "'"):
        return _bare(text[at:end]), "", end
    quoted = _QUOTED.match(text, at)
    if not quoted:
        return "", "the quote that begins the value has no end", end
    end = _line_end(text, quoted.end())
    if _bare(" " + text[quoted.end() : end]):
        return "", "there is something behind the quoted value", end
    if quoted[1] is None:
        return _unescape(quoted[2], _SINGLE), "", end
    return _unescape(quoted[1], _DOUBLE), "", end


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _bare(line: str) -> str:
    return _COMMENT.sub("", line).strip()


def _unescape(text: str, meant: dict[str, str]) -> str:
    return re.sub(r"\\(.)", lambda pair: meant.get(pair[1], pair[0]), text, flags=re.DOTALL)
