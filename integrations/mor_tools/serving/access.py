"""Who may call the server: by the name they call it by, and by API keys.

A web page that someone has open must not be able to use a server on the same machine. Bodies must be
declared as JSON, which browsers let a foreign page do only with the server's consent, and that is never
given. The Host header must be the server's own, or a page whose name is made to point at this machine
(DNS rebinding) would count as the server's own page.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mor_tools.serving.errors import ServiceError

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
OPEN_PATHS = frozenset({"/health"})
"""Answered without a key, for probes."""
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::\d+)?")


@dataclass(frozen=True)
class Access:
    """Who may call."""

    hosts: frozenset[str] = LOCAL_NAMES
    """What the Host header may name."""
    allows_addresses: bool = False
    """Whether it may be any IP address too. No DNS name can be made to look like one."""
    keys: tuple[str, ...] = ()
    """API keys, of which callers must send one. None: everyone may call."""

    def __post_init__(self) -> None:
        if not all(self.keys):
            raise ValueError("an API key is empty. Leave it out, or give one.")

    @classmethod
    def bound_to(cls, host: str, names: Iterable[str] = (), keys: Iterable[str] = ()) -> "Access":
        """Access to a server that listens at `host`.

        Args:
            names: further names that it is called by, as behind a proxy.
        """
        is_local = is_anywhere = False
        try:
            address = ip_address(host)
            is_local, is_anywhere = address.is_loopback, address.is_unspecified
        except ValueError:  # a name
            is_local = host in LOCAL_NAMES
        local = LOCAL_NAMES if is_local or is_anywhere else frozenset()
        own = frozenset(name.lower().rstrip(".") for name in (host, *names))
        return cls(own | local, is_anywhere, tuple(keys))

    def allows_host(self, header: str) -> bool:
        """Whether a Host header names this server; the port does not matter."""
        match = _HOST.fullmatch(header.strip().lower())
        if match is None:
            return False
        name = (match[1] or match[2]).rstrip(".")
        return name in self.hosts or (self.allows_addresses and _is_address(name))

    def key_number(self, authorization: str) -> int | None:
        """Which key an Authorization header gives; None: none of them."""
        scheme, _, given = authorization.partition(" ")
        # Digests, of equal length, and all of them are compared: the time tells nothing.
        digest = hashlib.sha256(given.strip().encode()).digest()
        matches = [
            hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in self.keys
        ]
        return matches.index(True) if scheme.lower() == "bearer" and any(matches) else None


def read_keys(file: str) -> list[str]:
    """The API keys of a file, one a line.

    Raises:
        OSError: it cannot be read.
        ValueError: there are none.
    """
    lines = Path(file).read_text("utf-8").splitlines()
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ValueError(f"{file} has no API key. Write one a line.")
    return keys


class AccessControl:
    """Lets calls through to an application, with who calls in `state.client`: a key or an address.

    Args:
        app: gets the calls that are allowed.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["client"] = self._client(scope)
            except ServiceError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _client(self, scope: Scope) -> str:
        """Who calls.

        Raises:
            ServiceError: someone who may not.
        """
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.access.allows_host(hosts[0]):
            raise ServiceError(
                403,
                f"this server is not known as {', '.join(hosts) or 'nothing'}. Call it by the address "
                "that it listens at, or start it with --allowed-host NAME.",
            )
        address = scope["client"][0] if scope.get("client") else ""
        if not self.access.keys or scope["path"] in OPEN_PATHS:
            return address
        number = self.access.key_number(headers.get("authorization", ""))
        if number is None:
            raise ServiceError(
                401,
                "the API key is missing or wrong. Send one as `Authorization: Bearer KEY`.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return f"key {number}"


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
