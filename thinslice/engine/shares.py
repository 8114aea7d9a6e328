"""Whose sequence is next where several tenants have some waiting: each has one admitted in turn.

Source: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), with a cost of one for each
sequence: a sequence's turn is known when it arrives and never changes, so that all sequences have
one order, by which they are admitted, served and displaced.
"""

from thinslice.config import Scheduling

# Entries beyond which those that say nothing any more are looked for.
_FEWEST = 64


class Shares:
    """Gives sequences their turns, within each priority.

    A tenant's next sequence comes a turn after its last one, and none comes before the turn that is
    being admitted: who was idle has saved up nothing. With one tenant alone it is first come first
    served.

    Time: constant, but for a sweep when the entries have doubled. Memory: an entry for each tenant
    whose turns lie ahead.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[int, str], int] = {}
        self._now: dict[int, int] = {}
        self._sweep_at = _FEWEST

    def turn_of(self, scheduling: Scheduling) -> int:
        """The turn of a sequence that arrives."""
        place = (scheduling.priority, scheduling.tenant)
        turn = self._now.get(scheduling.priority, 0)
        if place in self._last:
            turn = max(turn, self._last[place] + 1)
        self._last[place] = turn
        if len(self._last) > self._sweep_at:
            self._sweep()
        return turn

    def note_admitted(self, scheduling: Scheduling, turn: int) -> None:
        """A sequence with this turn runs: none that arrives comes before it."""
        self._now[scheduling.priority] = max(self._now.get(scheduling.priority, 0), turn)

    def clear(self) -> None:
        """Nothing is left: turns begin anew."""
        self._last.clear()
        self._now.clear()
        self._sweep_at = _FEWEST

    def _sweep(self) -> None:
        """Forget tenants whose next turn would be the one that is admitted anyway."""
        now = self._now
        self._last = {
            place: turn for place, turn in self._last.items() if turn >= now.get(place[0], 0)
        }
        self._sweep_at = max(2 * len(self._last), _FEWEST)
