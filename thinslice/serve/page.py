"""The chat page: its files, and the HTML of what answers hold."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from thinslice.serve.errors import ApiError
from thinslice.serve.markdown import MAX_TEXT, Rendered, render
from thinslice.serve.static_files import STATIC_FILES

# Made for the page's own script: no part of the interface that is documented.
router = APIRouter(include_in_schema=False)
# Texts that wait to be rendered; each takes milliseconds.
_MAX_WAITING = 64
# Answers are strangers' text. Nothing of them is run even where what cleans them has a hole.
_POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"),
        *("img-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        *("require-trusted-types-for 'script'", "trusted-types answers"),
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


class RenderBody(BaseModel):
    """The body of ``/page/render``.

    Attributes:
        text: markdown.
        is_whole: whether nothing follows it.
    """

    model_config = ConfigDict(strict=True)

    text: Annotated[str, Field(max_length=MAX_TEXT)]
    is_whole: bool


class Renderer:
    """Renders one text at a time, on a thread of its own, so that it takes one core at most."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="thinslice-render")
        self._num_waiting = 0

    async def render(self, body: RenderBody) -> Rendered:
        """Render a text. Errors: ApiError 429 where many wait."""
        if self._num_waiting >= _MAX_WAITING:
            raise ApiError(429, "too many texts wait to be rendered", code="queue_full")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, lambda: render(body.text, is_whole=body.is_whole)
            )
        finally:
            self._num_waiting -= 1


def _renderer(request: Request) -> Renderer:
    renderer: Renderer = request.app.state.renderer
    return renderer


@router.head("/")
async def page_head(request: Request) -> Response:
    """Whether there is a server, as Ollama's own command asks."""
    return _file("/", request)


@router.get("/")
async def page(request: Request) -> Response:
    """The chat page."""
    return _file("/", request)


@router.get("/page/{name}")
async def page_file(name: str, request: Request) -> Response:
    """A file that the page is made of."""
    return _file(f"/page/{name}", request)


@router.post("/page/render")
async def page_render(
    body: RenderBody, renderer: Annotated[Renderer, Depends(_renderer)]
) -> dict[str, Any]:
    """HTML of a text in markdown, block by block."""
    found = await renderer.render(body)
    return {"finished": found.finished, "rest": found.rest, "taken": found.taken}


def _file(path: str, request: Request) -> Response:
    found = STATIC_FILES.get(path)
    if found is None:
        raise ApiError(404, "there is no such path")
    headers = {**_HEADERS, "etag": found.etag}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers, media_type=found.media_type)
