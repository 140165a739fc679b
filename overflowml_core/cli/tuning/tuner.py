"""Runs a model under several plans for about a given time, and says which was the fastest. Prints nothing and keeps nothing."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overflowml_core.cli.tuning.hosts import Request, Subject, open_subject
from overflowml_core.cli.tuning.neighbours import Neighbourhood
from overflowml_core.cli.tuning.watching import PassClock, Ran, WatchedContest, fastest, heaviest, main_pass, merged, what_of
from overflowml_core.errors import OverflowmlError
from overflowml_core.facts import Machine, Network
from overflowml_core.measured import MeasuredPass
from overflowml_core.plan import Plan
from overflowml_core.tuned import Tried, Tuned

if TYPE_CHECKING:
    from overflowml_core.formats import Format

_PATIENCE, _LEAST_PATIENCE_S = 4, 15.0
"""Times the given seconds, and seconds at least, after which is given up what was not measured yet."""

Tell = Callable[[str], None]


class NothingMeasured(OverflowmlError):
    """Too little time for a single plan, or a device that tells no times."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found: the fastest plan with all that ran, and the file of the calibration that was corrected, None where none was."""

    tuned: Tuned
    corrected: Path | None = None


def tune(request: Request, base: Plan, machine: Machine, seconds: float, tell: Tell) -> Outcome:
    """Run a model under a plan and others beside it.

    Args:
        request: what is tuned.
        base: as it was made.
        machine: this one.
        seconds: of running, about; loading comes on top.
        tell: told in words what is done.

    Raises:
        NothingMeasured: not even one plan ran often enough.
        OverflowmlError: the model cannot be loaded or carried out.
    """
    from overflowml_core import session

    formats = session.plugins().formats(machine)
    tell(f"loading {request.folder}")
    subject = open_subject(request)
    made = _attached(subject, request, base)
    if any(phase.expert_cache_bytes for phase in base.phases):
        others = Neighbourhood(made.network, machine, formats).of_experts(base)
        ran = _one_by_one(request, (subject, made), others, seconds, tell)
        return Outcome(_best(ran))
    return _in_a_trial(request, (subject, made), machine, formats, seconds, tell)


def _attached(subject: Subject, request: Request, plan: Plan) -> Any:
    from overflowml_core import session

    without_trial = replace(plan, limits=replace(plan.limits, trial=False))
    return session.manage(subject.target, request.limits, request.workload, subject.load, without_trial)


def _in_a_trial(
    request: Request, at_work: tuple[Subject, Any], machine: Machine, formats: tuple[Format, ...], seconds: float, tell: Tell
) -> Outcome:
    """Plans that differ in what is resident are run one after the other on the model as it is."""
    from overflowml_core.planner.trial import Contest
    from overflowml_core.runtime.trial import Trial

    subject, made = at_work
    contest = WatchedContest(Contest(made.plan, made.network, machine, formats), Neighbourhood(made.network, machine, formats))
    lessons: list[MeasuredPass] = []
    trial = Trial(made, contest, lessons.extend).begin()
    if trial.is_over:  # nothing could be elsewhere
        tell(f"running {what_of(made.plan)}")
        ran = _timed(subject, made, seconds)
        return Outcome(_best([] if ran is None else [ran]))
    told = 0
    is_late = _patient(seconds, lambda: bool(contest.ran))

    def enough() -> bool:
        nonlocal told
        if told <= len(contest.ran):
            told = len(contest.ran) + 1
            tell(f"running {what_of(contest.plan)}")
        return trial.is_over or is_late()

    try:
        subject.run(enough)
        trial.abandon()
        contest.close()
    finally:
        made.detach()
    tuned = _best(contest.ran, contest.plan)
    return Outcome(tuned, _corrected(request, made.network, machine, contest.lessons))


def _corrected(request: Request, network: Network, machine: Machine, lessons: tuple[MeasuredPass, ...]) -> Path | None:
    from overflowml_core import environment
    from overflowml_core.inspect.calibration import correct_calibration
    from overflowml_core.planner.trial import corrected

    # What was profiled is held against what ran only where both are of the same sizes.
    known = network if request.workload is not None else replace(network, components=())
    return correct_calibration(machine, lambda rates: corrected(rates, known, lessons), environment.cache_folder())


def _one_by_one(request: Request, at_work: tuple[Subject, Any], plans: list[Plan], seconds: float, tell: Tell) -> list[Ran]:
    """Each plan has a load of its own: what experts wait where cannot be changed on a model at work."""
    ran: list[Ran] = []
    deadline_s = time.monotonic() + seconds
    subject: Subject | None
    made: Any
    subject, made = at_work
    for place, plan in enumerate(plans):
        left_s = deadline_s - time.monotonic()
        if place and left_s <= 0:
            break
        if subject is None:
            started_s = time.monotonic()
            tell(f"loading {request.folder} again")
            subject = open_subject(request)
            made = _attached(subject, request, plan)
            deadline_s += time.monotonic() - started_s
        tell(f"running {plan.strategy}, {what_of(plan)}")
        result = _timed(subject, made, max(0.0, left_s) / (len(plans) - place))
        ran += [result] if result is not None else []
        subject = made = None
        gc.collect()
    return ran


def _patient(seconds: float, is_settled: Callable[[], bool]) -> Callable[[], bool]:
    """Whether the time is over: after so many seconds, later as long as nothing was found, but not for ever."""
    started_s = time.monotonic()

    def is_late() -> bool:
        spent_s = time.monotonic() - started_s
        return spent_s >= max(seconds * _PATIENCE, _LEAST_PATIENCE_S) or (spent_s >= seconds and is_settled())

    return is_late


def _timed(subject: Subject, made: Any, seconds: float) -> Ran | None:
    """Run passes for a while, and give the model back; None where they were too few, even in ``_PATIENCE`` times as long."""
    component = heaviest(made.plan)
    _, module, _ = made.watched(component)
    try:
        with PassClock(module) as clock:
            subject.run(_patient(seconds, lambda: clock.pass_s() is not None))
    finally:
        made.detach()
    pass_s = clock.pass_s()
    expected = main_pass(made.plan, component)
    return None if pass_s is None else Ran(made.plan, component, None if expected is None else expected.pass_s, pass_s)


def _best(ran: list[Ran], kept: Plan | None = None) -> Tuned:
    """The fastest, or what a contest kept."""
    if not ran:
        raise NothingMeasured("no plan ran often enough to be measured; give more time with --seconds")
    chosen = fastest([one for one in ran if one.component == heaviest(ran[0].plan)] or ran)
    each = merged(ran)
    place = next(i for i, one in enumerate(each) if (one.component, what_of(one.plan)) == (chosen.component, what_of(chosen.plan)))
    expected = main_pass(chosen.plan, chosen.component)
    tried = tuple(Tried(one.plan.strategy, what_of(one.plan), one.predicted_pass_s, one.measured_pass_s) for one in each)
    return Tuned(kept or chosen.plan, expected.name if expected is not None else "pass", tried, place, time.time())
