"""Drafting: who guesses at the next tokens of which sequence, and how many.

N-grams of the text so far are looked up first, for they cost nothing. A sequence whose last tokens
never came before is left to the model's prediction layer, where the plan has one. Each of the two
has a DraftLength of its own, which learns from what became of its drafts and of what rows cost, and
drafts nothing where that would be faster.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from itertools import compress

from thinslice.engine.advance import Advance
from thinslice.engine.draft_length import DraftLength, DraftReport, MeasuredSeconds
from thinslice.engine.mtp_drafter import CertainRows, MTPDrafter
from thinslice.engine.ngram import NgramDrafter
from thinslice.engine.sequence import Sequence
from thinslice.kernels.arrays import Floats
from thinslice.plan.cost import PREDICTION_ROWS_HELD
from thinslice.plan.memory_plan import DraftPlan


@dataclass(frozen=True)
class _Asked:
    """Who chose how much was drafted for a sequence, and the draft: the very list that it has."""

    lengths: list[DraftLength]
    draft: list[int]


class Drafting:
    """Drafts for all sequences of an engine.

    Args:
        mtp: the prediction layer, where the plan has it draft.

    Memory: what the plan calls ``drafting``.
    """

    def __init__(self, plan: DraftPlan, mtp: MTPDrafter | None) -> None:
        assert (plan.num_mtp_layers > 0) == (mtp is not None), "plan and drafter do not agree"
        self._length = plan.length
        self.mtp = mtp
        self._step_seconds = MeasuredSeconds(unknown=1.0)
        self._by_ngram = DraftLength(plan.length, self._step_seconds) if plan.uses_ngram else None
        self._by_mtp: DraftLength | None = None
        if mtp is not None:
            seconds = (self._step_seconds, mtp.round_seconds, mtp.rows_seconds)
            self._by_mtp = DraftLength(plan.length, *seconds)
        self._indexes: dict[int, NgramDrafter] = {}
        # By sequence, rows that the prediction layers have not all taken in; see _predict. What
        # was last made of them counts once the step that made it is committed.
        self._held: dict[int, CertainRows] = {}
        self._held_next: dict[int, CertainRows] = {}
        self._asked: dict[int, _Asked] = {}

    def propose(
        self, advances: Rows[Advance], hidden_TD: Floats | None, running: Rows[Sequence]
    ) -> list[list[int]]:
        """Drafts for each sequence of a step that goes on; a prediction layer takes in its rows.

        Nothing of the sequences is changed. Where this or the step is interrupted before
        ``commit``, it can be called again.

        Args:
            advances: what the step brought, not yet committed.
            hidden_TD: the residual stream of all that ran, where a prediction layer drafts.
            running: sequences that hold blocks; what is kept of others is let go.
        """
        num_other_rows = sum(one.tokens.count for one in advances if not one.new_ids)
        asked: list[list[DraftLength]] = [[] for _ in advances]
        drafts = self._look_up(advances, running, num_other_rows, asked)
        if self._by_mtp is not None:
            num_other_rows += sum(len(found) + 1 for found in drafts if found)
            left = [one.goes_on and not found for one, found in zip(advances, drafts, strict=True)]
            length = self._by_mtp.choose(sum(left), num_other_rows)
            for index in compress(range(len(left)), left):
                asked[index].append(self._by_mtp)
            assert hidden_TD is not None, "no residual stream for the prediction layer"
            self._held = {s.seq_id: self._held[s.seq_id] for s in running if self._is_held(s)}
            predicted = self._predict(advances, hidden_TD, [length * one for one in left])
            drafts = [found or draft for found, draft in zip(drafts, predicted, strict=True)]
        self._asked = {
            one.tokens.sequence.seq_id: _Asked(lengths, draft)
            for one, lengths, draft in zip(advances, asked, drafts, strict=True)
            if lengths
        }
        return drafts

    def commit(self) -> None:
        """The step that was last proposed for is going to be committed."""
        self._held = self._held_next

    def forget(self) -> None:
        """Nothing is in the blocks any more: let go of what is kept of every sequence."""
        self._indexes, self._asked = {}, {}
        self._held, self._held_next = {}, {}

    def num_held(self, sequence: Sequence) -> int:
        """Positions of a sequence that the prediction layer has not yet taken in."""
        held = self._held.get(sequence.seq_id)
        return 0 if held is None else held.num_rows

    def record(self, advances: Rows[Advance], seconds: float) -> None:
        """Learn from a step that ran drafts: what became of them, and how long it took."""
        if all(one.tokens.count == one.tokens.num_rows for one in advances):
            self._step_seconds.record(sum(one.tokens.count for one in advances), seconds)
        outcomes: dict[DraftLength, list[tuple[int, int]]] = {}
        for one in advances:
            if not one.new_ids:
                continue
            asked = self._asked.get(one.tokens.sequence.seq_id)
            if asked is None or asked.draft is not one.tokens.sequence.draft_token_ids:
                continue
            for length in asked.lengths:
                # Only the last one asked has drafted; those before it chose not to.
                num_drafts = one.tokens.num_drafts if length is asked.lengths[-1] else 0
                outcome = (num_drafts, min(one.num_accepted, num_drafts))
                outcomes.setdefault(length, []).append(outcome)
        for length, of_length in outcomes.items():
            length.record(of_length, seconds)

    def reports(self) -> dict[str, DraftReport]:
        """What was done so far by ``ngram`` and ``mtp``, those of them that draft."""
        both = {"ngram": self._by_ngram, "mtp": self._by_mtp}
        return {name: length.report() for name, length in both.items() if length is not None}

    def _look_up(
        self,
        advances: Rows[Advance],
        running: Rows[Sequence],
        num_other_rows: int,
        asked: list[list[DraftLength]],
    ) -> list[list[int]]:
        """Drafts by n-grams; ``asked`` notes for whom there was one to be had."""
        if self._by_ngram is None:
            return [[] for _ in advances]
        alive = {sequence.seq_id for sequence in running}
        self._indexes = {key: one for key, one in self._indexes.items() if key in alive}
        found = [self._matches(one) if one.goes_on else [] for one in advances]
        length = self._by_ngram.choose(sum(map(bool, found)), num_other_rows)
        for index in compress(range(len(found)), found):
            asked[index].append(self._by_ngram)
        return [draft[:length] for draft in found]

    def _matches(self, advance: Advance) -> list[int]:
        """As many tokens as may be drafted, where the last ones of the sequence came before."""
        sequence = advance.tokens.sequence
        index = self._indexes.get(sequence.seq_id)
        # A step that was interrupted leaves tokens in it that were not committed.
        if index is None or index.num_tokens > sequence.num_tokens:
            index = NgramDrafter(sequence.max_positions)
            self._indexes[sequence.seq_id] = index
        index.extend(sequence.tokens(index.num_tokens, sequence.num_tokens))
        index.extend(advance.new_ids)
        return index.propose(min(self._length, _most_drafts(advance)))

    def _predict(
        self,
        advances: Rows[Advance],
        hidden_TD: Floats,
        lengths: list[int],
    ) -> list[list[int]]:
        """Drafts by the prediction layer, of these lengths.

        Rows of sequences that it drafts nothing for wait, up to a number. And of each sequence the
        last ones wait that further layers cannot take yet: they are all taken in once more.
        """
        assert self.mtp is not None
        held, taken = dict(self._held), list[CertainRows]()
        places: dict[int, int] = {}
        start, num_waiting = 0, len(self.mtp.layers) - 1
        for index, one in enumerate(advances):
            hidden_of_one, start = hidden_TD[start:], start + one.tokens.count
            sequence = one.tokens.sequence
            before = held.pop(sequence.seq_id, None)
            if one.error is not None:
                continue
            rows = self._rows_of(one, hidden_of_one, lengths[index])
            num_rows = rows.num_rows + (0 if before is None else before.num_rows)
            if rows.num_drafts == 0 and num_rows < PREDICTION_ROWS_HELD:
                held[sequence.seq_id] = _behind(before, rows).last(num_rows)
                continue
            rows = _behind(before, rows)
            places[index] = len(taken)
            taken.append(rows)
            if num_waiting > 0:
                held[sequence.seq_id] = rows.last(num_waiting)
        drafts = self.mtp.propose(taken) if taken else []
        self._held_next = held
        return [drafts[places[i]] if i in places else [] for i in range(len(advances))]

    def _is_held(self, sequence: Sequence) -> bool:
        """Whether rows of a sequence wait; those of one that lost its blocks meanwhile do not."""
        rows = self._held.get(sequence.seq_id)
        return rows is not None and sequence.num_held == rows.num_rows

    def _rows_of(self, advance: Advance, hidden_TD: Floats, num_drafts: int) -> CertainRows:
        """What the prediction layer takes of a sequence; ``hidden_TD`` begins with its rows."""
        assert self.mtp is not None
        sequence, count = advance.tokens.sequence, advance.num_certain
        num_positions = sequence.num_computed + count
        room = len(sequence.blocks) * self.mtp.block_size - num_positions
        return CertainRows(
            start=sequence.num_computed,
            hidden_TD=hidden_TD[:count],
            next_token_ids=advance.next_token_ids,
            blocks=sequence.blocks,
            num_drafts=min(num_drafts, _most_drafts(advance), room + 1),
        )


def _most_drafts(advance: Advance) -> int:
    """Drafts that could all be accepted, with one token more, before the sequence is at its end."""
    sequence = advance.tokens.sequence
    return max(sequence.max_positions - sequence.num_tokens - len(advance.new_ids) - 1, 0)


def _behind(before: CertainRows | None, rows: CertainRows) -> CertainRows:
    """Rows with those before them that waited."""
    if before is None:
        return rows
    return replace(
        rows,
        start=before.start,
        waited_TD=before.hidden_TD,
        next_token_ids=[*before.next_token_ids, *rows.next_token_ids],
    )
