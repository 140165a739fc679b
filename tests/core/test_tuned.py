"""Tuned plans: kept by what they are for, and never used for anything else."""

from __future__ import annotations

import functools
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overflowml_core import planning, session, tuned
from overflowml_core.cli.tuning.neighbours import Neighbourhood
from overflowml_core.errors import OverflowmlError
from overflowml_core.facts import Limits, Tier, Workload
from overflowml_core.plan import Plan
from overflowml_core.tuned import Tried, Tuned, forget_tuned, read_tuned, save_tuned, tuned_path
from tests.planner.build import GIB, llm, machine

NETWORK, MACHINE = llm(layers=8), machine(4 * GIB)
ANOTHER_CARD = replace(MACHINE, accelerators=(replace(MACHINE.accelerators[0], name="Another GPU"),))
LIMITS = Limits(quality="lossless")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path))
    return tmp_path / "tuned"


@functools.cache
def base(limits: Limits = LIMITS, on=MACHINE, workload: Workload | None = None) -> Plan:
    return planning.make_plan(NETWORK, limits, workload, on)


def resident_count(plan: Plan) -> int:
    return sum(place.tier is Tier.DEVICE for place in plan.placements())


@functools.cache
def other(plan: Plan) -> Plan:
    """A plan for the same with fewer blocks resident."""
    return next(one for one in Neighbourhood(NETWORK, MACHINE, ()).splits(plan) if resident_count(one) < resident_count(plan))


def keep(plan: Plan, instead: Plan) -> Path:
    tried = (Tried("stream", "3 of 9", 1.0, 2.0), Tried("stream", "2 of 9", None, 1.0))
    return save_tuned(Tuned(instead, "denoise", tried, 1, 1_700_000_000.0), plan, MACHINE)


def test_is_used_for_the_same_request_and_says_so(caplog):
    plan = base()
    instead = other(plan)
    keep(plan, instead)
    with caplog.at_level(logging.INFO, "overflowml"):
        used = session.make_plan(NETWORK, LIMITS, machine=MACHINE)
    assert used.phases == instead.phases
    assert used.reasons[0].startswith("tuned on 20")
    assert "2 of 9, the fastest of 2 plans" in used.reasons[0]
    assert "tuned on" in caplog.text
    assert used.limits.trial is False  # its neighbours were run
    assert session.make_plan(NETWORK, replace(LIMITS, trial=True), machine=MACHINE).limits.trial is True


@pytest.mark.parametrize(
    "asked",
    [
        {"limits": Limits(quality="lossless", device_memory="4GB")},
        {"limits": Limits(quality="lossless", reserve="1GB")},
        {"workload": Workload(steps=7)},
        {"machine": ANOTHER_CARD},
    ],
)
def test_is_used_for_no_other_request(asked, caplog):
    keep(base(), other(base()))
    arguments = {"limits": LIMITS, "machine": MACHINE, **asked}
    assert session.make_plan(NETWORK, **arguments) == planning.make_plan(NETWORK, **arguments)
    assert not caplog.records


def test_is_not_used_where_nobody_wants_it(monkeypatch):
    keep(base(), other(base()))
    monkeypatch.setenv("OVERFLOWML_TUNED", "0")
    assert session.make_plan(NETWORK, LIMITS, machine=MACHINE) == base()


def test_is_not_used_on_a_machine_that_was_named():
    keep(base(), other(base()))
    named = replace(MACHINE, named=True)
    assert session.make_plan(NETWORK, LIMITS, machine=named) == base(on=named)


