"""Makes an environment install the hosts by itself: writes one ``.pth`` file into its site-packages, and removes it. Knows no host.

Python executes the lines of such files at start-up that begin with ``import`` (docs.python.org, module ``site``). Ours holds the code of
``startup`` in one line, so that nothing of the project is imported, or has to be there, before a host is.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import site
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from overflowml_core.errors import OverflowmlError

FILE_NAME = "overflowml-activate.pth"
"""The one file that is written."""
_MARK = "import sys; exec("
_NEEDLE = "OverflowmlStart"
State = Literal["active", "stale", "inactive"]


@dataclass(frozen=True, slots=True)
class Environment:
    """A Python environment that can be activated.

    Attributes:
        folder: its site-packages.
        user_folder: the user's own, outside virtual environments.
        virtual: it is a virtual environment, that no other program depends on.
        managed: the system's package manager keeps it (PEP 668).
        installed: overflowml is installed in it, so that a new interpreter finds it.
    """

    folder: Path
    user_folder: Path | None
    virtual: bool
    managed: bool
    installed: bool


def this_environment() -> Environment:
    """The environment of this interpreter."""
    virtual = sys.prefix != sys.base_prefix
    user = None if virtual or not site.ENABLE_USER_SITE else Path(site.getusersitepackages())
    return Environment(
        folder=Path(sysconfig.get_path("purelib")),
        user_folder=user,
        virtual=virtual,
        managed=not virtual and (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").is_file(),
        installed=_is_installed(),
    )


def _is_installed() -> bool:
    try:
        importlib.metadata.distribution("overflowml")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pth_line() -> str:
    """The line that is written: the code of ``startup`` without its comments and docstrings, as the argument of ``exec``."""
    tree = ast.parse(Path(__file__).with_name("startup.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]
    # A namespace of its own: the line runs in that of module ``site``.
    return f"{_MARK}{ast.unparse(tree)!r}, {{'__name__': 'overflowml_startup'}})\n"


def activate(environment: Environment, user: bool = False, force: bool = False) -> tuple[Path, bool]:
    """Write the file.

    Args:
        environment: where.
        user: into the user's site-packages instead of the environment's.
        force: outside virtual environments too.

    Returns:
        The file, and whether it was written; False where it was there already as it should be.

    Raises:
        OverflowmlError: overflowml is not installed there, the environment is none of ours to change, or the folder cannot be written.
    """
    if not environment.installed:
        raise OverflowmlError(
            f"{environment.folder}: overflowml is not installed here, and would not be found; pip install overflowml first"
        )
    folder = _chosen_folder(environment, user, force)
    path = folder / FILE_NAME
    _check_ours(path)
    line = pth_line()
    if _read(path) == line:
        return path, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.write_text(line, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error
    return path, True


def _chosen_folder(environment: Environment, user: bool, force: bool) -> Path:
    if user:
        if environment.user_folder is None:
            why = (
                "a virtual environment has no folder of the user's" if environment.virtual else "the user's site-packages are switched off"
            )
            raise OverflowmlError(f"--user: {why}; leave it out")
        return environment.user_folder
    if not environment.virtual and not force:
        kept = "the system's package manager keeps this Python (PEP 668)" if environment.managed else "this is no virtual environment"
        raise OverflowmlError(
            f"{environment.folder}: {kept}, and every program that runs on it would be changed; activate a virtual environment, "
            "or give --user for your own programs or --force for all"
        )
    return environment.folder


def deactivate(environment: Environment) -> tuple[Path, ...]:
    """Remove the file wherever this environment reads it; a second call finds nothing to do.

    Returns:
        The files that were removed.

    Raises:
        OverflowmlError: a file of that name is not ours, or cannot be removed.
    """
    removed = []
    for path in _paths(environment):
        _check_ours(path)
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _not_writable(path, error) from error
        removed.append(path)
    return tuple(removed)


def state_of(environment: Environment) -> State:
    """Whether the environment is activated; "stale" where another version of the project wrote the file."""
    texts = [text for path in _paths(environment) if (text := _read(path)) is not None]
    if not texts:
        return "inactive"
    return "active" if all(text == pth_line() for text in texts) else "stale"


def _paths(environment: Environment) -> tuple[Path, ...]:
    folders = [environment.folder, *([environment.user_folder] if environment.user_folder is not None else [])]
    return tuple(folder / FILE_NAME for folder in dict.fromkeys(folders))


def _check_ours(path: Path) -> None:
    text = _read(path)
    if text is not None and not (text.startswith(_MARK) and _NEEDLE in text):
        raise OverflowmlError(f"{path}: a file of this name that overflowml did not write; look into it, and move it away by hand")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OverflowmlError(f"{path}: cannot be read ({error.strerror}); look at its permissions") from error


def _not_writable(path: Path, error: OSError) -> OverflowmlError:
    return OverflowmlError(f"{path}: cannot be changed ({error.strerror}); run it as the owner of the environment, or in one of your own")
