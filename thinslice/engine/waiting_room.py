"""What may wait to be begun: so many completions, so many tokens, and still room for others."""

from dataclasses import dataclass

from thinslice.config import about
from thinslice.engine.scheduler import Scheduler
from thinslice.errors import BusyError, RequestError

# A token of a prompt takes up to 36 bytes, as a number of Python's in a list: these take 2.3 of the
# 4 MiB that every plan keeps for what callers hold. Of long contexts some prompts may wait anyway.
_TOKENS = 65_536
_CONTEXTS = 4


@dataclass(frozen=True)
class Arrival:
    """What comes to wait.

    Attributes:
        count: completions.
        num_tokens: of the prompt, which they share.
    """

    tenant: str
    count: int
    num_tokens: int = 0


class WaitingRoom:
    """Completions that wait, between those who hand them over and the scheduler that begins them.

    A tenant with a name may have as much waiting as it leaves to others: one alone half of all, and
    whoever comes then still half of the rest. So nobody keeps another out.
    Source: dynamic queue thresholds (Choudhury and Hahne, Transactions on Networking 1998).

    Whoever calls holds the lock of those who hand over.

    Args:
        context: of the model, in tokens.

    Attributes:
        max_tokens: the most tokens of prompts that may wait, as they take memory.
        handed_over: what has not come to the scheduler yet.
    """

    def __init__(self, scheduler: Scheduler, max_waiting: int, context: int) -> None:
        self._scheduler = scheduler
        self.max_waiting = max_waiting
        self.max_tokens = max(_TOKENS, _CONTEXTS * context)
        self.handed_over: list[Arrival] = []

    def most_of(self, tenant: str) -> tuple[int, int]:
        """Completions, and tokens of prompts, that may come at once where nobody else waits."""
        share = 2 if tenant else 1
        return max(self.max_waiting // share, 1), self.max_tokens // share

    def check(self, arrival: Arrival) -> None:
        """Errors: BusyError where there is no room for more; RequestError where there never is."""
        if not arrival.count:
            return
        if arrival.count > (most := self.most_of(arrival.tenant)[0]):
            told = (
                f"{arrival.count} completions are asked for at once; at most {most} may wait here"
            )
            raise about("n", RequestError(told))
        waiting = self._waiting()
        own = [one for one in waiting if one.tenant == arrival.tenant]
        # The first of a tenant's may take the last place.
        is_shared = bool(arrival.tenant) and (bool(own) or arrival.count > 1)
        for what, count_of, most in (
            ("completions", _completions, self.max_waiting),
            ("tokens", _tokens, self.max_tokens),
        ):
            total, more = sum(map(count_of, waiting)), count_of(arrival)
            if total + more > most:
                told = f"{total} {what} wait and {more} more are asked for; at most {most} may wait"
                raise BusyError(f"{told}: try again later")
            mine = sum(map(count_of, own))
            if is_shared and mine + more > most - total - more:
                told = f"{mine} {what} of this key wait and {more} more are asked for"
                raise BusyError(f"{told}, which leave too few of {most} to others: try again later")

    def _waiting(self) -> list[Arrival]:
        """All that wait; the completions of a prompt share its tokens, and one of them the place of
        what scores it before."""
        found, seen = [*self.handed_over], set[int]()
        waiting = [*self._scheduler.waiting]
        leaders = {id(one.leader) for one in waiting}
        for one in waiting:
            if one.scored is not None and id(one) in leaders:
                continue
            prompt = one.prompt_token_ids
            num_tokens = 0 if id(prompt) in seen else len(prompt)
            seen.add(id(prompt))
            found.append(Arrival(one.scheduling.tenant, 1, num_tokens))
        return found


def _completions(arrival: Arrival) -> int:
    return arrival.count


def _tokens(arrival: Arrival) -> int:
    return arrival.num_tokens
