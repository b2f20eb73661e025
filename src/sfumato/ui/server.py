"""Serves the page on the loopback alone, with headers that keep other sites and other hosts out."""

from __future__ import annotations

import contextlib
import http.cookies
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import fastapi
import gradio as gr
import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware

from sfumato.errors import JobError
from sfumato.ui.jobs import Studio
from sfumato.ui.page import COOKIE, build, dress

__all__ = ["listen", "running", "serve"]

HOST = "127.0.0.1"
_START_S, _DRAIN_S = 30.0, 2
#: The page gets everything from this server, and nobody frames it.
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "connect-src 'self' data:; frame-ancestors 'none'; base-uri 'self'; form-action 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class _Guard:
    """Adds the headers, and a cookie that tells browsers apart."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((v for k, v in scope["headers"] if k == b"cookie"), b"").decode("latin-1")
        known = COOKIE in http.cookies.SimpleCookie(given)

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                if not known and scope["path"] == "/":
                    headers.append(
                        "set-cookie",
                        f"{COOKIE}={secrets.token_urlsafe(24)}; Path=/; HttpOnly; SameSite=Strict",
                    )
            await send(message)

        await self._app(scope, receive, answer)


def _app(studio: Studio) -> fastapi.FastAPI:
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app, build(studio), path="/", server_name=HOST, footer_links=[], run_history=False, ssr_mode=False,
        show_error=False, enable_monitoring=False, pwa=False, mcp_server=False, **dress(),
    )  # fmt: skip
    app.add_middleware(_Guard)
    app.add_middleware(
        TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]
    )  # outermost: no rebound names
    return app


def listen(port: int) -> socket.socket:
    """A listening socket of the loopback; port 0 takes a free one.

    Raises:
        JobError: the port is taken or not allowed.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise JobError(
            f"cannot listen on port {port} ({error.strerror}); choose another with --port"
        ) from None
    return listener


def _server(studio: Studio) -> uvicorn.Server:
    config = uvicorn.Config(
        _app(studio), log_level="error", access_log=False, timeout_graceful_shutdown=_DRAIN_S, ws="none"
    )
    return uvicorn.Server(config)


def address(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    return f"http://{HOST}:{listener.getsockname()[1]}/"


def serve(studio: Studio, listener: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM, then stop the local parties."""
    try:
        with contextlib.suppress(KeyboardInterrupt):
            _server(studio).run(sockets=[listener])
    finally:
        studio.close()
        listener.close()


@contextlib.contextmanager
def running(studio: Studio, port: int = 0) -> Iterator[str]:
    """The page's address while a `with` block lasts; the server runs in a thread.

    Raises:
        JobError: it did not start.
    """
    with listen(port) as listener:
        server = _server(studio)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + _START_S
            while not server.started:
                if time.monotonic() > deadline or not thread.is_alive():
                    raise JobError("the page's server did not start")
                thread.join(0.02)
            yield address(listener)
        finally:
            server.should_exit = True
            thread.join(_DRAIN_S + _START_S)
            studio.close()
