"""Numbers that go wrong are seen by all ranks before the update, named, and what can be repaired is."""

import functools
import itertools
import math

import numpy as np
import pytest
from mpi4py import MPI
from support.hard_messages import fewer_steps
from support.small_training import Training, owned_weights

from hpcpipe.config.schema import GuardConfig
from hpcpipe.errors import ExitCode, Interruption, NumericsError, RankError, Rewind
from hpcpipe.faults import hooks
from hpcpipe.faults.inject import Injector
from hpcpipe.faults.parse import parse
from hpcpipe.mpi.grid import make_grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.schedule.build import GENERATORS
from hpcpipe.train.guard import Surroundings
from hpcpipe.train.guard_state import split_state
from hpcpipe.train.history import History, share_history
from hpcpipe.train.parts import parts_of
from hpcpipe.train.stage_tensors import plan_model

pytestmark = pytest.mark.mpi(min_size=2)

STEPS = max(4, fewer_steps(4))
CHOICES = {"microbatches": 8, "lanes": 8}


@pytest.fixture(autouse=True)
def no_faults_are_left():
    yield
    hooks.active = None


def inject(text, comm):
    """Let faults happen from now on."""
    hooks.active = Injector(parse(text), comm.rank)
    hooks.active.rank = comm.rank


def figures(results):
    return [(result.loss, result.grad_norm) for result in results]


@functools.cache
def undisturbed():
    """Return what one process gets if nothing goes wrong: figures and weights after each step."""
    training = Training(MPI.COMM_SELF, 1, 1, **CHOICES)
    found = []
    for _ in range(STEPS):
        results = figures(training.run(1))
        found.append((results[0], owned_weights(training.state)))
    training.close()
    return found


class Told:
    """The events that were told to this rank."""

    def __init__(self):
        self.events = []

    def __call__(self, event, **facts):
        self.events.append((event, facts))

    def named(self, name):
        return [facts for event, facts in self.events if event == name]


def start(comm, pipeline, data, recovers=True, history=None, **guard):
    told = Told()
    surroundings = Surroundings(history or History(), told, recovers)
    training = Training(comm, pipeline, data, guard=GuardConfig(**guard), surroundings=surroundings, **CHOICES)
    return training, told


def assert_as_undisturbed(training, results):
    assert figures(results) == [entry for entry, _ in undisturbed()[: len(results)]]
    expected = undisturbed()[len(results) - 1][1]
    found = owned_weights(training.state)
    assert found and all(expected[name] == content for name, content in found.items())


def grids(comm):
    """All ranks as one pipeline, and as replicas where that gives the same bits."""
    yield comm.size, 1
    if comm.size & (comm.size - 1) == 0:
        yield 1, comm.size
        if comm.size >= 4:
            yield comm.size // 2, 2


def assert_alike(comm, told):
    """All ranks were told the same."""
    assert len(set(comm.allgather(str(told.events)))) == 1


def test_nothing_is_told_where_nothing_goes_wrong(comm):
    for pipeline, data in grids(comm):
        training, told = start(comm, pipeline, data, recompute_every=1, spikes="rewind")
        assert_as_undisturbed(training, training.run(STEPS))
        assert told.events == []
        assert not training.state.is_torn
        assert sorted(training.state.digests) == [STEPS - 1, STEPS]
        training.close()


def test_digests_are_of_the_parts_that_are_copied(comm):
    for pipeline, data in grids(comm):
        training, _ = start(comm, pipeline, data)
        own = [part.array for part in split_state(training.state) if part.shard == training.grid.replica]
        for mine, copied in zip(own, parts_of(training.state), strict=True):
            assert mine.ctypes.data == copied.ctypes.data
            assert mine.size == copied.size
        training.close()


def test_a_changed_message_is_seen_and_the_step_runs_again(comm):
    for pipeline, data in grids(comm):
        training, told = start(comm, pipeline, data)
        receiver = comm.size - 1
        inject(f"flip:in=message:rank={receiver}:step=2", comm)
        assert_as_undisturbed(training, training.run(STEPS))
        (found,) = told.named("message changed")
        assert (found["step"], found["receiver"]) == (2, receiver)
        assert found["sender"] != receiver
        if data == 1:
            # The tied table's gradient comes from the other end.
            assert found["sender"] in (receiver - 1, 0)
        assert_alike(comm, told)
        training.close()


