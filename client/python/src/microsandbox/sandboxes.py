"""Lists the sandboxes of a server."""

from __future__ import annotations

from . import _config
from ._core import list_call, list_result
from ._http import AsyncHTTP
from ._results import SandboxInfo


async def list_sandboxes(
    namespace: str | None = None, *, server_url: str | None = None, api_key: str | None = None
) -> list[SandboxInfo]:
    """Return all sandboxes of a namespace, in whatever state they are, sorted by namespace and name.

    namespace: None means the key's namespace, or default for a key that is not limited to one; "*" means all
        namespaces of the key.
    server_url, api_key: as for a sandbox.

    Raises ConfigError if the URL, the key or a .env file cannot be used, and the errors of the server and the
    connection.
    """
    http = AsyncHTTP(_config.load(server_url, api_key))
    sandboxes: list[SandboxInfo] = []
    after = ""
    try:
        while True:
            page, after = list_result(await http.call(list_call(namespace, after)), after)
            sandboxes += page
            if not after:
                return sandboxes
    finally:
        await http.close()
