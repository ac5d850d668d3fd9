"""Reads .env files as msb does: it supports what the popular dotenv tools agree on."""

from __future__ import annotations

import re

# The part of a line that precedes the value: NAME=, optionally after export.
_ASSIGNMENT = re.compile(r"[ \t]*(?:export[ \t]+)?([A-Za-z0-9_.-]+)[ \t]*(=?)[ \t]*")
_QUOTED = re.compile(r""""((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'""", re.DOTALL)
_COMMENT = re.compile(r"(?:^|[ \t])#.*")

# The characters that may follow a backslash, and what the pair means. Any other pair is kept.
_DOUBLE_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "'": "'", "\\": "\\", "$": "$"}
_SINGLE_ESCAPES = {"'": "'", "\\": "\\"}


def lookup(text: str, name: str) -> str:
    """Return the value of a variable in the text of a .env file; empty if it is not set.

    Values are bare or in single or double quotes. Quoted values may span several lines. Comments follow a #. If a
    name occurs several times, the last value counts. Nothing is interpolated. Malformed lines are skipped, except
    those of the variable itself, which raise a ValueError. The error contains the line's number, but none of its
    text, which may be secret.
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
    """Read the value that begins at an offset. Returns the value, a problem or "", and the end of its last line."""
    if not assigned:
        return "", "there is no = after the name", end
    if text[at : at + 1] not in ('"', "'"):
        return _bare(text[at:end]), "", end
    quoted = _QUOTED.match(text, at)
    if not quoted:
        return "", "the closing quote is missing", end
    end = _line_end(text, quoted.end())
    if _bare(" " + text[quoted.end() : end]):
        return "", "there is text after the quoted value", end
    if quoted[1] is None:
        return _unescape(quoted[2], _SINGLE_ESCAPES), "", end
    return _unescape(quoted[1], _DOUBLE_ESCAPES), "", end


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _bare(line: str) -> str:
    return _COMMENT.sub("", line).strip()


def _unescape(text: str, escapes: dict[str, str]) -> str:
    return re.sub(r"\\(.)", lambda pair: escapes.get(pair[1], pair[0]), text, flags=re.DOTALL)
