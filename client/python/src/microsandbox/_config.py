"""Finds the server's URL and the API key."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import urlsplit

from . import _dotenv
from .errors import ConfigError

API_KEY = "MSB_API_KEY"
SERVER_URL = "MSB_SERVER_URL"
DEFAULT_SERVER_URL = "http://127.0.0.1:5555"

# The maximum size of a .env file, in bytes; real files are much shorter.
_MAX_DOTENV = 1 << 20


class Key:
    """An API key. Its text is never printed, logged or pickled; only reveal and header return it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "[API key]"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an API key cannot be pickled: create a new sandbox object where you need it")

    def header(self) -> str:
        """Return the value of the Authorization header."""
        return f"Bearer {self._text}"

    def reveal(self) -> str:
        """Return the text of the key."""
        return self._text


@dataclass(frozen=True)
class Config:
    """The server's URL and the API key."""

    server_url: str  # without a trailing slash
    key: Key | None  # None if there is none; then only a server in dev mode accepts requests

    @property
    def tls(self) -> bool:
        """Whether requests are encrypted."""
        return self.server_url[:6].lower() == "https:"


def load(server_url: str | None = None, api_key: str | None = None) -> Config:
    """Find the server and the key.

    Each is looked up separately, and the first value that is not empty is used:

    1. the argument, which must not be empty if it is given,
    2. the environment,
    3. the file .env of the working directory and of each parent directory, the nearest first,
    4. the file .env of each directory above this package; if this package is in a virtual environment inside a
       project, this finds the project's file.

    Someone who can write one of these files could have the key sent to their own server. Therefore load raises
    ConfigError, with a message that says what to do, in two cases: if the value is from a file that can be
    written by someone who cannot write this package; and if a .env file names a server on another machine and the
    key is from another source, unless that file is above this package.
    """
    files = _dotenv_files()
    for param, value in (("server_url", server_url), ("api_key", api_key)):
        if value is not None and not value.strip():
            raise ConfigError(f"{param} is empty: give a value, or leave it out to use the environment or a .env file")
    if server_url:
        server_from = None
    else:
        server_url, server_from = _lookup(SERVER_URL, files)
    if api_key:
        key_from = None
    else:
        api_key, key_from = _lookup(API_KEY, files)
    server_url = (server_url or DEFAULT_SERVER_URL).rstrip("/")
    host = _check_url(server_url, server_from)
    api_key = api_key.strip()
    if not api_key:
        return Config(server_url, None)
    if not all("!" <= c <= "~" for c in api_key):
        raise ConfigError(
            "the API key contains a space or another character that keys never contain: "
            "copy the complete key and nothing else"
        )
    config = Config(server_url, Key(api_key))
    if not is_loopback(host):
        if not config.tls:
            raise ConfigError(
                f"the API key is not sent to {host} over plain http, because others could read it: use https, "
                f"or a tunnel ('ssh -L 5555:127.0.0.1:5555 {host}', then the URL {DEFAULT_SERVER_URL})"
            )
        if server_from not in (None, key_from) and server_from not in _dotenv_files_above(__file__):
            raise ConfigError(
                f"{server_from} sets the server to {server_url}, but the API key is from another source: the key is "
                "not sent to a server from a .env file that does not contain the key, because somebody else may have "
                f"written that file. If the server is right, set {SERVER_URL} where the key is set"
            )
    return config


def is_loopback(host: str) -> bool:
    """Report whether a host is certainly this machine."""
    import ipaddress  # not at the top, because importing it would slow down importing this package

    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _check_url(url: str, source: str | None) -> str:
    """Return the host of a URL. The error does not contain the URL, which may contain a password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    else:
        if port == 0 or parts.scheme not in ("http", "https") or parts.username is not None or "?" in url or "#" in url:
            host = None
    if not host or any(c <= " " or c > "~" for c in url):
        origin = f"{SERVER_URL} in {source}" if source else "the server's URL"
        raise ConfigError(
            f"{origin} must be https://HOST[:PORT] or http://HOST[:PORT], without a user, query or fragment"
        )
    return host


def _dotenv_files_above(file: str) -> list[str]:
    """Return the paths of the .env files in a file's directory and its parent directories, the nearest first."""
    paths = []
    directory, previous = os.path.dirname(os.path.abspath(file)), ""
    while directory != previous:
        paths.append(os.path.join(directory, ".env"))
        directory, previous = os.path.dirname(directory), directory
    return paths


def _dotenv_files() -> list[str]:
    paths: list[str] = []
    with suppress(FileNotFoundError):  # the working directory was deleted
        paths = _dotenv_files_above(os.path.join(os.getcwd(), "any"))
    return list(dict.fromkeys(paths + _dotenv_files_above(__file__)))


def _lookup(name: str, files: list[str]) -> tuple[str, str | None]:
    """Return a variable's value and the file it is from; None if it is from the environment or not set."""
    value = os.environ.get(name, "")
    if value:
        return value, None
    for path in files:
        try:
            text, untrusted = _read(path)
            value = _dotenv.lookup(text, name)
        except PermissionError:
            raise ConfigError(
                f"{path}: permission denied: make the file your own ('sudo chown \"$USER\" {path}'), "
                f"or set {SERVER_URL} and {API_KEY} in the environment"
            ) from None
        except ValueError as error:
            raise ConfigError(f"read {name} from {path}: {error}") from None
        if value and untrusted:
            raise ConfigError(f"{name} in {path} is not used, because {untrusted}, or set {name} in the environment")
        if value:
            return value, path
    return "", None


def _read(path: str) -> tuple[str, str]:
    """Return a file's text, and why the file cannot be trusted. Both are empty if the file does not exist."""
    try:
        info = os.stat(path)
    except OSError:
        return "", ""
    # Skip directories, because some people name a virtual environment .env, and pipes, which would block.
    if not stat.S_ISREG(info.st_mode):
        return "", ""
    with open(path, "rb") as file:
        data = file.read(_MAX_DOTENV + 1)
        info = os.fstat(file.fileno())
    if len(data) > _MAX_DOTENV:
        raise ValueError(f"the file is longer than {_MAX_DOTENV >> 10} KiB")
    return data.decode("utf-8", "replace"), _untrusted_reason(info, os.stat(__file__), path)


def _untrusted_reason(info: os.stat_result, package: os.stat_result, path: str) -> str:
    """Say why someone who cannot write this package may have written a file, and what to do; "" if nobody can.

    The file's group is trusted, because many systems give each user a group of their own and make files writable
    by it.
    """
    if info.st_mode & ~package.st_mode & stat.S_IWOTH:
        return f"everyone on this machine can write that file: if you wrote its contents, run 'chmod o-w {path}'"
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    if info.st_uid not in (0, user, package.st_uid):
        return (
            f"that file belongs to another user (uid {info.st_uid}): "
            f"if you wrote its contents, run 'chown {user} {path}'"
        )
    return ""
