"""What may wait: completions, tokens of prompts, and a place for whoever comes next."""

import pytest

from tests.unit.engine.test_scheduler import new_sequence, small_plan
from thinslice.engine.scheduler import Scheduler
from thinslice.engine.sequence import Scored
from thinslice.engine.waiting_room import Arrival, WaitingRoom
from thinslice.errors import BusyError, RequestError


def room(max_waiting: int = 16, context: int = 64) -> WaitingRoom:
    return WaitingRoom(Scheduler(small_plan(100)), max_waiting, context)


def enter(found: WaitingRoom, tenant: str, count: int = 1, num_tokens: int = 0) -> bool:
    arrival = Arrival(tenant, count, num_tokens)
    try:
        found.check(arrival)
    except BusyError:
        return False
    found.handed_over.append(arrival)
    return True


def test_without_names_all_places_may_be_taken() -> None:
    found = room()
    assert enter(found, "", 16)
    assert not enter(found, "")
    assert [enter(room(1), "") for _ in range(2)] == [True, True]


def test_one_that_fills_its_half_keeps_nobody_out() -> None:
    found = room()
    counts = {}
    for tenant in "abcde":
        while enter(found, tenant):
            counts[tenant] = counts.get(tenant, 0) + 1
    assert counts == {"a": 8, "b": 4, "c": 2, "d": 1, "e": 1}
    with pytest.raises(BusyError, match="16 completions wait and 1 more are asked for; at most 16"):
        found.check(Arrival("f", 1))


def test_who_has_its_share_is_told_whose_it_is() -> None:
    found = room()
    assert enter(found, "a", 8)
    with pytest.raises(BusyError, match="8 completions of this key wait and 1 more are asked for"):
        found.check(Arrival("a", 1))
    assert enter(found, "b", 4)
    assert not enter(found, "b", 1)


@pytest.mark.parametrize(("tenant", "most"), [("a", 8), ("", 16)])
def test_what_never_finds_room_is_not_told_to_try_again(tenant: str, most: int) -> None:
    with pytest.raises(RequestError, match=f"at once; at most {most} may wait") as caught:
        room().check(Arrival(tenant, most + 1))
    assert not isinstance(caught.value, BusyError)
    assert enter(room(), tenant, most)


def test_tokens_are_shared_in_the_same_way() -> None:
    found = room(1000, 100_000)
    assert found.max_tokens == 400_000
    assert found.most_of("a") == (500, 200_000)
    assert found.most_of("") == (1000, 400_000)
    assert enter(found, "a", 1, 100_000)
    assert enter(found, "a", 1, 100_000)
    assert not enter(found, "a", 1, 1)
    assert enter(found, "b", 1, 100_000)  # a prompt as long as the context
    assert not enter(found, "b", 1, 1)
    assert enter(found, "c", 1, 100_000)
    with pytest.raises(BusyError, match="400000 tokens wait and 1 more are asked for"):
        found.check(Arrival("d", 1, 1))
    assert room().max_tokens == 65_536


def test_a_place_of_its_own_may_be_the_last() -> None:
    found = room(1)
    assert found.most_of("a")[0] == 1
    assert enter(found, "a")
    assert not enter(found, "b")


def test_what_the_scheduler_has_counts_once_for_each_prompt() -> None:
    scheduler = Scheduler(small_plan(100))
    found = WaitingRoom(scheduler, 16, 64)
    found.max_tokens = 100
    samples = [new_sequence(seq_id, 20, 2, tenant="a") for seq_id in range(3)]
    for one in samples:
        one.prompt_token_ids = samples[0].prompt_token_ids
        scheduler.add(one)
    scheduler.add(new_sequence(9, 30, 2))
    with pytest.raises(BusyError, match="50 tokens wait and 51 more"):
        found.check(Arrival("", 1, 51))
    found.check(Arrival("", 12, 50))
    with pytest.raises(BusyError, match="4 completions wait and 13 more"):
        found.check(Arrival("", 13, 1))
    with pytest.raises(BusyError, match="20 tokens of this key wait and 16 more"):
        found.check(Arrival("a", 1, 16))
    found.check(Arrival("a", 1, 15))


def test_what_is_scored_first_has_the_place_of_one_of_its_completions() -> None:
    scheduler = Scheduler(small_plan(100))
    found = WaitingRoom(scheduler, 4, 64)
    scored, *completions = (new_sequence(number, 20, 2) for number in range(4))
    scored.scored = Scored(1, 0)
    scheduler.add(scored)
    for one in completions:
        one.leader, one.prompt_token_ids = scored, scored.prompt_token_ids
    found.check(Arrival("", 3))
    scheduler.add(completions[0])
    found.check(Arrival("", 3, found.max_tokens - 20))
    for one in completions[1:]:
        scheduler.add(one)
    found.check(Arrival("", 1, found.max_tokens - 20))
    with pytest.raises(BusyError):
        found.check(Arrival("", 2))
    found.check(Arrival("", 0))
