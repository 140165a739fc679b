"""What a cluster run is made of, without a cluster: addresses, seats, versions, files of models, and pictures of a worker."""

from __future__ import annotations

import importlib.util
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import overflowml
from overflowml_core.cli.running.folder import Header
from overflowml_core.cli.running.pipeline import CallFailed
from overflowml_core.cli.running.prompts import Prompt
from overflowml_core.cli.running.runner import Job
from overflowml_core.cli.running.settings import Settings
from overflowml_core.facts import Bytes, Limits
from overflowml_ray import connection
from overflowml_ray.errors import NobodyLeft, NoCluster, SetAside, WorkRefused
from overflowml_ray.models import Library, Listing, on_this_node
from overflowml_ray.nodes import Seat, difference, question, seats_of, versions_here

SEAT = Seat("host (1)", "1", 0, 1.0, 1)


# ---- reaching a cluster


def test_without_ray_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoCluster, match=r"--ray='auto': Ray is not installed; pip install 'overflowml\[ray\]'"):
        connection.check_address("auto")


@pytest.fixture
def ray_is_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":6379", "host:0", "host:99999", "ray://host:10001", "http://host:1", "host:port"]
)
def test_what_is_no_address_is_refused(ray_is_there, address):
    with pytest.raises(NoCluster, match="no address of a cluster; give local, auto or HOST:PORT"):
        connection.check_address(address)


def test_an_address_where_nobody_listens_is_refused_at_once(ray_is_there, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(NoCluster, match=r"nothing answers there .*ray start --head"):
            connection.check_address(address)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(NoCluster, match="nothing answers there"):
            connection.check_address("auto")


def test_addresses_that_may_be_one_pass(ray_is_there):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        connection.check_address(f"127.0.0.1:{server.getsockname()[1]}")
    for address in ("auto", "local"):
        connection.check_address(address)


def test_importing_overflowml_and_its_map_imports_no_ray():
    code = "import sys, overflowml; overflowml.ray.map; assert not {'ray', 'torch'} & set(sys.modules), 'imported'"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": f"{root}:{root / 'plugins'}"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'cluster'"):
        overflowml.cluster  # noqa: B018


# ---- nodes


def node(**resources: float) -> dict[str, object]:
    return {"NodeID": "0123456789abcdef", "NodeManagerHostname": "host", "Resources": resources}


def test_a_node_has_a_seat_for_each_accelerator_or_one():
    assert seats_of(node(CPU=8.0)) == [Seat("host (01234567)", "0123456789abcdef", 0, 8.0, 1)]
    cards = seats_of(node(CPU=8.0, GPU=2.0))
    assert [(one.name, one.accelerators, one.cores, one.on_node) for one in cards] == [
        ("host (01234567) accelerator 0", 1, 1.0, 2),
        ("host (01234567) accelerator 1", 1, 1.0, 2),
    ]
    assert seats_of(node(CPU=1.0, GPU=2.0))[0].cores == 0.5
    assert seats_of(node(memory=5.0)) == []


def test_versions_that_differ_are_named():
    here = versions_here()
    assert here["overflowml"] == overflowml.__version__
    assert question()() == here
    assert difference(here, here) == ""
    assert difference({"torch": "2.6", "python": "3.11"}, {"python": "3.11"}) == "torch is not installed there and 2.6 here"
    assert "python is 3.10 there and 3.11 here" in difference({"python": "3.11"}, {"python": "3.10"})


def test_what_is_asked_of_a_node_needs_nothing_of_ours_there():
    asked = question()
    assert "overflowml_ray" not in asked.__code__.co_names
    assert "<locals>" in asked.__qualname__, "sent by value: cloudpickle sends what is found by its name as the name alone"


def test_who_was_set_aside_is_named_with_the_reason():
    error = NobodyLeft({"host (1)": "disk full", "host (2)": "its node is gone"}, 5)
    assert str(error).startswith("no worker is left for 5 tasks (host (1): disk full; host (2): its node is gone)")
    back = pickle.loads(pickle.dumps(SetAside("full", whole_node=True)))
    assert (back.reason, back.whole_node) == ("full", True)


# ---- files of a model


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "weights").write_bytes(bytes(range(256)) * 20_000)
    return folder


def test_files_that_lie_there_are_used(model, tmp_path):
    assert on_this_node(model, Listing.of(model), tmp_path / "cache", _never) == model
    assert not (tmp_path / "cache").exists()


def _never(name: str, first: int, count: int) -> bytes:
    raise AssertionError("nothing is fetched")


def test_files_that_do_not_are_fetched_once_for_all_workers_of_a_node(model, tmp_path, monkeypatch):
    monkeypatch.setattr("overflowml_ray.models._PIECE_BYTES", 1_000_000)
    library, wanted, calls = Library(model), Listing.of(model), []

    def read(name: str, first: int, count: int) -> bytes:
        calls.append(name)
        return library.read(name, first, count)

    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(on_this_node(tmp_path / "elsewhere", wanted, tmp_path / "cache", read)))
        for _ in range(3)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(calls) == 1 + 6
    assert len(set(found)) == 1
    assert Listing.of(found[0]) == wanted
    assert (found[0] / "unet" / "weights").read_bytes() == (model / "unet" / "weights").read_bytes()


