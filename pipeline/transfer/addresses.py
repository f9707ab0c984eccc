"""Where a request may send the worker: to public addresses, and to hosts that the operator vouches for."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import requests
from requests_hardened import Config, HTTPSession

from pipeline.settings import Settings
from pipeline.transfer.interruptible import Connections

CONNECT_SEC, IDLE_SEC = 10.0, 20.0


class BadAddress(ValueError):
    """The URL cannot be asked; the message says why."""


class Addresses:
    """The settings' rules. No session follows redirects, and what a name resolves to is checked and then used."""

    def __init__(self, settings: Settings) -> None:
        self.names = {h for h in settings.download_allow_hosts if "/" not in h}
        self.networks = [ipaddress.ip_network(h, strict=False) for h in settings.download_allow_hosts if "/" in h]

    def vouched(self, host: str) -> bool:
        """Whether the operator vouches for this host, by name or literal address: it may be private."""
        host = host.lower().rstrip(".")
        if host in self.names:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in self.networks)

    def session(self, host: str, connections: Connections, idle_sec: float = IDLE_SEC) -> HTTPSession:
        """For requests to one host; another thread can end them through `connections`."""
        session = HTTPSession(Config(not self.vouched(host), False, True, (CONNECT_SEC, idle_sec), "musetalk-worker"))
        session.trust_env = False  # a proxy from the environment would resolve names itself
        connections.register(session)
        return session

    def check_target(self, url: str) -> None:
        """Raise BadAddress where a result must not be sent: what is no https URL, but for vouched hosts."""
        host = host_of(url)
        if not url.lower().startswith("https:") and not self.vouched(host):
            raise BadAddress("not https; only hosts in DOWNLOAD_ALLOW_HOSTS may be sent to without")


def host_of(url: str) -> str:
    """The host of an http(s) URL; raises BadAddress for one that cannot be asked."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
        if parts.scheme not in ("http", "https"):
            raise BadAddress("not http or https, and no others are taken")
        if not host or port == 0:
            raise BadAddress("the URL's port is 0" if host else "the URL names no host")
        host.encode("idna")
        requests.Request("GET", url).prepare()  # from here on, what cannot be parsed is what the host answers
    except BadAddress:
        raise
    except ValueError as e:  # of the standard library, requests and urllib3
        raise BadAddress("not a valid URL") from e
    return host
