"""What stands before the page and the service: requests that are too large, routes that are closed, headers."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse

#: Routes of gradio that fetch from elsewhere or run programs, of which this page needs none.
_CLOSED = ("/file=http", "/proxy=", "/process_recording", "/vibe", "/monitoring")
#: Browsers then ask no other host for anything, whatever a later gradio may bring.
_HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
}
#: What visitors sent, or had made, is nobody else's, nor of a later user of the same browser.
_PRIVATE = {"cache-control": "private, no-store"}


class Guard:
    """ASGI middleware around gradio: closes what is not needed and tells browsers to stay here."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and any(part in scope["path"].lower() for part in _CLOSED):
            await PlainTextResponse("Not found", 404)(scope, receive, send)
            return

        started = False
        wanted = _HEADERS | (_PRIVATE if "/gradio_api/" in scope.get("path", "") else {})

        async def with_headers(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in wanted.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, with_headers)
        except ClientDisconnect:  # in the middle of an upload: there is nobody to answer
            return
        except (RuntimeError, FileNotFoundError) as error:
            # A page that has been left, and its films with it, may have been about to play one, or begun to.
            gone = isinstance(error, FileNotFoundError) or "does not exist" in str(error)
            if not gone or "/file=" not in scope["path"]:
                raise
            if not started:
                await PlainTextResponse("Not found", 404)(scope, receive, send)


class BodyLimit:
    """ASGI middleware: a request says how long it is, and is not too long, before any of it is read."""

    def __init__(self, app: Any, most: int) -> None:
        """most: bytes of a request."""
        self._app, self._most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "DELETE"):
            said = dict(scope["headers"]).get(b"content-length", b"")
            if not said.isdigit():
                await JSONResponse({"detail": "the request must say its length."}, 411)(scope, receive, send)
                return
            if int(said) > self._most:
                detail = f"the request has {int(said) / 1e6:.0f} MB, but can have at most {self._most / 1e6:.0f}."
                await JSONResponse({"detail": detail}, 413)(scope, receive, send)
                return
        await self._app(scope, receive, send)
