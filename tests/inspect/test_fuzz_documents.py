"""Any document gives what its reader promises or the reader's own error; the long run is fuzz.py."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

from overflowml_core.errors import BadPlan
from overflowml_core.plan import Plan
from tests.inspect.fuzz_documents import readers

READERS = readers()


@pytest.mark.parametrize("name", READERS)
def test_malformed_documents_are_refused_or_read(tmp_path, name):
    reader, rng = READERS[name], random.Random(7)
    outcomes = Counter(reader.check(tmp_path / "fuzzed", reader.make_input(rng)) for _ in range(300))
    # The mutations are of use only as long as they reach both sides.
    assert outcomes["accepted"] > 10
    assert outcomes["refused"] > 100


def test_a_fingerprint_of_thousands_of_digits_is_not_repeated():
    document = json.loads(READERS["plan"].valid[0])
    with pytest.raises(BadPlan) as caught:
        Plan.from_json(json.dumps({**document, "fingerprint": "9" * 5000}))
    assert len(str(caught.value)) < 300


def test_the_largest_times_are_read_as_they_were_written():
    plan = Plan.from_json(READERS["plan"].valid[0])
    largest = replace(plan, estimate=replace(plan.estimate, stall_s=2.0**100), fingerprint="")
    assert Plan.from_json(largest.to_json()).estimate.stall_s == 2.0**100
    with pytest.raises(BadPlan, match="stall_s"):
        Plan.from_json(largest.to_json().replace('"stall_s": 1.2676506002282294e+30', f'"stall_s": {2**100 + 1}'))
