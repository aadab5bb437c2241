"""Names and addresses of hosts."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Scope


def host_name(host: str) -> str:
    """The name in a Host header field, without its port.

    >>> host_name("localhost:8000"), host_name("[::1]:8000")
    ('localhost', '::1')
    """
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether a name or an address is of this machine alone.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def format_host(host: str) -> str:
    """A host as it stands in an address: IPv6 in brackets.

    >>> format_host("::1")
    '[::1]'
    """
    return f"[{host}]" if ":" in host else host


def resolve_absolute_target(scope: Scope) -> None:
    """Rewrite `GET http://HOST/PATH`, which a server must accept, to PATH with this Host.

    RFC 9112, 3.2.2. Changes the scope of the request.
    """
    scheme, separator, rest = scope["raw_path"].partition(b"://")
    if not separator or scheme.lower() not in (b"http", b"https"):
        return
    host, _, raw_path = rest.partition(b"/")
    scope["raw_path"] = b"/" + raw_path
    scope["path"] = "/" + scope["path"].partition("://")[2].partition("/")[2]
    others = [(name, value) for name, value in scope["headers"] if name != b"host"]
    scope["headers"] = [(b"host", host), *others]
