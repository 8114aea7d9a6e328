"""Tenants that wait go in turn: one that asks much holds back nobody else."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence as Ordered

import pytest

from tests.engines import run_all, tiny_engine
from tests.unit.engine.test_scheduler import new_sequence, run_step, small_plan
from thinslice.config import SamplingParams, Scheduling
from thinslice.engine.engine import Engine
from thinslice.engine.scheduler import Scheduler, Shares
from thinslice.engine.sequence import Sequence, Status
from thinslice.errors import RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def admitted(scheduler: Scheduler) -> list[Sequence]:
    """All, in the order in which they are first let in."""
    found: list[Sequence] = []
    while scheduler.has_work:
        before = set(map(id, scheduler.running))
        scheduled = [tokens.sequence for tokens in run_step(scheduler)]
        new = [one for one in scheduled if id(one) not in before and one not in found]
        found += sorted(new, key=lambda one: one.order)
    return found


def tenants_of(sequences: Ordered[Sequence]) -> str:
    return "".join(one.scheduling.tenant for one in sequences)


def test_those_that_wait_go_in_turn() -> None:
    scheduler = Scheduler(small_plan(100))
    for seq_id, tenant in enumerate("aaaaaaaa" + "bbb" + "c"):
        scheduler.add(new_sequence(seq_id, 2, 2, tenant=tenant))
    found = admitted(scheduler)
    assert tenants_of(found) == "abcabab" + "aaaaa"
    for tenant in "abc":
        own = [one.seq_id for one in found if one.scheduling.tenant == tenant]
        assert own == sorted(own)


def test_one_tenant_alone_is_first_come_first_served() -> None:
    scheduler = Scheduler(small_plan(100))
    for seq_id in range(20):
        scheduler.add(new_sequence(seq_id, 2, 2))
    assert [one.seq_id for one in admitted(scheduler)] == [*range(20)]


def test_who_was_idle_has_saved_up_nothing() -> None:
    scheduler = Scheduler(small_plan(100))
    for seq_id in range(8):
        scheduler.add(new_sequence(seq_id, 2, 12, tenant="a"))
    run_step(scheduler)
    for seq_id in range(8, 16):
        scheduler.add(new_sequence(seq_id, 2, 2, tenant="b"))
    running = [*scheduler.running]
    found = [one for one in admitted(scheduler) if one not in running]
    assert tenants_of(found) == "babababa" + "bbbb"


def test_one_that_comes_one_by_one_does_not_pass_the_others() -> None:
    """Its queue is empty whenever one of it is admitted."""
    shares, queue = Shares(), list[tuple[int, str]]()
    queue += [(shares.turn_of(Scheduling(tenant="a")), "a") for _ in range(50)]
    order = ""
    for _ in range(60):
        if not any(tenant == "b" for _, tenant in queue):
            queue.append((shares.turn_of(Scheduling(tenant="b")), "b"))
        queue.sort()
        turn, tenant = queue.pop(0)
        shares.note_admitted(Scheduling(tenant=tenant), turn)
        order += tenant
    assert abs(order.count("a") - order.count("b")) <= 1


def test_priorities_come_first_and_have_turns_of_their_own() -> None:
    scheduler = Scheduler(small_plan(100))
    asked = [("a", 1)] * 6 + [("b", 1)] * 2 + [("a", 0)] * 3 + [("b", 0)]
    for seq_id, (tenant, priority) in enumerate(asked):
        scheduler.add(new_sequence(seq_id, 2, 2, tenant=tenant, priority=priority))
    found = admitted(scheduler)
    assert [one.scheduling.priority for one in found] == [0] * 4 + [1] * 8
    assert tenants_of(found) == "abaa" + "abab" + "aaaa"


@pytest.mark.parametrize("seed", range(50))
def test_nobody_has_three_admitted_while_another_waits_for_one(seed: int) -> None:
    """Whatever comes and ends."""
    rng, shares = random.Random(seed), Shares()
    shares_of = {tenant: Scheduling(tenant=tenant) for tenant in "abcde"}
    queue: list[tuple[int, int, str]] = []
    passed: dict[str, Counter[str]] = defaultdict(Counter)
    for number in range(400):
        tenant = rng.choice("aaaaabbcde")
        waits = {one for _, _, one in queue}
        queue.append((shares.turn_of(shares_of[tenant]), number, tenant))
        if tenant not in waits:
            passed[tenant].clear()
        if rng.random() < 0.6:
            queue.sort()
            turn, _, first = queue.pop(0)
            shares.note_admitted(shares_of[first], turn)
            passed[first].clear()
            for other in {one for _, _, one in queue} - {first}:
                passed[other][first] += 1
                assert passed[other][first] <= 2


def test_turns_are_told_apart_from_the_first_on() -> None:
    shares, a, b = Shares(), Scheduling(tenant="a"), Scheduling(tenant="b")
    assert [shares.turn_of(a) for _ in range(3)] == [0, 1, 2]
    shares.note_admitted(a, 0)
    assert shares.turn_of(b) == 0
    shares.note_admitted(a, 5)
    shares.note_admitted(a, 4)
    assert [shares.turn_of(b), shares.turn_of(a), shares.turn_of(a)] == [5, 5, 6]
    assert shares.turn_of(Scheduling(tenant="a", priority=1)) == 0


@pytest.mark.parametrize("is_admitted", [True, False])
def test_a_sweep_forgets_nobody_who_has_had_the_turn_that_is_admitted(is_admitted: bool) -> None:
    shares, early = Shares(), Scheduling(tenant="early")
    shares.turn_of(early)
    if is_admitted:
        shares.note_admitted(early, 0)
    for number in range(200):
        shares.turn_of(Scheduling(tenant=str(number)))
    assert shares.turn_of(early) == 1


def test_sweeps_come_when_the_entries_have_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    at: list[int] = []
    sweep = Shares._sweep

    def seen(self: Shares) -> None:
        at.append(len(self._last))
        sweep(self)

    monkeypatch.setattr(Shares, "_sweep", seen)
    shares = Shares()
    for _ in range(2):
        for number in range(1000):
            shares.turn_of(Scheduling(tenant=str(number)))
        assert at == [65, 131, 263, 527]
        at.clear()
        shares.clear()
    # Where a sweep leaves few, the next does not come earlier than the first.
    for number in range(200):
        scheduling = Scheduling(tenant=str(number))
        shares.note_admitted(scheduling, shares.turn_of(scheduling) + 1)
    assert at[0] == 65
    assert at[1] == 65


def test_many_tenants_leave_nothing_behind() -> None:
    shares = Shares()
    for number in range(10_000):
        scheduling = Scheduling(tenant=str(number))
        shares.note_admitted(scheduling, shares.turn_of(scheduling) + 1)
    assert len(shares._last) <= 128
    shares.clear()
    assert shares.turn_of(Scheduling()) == 0


def test_turns_begin_anew_where_nothing_is_left() -> None:
    scheduler = Scheduler(small_plan(100))
    for _ in range(3):
        scheduler.add(new_sequence(0, 2, 2, tenant="a"))
        assert scheduler.waiting[0].turn == 0
        admitted(scheduler)


def prompt(seed: int, length: int = 12) -> list[int]:
    return [random.Random(seed).randrange(3, 64) for _ in range(length)]


def ask(engine: Engine, tenant: str, seed: int, **more: object) -> Sequence:
    scheduling = Scheduling(tenant=tenant, **more)  # type: ignore[arg-type]
    return engine.add_request(prompt(seed), GREEDY, scheduling=scheduling)


def test_one_request_waits_for_few_steps_beside_two_hundred() -> None:
    engine = tiny_engine()
    many = [ask(engine, "a", seed) for seed in range(200)]
    for _ in range(10):
        engine.step()
    one = ask(engine, "b", 1000)
    num_steps = 0
    while one.status is not Status.FINISHED:
        engine.step()
        num_steps += 1
    # A place is free once one of four that run has ended: four tokens, of a prompt in two chunks.
    assert num_steps <= 2 * (4 + 2)
    assert sum(each.status is Status.FINISHED for each in many) < 30
    run_all(engine)


def test_blocks_run_out_and_all_write_what_they_write_alone() -> None:
    """Displaced or not, in any order: the same tokens, and whose turn is early is not displaced."""
    alone = tiny_engine()
    expected = []
    for seed in range(24):
        sequence = alone.add_request(prompt(seed), GREEDY)
        run_all(alone)
        expected.append(sequence.completion_token_ids)
    engine = tiny_engine(num_kv_blocks=9, context=36)
    found = [ask(engine, "a" if seed < 20 else "b", seed) for seed in range(24)]
    run_all(engine)
    assert engine.scheduler.num_preemptions > 0
    assert [one.completion_token_ids for one in found] == expected
    assert found[20].num_preemptions == 0


def test_a_deadline_holds_while_another_s_turn_is_waited_for() -> None:
    engine = tiny_engine(max_num_seqs=1)
    now = [0.0]
    engine.clock = lambda: now[0]
    ask(engine, "a", 0)
    late = [ask(engine, "a", seed, deadline_s=5.0) for seed in range(1, 4)]
    engine.step()
    now[0] = 5.0
    run_all(engine)
    assert [one.finish_reason for one in late] == ["deadline"] * 3


def test_admission_is_noted_with_its_time() -> None:
    engine = tiny_engine(max_num_seqs=1)
    now = [1.0]
    engine.clock = lambda: now[0]
    first, second = ask(engine, "a", 0), ask(engine, "a", 1)
    now[0] = 2.0
    engine.step()
    assert (first.admitted_at, second.admitted_at) == (2.0, None)
    now[0] = 3.0
    run_all(engine)
    assert second.admitted_at == 3.0


def test_a_tenant_is_a_text() -> None:
    with pytest.raises(RequestError, match="tenant is no text"):
        Scheduling(tenant=3)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="tenant is no text"):
        Scheduling(tenant="a" * 2000)
