"""Tests of the built and installed package."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
import tarfile
from pathlib import Path

import microsandbox
import microsandbox.sync

ROOT = Path(__file__).parents[2]


def test_installed() -> None:
    assert importlib.metadata.version("microsandbox") == microsandbox.__version__
    assert importlib.metadata.requires("microsandbox")[0].startswith("httpx")  # type: ignore[index]
    assert (Path(microsandbox.__file__).parent / "py.typed").exists()


def test_license(tmp_path: Path) -> None:
    """The license is in the wheel, from which this package was installed, and in the source distribution."""
    text = (ROOT / "LICENSE").read_text()
    assert text == (ROOT.parents[1] / "LICENSE").read_text()
    [installed] = [file for file in importlib.metadata.files("microsandbox") or () if file.name == "LICENSE"]
    assert installed.read_text() == text
    build = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(tmp_path / f"microsandbox-{microsandbox.__version__}.tar.gz") as archive:
        packed = archive.extractfile(f"microsandbox-{microsandbox.__version__}/LICENSE")
        assert packed is not None
        assert packed.read().decode() == text


def test_import_does_not_import_httpx() -> None:
    """Importing it would take most of the time."""
    program = "import microsandbox, microsandbox.sync, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert not {"httpx", "httpcore", "anyio", "certifi", "h11", "websockets", "tarfile", "tempfile"} & set(modules)


def test_both_flavours_have_the_same_methods() -> None:
    for name in set(microsandbox.sync.__all__) - {"NodeSandbox", "PythonSandbox", "list_sandboxes"}:
        asynchronous, blocking = getattr(microsandbox, name), getattr(microsandbox.sync, name)
        for method, function in inspect.getmembers(asynchronous, inspect.isfunction):
            if not method.startswith("_"):
                assert list(inspect.signature(function).parameters) == list(
                    inspect.signature(getattr(blocking, method)).parameters
                ), f"{name}.{method}"
    create = inspect.signature(microsandbox.BaseSandbox.create).parameters
    assert list(create) == list(inspect.signature(microsandbox.sync.BaseSandbox.create).parameters)
    assert set(create) == {
        *inspect.signature(microsandbox.BaseSandbox).parameters,
        *inspect.signature(microsandbox.BaseSandbox.start).parameters,
    } - {"self"}
