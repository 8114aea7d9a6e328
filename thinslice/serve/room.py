"""What a server comes to hold beside its model, for the plan to leave it."""

from dataclasses import replace

from thinslice.config import EngineSettings
from thinslice.serve.connection import CONNECTION_BYTES, connections_for
from thinslice.serve.intake import BodyBounds
from thinslice.serve.settings import ServerSettings
from thinslice.units import MIB

# What rendering the page's answers takes, one at a time: 8 MiB of the worst texts of the greatest
# length, and 3 MiB of the lexers for code, which come when they are first needed.
_RENDERING_BYTES = 11 * MIB


def with_room(settings: EngineSettings, server: ServerSettings) -> EngineSettings:
    """The settings of a model that is served, with room for connections, bodies and the page, and
    for what answers of a given form are followed by, unless these are off.

    The first two are bounds that the server holds; see Connection and Intake.
    """
    connections = connections_for(server.max_waiting + settings.max_num_seqs)
    without_context, with_a_token = (BodyBounds.of(count).room_bytes for count in (0, 1))
    return replace(
        settings,
        reserve=settings.reserve_bytes
        + connections * CONNECTION_BYTES
        + without_context
        + _RENDERING_BYTES,
        reserve_per_token=settings.reserve_per_token + with_a_token - without_context,
        forms="reserved" if settings.forms == "auto" else settings.forms,
    )
