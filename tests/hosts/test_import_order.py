"""Orders of importing the hosts and us, and our switch: each in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_REGISTER = """
import importlib, sys
from overflowml_core import session
for name in ("transformers", "diffusers"):
    if name not in session.plugins().names():
        session.plugins().register(importlib.import_module("overflowml_" + name), name)
session.plugins().accelerators = lambda: []
"""
"""As the entry points of an installed distribution do at the first call; without one it must come before ``import overflowml``."""

_IS_OURS = """
def is_ours(function):
    return "overflowml" in getattr(function, "__func__", function).__code__.co_filename

def places():
    import transformers, transformers.pipelines, transformers.modeling_utils, diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.loaders import single_file, single_file_model, single_file_utils
    base = transformers.modeling_utils.PreTrainedModel
    return [vars(base)["from_pretrained"], vars(base)["_load_pretrained_model"],
            transformers.pipeline, transformers.pipelines.pipeline, vars(transformers.pipelines.Pipeline)["__init__"],
            vars(DiffusionPipeline)["from_pretrained"], vars(ModelMixin)["from_pretrained"], vars(ModelMixin)["_load_pretrained_model"],
            single_file_utils.load_state_dict, vars(single_file_model.FromOriginalModelMixin)["from_single_file"],
            single_file_model.load_model_dict_into_meta, single_file_model.dispatch_model,
            vars(single_file.FromSingleFileMixin)["from_single_file"]]
"""


def _python(script: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_us_imports_neither_torch_nor_a_host(import_path: dict[str, str]) -> None:
    script = _REGISTER + (
        "import overflowml\n"
        "overflowml.uninstall(); overflowml.install()\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'accelerate', 'safetensors', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "overflowml.uninstall()\n"
        "assert not [f for f in sys.meta_path if 'overflowml' in type(f).__module__]\n"
    )
    _python(script, import_path)


_FORKED = """
import os, sys, traceback
import torch, torch._dynamo, torch.distributed.tensor, torch.fx.experimental.symbolic_shapes
assert not {"transformers", "diffusers", "accelerate"} & set(sys.modules)
results = {}
for name, (script, variables) in CASES.items():
    child = os.fork()
    if not child:
        os.environ.update(variables)
        try:
            exec(script, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    results[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert not any(results.values()), results
"""
"""Each case in a process of its own that knows neither host nor us; torch, which takes half of the time, is imported once before them."""

_ORDERS = [
    ["import overflowml", "import transformers, diffusers"],
    ["import transformers, diffusers", "import overflowml"],
    ["from transformers import AutoModel, pipeline", "from diffusers import FluxPipeline", "import overflowml"],
    ["import overflowml", "from diffusers import FluxPipeline", "from transformers import AutoModel, pipeline"],
    ["import diffusers", "import overflowml", "import transformers"],
]


def _order(steps: list[str]) -> str:
    return (
        "\n".join(_REGISTER + step if step == "import overflowml" else step for step in steps)
        + _IS_OURS
        + (
            "assert all(is_ours(f) for f in places()), [is_ours(f) for f in places()]\n"
            "overflowml.uninstall()\n"
            "assert not any(is_ours(f) for f in places()), [is_ours(f) for f in places()]\n"
            "overflowml.install()\n"
            "assert all(is_ours(f) for f in places()), [is_ours(f) for f in places()]\n"
        )
    )


def _in_forks(cases: dict[str, tuple[str, dict[str, str]]], environment: dict[str, str]) -> None:
    _python(f"CASES = {cases!r}\n{_FORKED}", environment)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_order_of_imports_does_not_matter(import_path: dict[str, str]) -> None:
    _in_forks({"; ".join(steps): (_order(steps), {}) for steps in _ORDERS}, import_path)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_hosts_that_are_imported_while_we_are_off_are_untouched(import_path: dict[str, str]) -> None:
    """After uninstall, and with the variable set; a zero means nothing."""
    uninstalled = _REGISTER + "import overflowml\noverflowml.uninstall()\n" + _IS_OURS + "assert not any(is_ours(f) for f in places())\n"
    cases = {"uninstalled": (uninstalled, {})}
    for value, installed in (("1", False), ("0", True)):
        script = _REGISTER + "import overflowml\n" + _IS_OURS + f"assert {{is_ours(f) for f in places()}} == {{{installed}}}\n"
        if not installed:
            script += "overflowml.install()\nassert all(is_ours(f) for f in places())\n"
        cases[f"{value!r}"] = (script, {"OVERFLOWML_DISABLE": value})
    _in_forks(cases, import_path)


def test_waiting_modules_can_be_looked_at_before_their_import(import_path: dict[str, str]) -> None:
    """Tools ask a module's spec for its source; our loader must answer as the module's own does."""
    script = _REGISTER + (
        "import overflowml, importlib.util, inspect, sys\n"
        "from overflowml_core.patching import after_import\n"
        "seen = []\n"
        "stop = after_import('json.tool', seen.append)\n"
        "spec = importlib.util.find_spec('json.tool')\n"
        "assert 'def main' in spec.loader.get_source('json.tool')\n"
        "assert spec.loader.get_code('json.tool') is not None\n"
        "import json.tool\n"
        "assert seen == [json.tool]\n"
        "assert 'overflowml' not in type(json.tool.__loader__).__module__\n"
        "assert 'overflowml' not in type(json.tool.__spec__.loader).__module__\n"
        "assert 'def main' in inspect.getsource(json.tool)\n"
    )
    _python(script, import_path)
