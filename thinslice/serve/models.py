"""/v1/models: what is served."""

from typing import Any

from fastapi import APIRouter

from thinslice.serve.served import Served, TheServed

router = APIRouter()


@router.get("/v1/models")
async def models(served: TheServed) -> dict[str, Any]:
    """The models of this server."""
    return {"object": "list", "data": [_model(served)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, served: TheServed) -> dict[str, Any]:
    """One model of this server."""
    served.check_model(name)
    return _model(served)


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.loaded_at,
        "owned_by": "thinslice",
        "max_model_len": served.engine.llm.plan.context,
    }
