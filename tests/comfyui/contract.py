"""What the pack uses of the host, read in the pack's own source, and where a version of the host has it, read in the host's.

``python contract.py VERSION=CHECKOUT ...`` records it into ``contract.json``, beside the versions that are there. Neither side is imported:
names and signatures come from syntax trees.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
RECORDED = Path(__file__).parent / "contract.json"
_PACK = ("comfyui_nodes", "plugins/overflowml_comfyui")
_HOST = ("comfy", "comfy_api", "server", "folder_paths", "nodes", "execution", "comfy_execution")
_METHODS = {
    "comfy.model_patcher.ModelPatcher": (
        "add_wrapper_with_key",
        "remove_wrappers_with_key",
        "clone",
        "is_dynamic",
        "model_size",
        "loaded_size",
    ),
    "comfy.model_management.LoadedModel": ("model_loaded_memory",),
    "server.PromptServer": ("add_on_prompt_handler", "send_sync"),
}
"""Methods of values that the host hands to us: no import says so."""


def used() -> dict[str, list[str]]:
    """Modules of the host with the names that the pack takes from them, and classes with their methods."""
    found: dict[str, set[str]] = {name: set(methods) for name, methods in _METHODS.items()}
    for folder in _PACK:
        for path in sorted((CHECKOUT / folder).glob("*.py")):
            tree = ast.parse(path.read_text("utf-8"))
            aliases = _imports(tree, found)
            for node in ast.walk(tree):
                dotted = _dotted(node)
                if dotted is not None and dotted[0] in aliases:
                    found.setdefault(aliases[dotted[0]], set()).add(dotted[1])
    return {name: sorted(names) for name, names in sorted(found.items()) if names}


def _imports(tree: ast.AST, found: dict[str, set[str]]) -> dict[str, str]:
    """Names under which a file holds modules of the host."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                if one.name.partition(".")[0] in _HOST:
                    aliases[one.asname or one.name] = one.name
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module and node.module.partition(".")[0] in _HOST:
            for one in node.names:
                found.setdefault(node.module, set()).add(one.name)
                aliases[one.asname or one.name] = f"{node.module}.{one.name}"
    return aliases


def _dotted(node: ast.AST) -> tuple[str, str] | None:
    """An attribute of a name, or of a module that is written with its dots."""
    if not isinstance(node, ast.Attribute):
        return None
    parts: list[str] = [node.attr]
    value = node.value
    while isinstance(value, ast.Attribute):
        parts.append(value.attr)
        value = value.value
    if not isinstance(value, ast.Name):
        return None
    parts.append(value.id)
    return ".".join(reversed(parts[1:])), parts[0]


def signatures(checkout: Path, wanted: dict[str, list[str]]) -> dict[str, str | None]:
    """Each wanted name with its signature in a checkout, "a value" for what is none, None where it is missing."""
    found: dict[str, str | None] = {}
    for owner, names in wanted.items():
        for name in names:
            found[f"{owner}.{name}"] = _signature(checkout, owner, name)
    return found


def _signature(checkout: Path, owner: str, name: str) -> str | None:
    """Of a name in a module, in a class of a module, or in a module that another one imports under a shorter name."""
    module = _file(checkout, owner)
    if module is not None:
        return _in_body(ast.parse(module.read_text("utf-8")).body, name)
    parent, _, last = owner.rpartition(".")
    hidden, outer = _file(checkout, f"{parent}._{last}"), _file(checkout, parent)
    if hidden is not None:
        return _in_body(ast.parse(hidden.read_text("utf-8")).body, name)
    body = ast.parse(outer.read_text("utf-8")).body if outer is not None else []
    inside = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == last), [])
    return _in_body(inside, name)


def _in_body(body: list[ast.stmt], name: str) -> str | None:
    answer = None
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            answer = f"({ast.unparse(node.args)})"
        elif isinstance(node, ast.ClassDef) and node.name == name:
            answer = "a class"
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                answer = "a value"
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and any((one.asname or one.name) == name for one in node.names):
            answer = "imported"
        elif isinstance(node, (ast.If, ast.Try)):
            answer = _in_body([*node.body, *node.orelse], name) or answer
    return answer


def _file(checkout: Path, module: str) -> Path | None:
    place = checkout.joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def main() -> None:
    """Record."""
    document = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    for argument in sys.argv[1:]:
        version, _, checkout = argument.partition("=")
        document[version] = signatures(Path(checkout), used())
    RECORDED.write_text(json.dumps(dict(sorted(document.items())), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
