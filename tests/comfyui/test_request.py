"""What users write into fields."""

from __future__ import annotations

import pytest

from overflowml_comfyui.request import request_of
from overflowml_core.errors import BadLimits, BadSize


def test_fields_become_limits_and_a_workload():
    request = request_of({"budget": " 12GB ", "reserve": "2GiB", "width": 1024, "height": 768, "frames": 0, "batch": 1, "steps": 20})

    assert (request.budget_bytes, request.reserve_bytes) == (12 * 10**9, 2 * 2**30)
    assert (request.workload.width, request.workload.height, request.workload.frames, request.workload.steps) == (1024, 768, None, 20)
    assert request.limits.quality == "lossless"


def test_empty_fields_are_open():
    request = request_of({"budget": "", "reserve": "  "})

    assert request.budget_bytes is None
    assert request.reserve_bytes is None
    assert request.workload.batch == 1


@pytest.mark.parametrize("budget", ["0", "0GB", "-1GB", "12", "nan", "NaNGB", "much", "9" * 40 + "GB"])
def test_a_budget_that_is_no_size_is_refused_by_name(budget):
    with pytest.raises(BadSize, match="budget"):
        request_of({"budget": budget})


@pytest.mark.parametrize("width", [float("nan"), float("inf"), 1.5, -8, True, "8", [8]])
def test_a_size_that_is_no_count_is_refused_by_name(width):
    with pytest.raises(BadLimits, match="width"):
        request_of({"width": width})


def test_a_reserve_as_large_as_the_budget_is_refused():
    with pytest.raises(BadLimits, match="reserve"):
        request_of({"budget": "2GB", "reserve": "2GB"})
