"""NewSequences: makes an engine's sequences, and has the room that they take promised."""

import itertools
import os
import weakref
from collections.abc import Callable

from thinslice.config import SamplingParams, Scheduling
from thinslice.engine.checks import max_positions
from thinslice.engine.draws import Draws
from thinslice.engine.logprobs import Logprobs
from thinslice.engine.processors import LogitsProcessor
from thinslice.engine.results import Held, ResultsRoom
from thinslice.engine.sequence import Scored, Sequence

_LARGEST_SEED = (1 << 63) - 1


class NewSequences:
    """Makes sequences that have been checked. Safe in any thread: nothing runs yet.

    Args:
        capacity: the most positions of a sequence.
    """

    def __init__(self, capacity: int, results: ResultsRoom) -> None:
        self._capacity = capacity
        self._results = results
        self._ids = itertools.count()

    def samples(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        scheduling: Scheduling,
        processors: Callable[[], tuple[LogitsProcessor, ...]],
    ) -> list[Sequence]:
        """``params.n`` sequences of one prompt, of which the first leads the others.

        Errors: what ``processors`` raises.
        """
        seed = int.from_bytes(os.urandom(7), "little") if params.seed is None else params.seed
        sequences = [
            Sequence(
                seq_id=next(self._ids),
                prompt_token_ids=prompt_token_ids,
                params=params,
                max_positions=max_positions(prompt_token_ids, params, self._capacity),
                draws=Draws((seed + index) & _LARGEST_SEED),
                scheduling=scheduling,
                more_processors=processors(),
            )
            for index in range(params.n)
        ]
        for sequence in sequences[1:]:
            sequence.leader = sequences[0]
        return sequences

    def scored(self, token_ids: list[int], asked: Scored, scheduling: Scheduling) -> Sequence:
        """A sequence of a text that is scored.

        Errors: BusyError where the plan has no room for what is to be told.
        """
        sequence = Sequence(
            seq_id=next(self._ids),
            prompt_token_ids=token_ids,
            params=SamplingParams(temperature=0.0),
            max_positions=len(token_ids),
            draws=Draws(0),
            scored=asked,
            scheduling=scheduling,
        )
        held = Held(self._results)
        weakref.finalize(sequence, held.release).atexit = False
        per_token = Logprobs.bytes_per_token(asked.num_top)
        held.need(per_token * (len(token_ids) - asked.start), "log-probabilities")
        return sequence
