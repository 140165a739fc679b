"""The files of heat maps: several writers, damage, names, and how many there may be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from overflowml_core import heat_store
from overflowml_core.facts import Block, Component, Experts, Network
from overflowml_core.heat import BadHeat
from overflowml_core.heat_store import Save, heat_path, kept_maps, load_heat, read_heat, save_run, with_heat
from tests.core.heats import FINGERPRINT, bank, report, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path))
    return tmp_path / "heat"


def save(key: str = "a", counts: tuple[int, ...] = (2, 0, 1, 1), network: str = FINGERPRINT) -> bool:
    return save_run(Save(network, "Moe", run(report(bank(counts)), key)))


def test_what_was_saved_is_there_for_this_user_alone(folder):
    assert load_heat(FINGERPRINT) is None
    assert save()
    heat = load_heat(FINGERPRINT)
    assert heat is not None
    assert heat.shares("model", "layers.0") == (1.0, 0.0, 0.5, 0.5)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", f"{FINGERPRINT}.json"]
    if os.name == "posix":
        assert heat_path(FINGERPRINT).stat().st_mode & 0o077 == 0


def test_no_increment_of_several_writers_is_lost():
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda number: save(str(number)), range(40)))
    assert load_heat(FINGERPRINT).banks[0].counts == (80, 0, 40, 40)


def test_who_holds_the_lock_for_too_long_is_not_waited_for(folder, monkeypatch):
    if sys.platform == "win32":
        pytest.skip("nothing is locked there")
    folder.mkdir()
    code = f"import fcntl, time; f = open({str(folder / '.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
    code += "print('held', flush=True); time.sleep(60)"
    monkeypatch.setattr(heat_store, "_PATIENCE_S", 0.05)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert save()
        holder.kill()


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"schema": 1, "banks": 3}'])
def test_a_damaged_map_is_named_left_out_and_made_again(raw, caplog):
    heat_path(FINGERPRINT).parent.mkdir()
    heat_path(FINGERPRINT).write_bytes(raw)
    assert load_heat(FINGERPRINT) is None
    assert str(heat_path(FINGERPRINT)) in caplog.text
    with pytest.raises(BadHeat, match=FINGERPRINT):
        read_heat(heat_path(FINGERPRINT))
    assert save()
    assert load_heat(FINGERPRINT).banks[0].counts == (2, 0, 1, 1)


def test_a_map_of_another_network_is_none_of_this(caplog):
    save()
    os.replace(heat_path(FINGERPRINT), heat_path("f" * 16))
    assert load_heat("f" * 16) is None
    assert FINGERPRINT in caplog.text


def test_a_fingerprint_names_no_other_folder(folder):
    assert save(network="../../etc/passwd")
    assert [path.parent for path in kept_maps()] == [folder]
    assert load_heat("../../etc/passwd").fingerprint == "../../etc/passwd"


def test_the_oldest_maps_go(folder, monkeypatch):
    monkeypatch.setattr(heat_store, "MOST_MAPS", 2)
    for number in range(4):
        save(network=f"{number:016x}")
        os.utime(heat_path(f"{number:016x}"), (number, number))
    assert [path.stem for path in kept_maps()] == [f"{3:016x}", f"{2:016x}"]


def test_a_folder_that_cannot_be_made_is_a_warning(folder, caplog):
    folder.write_text("a file")
    assert not save()
    assert str(heat_path(FINGERPRINT)) in caplog.text
    assert load_heat(FINGERPRINT) is None


def test_a_network_gets_its_heat_and_one_without_experts_asks_no_file(monkeypatch):
    save()
    blocks = (Block("layers.0", 1, 1, 1, experts=Experts(4, 100, 2)),)
    network = Network((Component("model", "Moe", blocks, 0, 0, (), "model"),), "x", "Moe", FINGERPRINT)
    assert with_heat(network).components[0].blocks[0].experts.heat == (1.0, 0.0, 0.5, 0.5)
    monkeypatch.setattr(heat_store, "load_heat", lambda _: pytest.fail("a file was asked for"))
    dense = Network((Component("model", "Llama", (Block("layers.0", 1, 1, 1),), 0, 0, (), "model"),), "x", "Llama", FINGERPRINT)
    assert with_heat(dense) is dense


def test_it_brings_in_no_torch(tmp_path):
    code = "import sys; from overflowml_core.heat_store import load_heat; load_heat('0' * 16); print('torch' in sys.modules)"
    environment = {"OVERFLOWML_CACHE": str(tmp_path), "PATH": "", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.stdout == "False\n", done.stderr


def test_the_file_is_json_that_others_can_read():
    save()
    assert json.loads(heat_path(FINGERPRINT).read_text())["banks"][0]["counts"] == [2, 0, 1, 1]
