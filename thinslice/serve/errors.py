"""What goes wrong over HTTP: a status, and a body in the form that OpenAI's clients read."""

import logging
from dataclasses import dataclass
from typing import Any

from thinslice.errors import BusyError, ContextError, RequestError, ThinsliceError, own_error

# Seconds after which a client that met a full queue may try again.
RETRY_AFTER_S = 1
log = logging.getLogger("thinslice.serve")
_ANTHROPIC_KINDS = {404: "not_found_error", 413: "request_too_large", 500: "api_error"}
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass
class ApiError(Exception):
    """An error with its HTTP status.

    Attributes:
        param: the field of the body that it is about.
        code: a name of it that programs know.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    @property
    def kind(self) -> str:
        """The type in OpenAI's sense."""
        otherwise = "invalid_request_error" if self.status < 500 else "server_error"
        return _KINDS.get(self.status, otherwise)

    def body(self, path: str) -> dict[str, Any]:
        """The JSON object that the clients of a path read."""
        if path.startswith("/v1/messages"):
            kind = _ANTHROPIC_KINDS.get(self.status, self.kind)
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        if path.startswith("/api/"):
            return {"error": self.message}
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}

    @property
    def headers(self) -> dict[str, str]:
        """Headers beside the body."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}


BUG = ApiError(500, "the server met a bug of its own; its log says more")


def told(error: BaseException) -> ApiError:
    """What an error is over HTTP; a bug of ours goes into the log."""
    known = _known(error)
    if known is None:
        log.error("a request failed", exc_info=error)
    return known or BUG


def _known(error: BaseException) -> ApiError | None:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), error.setting)
    if isinstance(error, ThinsliceError):  # of a disk, or of files that have changed
        return ApiError(500, str(error))
    known = own_error(error)
    return None if known is None else ApiError(503, str(known), code="out_of_resources")
