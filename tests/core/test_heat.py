"""Heat maps: what is added and forgotten, and that nothing in a file can be more than a warning."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.facts import Block, CacheRun, Component, Experts, Network
from overflowml_core.heat import MOST_RUNS, MOST_TOKENS, BadHeat, BankHeat, Heat, with_shares
from overflowml_core.heat_reader import heat_from_json, heat_to_json
from tests.core.heats import FINGERPRINT, bank, report, run

counts = st.lists(st.integers(0, 10**6), min_size=2, max_size=8).map(tuple)
EMPTY = Heat(FINGERPRINT, "Moe")


def test_shares_sum_to_the_experts_of_a_token():
    heat = EMPTY.with_run(run(report(bank((6, 2, 0, 0)), bank((0, 0, 0, 0), "layers.1"))))
    assert heat.shares("model", "layers.0") == (1.5, 0.5, 0.0, 0.0)
    assert heat.shares("model", "layers.1") == ()
    assert heat.shares("vae", "layers.0") == ()
    assert heat.by_block() == {("model", "layers.0"): (1.5, 0.5, 0.0, 0.0)}


def test_a_run_that_is_saved_again_adds_only_what_came_since():
    first, second = report(bank((4, 0, 2, 2))), report(bank((6, 2, 2, 2)))
    heat = EMPTY.with_run(run(first)).with_run(run(second), first)
    assert heat.banks[0].counts == (6, 2, 2, 2)
    assert [one.report for one in heat.runs] == [second]


def test_counts_that_went_back_were_reset_and_are_all_new():
    first, second = report(bank((4, 4, 0, 0))), report(bank((0, 2, 0, 2)))
    heat = EMPTY.with_run(run(first)).with_run(run(second), first)
    assert heat.banks[0].counts == (4, 6, 0, 2)


def test_the_newest_runs_are_kept():
    heat = EMPTY
    for number in range(MOST_RUNS + 2):
        heat = heat.with_run(run(report(bank((2, 0))), key=str(number)))
    assert [one.key for one in heat.runs] == [str(number) for number in range(2, MOST_RUNS + 2)]
    assert heat.banks[0].counts == (2 * (MOST_RUNS + 2), 0)


@given(old=counts, new=st.data())
def test_older_counts_are_halved_until_the_new_ones_have_room(old, new):
    fresh = new.draw(st.tuples(*(st.integers(0, 10**6) for _ in old)))
    known = replace(EMPTY, banks=(BankHeat("model", "layers.0", 2, old),))
    found = known.with_run(run(report(bank(fresh)))).banks[0].counts
    kept = [total - gain for total, gain in zip(found, fresh, strict=True)]
    assert sum(found) <= max(2 * MOST_TOKENS, sum(fresh))
    halvings = next(n for n in range(64) if [count >> n for count in old] == kept)
    # Not one halving more than it takes.
    assert halvings == 0 or sum(count >> (halvings - 1) for count in old) + sum(fresh) > 2 * MOST_TOKENS


def test_a_bank_of_another_size_is_begun_anew():
    heat = EMPTY.with_run(run(report(bank((4, 4))))).with_run(run(report(bank((1, 1, 2, 0))), key="b"))
    assert heat.banks[0].counts == (1, 1, 2, 0)


def test_the_fingerprint_of_a_network_stays():
    blocks = (Block("layers.0", 1, 1, 1, experts=Experts(4, 100, 2)), Block("layers.1", 1, 1, 1, experts=Experts(3, 100, 2)))
    network = Network((Component("model", "Moe", blocks, 0, 0, (), "model"),), "x", "Moe", FINGERPRINT)
    warm = with_shares(network, EMPTY.with_run(run(report(bank((6, 2, 0, 0)), bank((6, 2, 0, 0), "layers.1")))))
    assert warm.components[0].blocks[0].experts == Experts(4, 100, 2, heat=(1.5, 0.5, 0.0, 0.0))
    assert warm.components[0].blocks[1] == blocks[1]  # a map of four experts is none of three
    assert warm.fingerprint == network.fingerprint


def test_only_runs_that_saw_enough_tokens_say_what_their_caches_found():
    enough = replace(report(bank((6, 2, 0, 0)), bank((6, 2, 0, 0), "layers.1")), slots=3, token_requests=128, token_hits=96)
    heat = EMPTY.with_run(run(replace(enough, token_requests=127))).with_run(run(enough, key="b"))
    assert heat.cache_runs() == (CacheRun(3, 128, 96),)
    network = Network(
        (Component("model", "Moe", (Block("layers.0", 1, 1, 1, experts=Experts(4, 100, 2)),), 0, 0, (), "model"),), "x", "Moe", ""
    )
    assert with_shares(network, heat).components[0].blocks[0].experts.runs == (CacheRun(3, 128, 96),)


def test_reads_back_what_was_written():
    heat = EMPTY.with_run(run(report(bank((6, 2, 0, 0), cached=(0, 3)), bank((0, 0, 4, 4), "layers.1"))))
    assert heat_from_json(heat_to_json(heat)) == heat
    endless = EMPTY.with_run(run(replace(report(bank((1, 1))), half_life=float("inf"))))
    assert heat_from_json(heat_to_json(endless)).runs[0].report.half_life == 1e12


def _damaged(change):
    document = json.loads(heat_to_json(EMPTY.with_run(run(report(bank((6, 2, 0, 0), cached=(0, 3)))))))
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema=1), "schema '1'"),
        (lambda d: d["runs"][0]["report"].update(token_hits=1), "1 hits of 0 requests of single tokens"),
        (lambda d: d.pop("banks"), "no 'banks'"),
        (lambda d: d["banks"].append(d["banks"][0]), "twice"),
        (lambda d: d["banks"][0].update(counts=[1, -1]), "counts"),
        (lambda d: d["banks"][0].update(counts=[1, 1.5]), "counts"),
        (lambda d: d["banks"][0].update(counts=[1, True]), "counts"),
        (lambda d: d["banks"][0].update(counts=[0] * 70_000), "counts"),
        (lambda d: d["banks"][0].update(counts=[2**61, 1]), "counts"),
        (lambda d: d["banks"][0].update(per_token=0), "0 of 4 experts"),
        (lambda d: d["banks"][0].update(per_token=9), "9 of 4 experts"),
        (lambda d: d["banks"][0].update(block="x" * 5000), "block"),
        (lambda d: d.update(runs=d["runs"] * 9), "runs"),
        (lambda d: d["runs"][0].update(ended_s=float("nan")), "ended_s"),
        (lambda d: d["runs"][0].update(ended_s=1e300), "ended_s"),
        (lambda d: d["runs"][0].update(pass_s=10**400), "pass_s"),
        (lambda d: d["runs"][0]["report"]["banks"][0].update(hits=9), "9 hits"),
        (lambda d: d["runs"][0]["report"]["banks"][0].update(cached=[4]), "expert 4"),
        (lambda d: d["runs"].__setitem__(0, 3), "run is no object"),
    ],
)
def test_what_cannot_be_is_named(change, words):
    with pytest.raises(BadHeat, match=words):
        heat_from_json(_damaged(change))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_map_or_an_error_of_ours(raw):
    with pytest.raises(BadHeat):
        heat_from_json(raw)


@given(st.data())
def test_a_map_with_bytes_changed_is_a_map_or_an_error_of_ours(data):
    raw = bytearray(heat_to_json(EMPTY.with_run(run(report(bank((6, 2, 0, 0), cached=(0, 3)))))).encode())
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=5)):
        raw[place] = data.draw(st.integers(0, 255))
    try:
        heat = heat_from_json(bytes(raw))
    except BadHeat:
        return
    assert all(sum(shares) == pytest.approx(heat.banks[0].per_token) for shares in heat.by_block().values())
