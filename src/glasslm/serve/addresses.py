"""Names and addresses of hosts."""

from __future__ import annotations

import ipaddress


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