def test_other_files_of_the_same_name_are_not_used(model, tmp_path):
    wanted, library = Listing.of(model), Library(model)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text("{ }")
    assert on_this_node(other, wanted, tmp_path / "cache", library.read) != other


def test_a_fetch_that_ends_in_the_middle_leaves_nothing_that_is_believed(model, tmp_path):
    wanted, library = Listing.of(model), Library(model)

    def torn(name: str, first: int, count: int) -> bytes:
        if name.endswith("weights"):
            raise OSError(28, "No space left on device")
        return library.read(name, first, count)

    with pytest.raises(SetAside, match=r"cannot be kept there .No space left on device") as caught:
        on_this_node(tmp_path / "elsewhere", wanted, tmp_path / "cache", torn)
    assert caught.value.whole_node
    short = lambda name, first, count: library.read(name, first, count)[:-1]  # noqa: E731
    with pytest.raises(SetAside, match="changed while they were fetched"):
        on_this_node(tmp_path / "elsewhere", wanted, tmp_path / "cache", short)
    assert Listing.of(on_this_node(tmp_path / "elsewhere", wanted, tmp_path / "cache", library.read)) == wanted


def test_names_that_lead_elsewhere_are_refused(tmp_path):
    with pytest.raises(SetAside, match="no name of a file"):
        on_this_node(tmp_path / "none", Listing((("../../evil", 1, "0"),)), tmp_path / "cache", lambda *_: b"x")


# ---- pictures of a worker


class Painter:
    def __init__(self, room: int = 9) -> None:
        self.room = room
        self.fault: Exception | None = None

    def draw(self, prompts, seeds):
        from PIL import Image

        if self.fault is not None:
            raise self.fault
        if len(seeds) > self.room:
            raise MemoryError("no room")
        return [Image.new("RGB", (4, 4), (seed, len(seeds), 0)) for seed in seeds]


def worker(painter: Painter, storage=None):
    pytest.importorskip("PIL")
    from overflowml_ray.pictures import OpenPictures, PictureWork

    prompts = tuple(Prompt(f"{index}") for index in range(4))
    job = Job(Path("pipeline"), prompts, Settings("digest"), Limits())
    work = PictureWork(job, Header({}, "0", 4, 7, 4), Listing(()), None, storage)
    return OpenPictures(work, painter, [7, 8, 9, 10])  # type: ignore[arg-type]


def test_a_worker_makes_what_is_missing_of_a_company():
    made = worker(Painter()).do(((0, 1, 2), frozenset({1})))
    assert sorted(made) == [0, 2]
    assert {one.batch for one in made.values()} == {(0, 1, 2)}


def test_a_company_that_does_not_fit_is_halved():
    made = worker(Painter(room=2)).do(((0, 1, 2, 3), frozenset()))
    assert [one.batch for one in made.values()] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    with pytest.raises(MemoryError):
        worker(Painter(room=0)).do(((0, 1), frozenset()))


def test_a_call_that_a_pipeline_refuses_ends_the_work():
    painter = Painter()
    painter.fault = CallFailed("refused")
    with pytest.raises(WorkRefused, match="refused"):
        worker(painter).do(((0,), frozenset()))


def test_a_storage_that_a_node_cannot_write_sets_the_node_aside(tmp_path):
    pytest.importorskip("fsspec")
    from overflowml_ray.storage import Storage

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SetAside, match="cannot be written from there") as caught:
        worker(Painter(), Storage(f"file://{tmp_path}/file")).do(((0,), frozenset()))
    assert caught.value.whole_node
    made = worker(Painter(), Storage(f"file://{tmp_path}/out")).do(((0,), frozenset()))
    assert made[0].content is None
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["00000.png"]


def test_workers_of_one_node_divide_its_memory(monkeypatch):
    pytest.importorskip("PIL")
    psutil = pytest.importorskip("psutil")
    from overflowml_ray.pictures import _shared

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    two = Seat("a", "1", 1, 1.0, 2)
    assert _shared(Limits(), two).host_memory == Bytes(45)
    assert _shared(Limits(host_memory=Bytes(10)), two).host_memory == Bytes(10)
    assert _shared(Limits(), SEAT).host_memory is None


def test_an_accelerator_that_torch_does_not_see_sets_its_worker_aside(monkeypatch):
    from overflowml_core import session
    from overflowml_ray.pictures import _check_accelerator

    monkeypatch.setattr(session, "detect", lambda: SimpleNamespace(accelerators=()))
    with pytest.raises(SetAside, match="torch sees none"):
        _check_accelerator(Seat("a", "1", 1, 1.0, 1))
    _check_accelerator(SEAT)
    monkeypatch.setattr(session, "detect", lambda: SimpleNamespace(accelerators=("one",)))
    _check_accelerator(Seat("a", "1", 1, 1.0, 1))
