"""activate and deactivate: one file, written and removed; and in an environment of its own, what it does to interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from overflowml_core import activation
from overflowml_core.activation import FILE_NAME, Environment, activate, deactivate, pth_line, state_of, this_environment
from overflowml_core.cli import activate as command
from overflowml_core.errors import OverflowmlError

ROOT = Path(__file__).parents[2]
Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "site-packages", None, virtual=True, managed=False, installed=True)


def _system(tmp_path: Path, user: bool = True, managed: bool = True) -> Environment:
    return Environment(tmp_path / "system", tmp_path / "user" if user else None, virtual=False, managed=managed, installed=True)


# ---- the file


def test_writes_one_file_once_and_removes_it_once(environment):
    assert state_of(environment) == "inactive"
    path, written = activate(environment)
    assert (path, written) == (environment.folder / FILE_NAME, True)
    assert activate(environment) == (path, False)
    assert state_of(environment) == "active"
    assert [p.name for p in environment.folder.iterdir()] == [FILE_NAME]
    assert deactivate(environment) == (path,)
    assert deactivate(environment) == ()
    assert list(environment.folder.iterdir()) == []


def test_is_one_line_that_python_executes():
    line = pth_line()
    assert line.startswith("import ")
    assert line.endswith("\n")
    assert line.count("\n") == 1
    compile(line, FILE_NAME, "exec")
    assert "site-packages" in line or str(ROOT) not in line


def test_a_file_of_an_older_version_is_replaced(environment):
    path, _ = activate(environment)
    path.write_text(pth_line().replace("transformers", "other"), encoding="utf-8")
    assert state_of(environment) == "stale"
    assert activate(environment) == (path, True)
    assert state_of(environment) == "active"


def test_a_strangers_file_is_left_alone(environment):
    environment.folder.mkdir()
    path = environment.folder / FILE_NAME
    path.write_text("import os\n", encoding="utf-8")
    for change in (activate, deactivate):
        with pytest.raises(OverflowmlError, match="did not write"):
            change(environment)
    assert path.read_text(encoding="utf-8") == "import os\n"


def test_other_files_stay(environment):
    environment.folder.mkdir()
    other = environment.folder / "other.pth"
    other.write_text("import sys\n", encoding="utf-8")
    activate(environment)
    deactivate(environment)
    assert list(environment.folder.iterdir()) == [other]


# ---- where it is refused


def test_not_installed(tmp_path):
    with pytest.raises(OverflowmlError, match="pip install overflowml"):
        activate(Environment(tmp_path, None, virtual=True, managed=False, installed=False))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("managed", "word"), [(True, "PEP 668"), (False, "no virtual environment")])
def test_outside_a_virtual_environment(tmp_path, managed, word):
    system = _system(tmp_path, managed=managed)
    with pytest.raises(OverflowmlError, match=rf"{word}.*--user.*--force"):
        activate(system)
    assert activate(system, user=True)[0] == tmp_path / "user" / FILE_NAME
    assert activate(system, force=True)[0] == tmp_path / "system" / FILE_NAME
    assert {path.parent.name for path in deactivate(system)} == {"system", "user"}


def test_no_folder_of_the_user(environment, tmp_path):
    for made in (environment, _system(tmp_path, user=False)):
        with pytest.raises(OverflowmlError, match="--user"):
            activate(made, user=True)


def test_a_folder_that_cannot_be_written(environment):
    environment.folder.write_text("a file stands where the folder should be")
    with pytest.raises(OverflowmlError, match="cannot be changed"):
        activate(environment)
    assert deactivate(environment) == ()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_folder(environment):
    environment.folder.mkdir()
    environment.folder.chmod(0o500)
    with pytest.raises(OverflowmlError, match="cannot be changed"):
        activate(environment)


def test_a_write_that_fails_leaves_nothing(environment, monkeypatch):
    monkeypatch.setattr(Path, "replace", _no_space)
    with pytest.raises(OverflowmlError, match="No space left"):
        activate(environment)
    assert list(environment.folder.iterdir()) == []


def _no_space(*args: object) -> None:
    raise OSError(28, "No space left on device")


# ---- the commands


@pytest.fixture
def run(environment, monkeypatch):
    monkeypatch.setattr(activation, "this_environment", lambda: environment)
    app = typer.Typer()
    app.command()(command.activate)
    app.command()(command.deactivate)
    return lambda *arguments: CliRunner().invoke(app, [*arguments])


def test_commands_say_what_they_did(run, environment):
    path = environment.folder / FILE_NAME
    first, second = run("activate"), run("activate")
    assert first.output.splitlines()[0] == f"{path}: written"
    assert "overflowml deactivate" in first.output
    assert second.output.splitlines() == [f"{path}: was there already"]
    assert run("deactivate").output.splitlines() == [f"{path}: removed"]
    last = run("deactivate")
    assert (last.output.splitlines(), last.exit_code) == (["this environment was not activated; nothing to do"], 0)


def test_this_environment_is_the_one_that_runs():
    here = this_environment()
    assert here.folder == Path(sysconfig.get_path("purelib"))
    assert here.virtual == (sys.prefix != sys.base_prefix)


# ---- interpreters of an environment of its own


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that finds what this one has, and the project as its entry points are registered."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    folder = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    others = [path for path in dict.fromkeys([str(ROOT), str(ROOT / "plugins"), *sys.path]) if path and Path(path).is_dir()]
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    outside = [path for path in others if not any(path == own or path.startswith(f"{own}{os.sep}lib-dynload") for own in standard)]
    (folder / "paths.pth").write_text("".join(f"{path}\n" for path in outside), encoding="utf-8")
    return folder


@pytest.fixture
def python(site_packages: Path, tmp_path: Path):
    home = site_packages
    while not (home / "pyvenv.cfg").is_file():
        home = home.parent
    binary = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OVERFLOWML_", "PYTHON"))}

    def call(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        settings = {**inherited, "OVERFLOWML_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", **variables}
        return subprocess.run([str(binary), "-c", code], capture_output=True, text=True, timeout=300, check=False, env=settings)

    yield call
    (site_packages / FILE_NAME).unlink(missing_ok=True)


def _activated(site_packages: Path) -> None:
    activate(Environment(site_packages, None, virtual=True, managed=False, installed=True))


def test_an_interpreter_starts_without_anything_of_ours(python, site_packages):
    _activated(site_packages)
    code = "import sys; print(sorted(m for m in sys.modules if 'overflowml' in m), "
    done = python(code + "[type(f).__name__ for f in sys.meta_path if 'Overflow' in type(f).__name__])")
    assert done.stdout.strip() == "[] ['OverflowmlStart']", done.stderr
    assert done.stderr == ""


def test_a_deactivated_environment_is_as_it_was(python, site_packages):
    code = "import sys; print(sorted(type(f).__name__ for f in sys.meta_path), sorted(sys.modules), sys.path)"
    before = python(code)
    _activated(site_packages)
    assert python(code).stdout != before.stdout
    assert deactivate(Environment(site_packages, None, virtual=True, managed=False, installed=True))
    assert python(code).stdout == before.stdout != "", before.stderr


def test_a_host_brings_overflowml_just_before_itself(python, site_packages):
    _activated(site_packages)
    stand_in = site_packages / "diffusers_stand_in"
    code = f"""
