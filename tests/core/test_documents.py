"""Docs and code say the same."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from overflowml_core import environment, hookspecs
from overflowml_core.facts import ComputeRate, Limits, Rates, Workload
from overflowml_core.plan import Avoided, Budget, Estimate, PassEstimate, PhasePlan, Placement, Plan, Rejected, WhatIf

ROOT = Path(__file__).parents[2]
HOOKS = {name: function for name, function in vars(hookspecs).items() if name.startswith("overflowml_")}


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_every_hook_has_its_heading_with_its_arguments(name):
    arguments = ", ".join(inspect.signature(HOOKS[name]).parameters)
    assert f"\n### {name}({arguments})\n" in (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")


def test_no_page_for_a_hook_that_does_not_exist():
    headings = set(re.findall(r"^### (overflowml_\w+)\(", (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8"), re.M))
    assert headings == set(HOOKS)


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_every_hook_has_a_test(name):
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert f"def test_hook_{name.removeprefix('overflowml_')}" in tests


PLAN_TYPES = [Plan, PhasePlan, Placement, PassEstimate, Estimate, Budget, Rejected, Avoided, WhatIf, Limits, Workload, Rates, ComputeRate]


@pytest.mark.parametrize("kind", PLAN_TYPES)
def test_every_field_of_the_plan_is_specified(kind):
    page = (ROOT / "docs" / "plan-format.md").read_text(encoding="utf-8")
    assert [f.name for f in dataclasses.fields(kind) if f"`{f.name}`" not in page] == []


def test_every_environment_variable_is_in_the_readme():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [value for key, value in vars(environment).items() if key.isupper() and isinstance(value, str)]
    assert names
    assert [name for name in names if f"`{name}`" not in page] == []


def test_only_one_file_reads_the_environment():
    readers = [
        str(path.relative_to(ROOT))
        for folder in ("overflowml", "overflowml_core", "plugins")
        for path in (ROOT / folder).rglob("*.py")
        if "cli" not in path.parts and re.search(r"os\.environ|getenv", path.read_text(encoding="utf-8"))
    ]
    assert readers == ["overflowml_core/environment.py"]


def test_python_in_the_docs_is_python():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    snippets = [(page.name, code) for page in pages for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)]
    assert snippets
    for name, code in snippets:
        ast.parse(code, filename=name)


def test_links_between_documents_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(r"`(docs/[\w-]+\.md)`", text):
            base = ROOT if target.startswith("docs/") else page.parent
            assert (base / target).exists(), f"{page.name}: {target}"
