"""The application: routes, and errors in the form that clients read."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from thinslice import __version__
from thinslice.errors import ThinsliceError
from thinslice.serve import (
    anthropic,
    api_page,
    chat,
    completions,
    metrics,
    models,
    ollama,
    page,
    responses,
    status,
    tokenize,
)
from thinslice.serve.document import document
from thinslice.serve.errors import BUG, ApiError, told
from thinslice.serve.events import ClientGoneError
from thinslice.serve.guard import Guard
from thinslice.serve.intake import BodyBounds, Intake
from thinslice.serve.keys import Keys
from thinslice.serve.served import Served
from thinslice.serve.settings import ServerSettings

# Nobody reads it: nginx's for a client that has closed its connection.
_GONE = 499
_OF_MODELS = (chat, completions, responses, anthropic, ollama, models, tokenize)
_ROUTES = (*_OF_MODELS, status, metrics, page, api_page)
_TYPES = frozenset(("str", "int", "float", "bool", "none"))


def make_app(served: Served, settings: ServerSettings, keys: Keys) -> FastAPI:
    """The application that serves a model. The engine is started with it; the server ends it."""

    @asynccontextmanager
    async def running(_app: FastAPI) -> AsyncIterator[None]:
        served.engine.start()
        yield

    app = FastAPI(
        title="thinslice",
        version=__version__,
        lifespan=running,
        docs_url=None,
        redoc_url=None,
        strict_content_type=False,
    )
    app.state.served = served
    app.state.renderer = page.Renderer()
    hosts, origins = (
        frozenset(map(str.lower, one)) for one in (settings.allow_host, settings.allow_origin)
    )
    # The last is the first to see a request.
    app.add_middleware(Intake, bounds=BodyBounds.of(served.engine.llm.plan.context))
    app.add_middleware(Guard, hosts=hosts, origins=origins, keys=keys)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=[*origins], allow_methods=["*"], allow_headers=["*"]
        )
    for one in _ROUTES:
        app.include_router(one.router)
    has_keys = bool(keys)
    app.openapi = cache(lambda: document(app, served.name, has_keys))  # type: ignore[method-assign]
    app.add_exception_handler(RequestValidationError, _misfit)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(ClientGoneError, _gone)
    for kind in (ApiError, ThinsliceError, OSError, MemoryError):
        app.add_exception_handler(kind, _failed)
    app.add_exception_handler(Exception, _bug)
    return app


def _response(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(request.scope["path"]), error.status, error.headers)


async def _misfit(request: Request, error: Exception) -> Response:
    """A body that is no JSON, or whose fields are no good: the first of what is wrong."""
    assert isinstance(error, RequestValidationError), "registered for these"
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _response(request, ApiError(400, f"the body is no JSON: {first['ctx']['error']}"))
    # Among the names of fields stand those of the types that one may have.
    place = [str(one) for one in first["loc"][1:] if str(one).isalnum() or "_" in str(one)]
    name = ".".join(one for one in place if one not in _TYPES) or None
    told = f"{name or 'the body'}: {first['msg'].lower()}"
    return _response(request, ApiError(400, told, name))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for these"
    told = {404: "there is no such path", 405: "this path has no such method"}
    return _response(
        request, ApiError(error.status_code, told.get(error.status_code, str(error.detail)))
    )


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_GONE)


async def _failed(request: Request, error: Exception) -> Response:
    return _response(request, told(error))


async def _bug(request: Request, _error: Exception) -> Response:
    """The error is raised on, into the log."""
    return _response(request, BUG)