import sys
sys.path.insert(0, {str(stand_in)!r})
import diffusers
print(diffusers.seen, type(diffusers.__spec__.loader).__name__, [f for f in sys.meta_path if type(f).__name__ == 'OverflowmlStart'])
"""
    stand_in.mkdir(exist_ok=True)
    (stand_in / "diffusers.py").write_text("import sys\nseen = 'overflowml' in sys.modules\n")
    done = python(code)
    assert done.stdout.strip() == "True SourceFileLoader []", done.stderr


def test_a_host_that_is_missing_is_missing_as_before(python, site_packages):
    _activated(site_packages)
    code = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
    code += "try: import diffusers\nexcept ModuleNotFoundError as e: print(e)"
    assert python(code).stdout.strip() == "No module named 'diffusers'"


def test_an_error_of_ours_reaches_nobody(python, site_packages):
    _activated(site_packages)
    broken = site_packages / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "overflowml.py").write_text("raise RuntimeError('no luck')\n")
    (broken / "diffusers.py").write_text("fine = True\n")
    done = python(f"import sys; sys.path.insert(0, {str(broken)!r})\nimport diffusers; print(diffusers.fine)")
    assert (done.stdout.strip(), done.returncode) == ("True", 0)
    assert done.stderr.strip() == "overflowml: not active (RuntimeError: no luck); install it, or remove overflowml-activate.pth"


_LOAD = """
import sys
assert "overflowml" not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, device_map="overflowml")
print(sys.modules["overflowml"].attachment(model) is not None)
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from importlib.metadata import entry_points

    if not entry_points(group="overflowml"):
        pytest.skip("the project is not installed, so that its plugins are not found")
    from tests.hosts import models

    folder = tmp_path_factory.mktemp("llama")
    models.build("llama").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_plain_script_asks_for_overflowml(python, site_packages, llama):
    _activated(site_packages)
    done = python(_LOAD.format(folder=str(llama)))
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.slow
def test_switched_off_the_host_refuses_as_before(python, site_packages, llama):
    _activated(site_packages)
    done = python(_LOAD.format(folder=str(llama)), OVERFLOWML_DISABLE="1")
    assert "overflowml" in done.stderr.strip().splitlines()[-1]
    assert "ValueError" in done.stderr
    assert done.stdout == ""
