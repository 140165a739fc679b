"""The catalog as data: complete, with evidence that is where it says, and the same as its page in the docs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overflowml_core.errors import DoesNotFit
from overflowml_core.facts import Limits, Workload
from overflowml_core.planner import make_plan
from overflowml_core.traps import CATALOG, avoided, objections, traps_page
from tests.planner.build import MIB, component, granted, machine, network

ROOT = Path(__file__).parents[2]
SOURCE = re.compile(r"(diffusers|transformers|accelerate|torch) (\d[\w.]*) ([\w/]+\.(?:py|h|cpp))(?:, ([\w.]+))?")
OTHERS = (
    "ComfyUI comfy/model_management.py, MAX_PINNED_MEMORY",
    "CUDA C++ Programming Guide, CUDA environment variables",
    "Linux kernel filesystems/tmpfs",
)
ISSUE = re.compile(r"[\w.-]+(?:/[\w.-]+)? #\d+")


def test_names_are_unique_and_as_they_are_written():
    names = [trap.name for trap in CATALOG]
    assert len(names) == len(set(names)) >= 24
    assert [name for name in names if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name)] == []


@pytest.mark.parametrize("trap", CATALOG, ids=lambda trap: trap.name)
def test_says_when_what_and_what_is_done_on_evidence(trap):
    for text in (trap.applies_when, trap.symptom, trap.what_we_do):
        assert text
        assert not text.endswith(".")
    assert trap.evidence
    for text in trap.evidence:
        assert SOURCE.fullmatch(text) or ISSUE.fullmatch(text) or text in OTHERS, text
    logic = {"plan": trap.step or trap.relevance, "host": trap.guard, "environment": trap.look}
    assert logic[trap.kind]


def test_the_four_oldest_are_there():
    assert {trap.name for trap in CATALOG} >= {
        "fp8-offload-on-windows",
        "attention-slicing-with-offload",
        "component-larger-than-device",
        "expandable-segments-on-wddm",
    }


SOURCES = sorted({(trap.name, text) for trap in CATALOG for text in trap.evidence if SOURCE.fullmatch(text)})


@pytest.mark.parametrize(("name", "text"), SOURCES)
def test_evidence_in_a_source_file_is_in_that_file(name, text):
    match = SOURCE.fullmatch(text)
    assert match is not None
    package, version, file, symbol = match.groups()
    if importlib.util.find_spec(package) is None or importlib.metadata.version(package).partition("+")[0] != version:
        pytest.skip(f"{package} {version} is not installed")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    path = folder / "include" / file if file.endswith(".h") else folder / file
    if file.endswith(".cpp"):
        pytest.skip("C++ sources are not part of the package")
    assert path.is_file()
    if symbol:
        assert symbol.rpartition(".")[2] in path.read_text(encoding="utf-8")


def test_guards_are_places_in_the_code():
    for trap in CATALOG:
        for place in trap.guard.split("; ") if trap.guard else ():
            file, _, rest = place.partition(".py")
            path = ROOT / f"{file}.py"
            assert path.is_file(), place
            if rest.startswith(", "):
                assert rest[2:].rpartition(".")[2] in path.read_text(encoding="utf-8"), place


def test_the_page_in_the_docs_is_made_of_the_catalog():
    assert (ROOT / "docs" / "traps.md").read_text(encoding="utf-8") == traps_page(CATALOG)


@settings(max_examples=60)
@given(
    blocks=st.lists(st.integers(1, 64), min_size=0, max_size=6),
    fixed=st.integers(0, 32),
    activations=st.integers(0, 64),
    budget=st.integers(1, 400),
    unified=st.booleans(),
    host=st.integers(1, 512),
)
def test_no_plan_of_the_planner_steps_into_a_trap(blocks, fixed, activations, budget, unified, host):
    parts = (
        component("text_encoder", [size * MIB for size in blocks], fixed * MIB, activations * MIB),
        component("transformer", [16 * MIB] * 6, MIB, 8 * MIB),
    )
    net, where = network(*parts), machine(400 * MIB, host * MIB, unified=unified)
    try:
        plan = make_plan(net, where, Workload(), granted(budget * MIB))
    except DoesNotFit:
        return
    assert objections(plan, net, where) == []
    for found in avoided(plan, net, where):
        assert found.reason
        assert found.remedy


def test_a_direct_plan_of_a_small_model_steers_around_nothing():
    net, where = network(component("model", [MIB] * 4, MIB)), machine()
    assert avoided(make_plan(net, where, Workload(), Limits()), net, where) == ()
