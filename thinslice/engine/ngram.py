"""Draft by prompt lookup: what followed the last few tokens when they came before.

Sources: apoorvumang/prompt-lookup-decoding; vLLM's ngram_proposer.py, which searches the whole
context at each step where this keeps an index, and llama.cpp's ngram-map, which keeps one.
"""

from array import array
from collections.abc import Iterable

from thinslice.plan.cost import ngram_table_size


class NgramDrafter:
    """Drafts for one sequence from its own prompt and completion.

    A draft follows the most recent earlier occurrence of the longest suffix that has one. Only
    tokens that are certain are added, so nothing ever has to be taken back.

    Args:
        capacity: the most tokens the sequence can come to hold.
        max_n, min_n: lengths of the suffixes looked up, longest first.

    Memory: ``plan.cost.ngram_index_bytes``, all of it at once.
    Time: O(max_n - min_n + 1) expected, for a token as for a draft.
    """

    def __init__(self, capacity: int, max_n: int = 4, min_n: int = 2) -> None:
        assert 0 < min_n <= max_n, f"n-grams of {min_n}..{max_n} tokens"
        self.lengths = range(max_n, min_n - 1, -1)
        self._tokens = array("i", [0]) * capacity
        self._num_tokens = 0
        # One table for each length: where an n-gram last ended, 0 for none. Open addressing, at
        # most half full; an n-gram is told from others by the tokens before its end.
        self._tables = {n: array("i", [0]) * ngram_table_size(capacity) for n in self.lengths}

    @property
    def num_tokens(self) -> int:
        """Tokens added so far."""
        return self._num_tokens

    def extend(self, token_ids: Iterable[int]) -> None:
        """Add tokens of the prompt, or accepted ones."""
        for token_id in token_ids:
            end = self._num_tokens
            # The n-grams that end here have a follower now, and count from now on.
            for n, table in self._tables.items():
                if n <= end:
                    table[self._place(n, end)] = end
            self._tokens[end] = token_id
            self._num_tokens += 1

    def propose(self, count: int) -> list[int]:
        """``count`` tokens that may come next, or none where no suffix came before.

        Where the earlier occurrence reaches into the suffix, as in a loop, the draft goes on with
        its own first tokens.
        """
        num_tokens = self._num_tokens
        for n, table in self._tables.items():
            end = table[self._place(n, num_tokens)] if n <= num_tokens else 0
            if end:
                period = num_tokens - end
                return [self._tokens[end + i % period] for i in range(count)]
        return []

    def _place(self, n: int, end: int) -> int:
        """Where the table of length ``n`` has the n-gram before ``end``, or would have it."""
        tokens, table = self._tokens, self._tables[n]
        ngram = tokens[end - n : end]
        place = hash(tuple(ngram)) % len(table)
        while (other := table[place]) and tokens[other - n : other] != ngram:
            place = (place + 1) % len(table)
        return place
