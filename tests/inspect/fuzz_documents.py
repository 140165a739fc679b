"""Malformed JSON for every reader of documents: plans, machine files, heat maps, tuned plans, a checkpoint's index, a kept slab's page.

The rule: either the reader's own error, or an object that, where it can be written again, reads as the same. ``fuzz.py`` runs them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from overflowml._version import __version__
from overflowml_core.errors import BadCheckpoint, BadPlan, NotAModel, OverflowmlError
from overflowml_core.facts import Limits, Workload
from overflowml_core.heat import BadHeat, Heat
from overflowml_core.heat_reader import heat_from_json, heat_to_json
from overflowml_core.inspect.checkpoint import open_checkpoint
from overflowml_core.inspect.datasheet import UnknownAccelerator
from overflowml_core.inspect.machine_file import BadMachine, machine_of_json, machine_to_json
from overflowml_core.inspect.machines_file import read_machines
from overflowml_core.plan import Avoided, Plan
from overflowml_core.planner import make_plan, with_outlook
from overflowml_core.runtime.kept_file import SLAB_OFFSET_BYTES, BadSlabFile, Header, Title
from overflowml_core.tuned import TUNED_SCHEMA, BadTuned, read_tuned
from tests.core.heats import FINGERPRINT, bank, report, run
from tests.inspect.fuzz_headers import ABSURD_NUMBERS, mutate_text
from tests.planner.build_timed import FP8, ONE_DEVICE, mixture, on
from tests.runtime.test_kept_file import framed

_NUMBERS = [0, -1, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]
_LEAVES = [None, True, False, *_NUMBERS, "", "disk", "device", "../../x", "/etc/passwd", [], {}]


@dataclass(frozen=True)
class Reader:
    """One reader of documents.

    Attributes:
        valid: documents to begin with.
        check: reads a file with such bytes; says "accepted" or "refused", fails where the rule is broken.
        wrap: what stands around a document in the file.
    """

    valid: tuple[str, ...]
    check: Callable[[Path, bytes], str]
    wrap: Callable[[bytes], bytes] = bytes

    def make_input(self, rng: random.Random) -> bytes:
        """Arbitrary bytes, or a valid document with none to four changes of its text or its values."""
        if rng.random() < 0.05:
            return rng.randbytes(rng.randrange(200))
        text = rng.choice(self.valid)
        if rng.random() < 0.6:
            document = json.loads(text)
            for _ in range(rng.choice((0, 1, 1, 2, 3))):
                _mutate_value(document, rng)
            raw = json.dumps(document).encode()
        else:
            raw = text.encode()
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                raw = mutate_text(raw, rng)
        return self.wrap(raw)


def _mutate_value(document: object, rng: random.Random) -> None:
    node = document
    while isinstance(node, (dict, list)) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        inner = node[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            node = inner
            continue
        match rng.randrange(4):
            case 0:
                del node[key]
            case 1 if isinstance(node, list):
                node.append(inner)
            case 2 if isinstance(inner, int):
                node[key] = rng.choice((inner + 1, inner - 1, inner * 2, -inner, *(int(n) for n in ABSURD_NUMBERS[:8] if n.isdigit())))
            case _:
                node[key] = rng.choice(_LEAVES)
        return


def _plan() -> Plan:
    """A plan with something in every field."""
    net, machine = mixture(), on(device=2**30)
    asked = (net, machine, Workload(prompt_tokens=8), Limits(device_memory="440MiB"), (FP8,), ONE_DEVICE)
    plan = with_outlook(make_plan(*asked), *asked)
    return replace(plan, traps=(Avoided("a trap", "it would have hurt", "it does not"),), devices=("cuda:0", "cuda:1"), fingerprint="")


def _check_plan(path: Path, raw: bytes) -> str:
    """By turns with the fingerprint taken on trust, so that what comes behind it is reached, as by somebody who can compute it."""
    trusted = (lambda plan: plan.fingerprint) if raw[-1:] != b"\n" and len(raw) % 2 else Plan.digest
    with patch.object(Plan, "digest", trusted):
        try:
            plan = Plan.from_json(raw)
        except BadPlan as error:
            return _refused(error)
        assert Plan.from_json(plan.to_json()) == plan
    return "accepted"


def _check_machine(path: Path, raw: bytes) -> str:
    try:
        machine = machine_of_json(raw)
    except (BadMachine, UnknownAccelerator) as error:
        return _refused(error)
    assert machine_of_json(machine_to_json(machine)) == machine
    return "accepted"


def _check_machines(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    try:
        kinds = read_machines(path)
    except (BadMachine, UnknownAccelerator) as error:
        return _refused(error)
    assert 1 <= sum(kind.count for kind in kinds) <= 1024
    assert len({kind.name for kind in kinds}) == len(kinds)
    return "accepted"


def _check_heat(path: Path, raw: bytes) -> str:
    try:
        heat = heat_from_json(raw)
    except BadHeat as error:
        return _refused(error)
    assert heat_from_json(heat_to_json(heat).encode()) == heat
    return "accepted"


def _check_tuned(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    try:
        read_tuned(path)
    except (BadTuned, BadPlan) as error:
        return _refused(error)
    return "accepted"


def _check_index(path: Path, raw: bytes) -> str:
    """Never reads a file outside of the index's folder: there is a real one, and no name in an index may reach it."""
    folder = path.parent / "model"
    folder.mkdir(exist_ok=True)
    for file in (path.parent / "x.safetensors", folder / "a.safetensors"):
        if not file.exists():
            header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
            file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    (folder / "model.safetensors.index.json").write_bytes(raw)
    try:
        checkpoint = open_checkpoint(folder)
    except (BadCheckpoint, NotAModel) as error:
        return _refused(error)
    assert all(file.parent == folder for file in checkpoint.files), f"outside of its folder: {raw!r}"
    return "accepted"


