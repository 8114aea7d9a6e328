"""Whether the server is well, and what it takes."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from thinslice.memory.meter import current_rss_bytes, peak_rss_bytes
from thinslice.serve.served import TheServed

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(served: TheServed) -> Response:
    """Whether requests are taken."""
    is_open = served.engine.is_open
    return JSONResponse({"status": "ready" if is_open else "closing"}, 200 if is_open else 503)


@router.get("/plan")
async def plan(served: TheServed) -> dict[str, Any]:
    """The memory plan, what the process holds now and has held at most, in bytes, and whether the
    model is known to think."""
    return {
        "model": served.name,
        "plan": served.engine.llm.plan.to_dict(),
        "rss_bytes": current_rss_bytes(),
        "peak_bytes": peak_rss_bytes(),
        "thinks": served.engine.llm.thinks,
    }
