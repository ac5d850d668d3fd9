"""Runs the examples of the README unchanged."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from microsandbox import PythonSandbox

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_readme_has_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("text", EXAMPLES)
def test_example(text: str, python_name: str) -> None:
    code = compile(text, str(README), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names: dict[str, Any] = {"PythonSandbox": PythonSandbox}

    async def with_sandbox() -> None:  # for an example that uses the sandbox of an earlier one
        sandbox = names["sandbox"] = PythonSandbox(name=python_name)
        await sandbox.start()
        await eval(code, names)
        await sandbox.close()

    if not code.co_flags & inspect.CO_COROUTINE:
        eval(code, names)
    elif creates_sandbox(text):
        asyncio.run(eval(code, names))
    else:
        asyncio.run(with_sandbox())


def creates_sandbox(text: str) -> bool:
    """Return whether the example assigns the variable sandbox."""
    nodes = ast.walk(ast.parse(text))
    return any(isinstance(n, ast.Name) and n.id == "sandbox" and isinstance(n.ctx, ast.Store) for n in nodes)
