"""Serving the annotation app: on this machine alone unless told otherwise, and never in plain text to a network by accident."""

import gc
import ipaddress
import logging
import signal
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import uvicorn
from fastapi import FastAPI
from pydantic import Field, model_validator

from synpref_ray.config import Settings
from synpref_ray.errors import InputError
from synpref_ray.human.accounts import LoginConfig

logger = logging.getLogger(__name__)


class ServeConfig(Settings):
    """Where the app listens, and how people sign in."""

    host: str = "127.0.0.1"  # ours: nobody else reaches it
    port: int = Field(default=8400, ge=0, le=65535)  # ours; 0: any free one
    tls_certificate: str = ""
    """A PEM file with the certificate chain; with `tls_key`, pages are served over HTTPS."""
    tls_key: str = ""
    """A PEM file with its private key."""
    behind_tls_proxy: bool = False  # a proxy before it ends TLS: browsers see https, so cookies are Secure and HSTS is sent
    allow_plain_http: bool = False  # no TLS anywhere: everybody on the way reads along
    login: LoginConfig = LoginConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("TLS needs both files: serve.tls_certificate and serve.tls_key")
        if not (is_loopback(self.host) or self.secure or self.allow_plain_http):
            raise ValueError(
                f"serve.host={self.host} opens the app to a network in plain text: give serve.tls_certificate and serve.tls_key, or say "
                "serve.behind_tls_proxy=true if a proxy before it ends TLS (serve.allow_plain_http=true does without TLS)"
            )
        return self

    @property
    def secure(self) -> bool:
        """Whether browsers come over TLS; cookies are then marked Secure."""
        return bool(self.tls_key) or self.behind_tls_proxy


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_files(config: ServeConfig) -> None:
    """Raise `InputError` where a TLS file is not there, or the two are no certificate and its key."""
    files = [file for file in (config.tls_certificate, config.tls_key) if file]
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"there is no TLS file {file}")
    if files:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                config.tls_certificate, config.tls_key, lambda: b""
            )  # never asked for on a terminal
        except (ssl.SSLError, OSError) as error:
            why = "the key belongs to another certificate" if "MISMATCH" in str(error) else "expected PEM files, the key without a passphrase"
            raise InputError(f"cannot use the TLS files {' and '.join(files)}: {why} ({error.strerror or error})") from None


def serve(app: FastAPI, config: ServeConfig) -> None:
    """Answer requests until SIGINT or SIGTERM; requests in flight are finished.

    Raises:
        InputError: the address cannot be used.
    """
    check_files(config)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=512)
    except OSError as error:
        raise InputError(f"cannot listen on {config.host}, port {config.port}: {error.strerror or error}") from None
    settings = uvicorn.Config(
        app,
        ssl_certfile=config.tls_certificate or None,
        ssl_keyfile=config.tls_key or None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # an address in a header is the client's own claim
        lifespan="on",
    )
    host = f"[{config.host}]" if family == socket.AF_INET6 else config.host
    logger.info("serving on %s://%s:%d (Ctrl-C ends it)", "https" if config.tls_key else "http", host, listener.getsockname()[1])
    gc.collect()
    gc.freeze()  # what is loaded by now stays: no collection walks through it while somebody waits for a page
    with listener, _quiet_signals():
        uvicorn.Server(settings).run(sockets=[listener])


@contextmanager
def _quiet_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the server and nothing more: uvicorn raises them once again after it has stopped."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
