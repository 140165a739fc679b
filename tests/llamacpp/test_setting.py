"""The budget is what is free now less a reserve, unless it was named; rates are the machine's."""

from __future__ import annotations

from dataclasses import replace

from overflowml_core.inspect.named import CONTEXT_BYTES, named_machine
from overflowml_llamacpp.setting import setting_of

GIB = 2**30
CARD = named_machine("RTX 4090", ram_bytes=64 * GIB)


def with_card(machine, count=1, **changes):
    one = replace(machine.accelerators[0], **changes)
    return replace(machine, accelerators=(one,) * count, named=False)


def test_what_is_free_counts_not_what_there_is():
    setting = setting_of(with_card(CARD, free_bytes=10 * GIB, total_bytes=24 * GIB), None)
    assert setting.device_bytes == 10 * GIB - 24 * GIB // 25
    assert setting.context_bytes == CONTEXT_BYTES
    assert "10.00 GiB free" in setting.reasons[0]


def test_a_named_budget_is_taken_up_to_what_is_free():
    machine = with_card(CARD, free_bytes=10 * GIB)
    assert setting_of(machine, 8 * GIB).device_bytes == 8 * GIB
    assert setting_of(machine, 12 * GIB).device_bytes == 10 * GIB


def test_a_named_card_has_its_context_off_its_free_bytes_already():
    assert setting_of(CARD, None).context_bytes == 0


def test_without_a_card_nothing_is_on_it():
    machine = replace(CARD, accelerators=())
    setting = setting_of(machine, None)
    assert (setting.device_bytes, setting.device_rates) == (0, None)
    assert "no accelerator is found here" in setting.reasons[0]


def test_a_budget_for_a_card_that_is_not_here_has_no_rates():
    setting = setting_of(replace(CARD, accelerators=()), 12 * GIB)
    assert (setting.device_bytes, setting.device_rates) == (12 * GIB, None)
    assert "--gpu" in setting.warnings[0]


def test_the_first_of_several_cards_is_planned_with():
    setting = setting_of(with_card(CARD, count=2), None)
    assert setting.device_bytes == setting_of(with_card(CARD), None).device_bytes
    assert setting.warnings[0].startswith("2 accelerators")
