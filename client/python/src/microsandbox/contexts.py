"""Sessions of interpreters in a sandbox."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING

from ._abilities import ContextsCore, context, context_list
from ._results import Context

if TYPE_CHECKING:
    from .base_sandbox import BaseSandbox


class Contexts(ContextsCore):
    """Creates and removes contexts, which keep their variables apart. run() has a parameter context."""

    _sandbox: BaseSandbox

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    async def create(
        self, language: str | None = None, name: str | None = None, cwd: str | None = None, user: str | None = None
    ) -> Context:
        """Create a context, and return when its interpreter is ready.

        language: python, node or bash; None means that of the sandbox.
        name: up to 64 letters, digits and . _ -; None generates a name.
        cwd: the directory in which the interpreter starts.
        user: the name or number of the user that the interpreter runs as; None means the user of the sandbox.
        """
        return context(await self._sandbox._http.call(self._create_call(language, name, cwd, user)))

    async def list(self) -> builtins.list[Context]:
        """Return the contexts, also those of runs that name none."""
        return context_list(await self._sandbox._http.call(self._list_call()))

    async def restart(self, which: Context | str) -> Context:
        """Replace the interpreter of a context. Its variables are lost, and a run in progress ends."""
        return context(await self._sandbox._http.call(self._change_call("restart", which)))

    async def remove(self, which: Context | str) -> None:
        """End the interpreter of a context, and forget the context."""
        await self._sandbox._http.call(self._change_call("remove", which))
