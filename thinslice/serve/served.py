"""What the routes of a server share."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from thinslice import __version__
from thinslice.config import Scheduling
from thinslice.engine.async_engine import AsyncEngine
from thinslice.serve.bodies import FORMS_ELSEWHERE, REFUSED
from thinslice.serve.errors import ApiError, log
from thinslice.serve.keys import Key

_MAX_NAMED = 1000
# Of a name: what may be kept, and what the log tells.
_LONGEST_NAME = 60
# Clients send these for what they do not ask for.
_NOTHING: tuple[object, ...] = (None, [], {}, "")
FINGERPRINT = f"thinslice-{__version__}"


@dataclass
class Served:
    """A model that is served, and by what.

    Attributes:
        name: under which requests name the model.
        loaded_at: seconds since 1970.
        unknown_fields: of bodies, that the log has named already, as far as it names them.
    """

    engine: AsyncEngine
    name: str
    loaded_at: int = field(default_factory=lambda: int(time.time()))
    unknown_fields: set[str] = field(default_factory=set)

    def check_model(self, name: str) -> None:
        """Errors: ApiError 404 for the name of another model."""
        if name != self.name:
            told = f"the model {name!r:.200} is not served here; this server has {self.name!r}"
            raise ApiError(404, told, "model", "model_not_found")

    def check_others(self, fields: Mapping[str, object] | None) -> None:
        """Look at the fields of a body that it does not name itself: of those that nobody knows,
        each is named in the log once.

        Errors: ApiError 400 for one that would change the answer.
        """
        for name, value in (fields or {}).items():
            if name in REFUSED:
                if value not in (*_NOTHING, *REFUSED[name]):
                    instead = "; structured_outputs is" if name in FORMS_ELSEWHERE else ""
                    told = f"{name} is not supported here{instead}"
                    raise ApiError(400, told, name, "unsupported_parameter")
                continue
            shown = name[:_LONGEST_NAME]
            if shown not in self.unknown_fields and len(self.unknown_fields) < _MAX_NAMED:
                self.unknown_fields.add(shown)
                log.warning("the field %r of a request is not known and has no effect", shown)


def _served(request: Request) -> Served:
    served: Served = request.app.state.served
    return served


TheServed = Annotated[Served, Depends(_served)]


def scheduling_of(request: Request) -> Scheduling:
    """How a request stands beside others: who has another key shares no cached prefixes with it,
    and waits in another queue."""
    key: Key | None = request.state.key
    name = "" if key is None else key.name
    return Scheduling(cache_salt=name, tenant=name)
