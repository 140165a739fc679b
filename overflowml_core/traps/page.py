"""Writes the catalog as a page of the documentation. Knows the form of the page, and no trap."""

from __future__ import annotations

from collections.abc import Iterable

from overflowml_core.traps.trap import Trap

_HEAD = """# Known traps

Combinations of models, hosts, drivers and settings that go wrong, and what this project does about each. The list is data
(`overflowml_core/traps/`), this page is made from it, and every entry has a test. A plan names the traps that it steered around;
`overflowml doctor` looks for those of the environment. Evidence is a repository with the number of an issue or pull request, or a
package with its version and a file of it.
"""
_SECTIONS = (
    ("plan", "Plans", "A plan is held against each of these before it is used; what they exclude is planned again without it."),
    ("host", "Calls of a host", "What holds on a model or pipeline that is managed, by its place in the code."),
    ("environment", "The environment", "`overflowml doctor` looks for these and names the way out."),
)


def traps_page(traps: Iterable[Trap]) -> str:
    """The page as Markdown, each trap under its kind in the order given."""
    known = tuple(traps)
    parts = [_HEAD]
    for kind, title, text in _SECTIONS:
        parts.append(f"## {title}\n\n{text}\n")
        parts += [_entry(trap) for trap in known if trap.kind == kind]
    return "\n".join(parts)


def _entry(trap: Trap) -> str:
    lines = [
        f"### {trap.name}",
        "",
        f"- applies when: {trap.applies_when}",
        f"- symptom: {trap.symptom}",
        f"- what we do: {trap.what_we_do}",
    ]
    if trap.guard:
        lines.append(f"- guard: {trap.guard}")
    lines.append(f"- evidence: {'; '.join(trap.evidence)}")
    return "\n".join(lines) + "\n"
