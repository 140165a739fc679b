"""report: the list of runs, the figures of one, and pictures of expert heat that show no more and no less than was counted."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overflowml_core.cli.heat.drawing import drawing
from overflowml_core.cli.heat.picture import EDGES, LEVELS, grouped, level_of, rows_of
from overflowml_core.cli.heat.terminal import HeatScreen
from overflowml_core.heat import Heat
from overflowml_core.heat_store import Save, heat_path, save_run
from tests.core.heats import FINGERPRINT, bank, report
from tests.core.heats import run as ran

OTHER = "f" * 16
_STYLES = re.compile("\x1b\\[[0-9;]*m")
HOSTILE = '/models/<script>alert("1")</script>\x1b[2J\n]]>'
HUB = "/home/me/.cache/huggingface/hub/models--owner--name/snapshots/abc"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OVERFLOWML_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def saved(folder) -> Path:
    counted = report(bank((12, 4, 0, 0), "model.layers.0", cached=(0,)), bank((4, 4, 4, 4), "model.layers.1", cached=(2, 3)))
    assert save_run(Save(FINGERPRINT, "Moe", ran(counted, source=HUB)))
    assert save_run(Save(OTHER, "Other", ran(report(bank((2, 2, 0, 0))), source=HOSTILE, ended_s=1.6e9)))
    return folder


def test_lists_the_latest_runs_first(run, saved):
    status, out, err = run("report")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0] == "=== Runs with experts outside of the device ==="
    assert lines[1].split() == ["Model", "Fingerprint", "When", "Tokens", "Hits", "MB/token", "Waited"]
    assert lines[2].split()[:2] == ["owner/name", "01234567"]
    assert lines[2].split()[-6:] == ["8", "50.0", "%", "0.000375", "25.0", "%"]  # 6 of 6 asked, 3 hits, 3000 bytes, 8 tokens
    assert "\x1b" not in out
    document = json.loads(run("report", "--json")[1])
    assert [one["fingerprint"] for one in document["runs"]] == [FINGERPRINT, OTHER]
    assert document["runs"][0]["hit_rate"] == 0.5
    assert document["damaged"] == []


def test_where_nothing_ran(run, folder):
    assert "none yet" in run("report")[1]
    assert json.loads(run("report", "--json")[1])["runs"] == []


@pytest.mark.parametrize("source", ["0123", FINGERPRINT, "owner/name", HUB, "Moe"])
def test_figures_of_one_model_by_any_of_its_names(run, saved, source):
    status, out, _ = run("report", source)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "=== Expert heat of owner/name (Moe) ==="
    assert any(line.startswith("layers.0 ◕") for line in lines)  # three times the even share, and cached
    table = [line.split() for line in lines[-2:]]
    assert table[0] == ["layers.0", "50.0", "%", "0.000125", "1", "of", "4", "75.0", "%", "2"]
    assert table[1] == ["layers.1", "50.0", "%", "0.00025", "2", "of", "4", "25.0", "%", "0"]


def test_figures_of_a_folder(run, saved, monkeypatch, tmp_path):
    from overflowml_core import session

    network = type("Network", (), {"fingerprint": FINGERPRINT})
    monkeypatch.setattr(session, "describe", lambda source: network)
    assert run("report", tmp_path)[1].startswith("=== Expert heat of owner/name (Moe) ===")
    network.fingerprint = "0" * 16
    assert "no run with experts" in run("report", tmp_path)[2]


def test_as_json(run, saved):
    document = json.loads(run("report", FINGERPRINT, "--json")[1])
    assert document["heat"][0] == {
        "component": "model",
        "block": "model.layers.0",
        "per_token": 2,
        "tokens": 8,
        "shares": [1.5, 0.5, 0.0, 0.0],
    }
    assert document["run"]["report"]["banks"][1]["cached"] == [2, 3]


def test_an_unknown_model_and_an_ambiguous_name_end_with_2(run, saved):
    status, _, err = run("report", "nobody/nothing")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "owner/name" in err
    assert save_run(Save("0123" + "0" * 12, "Moe", ran(report(bank((2, 2, 0, 0))), source=HUB)))
    assert "write more of it" in run("report", "0123")[2]
    assert "2 models" in run("report", "owner/name")[2]
    assert "SOURCE" in run("report", "--svg", saved / "x.svg")[2]
    assert run("report", "0123456", "--svg", saved / "no" / "x.svg")[0] == 2


def test_a_damaged_map_is_named_and_costs_no_other(run, saved):
    heat_path(OTHER).write_bytes(b"\x00 nothing")
    status, out, err = run("report")
    assert status == 0
    assert "owner/name" in out
    assert str(heat_path(OTHER)) in "".join(err.split())  # folded to the width of a terminal
    assert str(heat_path(OTHER)) in json.loads(run("report", "--json")[1])["damaged"][0]
    status, _, err = run("report", OTHER)
    assert status == 2
    assert str(heat_path(OTHER)) in "".join(err.split())


def test_svg_and_page_hold_what_was_counted_and_nothing_of_strangers(run, saved, tmp_path):
    svg, html = tmp_path / "heat.svg", tmp_path / "heat.html"
    assert run("report", OTHER, "--svg", svg, "--html", html)[0] == 0
    root = ElementTree.parse(svg).getroot()
    assert not [one for one in root.iter() if one.tag.endswith(("script", "foreignObject", "image"))]
    assert "<script" not in svg.read_text()
    page = html.read_text()
    assert "<script" not in page
    assert "default-src &#x27;none&#x27;" in page
    assert "&lt;script&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def cells(counts: tuple[int, ...], cached: tuple[int, ...] = ()) -> ElementTree.Element:
    heat = Heat(FINGERPRINT, "Moe").with_run(ran(report(bank(counts, cached=cached))))
    return ElementTree.fromstring(drawing("title", "figures", rows_of(heat)))


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=80).filter(any).map(tuple), st.data())
def test_every_expert_is_drawn_once_in_its_level(counts, data):
    cached = tuple(sorted(data.draw(st.sets(st.integers(0, len(counts) - 1)))))
    root = cells(counts, cached)
    paths = {one.get("class"): one.get("d", "") for one in root.iter() if one.tag.endswith("path")}
    even = sum(counts) / len(counts)
    for level in range(LEVELS):
        widths = [float(piece.split("h")[1].split("v")[0]) for piece in paths.get(f"h{level}", "").split("M")[1:]]
        drawn = sum(widths) * len(counts) / 1000
        assert drawn == pytest.approx(sum(level_of(count / even) == level for count in counts), abs=0.01)
    assert paths.get("cached", "").count("M") == len(cached)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=600).filter(any).map(tuple), st.integers(1, 200))
def test_columns_hold_all_experts(counts, columns):
    heat = Heat(FINGERPRINT, "Moe").with_run(ran(report(bank(counts, cached=(0,)))))
    (row,) = rows_of(heat)
    shown = grouped(row, columns)
    assert len(shown) <= columns
    assert max(ratio for ratio, _ in shown) <= max(row.ratios) * (1 + 1e-9)
    assert shown[0][1] == 1 / min(-(-len(counts) // columns), len(counts))


def test_levels_are_the_edges():
    assert [level_of(edge) for edge in EDGES] == list(range(1, LEVELS))
    assert level_of(0.0) == 0


class Terminal(io.StringIO):
    """A terminal, or a file, of an encoding."""

    def __init__(self, encoding: str, terminal: bool) -> None:
        super().__init__()
        self._encoding, self._terminal = encoding, terminal

    @property
    def encoding(self) -> str:
        return self._encoding

    def isatty(self) -> bool:
        return self._terminal


def picture(monkeypatch: pytest.MonkeyPatch, columns: int, encoding: str = "utf-8", colours: bool = False, experts: int = 128) -> list[str]:
    counts = tuple(1000 // (place + 1) for place in range(experts))
    heat = Heat(FINGERPRINT, "Moe").with_run(ran(report(*(bank(counts, f"layers.{n}", cached=(0, 2)) for n in range(12)))))
    shown = Terminal(encoding, terminal=True)
    monkeypatch.setattr(sys, "stdout", shown)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": str(columns), "NO_COLOR": "" if colours else "1"}.items():
        monkeypatch.setenv(name, value)
    if colours:
        monkeypatch.delenv("NO_COLOR")
    HeatScreen().picture(rows_of(heat))
    return shown.getvalue().splitlines()


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_the_picture_is_as_wide_as_the_terminal(monkeypatch, columns):
    lines = [_STYLES.sub("", line) for line in picture(monkeypatch, columns)]
    assert max(len(line) for line in lines) <= columns
    assert len({len(line) for line in lines[:12]}) == 1
    assert lines[0].startswith(" layers.0 ")
    assert lines[11].startswith("layers.11 ")


def test_what_is_cached_is_told_without_colours_by_another_character(monkeypatch):
    (line,) = {line.split()[1] for line in picture(monkeypatch, 200)[:12]}
    assert [place for place, character in enumerate(line) if character in "○◔◑◕●"] == [0, 2]


def test_with_colours_it_is_told_by_them(monkeypatch):
    lines = picture(monkeypatch, 200, colours=True)
    assert not set("○◔◑◕●") & set("".join(lines))
    assert "\x1b[1;32m" in lines[0]


def test_an_output_of_few_characters_gets_no_question_marks(monkeypatch):
    text = "\n".join(picture(monkeypatch, 100, "ascii"))
    assert text.isascii()
    assert "?" not in text