@pytest.mark.parametrize("recovers", [True, False])
def test_messages_that_change_again_and_again_interrupt(comm, recovers):
    training, told = start(comm, comm.size, 1, recovers)
    training.run(1)
    before = owned_weights(training.state)
    inject("flip:in=message:rank=1:step=2:times=0", comm)
    error = Interruption if recovers else RankError
    with pytest.raises(error, match=r"messages from rank \d to rank 1 .*changed on their way 3 times in step 2"):
        training.run(1)
    assert owned_weights(training.state) == before
    assert training.state.step == 1
    assert not training.state.is_torn
    assert len({facts["sender"] for facts in told.named("message changed")}) >= 1
    training.close()


def test_unguarded_messages_are_not_looked_at(comm):
    training, told = start(comm, comm.size, 1, messages=False, spikes="off")
    inject("flip:in=message:rank=1:step=2:bit=0", comm)
    results = training.run(2)
    assert told.events == []
    assert figures(results)[1] != undisturbed()[1][0]
    training.close()


def test_an_unguarded_state_is_not_looked_at(comm):
    for pipeline, data in grids(comm):
        training, told = start(comm, pipeline, data, state=False, spikes="off")
        training.run(1)
        inject("flip:in=moment:rank=0:step=2:bit=0", comm)
        training.run(1)
        training.trainer.require_sound_state()
        assert told.events == []
        assert training.state.digests == {}
        assert not training.state.is_torn
        training.close()


@pytest.mark.parametrize("kind", ["weight", "moment"])
def test_a_bit_that_flips_in_the_state_is_seen_before_the_update(comm, kind):
    for pipeline, data in grids(comm):
        victim = comm.size - 1
        training, told = start(comm, pipeline, data)
        training.run(2)
        inject(f"flip:in={kind}:rank={victim}:step=3:seed={comm.size}", comm)
        with pytest.raises(Interruption, match=rf"a {kind}\w* of stage \d+ on rank {victim} had changed .* in step 3"):
            training.run(1)
        assert training.state.step == 2
        assert training.state.is_torn is (comm.rank == victim)
        expected, found = undisturbed()[1][1], owned_weights(training.state)
        if comm.rank != victim:
            assert all(expected[name] == content for name, content in found.items())
        (event,) = told.named("state changed")
        assert event["rank"] == victim
        assert event["kind"].startswith(kind)
        assert event["stage"] == (victim if pipeline == comm.size else victim % pipeline)
        assert_alike(comm, told)
        training.close()


def test_a_bit_that_flips_before_a_checkpoint_is_seen(comm):
    training, told = start(comm, comm.size, 1)
    training.trainer.require_sound_state()
    training.run(2)
    training.trainer.require_sound_state()
    if comm.rank == 1:
        parts_of(training.state)[-1].view(np.uint32)[5] ^= 1 << 30
    with pytest.raises(Interruption, match="a moment2 of stage 1 on rank 1 had changed"):
        training.trainer.require_sound_state()
    assert training.state.is_torn is (comm.rank == 1)
    assert_alike(comm, told)
    training.close()


def test_a_flip_between_recoveries_is_seen_by_the_digests_that_are_kept(comm):
    training, _ = start(comm, comm.size, 1)
    training.run(2)
    again, _ = start(comm, comm.size, 1)
    for mine, theirs in zip(parts_of(again.state), parts_of(training.state), strict=True):
        mine[...] = theirs
    again.state.pack()
    again.state.step = 2
    again.state.digests = {1: training.state.digests[1], 2: training.state.digests[2], 7: (1,)}
    assert figures([again.trainer.run(3)]) == [undisturbed()[2][0]]
    assert 7 not in again.state.digests
    third, _ = start(comm, comm.size, 1)
    third.state.step, third.state.digests = 2, dict(training.state.digests)
    with pytest.raises(Interruption, match="had changed"):
        third.trainer.run(3)
    for each in (training, again, third):
        each.close()