def test_takes_the_budget_of_today_and_is_left_where_it_is_over_it(caplog):
    keep(base(), other(base()))
    more = replace(MACHINE, accelerators=(replace(MACHINE.accelerators[0], free_bytes=MACHINE.accelerators[0].free_bytes + 2**20),))
    assert session.make_plan(NETWORK, LIMITS, machine=more).budget == base(on=more).budget
    assert not caplog.records
    keep(base(), base())
    less = replace(MACHINE, accelerators=(replace(MACHINE.accelerators[0], free_bytes=7 * GIB // 2),))
    assert session.make_plan(NETWORK, LIMITS, machine=less) == base(on=less)
    assert "over its own budget" in caplog.text
    assert str(tuned_path(base(), MACHINE)) in caplog.text


def edited(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema=9), "schema"),
        (lambda d: d.update(version="0.0.1"), "version 0.0.1"),
        (lambda d: d.update(kept=2), "which plan was kept"),
        (lambda d: d.update(kept=True), "which plan was kept"),
        (lambda d: d.update(tried=[{}] * 100), "list"),
        (lambda d: d.update(tried=3), "list"),
        (lambda d: d["tried"][0].update(measured_pass_s=-1), "seconds"),
        (lambda d: d["tried"][0].update(what=7), "text"),
        (lambda d: d.update(made_s=1e300), "seconds"),
        (lambda d: d.pop("plan"), "plan"),
        (lambda d: d["plan"].update(network_fingerprint="0" * 16), "edited"),
        (lambda d: d["plan"]["phases"][0]["placements"].pop(), "edited"),
        (lambda d: d.update(plan=json.loads(base(workload=Workload(steps=3)).to_json())), "another request"),
    ],
)
def test_a_file_that_is_damaged_or_out_of_date_is_named_and_left(change, words, caplog):
    path = keep(base(), other(base()))
    edited(path, change)
    assert session.make_plan(NETWORK, LIMITS, machine=MACHINE) == base()
    assert str(path) in caplog.text
    assert words in caplog.text


def test_a_plan_of_other_blocks_is_left(caplog):
    strange = planning.make_plan(llm(layers=9), LIMITS, None, MACHINE)
    keep(base(), replace(strange, network_fingerprint=NETWORK.fingerprint, fingerprint=""))
    assert session.make_plan(NETWORK, LIMITS, machine=MACHINE) == base()
    assert "other blocks" in caplog.text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(data=st.data())
def test_any_bytes_in_it_are_no_more_than_a_warning(data):
    path = tuned_path(base(), MACHINE)
    if data.draw(st.booleans()):
        raw = data.draw(st.binary(max_size=100))
    else:
        whole = bytearray(keep(base(), other(base())).read_bytes())
        whole[data.draw(st.integers(0, 2000))] = data.draw(st.integers(0, 255))
        raw = bytes(whole)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(raw)
    assert session.make_plan(NETWORK, LIMITS, machine=MACHINE).check()


def test_the_oldest_go(monkeypatch):
    monkeypatch.setattr(tuned, "MOST_TUNED", 2)
    paths = []
    for steps in (1, 2, 3):
        plan = base(workload=Workload(steps=steps))
        paths.append(keep(plan, plan))
        os.utime(paths[-1], (steps, steps))
    keep(base(), base())
    assert [path.exists() for path in paths] == [False, False, True]


def test_forgets_one_or_all(folder):
    keep(base(), base())
    (folder / f"{'f' * 16}-{'0' * 16}-{'0' * 16}.json").write_text("{}")
    assert forget_tuned(NETWORK.fingerprint) == 1
    assert len(list(folder.iterdir())) == 1
    assert forget_tuned() == 1
    assert forget_tuned() == 0


def test_a_folder_that_cannot_be_written_is_an_error_with_a_way_out(folder):
    folder.write_text("a file")
    with pytest.raises(OverflowmlError, match="OVERFLOWML_CACHE"):
        keep(base(), base())


def test_reads_back_what_was_kept():
    instead = other(base())
    found = read_tuned(keep(base(), instead))
    assert found.plan == instead
    assert (found.pass_name, found.kept, found.tried[1].predicted_pass_s) == ("denoise", 1, None)
    with pytest.raises(FileNotFoundError):
        read_tuned(tuned_path(base(workload=Workload(steps=3)), MACHINE))
