"""Runs a Python file that may use await at the top level, as examples in the documentation do."""

import ast
import asyncio
import inspect
import sys

with open(sys.argv[1]) as file:
    code = compile(file.read(), sys.argv[1], "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
result = eval(code, {"__name__": "__main__"})
if inspect.iscoroutine(result):
    asyncio.run(result)
