"""Access control by the Host header and by API keys.

A web page that is open in a browser must not be able to use a server on the same machine. Two checks
prevent this. Request bodies must be declared as JSON, because a browser sends JSON from a foreign page
only with the server's consent (CORS), which this server never gives. The Host header must name this
server. Otherwise, a page whose domain is made to resolve to this machine (DNS rebinding) would count
as the server's own page.
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
"""Paths that need no API key, for health probes."""
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::\d+)?")


@dataclass(frozen=True)
class Access:
    """Which requests the server accepts."""

    hosts: frozenset[str] = LOCAL_NAMES
    """Names that the Host header may contain."""
    allows_addresses: bool = False
    """Whether the Host header may also be any IP address. This is safe, because a DNS rebinding
    attack needs a domain name."""
    keys: tuple[str, ...] = ()
    """API keys, one of which clients must send. If empty, no key is needed."""

    def __post_init__(self) -> None:
        if not all(self.keys):
            raise ValueError("an API key is empty. Remove it, or pass a key that is not empty.")

    @classmethod
    def bound_to(cls, host: str, names: Iterable[str] = (), keys: Iterable[str] = ()) -> "Access":
        """The access to a server that listens on `host`.

        Args:
            names: further names that clients use for the server, for example behind a proxy.
        """
        is_local = is_anywhere = False
        try:
            address = ip_address(host)
            is_local, is_anywhere = address.is_loopback, address.is_unspecified
        except ValueError:  # `host` is a name and not an address
            is_local = host in LOCAL_NAMES
        local = LOCAL_NAMES if is_local or is_anywhere else frozenset()
        own = frozenset(name.lower().rstrip(".") for name in (host, *names))
        return cls(own | local, is_anywhere, tuple(keys))

    def allows_host(self, header: str) -> bool:
        """Whether a Host header names this server. The port is ignored."""
        match = _HOST.fullmatch(header.strip().lower())
        if match is None:
            return False
        name = (match[1] or match[2]).rstrip(".")
        return name in self.hosts or (self.allows_addresses and _is_address(name))

    def key_number(self, authorization: str) -> int | None:
        """The index of the key in an Authorization header, or None if it has none of the keys."""
        scheme, _, given = authorization.partition(" ")
        # All keys are compared, by digests of equal length, so that the response time does not
        # reveal anything about the keys.
        digest = hashlib.sha256(given.strip().encode()).digest()
        matches = [
            hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in self.keys
        ]
        return matches.index(True) if scheme.lower() == "bearer" and any(matches) else None


def read_keys(file: str) -> list[str]:
    """Read API keys from a file with one key per line.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has no keys.
    """
    lines = Path(file).read_text("utf-8").splitlines()
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ValueError(f"{file} has no API key. Write one key per line.")
    return keys


class AccessControl:
    """Middleware that rejects requests without access, and stores the client in `state.client`.

    A client is identified by its API key, or by its address if no keys are required.

    Args:
        app: the application, which gets the accepted requests.
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
        """The client of a request.

        Raises:
            ServiceError: the client has no access.
        """
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.access.allows_host(hosts[0]):
            raise ServiceError(
                403,
                f"the Host header {', '.join(hosts) or '(none)'} does not name this server. Use the "
                "address that it listens on, or start it with --allowed-host NAME.",
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