def test_replicas_whose_weights_differ_are_named(comm):
    if comm.size % 2:
        pytest.skip("needs replicas")
    training, told = start(comm, comm.size // 2, 2)
    training.run(2)
    victim = comm.size - 1
    if comm.rank == victim:
        # What the other replica has sent arrives with a flipped bit, which the digests of this rank then cover.
        parts = [part for part in split_state(training.state) if part.kind == "weight" and part.shard == 0]
        part = max(parts, key=lambda part: part.array.size)
        part.array.view(np.uint32)[0] ^= 1
        training.trainer._guard.updated()
    with pytest.raises(Interruption, match=rf"weights of stage \d+ on rank {victim} were not those of the other"):
        training.run(1)
    assert training.state.is_torn is (comm.rank == victim)
    assert (2 in training.state.digests) is (comm.rank != victim)
    assert [facts["rank"] for facts in told.named("state changed")] == [victim]
    training.close()


def test_an_action_that_computes_something_else_is_outvoted(comm):
    for pipeline, data in grids(comm):
        if pipeline == 1:
            continue
        training, told = start(comm, pipeline, data, recompute_every=1, spikes="off")
        choose, last = training.trainer._guard.actions._choose, training.state.last_stage
        # The head's output is a number, which cannot be injected into.
        step = next(step for step in range(1, STEPS + 1) if choose(step)[1][0] < last)
        replica, (stage, microbatch) = choose(step)
        rank = training.grid.world_rank(replica, stage)
        inject(f"flip:in=activation:rank={rank}:step={step}:microbatch={microbatch}", comm)
        assert_as_undisturbed(training, training.run(STEPS))
        (found,) = told.named("computation differed")
        assert (found["rank"], found["stage"], found["step"], found["decided"]) == (rank, stage, step, True)
        assert found["microbatch"] == replica * 8 // data + microbatch
        assert_alike(comm, told)
        training.close()


def test_a_rank_that_computes_something_else_each_time_interrupts(comm, monkeypatch):
    training, _ = start(comm, comm.size, 1, recompute_every=1)
    if comm.rank == 0:
        numbers = itertools.count()
        monkeypatch.setattr("hpcpipe.train.guard_actions._digest_of", lambda done: next(numbers))
    with pytest.raises(Interruption, match=r"rank 0 computed the forward of stage 0, microbatch \d, three times"):
        training.run(60)
    training.close()


@pytest.mark.parametrize("where", ["activation", "gradient"])
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_number_that_is_not_finite_once_costs_a_repeated_step(comm, where, kind):
    for pipeline, data in grids(comm):
        if where == "activation" and pipeline == 1:
            continue
        training, told = start(comm, pipeline, data)
        inject(f"{kind}:in={where}:rank=0:step=2", comm)
        assert_as_undisturbed(training, training.run(STEPS))
        assert [facts["step"] for facts in told.named("not finite once")] == [2]
        assert_alike(comm, told)
        training.close()


OTHERS = [name for name in GENERATORS if name not in ("1f1b", "forward")]


@functools.cache
def alone(layers, microbatches):
    training = Training(MPI.COMM_SELF, 1, 1, layers=layers, microbatches=microbatches)
    results = figures(training.run(3))
    training.close()
    return results


@pytest.mark.parametrize("schedule", OTHERS)
def test_every_schedule_can_be_walked_again(comm, schedule):
    if comm.size > 4:
        pytest.skip("long, and nothing new")
    size = {"layers": 2 * comm.size + 1, "microbatches": 2 * comm.size}
    told = Told()
    training = Training(
        comm, comm.size, 1, schedule=schedule, recompute="full", surroundings=Surroundings(tell=told), **size
    )
    inject(f"nan:in=gradient:rank={comm.size - 1}:step=2;flip:in=message:rank=0:step=3", comm)
    assert figures(training.run(3)) == alone(**size)
    assert [event for event, _ in told.events] == ["not finite once", "message changed"]
    training.close()


def test_a_step_that_is_not_finite_is_skipped_and_its_microbatch_named(comm):
    for pipeline, data in grids(comm):
        if pipeline == 1:
            continue
        training, told = start(comm, pipeline, data)
        training.run(1)
        before, digests = owned_weights(training.state), training.state.digests[1]
        rank = comm.size - 2
        inject(f"nan:in=activation:rank={rank}:step=2:microbatch=1:times=0", comm)
        (result,) = training.run(1)
        assert result.is_skipped
        assert not (math.isfinite(result.loss) and math.isfinite(result.grad_norm))
        assert owned_weights(training.state) == before
        assert training.state.digests == {1: digests, 2: digests}
        assert (training.state.step, training.state.is_torn) == (2, False)
        (found,) = told.named("step skipped")
        microbatch = (rank // pipeline) * (8 // data) + 1
        first = (8 + microbatch) * 2
        assert (found["step"], found["rank"], found["part"]) == (2, rank, "forward")
        assert (found["stage"], found["microbatch"]) == (rank % pipeline, microbatch)
        assert found["samples"] == [first, first + 1]
        stage = plan_model(training.config, training.schedule.num_stages).stage(found["stage"])
        assert found["layer"] == stage.layers[-1].prefix.rstrip("/")
        assert_alike(comm, told)
        assert not training.run(1)[0].is_skipped
        training.close()


def test_too_many_skipped_steps_go_back_and_then_end_the_run(comm):
    always = "nan:in=gradient:rank=1:step=2-99:times=0"
    for history, recovers, error, text in (
        (History(), True, Rewind, r"in step 4, first in the sum of the gradients of stage \d \(rank 1\), and 2 steps"),
        (History(rewound=(4,)), True, NumericsError, r"step 4: not finite, nor since step 2, again after going back: "),
        (History(), False, NumericsError, r"step 4: not finite, nor since step 2: .*lower train.learning_rate"),
        (History(num_skipped=2), True, Rewind, "in step 1, first in"),
    ):
        training, told = start(comm, comm.size, 1, recovers, history, max_skipped=2)
        if history.num_skipped:
            # As if steps -1 and 0 had been skipped before a restart.
            inject(always.replace("2-99", "1-99"), comm)
        else:
            training.run(1)
            inject(always, comm)
        with pytest.raises(error, match=text) as caught:
            training.run(5)
        if error is Rewind and not history.num_skipped:
            assert caught.value.to_step == 1
            assert [facts["to_step"] for facts in told.named("going back")] == [1]
        elif error is NumericsError:
            assert caught.value.on_all_ranks
            assert caught.value.exit_code == ExitCode.NUMERICS
        assert not training.state.is_torn
        training.close()


def test_all_ranks_know_the_history_that_rank_0_reads(comm):
    grid = make_grid(comm, comm.size, 1)
    known = History(((1.0 / 3, 2e-308), (0.1, 5.0)), 2, (7, 9))
    assert share_history(grid, Waiter(60.0), known if comm.rank == 0 else History()) == known
    assert share_history(grid, Waiter(60.0), History()) == History()
    grid.free()


CALM = History(steps=tuple((0.5 + 0.01 * (step % 7), 0.1 + 0.01 * (step % 5)) for step in range(64)))


@pytest.mark.parametrize("action", ["off", "warn", "skip", "rewind"])
def test_spikes(comm, action):
    training, told = start(comm, comm.size, 1, history=CALM, spikes=action)
    before = owned_weights(training.state)
    if action == "rewind":
        with pytest.raises(Rewind, match="a spike of score"):
            training.run(1)
        assert told.named("going back")[0]["step"] == 1
        training.close()
        rewound = History(CALM.steps, rewound=(1,))
        training, told = start(comm, comm.size, 1, history=rewound, spikes=action)
    (result,) = training.run(1)
    assert figures([result]) == [undisturbed()[0][0]]
    assert result.is_skipped is (action in ("skip", "rewind"))
    assert len(told.named("spike")) == (action != "off")
    if result.is_skipped:
        assert owned_weights(training.state) == before
        assert told.named("step skipped")[0]["reason"].startswith("spike of score")
    else:
        assert_as_undisturbed(training, [result])
    training.close()


def test_a_spike_that_a_fault_has_made_is_gone_when_the_step_runs_again(comm):
    calm = History(steps=tuple((2.4, 0.3) for _ in range(64)))
    training, told = start(comm, comm.size, 1, history=calm)
    inject("flip:in=activation:rank=0:step=1:microbatch=1:bit=29:seed=3", comm)
    assert_as_undisturbed(training, training.run(STEPS))
    assert len(told.named("spike once")) + len(told.named("not finite once")) <= 1
    training.close()
