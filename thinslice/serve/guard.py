"""Who gets through: the host and the origin that a request names, and its key."""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from thinslice.serve.errors import ApiError
from thinslice.serve.keys import Key, Keys
from thinslice.serve.static_files import STATIC_FILES

# All that needs no key.
PUBLIC = frozenset(("/health", "/ready", *STATIC_FILES))
_BEARER = "bearer "
# Every body here is JSON, whatever curl and others call it. No page of another site can make use of
# that to send one without asking first: its origin is looked at.
_JSON = (b"content-type", b"application/json")


class Guard:
    """Lets requests through to an application, or answers them with an error.

    A web page may make a browser send requests here. The name of its own site, which it may point
    to this machine, is refused as a host; its requests to our name bear its origin.

    Args:
        hosts: names that this server goes by, in small letters; addresses and localhost always do.
        origins: of web pages that may use it, as ``https://chat.example.com``.
    """

    def __init__(
        self, app: ASGIApp, hosts: frozenset[str], origins: frozenset[str], keys: Keys
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = origins
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with ``key`` in its state where there are keys."""
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["key"] = self._checked(scope)
                scope["headers"] = [one for one in scope["headers"] if not _is_type(one)] + [_JSON]
            except ApiError as error:
                response = JSONResponse(error.body(scope["path"]), error.status, error.headers)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _checked(self, scope: Scope) -> Key | None:
        """Errors: ApiError 400, 401 or 403."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            told = f"this server does not go by the name {', '.join(hosts)!r:.100}"
            raise ApiError(403, f"{told}; --allow-host adds one", code="host_not_allowed")
        for origin in headers.getlist("origin"):
            if origin not in self._origins and _netloc(origin) != hosts[0].lower():
                told = f"pages of {origin!r:.100} may not use this server"
                raise ApiError(403, f"{told}; --allow-origin adds one", code="origin_not_allowed")
        # What is routed by, and not what a header makes of it.
        if not self._keys or scope["path"] in PUBLIC:
            return None
        key = self._keys.find(_given(headers))
        if key is None:
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        return key

    def _is_ours(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
        except ValueError:
            return False
        if parts.netloc != host or "@" in host:  # more than a name and a port
            return False
        name = parts.hostname or ""
        return name in self._hosts or _is_local(name) or _is_address(name)


def _is_type(header: tuple[bytes, bytes]) -> bool:
    return header[0] == b"content-type"


def _is_local(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _given(headers: Headers) -> str:
    """The key in a request's headers: of OpenAI's clients, or of Anthropic's."""
    authorization = headers.get("authorization", "")
    if authorization.lower().startswith(_BEARER):
        return authorization[len(_BEARER) :].strip()
    return headers.get("x-api-key", "")
