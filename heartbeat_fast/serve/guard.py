"""Who may talk to the server: hosts, origins, a token; and headers that keep the page to itself."""

import hmac
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PUBLIC = ("/", "/health/live", "/health/ready")  # and /page/…: files without secrets
SECURITY = (
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data: blob:; "
     b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)  # fmt: skip


class Guard:
    """ASGI middleware.

    A web page elsewhere can make a browser talk to 127.0.0.1: so the Host must be ours (against DNS
    rebinding), and an Origin, where a browser sends one, must be the page's own.

    Args:
        hosts: host names that count as ours; None for any (bound wider, where the token decides).
        token: asked of everything that costs or tells something; None for none.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...] | None, token: str | None) -> None:
        self._app, self._hosts, self._token = app, hosts, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes on what is allowed, and refuses the rest with a sentence."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if (refusal := self._refusal(scope)) is not None:
            await _refuse(scope, send, *refusal)
            return

        async def secured(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *SECURITY]}
            await send(message)

        await self._app(scope, receive, secured)

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
        host = headers.get(b"host", "")
        if self._hosts is not None and _name(f"//{host}") not in self._hosts:
            return 403, f"host: {host[:80]!r} came; wanted this server's own name"
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "origin: another site's page asked; open the page of this server"
        path = scope["path"]
        if self._token is None or path in PUBLIC or path.startswith("/page/"):
            return None
        bearer = headers.get(b"authorization", "").removeprefix("Bearer ")
        query = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        given = bearer or query  # browsers cannot set headers on a WebSocket
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            return 401, "token: missing or wrong; send it as `Authorization: Bearer TOKEN`"
        return None


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


async def _refuse(scope: Any, send: Any, status: int, sentence: str) -> None:
    if scope["type"] == "websocket":  # before it is accepted: the client sees 403
        await send({"type": "websocket.close", "code": 1008, "reason": sentence[:100]})
        return
    headers = [(b"content-type", b"application/json"), *SECURITY]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    body = json.dumps({"error": sentence}).encode()
    await send({"type": "http.response.body", "body": body})
