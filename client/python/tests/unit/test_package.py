"""The package as a whole."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import microsandbox
import microsandbox.sync


def test_installed() -> None:
    assert importlib.metadata.version("microsandbox") == microsandbox.__version__
    assert importlib.metadata.requires("microsandbox")[0].startswith("httpx")  # type: ignore[index]
    assert (Path(microsandbox.__file__).parent / "py.typed").exists()


def test_import_brings_no_http_client_along() -> None:
    """It would take most of the time of the import."""
    program = "import microsandbox, microsandbox.sync, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert not {"httpx", "httpcore", "anyio", "certifi", "h11"} & set(modules)


def test_both_flavours_are_alike() -> None:
    for name in ("BaseSandbox", "Command", "Metrics", "Execution", "CommandExecution"):
        ours, blocking = getattr(microsandbox, name), getattr(microsandbox.sync, name)
        for method, function in inspect.getmembers(ours, inspect.isfunction):
            if method not in ("__aenter__", "__aexit__", "_end"):
                assert list(inspect.signature(function).parameters) == list(
                    inspect.signature(getattr(blocking, method)).parameters
                ), f"{name}.{method}"
    create = inspect.signature(microsandbox.BaseSandbox.create).parameters
    assert list(create) == list(inspect.signature(microsandbox.sync.BaseSandbox.create).parameters)
    assert set(create) == {
        *inspect.signature(microsandbox.BaseSandbox).parameters,
        *inspect.signature(microsandbox.BaseSandbox.start).parameters,
    } - {"self"}
