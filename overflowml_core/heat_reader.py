"""Heat maps as JSON: written for the cache folder, read back from files that anybody may have damaged: bounded, typed, field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from overflowml_core.expert_report import BankReport, ExpertReport
from overflowml_core.heat import MOST_RUNS, BadHeat, BankHeat, Heat, Run

HEAT_SCHEMA = 2
"""Version of the JSON form."""

LARGEST_HEAT_BYTES = 32 * 2**20
"""The map of a model with 100 blocks of 512 experts and its last runs takes about 2 MB."""
_MOST_BANKS = 4096
_MOST_EXPERTS = 65_536
_LARGEST_COUNT = 2**60
_LONGEST_TEXT = 4096
_LARGEST_NUMBER = 1e12
_LATEST_S = 3e10
"""Seconds since 1970 up to which all systems know a date."""

_COUNTED = ("tokens", "passes", "slots", "slot_bytes", "prefetched", "prefetch_hits", "on_cpu", "token_requests", "token_hits")
_BANK_COUNTED = ("per_token", "expert_bytes", "requests", "hits", "fetched_bytes")


def heat_to_json(heat: Heat) -> str:
    """A heat map as JSON; :func:`heat_from_json` reads it back without loss."""
    runs = [{**asdict(run), "report": report_document(run.report)} for run in heat.runs]
    return json.dumps({"schema": HEAT_SCHEMA, **asdict(heat), "runs": runs}, separators=(",", ":"), allow_nan=False)


def report_document(report: ExpertReport) -> dict[str, Any]:
    """A report as a JSON object. JSON knows no number without end, which is the half-life of what never ages."""
    return {**asdict(report), "half_life": min(report.half_life, _LARGEST_NUMBER)}


def heat_from_json(text: bytes | str) -> Heat:
    """The heat map in a JSON text.

    Raises:
        BadHeat: it is none of this version, or a value in it cannot be.
    """
    if len(text) > LARGEST_HEAT_BYTES:
        raise BadHeat(f"{len(text)} bytes; no heat map is larger than {LARGEST_HEAT_BYTES}")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadHeat(f"not JSON ({error})") from None
    if not isinstance(document, dict) or document.get("schema") != HEAT_SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise BadHeat(f"schema {str(found)[:40]!r}, this version reads {HEAT_SCHEMA}")
    try:
        return _heat(document)
    except KeyError as error:
        raise BadHeat(f"no {error.args[0]!r} in it") from None


def _heat(document: Mapping[str, Any]) -> Heat:
    banks = tuple(_bank(_mapping(bank, "bank")) for bank in _list(document["banks"], _MOST_BANKS, "banks"))
    if len({(bank.component, bank.block) for bank in banks}) < len(banks):
        raise BadHeat("a block stands in it twice")
    runs = tuple(_run(_mapping(run, "run")) for run in _list(document["runs"], MOST_RUNS, "runs"))
    return Heat(_text(document["fingerprint"], "fingerprint"), _text(document["network"], "network"), banks, runs)


def _bank(document: Mapping[str, Any]) -> BankHeat:
    bank = BankHeat(
        component=_text(document["component"], "component"),
        block=_text(document["block"], "block"),
        per_token=_count(document["per_token"], "per_token"),
        counts=_counts(document["counts"], "counts"),
    )
    _check_per_token(bank.per_token, len(bank.counts), bank.block)
    return bank


def _run(document: Mapping[str, Any]) -> Run:
    return Run(
        key=_text(document["key"], "key"),
        source=_text(document["source"], "source"),
        device=_text(document["device"], "device"),
        ended_s=_number(document["ended_s"], "ended_s", _LATEST_S),
        pass_s=_number(document["pass_s"], "pass_s"),
        report=_report(_mapping(document["report"], "report")),
    )


def _report(document: Mapping[str, Any]) -> ExpertReport:
    report = ExpertReport(
        banks=tuple(_bank_report(_mapping(bank, "bank")) for bank in _list(document["banks"], _MOST_BANKS, "banks")),
        stall_s=_number(document["stall_s"], "stall_s"),
        half_life=_number(document["half_life"], "half_life"),
        **{name: _count(document[name], name) for name in _COUNTED},
    )
    if report.token_hits > report.token_requests:
        raise BadHeat(f"{report.token_hits} hits of {report.token_requests} requests of single tokens")
    return report


def _bank_report(document: Mapping[str, Any]) -> BankReport:
    bank = BankReport(
        component=_text(document["component"], "component"),
        block=_text(document["block"], "block"),
        tokens=_counts(document["tokens"], "tokens"),
        cached=_counts(document["cached"], "cached"),
        **{name: _count(document[name], name) for name in _BANK_COUNTED},
    )
    _check_per_token(bank.per_token, len(bank.tokens), bank.block)
    if bank.hits > bank.requests:
        raise BadHeat(f"{bank.block}: {bank.hits} hits of {bank.requests} requests")
    if any(expert >= len(bank.tokens) for expert in bank.cached):
        raise BadHeat(f"{bank.block}: expert {max(bank.cached)} of {len(bank.tokens)} is cached")
    return bank


def _check_per_token(per_token: int, count: int, block: str) -> None:
    if not 1 <= per_token <= count:
        raise BadHeat(f"{block}: {per_token} of {count} experts for each token")


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadHeat(f"a {what} is no object")
    return value


def _list(value: object, most: int, what: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise BadHeat(f"{what}: no list of at most {most}")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise BadHeat(f"{what}: no text of at most {_LONGEST_TEXT} characters")
    return value


def _count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_COUNT:
        raise BadHeat(f"{what}: no whole number from 0 to 2**60")
    return value


def _counts(value: object, what: str) -> tuple[int, ...]:
    return tuple(_count(number, what) for number in _list(value, _MOST_EXPERTS, what))


def _number(value: object, what: str, most: float = _LARGEST_NUMBER) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise BadHeat(f"{what}: no number from 0 to {most:g}")
    return float(value)
