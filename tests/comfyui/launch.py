"""Starts the host with the CPU build of torch: ``python launch.py CHECKOUT [the host's arguments]``.

torch's CPU build has no torchvision of its own; that of the CUDA build imports once the operators exist that its library would bring.
Nothing in the tests calls them. With OVERFLOWML_TEST_CARD the host computes on the CPU without its flag ``--cpu``, which excludes others.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys

import torch


def main() -> None:
    """Run the host's main.py as if it had been started by itself."""
    root = os.path.abspath(sys.argv[1])
    if importlib.util.find_spec("torchvision") is not None and not torch.cuda.is_available():
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["library"] = library  # its operators live as long as it does
    sys.path[0] = root
    os.chdir(root)
    script = os.environ.get("OVERFLOWML_TEST_SCRIPT") or os.path.join(root, "main.py")
    sys.argv = [script, *sys.argv[2:]]
    if os.environ.get("OVERFLOWML_TEST_CARD"):
        import comfy.options

        comfy.options.enable_args_parsing()
        from comfy.cli_args import args

        args.cpu = True
    runpy.run_path(script, run_name="__main__")


main()
