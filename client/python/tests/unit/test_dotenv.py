"""Tests that .env files are read as msb reads them. The table is a copy of the one in client/dotenv_test.go."""

from __future__ import annotations

import contextlib

import pytest

from microsandbox._dotenv import lookup

VALUES = {
    "A=b": "b",
    "A=b\n": "b",
    "A=b\r\n": "b",
    "A=b\rB=c": "b",
    "\ufeffA=b": "b",
    "  A = b  ": "b",
    "\tA\t=\tb\t": "b",
    "export A=b": "b",
    "export\t A=b": "b",
    "export=1\nA=b": "b",
    "A=": "",
    "A=\nB=c": "",
    "A=b c": "b c",
    "A=b=c": "b=c",
    "A=b#c": "b#c",
    "A=b #c": "b",
    "A=b\t# c": "b",
    "A= # c": "",
    "#A=b": "",
    " # A=b\n\n\nA=c": "c",
    "A=b\nA=c": "c",
    "A=b\nA=": "",
    "a=b": "",
    "AA=b\nXA=c\nA.B=d\nA-B=e": "",
    "B=A=c": "",
    'A="b"': "b",
    "A='b'": "b",
    'A="b" # c': "b",
    'A="b"# c': "b",
    'A="b # c"': "b # c",
    "A='b \"c\"'": 'b "c"',
    "A=\"b 'c'\"": "b 'c'",
    'A=" b "': " b ",
    'A=""': "",
    'A=b"c"': 'b"c"',
    r'A="b\nc\td\r\"\\\'"': "b\nc\td\r\"\\'",
    r"A='b\nc'": r"b\nc",
    r"A='b\'c\\'": r"b'c" + "\\",
    r'A="b\$C\d"': r"b$C\d",
    'A="$B ${B}"': "$B ${B}",
    "A=$B": "$B",
    'A="b\nc"\nB=d': "b\nc",
    "A='b\r\nc'": "b\nc",
    'B="x\nA=b\n"\nA=c': "c",
    "B='x\nA=b": "b",
    'B="x" y\nA=b': "b",
    "nonsense\n=x\n: y\nA=b": "b",
    "B='-----BEGIN\nA=b\n-----END'": "",
    "A='b'\n\n\n": "b",
    "if [ -f x ]; then\n  A=b\nfi\n": "b",
    "": "",
}

PROBLEMS = {
    "A": "line 1: there is no =",
    "B=c\n\nA: hunter2": "line 3: there is no =",
    "export A hunter2": "line 1: there is no =",
    "B='x\ny'\nA=\"hunter2": "line 3: the closing quote",
    "A='hunter2\nB=c": "line 1: the closing quote",
    'A="hunter2\\"': "line 1: the closing quote",
    "A='x' hunter2": "line 1: there is text after",
    "#\r\n\r\nA='x'=hunter2#": "line 3: there is text after",
}


@pytest.mark.parametrize("text", VALUES)
def test_value(text: str) -> None:
    assert lookup(text, "A") == VALUES[text]


@pytest.mark.parametrize("text", PROBLEMS)
def test_problem(text: str) -> None:
    with pytest.raises(ValueError, match=PROBLEMS[text]) as caught:
        lookup(text, "A")
    assert "hunter2" not in str(caught.value)


def test_long_file_is_parsed_quickly() -> None:
    for text in ("A=\\" * 300_000, 'B="' * 300_000, "#\n" * 300_000, "A='" + "\\'" * 300_000, " " * 900_000):
        with contextlib.suppress(ValueError):
            lookup(text, "A")
