"""Tests where the server's URL and the API key are found, and which files are not trusted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from microsandbox import ConfigError, MicrosandboxError, PythonSandbox, _config
from microsandbox._config import API_KEY, DEFAULT_SERVER_URL, SERVER_URL, load

from .stub import TEST_KEY

KEY = f"MSB_API_KEY='{TEST_KEY}'\n"
REMOTE = "MSB_SERVER_URL=https://sandboxes.example.org\n"
LOCAL = "MSB_SERVER_URL=http://127.0.0.1:7001\n"
NEAR, FAR, VENV = "project/sub/.env", "project/.env", "venv/.env"


class Case(NamedTuple):
    files: dict[str, str]
    env: dict[str, str]
    given: dict[str, str]
    server: str
    key: bool


@pytest.mark.parametrize(
    "case",
    {
        "nothing": Case({}, {}, {}, DEFAULT_SERVER_URL, False),
        "environment": Case({}, {API_KEY: TEST_KEY, SERVER_URL: "https://a"}, {}, "https://a", True),
        "working directory": Case({NEAR: KEY + REMOTE}, {}, {}, "https://sandboxes.example.org", True),
        "parent": Case({FAR: KEY + REMOTE}, {}, {}, "https://sandboxes.example.org", True),
        "above the package": Case({VENV: KEY + REMOTE}, {}, {}, "https://sandboxes.example.org", True),
        "nearest": Case(
            {NEAR: KEY, FAR: "MSB_API_KEY=msb_other\n", VENV: "MSB_API_KEY=msb_x"}, {}, {}, DEFAULT_SERVER_URL, True
        ),
        "key and server from different files": Case({NEAR: LOCAL, FAR: KEY}, {}, {}, "http://127.0.0.1:7001", True),
        "environment first": Case(
            {NEAR: "MSB_API_KEY=msb_other\nMSB_SERVER_URL=https://other\n"},
            {API_KEY: TEST_KEY, SERVER_URL: "https://a"},
            {},
            "https://a",
            True,
        ),
        "empty is unset": Case(
            {NEAR: "MSB_API_KEY=\nMSB_SERVER_URL=''\n", FAR: KEY + LOCAL},
            {API_KEY: ""},
            {},
            "http://127.0.0.1:7001",
            True,
        ),
        "given": Case(
            {NEAR: "MSB_API_KEY=msb_other\n" + REMOTE},
            {SERVER_URL: "https://a"},
            {"server_url": "https://b/", "api_key": f" {TEST_KEY}\n"},
            "https://b",
            True,
        ),
        "given key, server above the package": Case(
            {VENV: REMOTE}, {}, {"api_key": TEST_KEY}, "https://sandboxes.example.org", True
        ),
        "without a key, any server": Case({NEAR: REMOTE}, {}, {}, "https://sandboxes.example.org", False),
        "this machine": Case({NEAR: LOCAL}, {API_KEY: TEST_KEY}, {}, "http://127.0.0.1:7001", True),
        "local names": Case(
            {}, {}, {"server_url": "http://[::1]:80/x", "api_key": TEST_KEY}, "http://[::1]:80/x", True
        ),
        "scheme in capitals": Case({}, {}, {"server_url": "HTTPS://a", "api_key": TEST_KEY}, "HTTPS://a", True),
        "localhost": Case(
            {}, {}, {"server_url": "http://LocalHost:80", "api_key": TEST_KEY}, "http://LocalHost:80", True
        ),
    }.items(),
    ids=lambda case: case[0],
)
def test_load(case: tuple[str, Case], nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, env, given, server, keyed = case[1]
    for name, text in files.items():
        (nowhere / name).write_text(text)
        (nowhere / name).chmod(0o600)
    for name, text in env.items():
        monkeypatch.setenv(name, text)
    config = load(**given)
    assert config.server_url == server
    assert config.key is None if not keyed else config.key is not None and config.key.header() == f"Bearer {TEST_KEY}"


class Refused(NamedTuple):
    files: dict[str, tuple[str, int]]
    key: str  # the API key in the environment
    given: dict[str, str]
    says: str


@pytest.mark.parametrize(
    "case",
    {
        "server beside the environment's key": Refused(
            {NEAR: (REMOTE, 0o600)}, TEST_KEY, {}, "the API key is from another source"
        ),
        "server beside the caller's key": Refused(
            {NEAR: (REMOTE, 0o600)}, "", {"api_key": TEST_KEY}, "is from another source"
        ),
        "server beside another .env's key": Refused(
            {FAR: (REMOTE, 0o600), NEAR: (KEY, 0o600)}, "", {}, "is from another source"
        ),
        "the key in the environment replaces the file's": Refused(
            {NEAR: (REMOTE + KEY, 0o600)}, "msb_other", {}, "is from another source"
        ),
        "written by everyone, key": Refused({FAR: (KEY, 0o666)}, "", {}, "chmod o-w"),
        "written by everyone, server": Refused({FAR: (LOCAL, 0o602)}, TEST_KEY, {}, "MSB_SERVER_URL in"),
        "written by everyone, above the package": Refused({VENV: (KEY, 0o666)}, "", {}, "chmod o-w"),
        "not a .env": Refused({NEAR: ("MSB_API_KEY: hunter2\n", 0o600)}, "", {}, r"\.env: line 1"),
        "no URL": Refused({NEAR: ("MSB_SERVER_URL=hunter2\n", 0o600)}, TEST_KEY, {}, "must be https://"),
        "far too long": Refused({NEAR: ("# hello\n" * 131073, 0o600)}, "", {}, "longer than 1024 KiB"),
        "plain http": Refused({}, TEST_KEY, {"server_url": "http://sandboxes.example.org:5555"}, "over plain http"),
        "plain http to a number": Refused({}, TEST_KEY, {"server_url": "http://10.0.0.1:5555"}, "over plain http"),
        "a name like this machine's": Refused(
            {}, TEST_KEY, {"server_url": "http://localhost.example.org"}, "over plain http"
        ),
        "key with a space": Refused({}, "msb_a hunter2", {}, "copy the complete key"),
        "key with a line": Refused({}, "msb_a\nhunter2", {}, "copy the complete key"),
        "key with another letter": Refused({}, "msb_hunter2é", {}, "copy the complete key"),
    }.items(),
    ids=lambda case: case[0],
)
def test_load_refuses(case: tuple[str, Refused], nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, key, given, says = case[1]
    for name, (text, mode) in files.items():
        (nowhere / name).write_text(text)
        (nowhere / name).chmod(mode)
    monkeypatch.setenv(API_KEY, key)
    with pytest.raises(ConfigError, match=says) as caught:
        load(**given)
    assert isinstance(caught.value, (MicrosandboxError, ValueError))
    assert TEST_KEY not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "hunter2",
        "ftp://hunter2",
        "http://",
        "//hunter2",
        "http://u:hunter2@a",
        "http://hunter2?a",
        "http://a#hunter2",
        "http://a:hunter2",
        "http://a:99999",
        "http://a:0",
        "http://[::1",
        "http://a b",
        "http://hunter2\n",
        "https://é",
    ],
)
def test_wrong_url(url: str) -> None:
    with pytest.raises(ConfigError, match="must be https://") as caught:
        PythonSandbox(server_url=url)
    assert "hunter2" not in str(caught.value)


# Fakes the owners of the files, because only root could create them.
@pytest.mark.parametrize(
    ("owner", "package_owner", "trusted"), [(0, 1, True), (7, 1, True), (8, 1, False), (8, 8, True)]
)
def test_files_of_other_users(owner: int, package_owner: int, trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 7, raising=False)

    def info(uid: int) -> os.stat_result:
        return os.stat_result((0o100600, 0, 0, 1, uid, 0, 0, 0, 0, 0))

    reason = _config._untrusted_reason(info(owner), info(package_owner), "/p/.env")
    assert (reason == "") == trusted
    if not trusted:
        assert f"uid {owner}" in reason
        assert "chown 7 /p/.env" in reason


def test_writable_like_the_package(nowhere: Path) -> None:
    """If everyone can write this package, as on some mounts, a .env file that everyone can write is no further risk."""
    (nowhere / NEAR).write_text(KEY)
    (nowhere / NEAR).chmod(0o666)
    Path(_config.__file__).chmod(0o666)
    assert load().key is not None


def test_directory_and_pipe_are_skipped(nowhere: Path) -> None:
    (nowhere / NEAR).mkdir()
    os.mkfifo(nowhere / FAR)
    (nowhere / ".env").write_text(KEY)
    assert load().key is not None


def test_unreadable_dotenv(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nowhere / NEAR).write_text(KEY)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("builtins.open", refuse)  # root could open a real file without permissions
    with pytest.raises(ConfigError, match=r"sub/\.env: permission denied.*chown"):
        load()


def test_deleted_working_directory(nowhere: Path) -> None:
    (nowhere / VENV).write_text(KEY)
    (nowhere / "project/sub").rmdir()
    assert load().key is not None
