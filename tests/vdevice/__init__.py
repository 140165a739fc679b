"""A virtual accelerator: a PyTorch device, "vgpu", made of host memory, a byte budget and a simulated clock.

It is for tests of code that moves weights to a GPU, on machines that have none:

    device = install(Config(budget_bytes=1 << 20, h2d_bytes_per_s=1e9))
    x = torch.ones(4, device="vgpu")
    device.peak_bytes, device.elapsed(), device.log, device.hazards

What it is: real numbers (CPU kernels over real storages), exact accounting with OutOfMemoryError at the first byte too
many, errors where CUDA refuses to mix devices, streams and events on a simulated time line, asynchronous copies that
happen as late as anything allows, checks that events order all uses of the same bytes, faults on demand.

What it is not: a model of any GPU's speed, of a caching allocator (fragmentation, rounding of pinned memory, reuse of
freed blocks), of kernels' workspaces, of more than one device, of autocast (its dtype rules are not applied), of a
device random generator (the CPU's is used), or of autograd. Operators compute when they are enqueued; only copies are
late. `torch.Stream("vgpu")` is not simulated: use `torch.vgpu.Stream`. `pin_memory=True` works in the torch.*
factories, not in `Tensor.new_empty` and its like.

`install` is for the life of the process: torch.accelerator finds "vgpu" from then on, and page-locking of host memory
is simulated for all devices. Where there is a real GPU, run these tests in a process of their own.
"""

from __future__ import annotations

from .clock import Clock, Engine, LogEntry
from .config import DEVICE_NAME, Config, Faults, HazardError
from .device import SimDevice
from .install import install
from .pinned import register_pinned, unregister_pinned

__all__ = [
    "DEVICE_NAME",
    "Clock",
    "Config",
    "Engine",
    "Faults",
    "HazardError",
    "LogEntry",
    "SimDevice",
    "install",
    "register_pinned",
    "unregister_pinned",
]
