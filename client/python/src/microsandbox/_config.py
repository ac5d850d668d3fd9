"""Which server requests go to, and with which key."""

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

# Longer than any .env file that people write.
_MAX_DOTENV = 1 << 20


class Key:
    """An API key. However it is printed, logged or copied, it does not tell its text."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "[API key]"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an API key is not pickled: make the sandbox object anew where it is used")

    def header(self) -> str:
        """Return the value of the header Authorization."""
        return f"Bearer {self._text}"

    def reveal(self) -> str:
        """Return its text."""
        return self._text


@dataclass(frozen=True)
class Config:
    """Where requests go."""

    server_url: str  # without a slash at its end
    key: Key | None  # None: only a server in dev mode takes requests then

    @property
    def tls(self) -> bool:
        """Say whether requests are encrypted."""
        return self.server_url[:6].lower() == "https:"


def load(server_url: str | None = None, api_key: str | None = None) -> Config:
    """Find the server and the key.

    Each by itself, it is the first that is not empty of

    1. what the caller gives,
    2. the environment,
    3. the file .env of the working directory, and of each directory above it, the nearest first,
    4. the file .env of the directories above this package: in a virtual environment, those of its project.

    Whoever can write such a file could have the key sent to a server of his own. So a value is refused with a
    ConfigError that says what to do when it is from a file that others than those who can write this package
    can write, too. The same goes for a server off this machine that a .env file names while the key is from
    elsewhere, unless that file is above this package.
    """
    files = _dotenv_files()
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
            "the API key holds a space or another character that no key has: "
            "copy it whole, and nothing of what is around it"
        )
    config = Config(server_url, Key(api_key))
    if not is_loopback(host):
        if not config.tls:
            raise ConfigError(
                f"the API key is not sent to {host} over plain http, where others could read it: use https, "
                f"or a tunnel ('ssh -L 5555:127.0.0.1:5555 {host}', and then {DEFAULT_SERVER_URL})"
            )
        if server_from not in (None, key_from) and server_from not in _above(__file__):
            raise ConfigError(
                f"{server_from} names the server {server_url}, but the API key is from elsewhere: a key is not "
                "sent where a file beside it says, which may be another's. If the server is right, "
                f"set {SERVER_URL} where the key is"
            )
    return config


def is_loopback(host: str) -> bool:
    """Say whether a host can only be this machine."""
    import ipaddress  # here, since it is not needed to import the package

    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _check_url(url: str, source: str | None) -> str:
    """Return the host of a URL. The error does not repeat the URL: it may hold a password."""
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


def _above(place: str) -> list[str]:
    """Name the .env files of the directory of a file, and of those above it."""
    paths = []
    directory, up = os.path.dirname(os.path.abspath(place)), ""
    while directory != up:
        paths.append(os.path.join(directory, ".env"))
        directory, up = os.path.dirname(directory), directory
    return paths


def _dotenv_files() -> list[str]:
    paths: list[str] = []
    with suppress(FileNotFoundError):  # the working directory is gone
        paths = _above(os.path.join(os.getcwd(), "any"))
    return list(dict.fromkeys(paths + _above(__file__)))


def _lookup(name: str, files: list[str]) -> tuple[str, str | None]:
    """Find a variable, and say in which file; None is the environment, or nowhere."""
    value = os.environ.get(name, "")
    if value:
        return value, None
    for path in files:
        try:
            text, distrust = _read(path)
            value = _dotenv.lookup(text, name)
        except PermissionError:
            raise ConfigError(
                f"{path}: permission denied: make it your own ('sudo chown \"$USER\" {path}'), "
                f"or set {SERVER_URL} and {API_KEY} in the environment"
            ) from None
        except ValueError as error:
            raise ConfigError(f"read {name} from {path}: {error}") from None
        if value and distrust:
            raise ConfigError(f"{name} in {path} is not used, since {distrust}; or set {name} in the environment")
        if value:
            return value, path
    return "", None


def _read(path: str) -> tuple[str, str]:
    """Read a file, which need not be there, and say why what it holds cannot be trusted, if so."""
    try:
        info = os.stat(path)
    except OSError:
        return "", ""
    # Not a directory, as virtual environments are called at times, nor a pipe, which would block.
    if not stat.S_ISREG(info.st_mode):
        return "", ""
    with open(path, "rb") as file:
        data = file.read(_MAX_DOTENV + 1)
        info = os.fstat(file.fileno())
    if len(data) > _MAX_DOTENV:
        raise ValueError(f"it is longer than {_MAX_DOTENV >> 10} KiB")
    return data.decode("utf-8", "replace"), _distrust(info, os.stat(__file__), path)


def _distrust(info: os.stat_result, own: os.stat_result, path: str) -> str:
    """Say why a file's text may be that of someone who could not write this package either.

    Members of its group are trusted: many systems give each user one of his own, and let it write.
    """
    if info.st_mode & ~own.st_mode & stat.S_IWOTH:
        return f"everyone on this machine can write that file: 'chmod o-w {path}' if its text is yours"
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    if info.st_uid not in (0, user, own.st_uid):
        return f"that file belongs to another user, with uid {info.st_uid}: 'chown {user} {path}' if its text is yours"
    return ""
