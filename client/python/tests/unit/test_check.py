"""Tests how check.sh installs packages, with a fake python3 that logs its arguments and installs nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / "check.sh"

# The fake for both python and pip. The first FAILURES installs fail. It appends its arguments to the file NOTES.
FAKE = """#!/bin/sh
case "$(basename "$0") $*" in
*" -VV") echo "Python 3" ;;
*" -m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip" ;;
*)
	echo "$(basename "$(dirname "$(dirname "$0")")"): $(basename "$0") $*" >>"$NOTES"
	case $* in *hatchling*) [ "$(grep -c hatchling "$NOTES")" -gt "$FAILURES" ] ;; esac
	;;
esac
"""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "path").mkdir()
    for name, text in (("python3", FAKE), ("sleep", "#!/bin/sh\n")):
        (tmp_path / "path" / name).write_text(text)
        (tmp_path / "path" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:{os.environ['PATH']}")
    monkeypatch.setenv("VENVS", str(tmp_path / "venvs"))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("MSB_SERVER_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MSB_API_KEY", "msb_x")
    return tmp_path / "notes"


def check(failures: int, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "FAILURES": str(failures)}
    return subprocess.run([str(CHECK), *args], env=env, capture_output=True, text=True, check=False)


def test_installs_are_tried_three_times(notes: Path) -> None:
    done = check(3, "live")
    assert done.returncode != 0
    assert done.stderr.count("failed, attempt") == 3
    assert "failed, attempt 3 of 3" in done.stderr
    assert notes.read_text().splitlines() == ["live: pip install hatchling .[test]"] * 3
    # A failed installation is not reused as an environment.
    notes.unlink()
    done = check(2, "live")
    assert (done.returncode, done.stderr.count("failed, attempt")) == (0, 2)
    assert notes.read_text().splitlines()[-1] == "live: python -m pytest --quiet tests/live"


def test_this_package_is_not_installed_over_the_original(notes: Path) -> None:
    assert check(0, "original").returncode == 0
    assert notes.read_text().splitlines() == [
        "original: pip install hatchling microsandbox==0.1.8",
        "original: python tests/original/program.py",
        "moved: pip install hatchling .[compat]",
        "moved: pip install --no-deps --no-build-isolation --force-reinstall .",
        "moved: python tests/original/program.py",
    ]
