"""What the variables say, without a host."""

from __future__ import annotations

import pytest

from overflowml_core import environment


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("yes", True), ("0", False), ("", False), (None, False)])
def test_a_switch_is_off_where_it_is_empty_or_zero(value, expected, monkeypatch):
    monkeypatch.delenv(environment.DISABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(environment.DISABLE, value)
    assert environment.disabled() is expected
