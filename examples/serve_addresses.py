"""Images from addresses that strangers name: from allowed places alone, within limits of size and time.

A server that opens any address lets strangers ask its own network through it. So an address must begin with an allowed
origin, its host must have no private address, redirects are not followed, and the connection goes to the very address
that was looked at, not to what a name means a moment later. `serve.py` uses it; it knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx

from sep_peft.tuner.messages import shown


#: Ports of schemes that an address may leave out.
PORTS = {"https": 443, "http": 80}
#: IPv6 addresses whose last 32 bits are an IPv4 address (RFC 6052).
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Refused(Exception):
    """A request that is not answered, with what a client is told.

    Args:
        status: of HTTP.
        code: a short name for programs.
        message: for people.
    """

    def __init__(self, status: int, code: str, message: str):
        super().__init__(status, code, message)  # all of them, so that it can be pickled
        self.status, self.code, self.message = status, code, message


def origin(address: str) -> tuple[str, str, int]:
    """Scheme, host and port of an address.

    Raises:
        ValueError: it is no address of http or https, or names a user.
    """
    parts = urlsplit(address)
    if parts.scheme not in PORTS or not parts.hostname:
        raise ValueError(f"{shown(address)} is no address of http or https.")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{shown(address)} names a user; leave that out.")
    return parts.scheme, parts.hostname.rstrip(".").lower(), parts.port or PORTS[parts.scheme]


class Addresses:
    """Fetches what lies at allowed addresses.

    Args:
        origins: such as "https://images.example.com"; an address must have the scheme, the host and the port of one.
        max_bytes: of an answer.
        seconds: for all of it.
        networks: private networks that hosts may be in, such as "10.1.0.0/16"; none by default.

    Raises:
        ValueError: one of `origins` is no address of http or https, or one of `networks` no network.
    """

    def __init__(self, origins: Sequence[str], max_bytes: int, seconds: float, networks: Sequence[str] = ()):
        self.origins = {origin(each) for each in origins}
        self.max_bytes, self.seconds = max_bytes, seconds
        self.networks = [ipaddress.ip_network(each) for each in networks]

    async def fetch(self, address: str) -> bytes:
        """What lies at an address.

        Raises:
            Refused: it is not allowed (403), unreachable or not answered with 200 (502), too large (413) or too slow
                (504).
        """
        try:
            scheme, host, port = origin(address)
        except ValueError as error:
            raise Refused(422, "invalid_address", str(error)) from error
        if (scheme, host, port) not in self.origins:
            raise Refused(403, "address_not_allowed", f"{scheme}://{host}:{port} is not among the allowed origins.")
        try:
            return await asyncio.wait_for(self._get(address, host, port), self.seconds)
        except (asyncio.TimeoutError, httpx.TimeoutException) as error:
            message = f"{host} has not answered within {self.seconds:g} s."
            raise Refused(504, "address_too_slow", message) from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise Refused(502, "address_unreachable", f"{host} cannot be read: {type(error).__name__}.") from error

    async def _look_up(self, host: str, port: int) -> str:
        """An address of a host that may be asked; every one that it has must be."""
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
        if not all(self._may_be_asked(each) for each in addresses):
            raise Refused(403, "address_not_allowed", f"{host} is in a private network.")
        return str(addresses[0])

    def _may_be_asked(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        return all(
            (each.is_global and not each.is_multicast) or any(each in network for network in self.networks)
            for each in meant(address)
        )

    async def _get(self, address: str, host: str, port: int) -> bytes:
        url, ip = httpx.URL(address), await self._look_up(host, port)
        headers = {"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"}
        options = {"timeout": self.seconds, "follow_redirects": False, "trust_env": False}
        async with (
            httpx.AsyncClient(**options) as client,
            client.stream("GET", url.copy_with(host=ip), headers=headers, extensions={"sni_hostname": host}) as answer,
        ):
            if answer.is_redirect:
                raise Refused(502, "address_redirects", f"{host} redirects; name the address where the image lies.")
            if answer.status_code != 200:
                raise Refused(502, "address_unreachable", f"{host} answered with {answer.status_code}.")
            content = bytearray()
            async for chunk in answer.aiter_raw():
                content += chunk
                if len(content) > self.max_bytes:
                    raise too_large(self.max_bytes)
            return bytes(content)


def meant(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list:
    """Where a connection to an address may end: there, or at the IPv4 address that is a part of it."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    inner = [address.sixtofour, *(address.teredo or ())]
    if address in NAT64:
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [address, *(each for each in inner if each is not None)]


def too_large(max_bytes: int) -> Refused:
    """What is said of an image of more bytes."""
    return Refused(413, "image_too_large", f"The image has more than {max_bytes:,} bytes. Make it smaller.")
