"""Check that a SuperLink can be reached as by a SuperNode: connection, then TLS.

Nothing is sent over either.
"""

import contextlib
import re
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flower_mcepl.doctor.findings import Examination, Finding
from flower_mcepl.errors import ConfigError

_ADDRESS = re.compile(
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.%]+)\]|(?P<host>[^:\[\]\s/]+)):(?P<port>[0-9]{1,5})"
)
SOON = 30  # days: a certificate that ends within them should be renewed
_HOST = "Check the address, the network and the name service of this machine."
_CERTIFICATES = "(examples/deployment/certificates.sh makes it)"
_REASONS = {  # OpenSSL's verify codes: what they mean here, and what to do
    10: (
        "the certificate has expired",
        f"Renew the SuperLink's certificate {_CERTIFICATES}; check the clock of this machine.",
    ),
    9: (
        "the certificate is not valid yet",
        "Check the clocks of this machine and of the one that made it.",
    ),
    62: (
        "the certificate is for another host name",
        f"Use a name that is in it, or renew it with this name {_CERTIFICATES}.",
    ),
    64: (
        "the certificate is not for this IP address",
        f"Use a name that is in it, or renew it with this address {_CERTIFICATES}.",
    ),
}
_FOREIGN = (
    "the certificate is not from the given certificate authority",
    "Pass the SuperLink's own ca.crt as --root-certificates; if it is, something else answers at "
    "this address.",
)
_REASONS |= dict.fromkeys((18, 19, 20, 21), _FOREIGN)  # self-signed, or its issuer is not known
_REFUSED = (
    "the certificate is refused",
    f"Make it and the certificate authority anew {_CERTIFICATES}.",
)
_NOT_TLS = "a server answers, but it does not speak TLS"


class SuperLink(NamedTuple):
    """Where a SuperLink should be, and how it is trusted."""

    address: str  # HOST:PORT, [IPV6]:PORT
    root_certificates: Path | None = None  # None: the system's
    insecure: bool = False  # without TLS
    timeout: float = 5.0  # seconds, for the connection and for the handshake


def check_superlink(link: SuperLink) -> list[Finding]:
    """Connect to a SuperLink, then begin TLS with it, and say what is in the way."""
    with Examination("superlink-connection", remedy=_HOST) as connection:
        _connect(link, connection)
    if connection.failed:
        return [connection.finding]
    with Examination("superlink-tls", remedy=_HOST) as tls:
        if link.insecure:
            _check_plain(link, tls)
        else:
            _check_tls(link, tls)
    return [connection.finding, tls.finding]


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(
            "a SuperLink's address is HOST:PORT, or [IPV6]:PORT, with a port from 1 to 65535; "
            f"got {address!r}."
        )
    return match["ipv6"] or match["host"], int(match["port"])


def _connect(link: SuperLink, check: Examination) -> None:
    host, port = split_address(link.address)
    began = time.monotonic()
    up = "Start the SuperLink there, or correct the port (flower-superlink --port)"
    try:
        with socket.create_connection((host, port), timeout=link.timeout):
            seconds = time.monotonic() - began
    except socket.gaierror as error:
        check.fail(f"{host} is no known host name ({error.strerror})", _HOST)
    except ConnectionRefusedError:
        check.fail(f"{link.address} refuses: nothing listens on this port", f"{up}.")
    except TimeoutError:
        check.fail(
            f"{link.address} does not answer within {link.timeout:g} s",
            f"{up}; open it in the firewalls between; check that --host is an address that others "
            "reach.",
        )
    else:
        check.ok(f"{link.address} answers after {1000 * seconds:.0f} ms", seconds=round(seconds, 4))


def _check_tls(link: SuperLink, check: Examination) -> None:
    context = _trusting(link, check)
    if context is None:
        return
    try:
        with _handshake(link, context) as stream:
            _judge_certificate(stream, link, check)
    except ssl.SSLCertVerificationError as error:
        reason, remedy = _REASONS.get(error.verify_code, _REFUSED)
        check.fail(f"{reason} ({error.verify_message})", remedy, verify_code=error.verify_code)
    except TimeoutError:
        check.fail(f"{_NOT_TLS} within {link.timeout:g} s", _no_tls_remedy())
    except (ssl.SSLError, ConnectionError) as error:
        check.fail(f"{_NOT_TLS} ({error.args[-1]})", _no_tls_remedy())


def _check_plain(link: SuperLink, check: Examination) -> None:
    """Begin TLS without trust: where it works, a SuperNode with --insecure fails."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with _handshake(link, context):
            check.fail(
                "the server speaks TLS, but --insecure was given",
                "Leave out --insecure here and on the SuperNode; pass --root-certificates ca.crt.",
            )
    except OSError:
        check.warn(
            "not encrypted: who is on the way can read and change masks, and the node's key "
            "proves nothing",
            "Good for trying on one machine only; docs/security.md says more. Set up TLS: "
            "examples/deployment.",
        )


def _trusting(link: SuperLink, check: Examination) -> ssl.SSLContext | None:
    try:
        context = ssl.create_default_context(cafile=link.root_certificates)
    except (ssl.SSLError, OSError) as error:
        check.fail(
            f"{link.root_certificates} cannot be read as certificates in PEM format "
            f"({error.args[-1]})",
            f"Copy the SuperLink's ca.crt here {_CERTIFICATES}.",
        )
        return None
    context.set_alpn_protocols(["h2", "http/1.1"])  # as Flower's own client
    return context


@contextlib.contextmanager
def _handshake(link: SuperLink, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    host, port = split_address(link.address)
    with socket.create_connection((host, port), timeout=link.timeout) as connection:
        with context.wrap_socket(connection, server_hostname=host) as stream:
            yield stream


def _judge_certificate(stream: ssl.SSLSocket, link: SuperLink, check: Examination) -> None:
    certificate = stream.getpeercert() or {}
    until = str(certificate.get("notAfter"))
    days = (ssl.cert_time_to_seconds(until) - time.time()) / 86400
    trusted = link.root_certificates or "the system's certificate authorities"
    state = (
        f"{stream.version()}; the certificate is from {trusted} and valid for {days:.0f} more days"
    )
    values = {"version": stream.version(), "valid_until": until, "days_left": round(days, 2)}
    if days < SOON:
        check.warn(
            state,
            f"Renew the SuperLink's certificate {_CERTIFICATES}, then restart the SuperLink.",
            **values,
        )
    else:
        check.ok(state, **values)


def _no_tls_remedy() -> str:
    return (
        "Start the SuperLink with --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile, or correct "
        "the port. --insecure, here and on the SuperNode, is for trying on one machine only."
    )