def _check_page(path: Path, raw: bytes) -> str:
    page = raw[:SLAB_OFFSET_BYTES].ljust(SLAB_OFFSET_BYTES, b"\0")
    try:
        header = Header.decode(page)
    except BadSlabFile as error:
        return _refused(error)
    again = Header.decode(header.encode())  # half a surrogate pair is no text, and written as a question mark
    assert Header.decode(again.encode()) == again
    return "accepted"


def _refused(error: OverflowmlError) -> str:
    assert len(str(error)) < 1500, f"endless message: {error!r}"
    return "refused"


def readers() -> dict[str, Reader]:
    """All of them by name."""
    plan = _plan().to_json()
    heat = heat_to_json(Heat(FINGERPRINT, "Moe").with_run(run(report(bank((3, 1, 0, 4))))))
    tried = [{"strategy": "stream", "what": "3 of 9", "predicted_pass_s": 1.0, "measured_pass_s": 2.0}]
    kept = {"tried": tried, "kept": 0, "plan": json.loads(plan), "pass": "denoise", "made_s": 1.0}
    tuned = {"schema": TUNED_SCHEMA, "version": __version__, **kept}
    index = {"metadata": {"total_size": 0}, "weight_map": {"w": "a.safetensors", "v": "../x.safetensors"}}
    host = {"total_bytes": "64GB", "core_count": 16}
    entries = [{"name": name, "count": count, "accelerators": ["RTX 4090"] * count, "host": host} for name, count in (("a", 2), ("b", 1))]
    machines = {"machines": entries}
    page = Header("0" * 64, 4096, 7, 1_700_000_000, Title("model", "layers.0", "bf16")).encode()
    return {
        "plan": Reader((plan,), _check_plan),
        "machine": Reader((machine_to_json(on(device=2**30)),), _check_machine),
        "machines": Reader((json.dumps(machines),), _check_machines),
        "heat": Reader((heat,), _check_heat),
        "tuned": Reader((json.dumps(tuned),), _check_tuned),
        "index": Reader((json.dumps(index), json.dumps({"weight_map": {"w": "a.safetensors"}})), _check_index),
        "page": Reader((page[16:].rstrip(b"\0").decode(),), _check_page, framed),
    }
