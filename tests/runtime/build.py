"""Tiny models and what is needed to run them by a plan. Everything here is explicit: nothing is detected."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from overflowml_core.facts import Accelerator, HostMemory, Limits, Machine, Network, Rates, Workload, network_fingerprint
from overflowml_core.inspect.safetensors import read_header
from overflowml_core.loading import Loading, Origin
from overflowml_core.plan import Plan
from overflowml_core.planner import make_plan, smallest_budget_bytes
from overflowml_core.runtime.component import describe_module
from overflowml_core.runtime.device import Device, HostDevice, StreamDevice
from overflowml_core.runtime.engine import Engine

PLENTY = 2**40
TIMEOUT_S = 60


class Block(nn.Module):
    """A block of one matrix: ``x @ W + x``. Its operators allocate two tensors of the size of ``x`` and no more."""

    def __init__(self, width: int, hidden: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden or width, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias) if hidden else None
        self.fault: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        if self.fault is not None:
            raise self.fault
        if self.down is not None:
            y = self.down(y.relu_())
        return y + x


class Stack(nn.Module):
    """Blocks in a row. ``order`` says which are called; every call may change it."""

    def __init__(self, count: int = 6, width: int = 16, *, hidden: int | None = None, bias: bool = False, ends: bool = False) -> None:
        super().__init__()
        self.inlet = nn.Linear(width, width) if ends else None
        self.blocks = nn.ModuleList(Block(width, hidden, bias) for _ in range(count))
        self.outlet = nn.LayerNorm(width) if ends else None
        self.order: list[int] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.inlet is not None:
            x = self.inlet(x)
        for k in range(len(self.blocks)) if self.order is None else self.order:
            x = self.blocks[k](x)
        return x if self.outlet is None else self.outlet(x)


def stack(count: int = 6, width: int = 16, seed: int = 0, **options: Any) -> Stack:
    torch.manual_seed(seed)
    return Stack(count, width, **options).eval().requires_grad_(False)


def rows(width: int = 16, count: int = 3, seed: int = 7) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


# ---- plans


def network(modules: Mapping[str, nn.Module], phase: str | None = None, activations: int = 0) -> Network:
    components = tuple(describe_module(m, name, phase, activations, "measured") for name, m in modules.items())
    return Network(components, "test", "Test", network_fingerprint(components))


def machine(device: Device, host_bytes: int = PLENTY, pinnable_bytes: int = PLENTY) -> Machine:
    found = () if device.on_host else (Accelerator(device.torch_device.type, "Virtual", 0, PLENTY, PLENTY),)
    return Machine(found, HostMemory(PLENTY, max(host_bytes, PLENTY), pinnable_bytes, 2), Rates(25e9, 25e9, 5e9), PLENTY)


@dataclass
class Job:
    """What a test wants: modules, where, how much memory. ``tier`` is where streamed weights wait."""

    modules: Mapping[str, nn.Module]
    device: Device
    budget_bytes: int | None = None
    reserve_bytes: int = 0
    tier: str = "pinned"
    phase: str | None = None
    loading: Loading | None = None

    def __post_init__(self) -> None:
        self.network = network(self.modules, self.phase)
        host, pinnable = PLENTY, PLENTY
        if self.tier == "ram":
            pinnable = 0
        if self.tier == "disk":
            # Just the ring: two of the largest block, so that no block finds room in RAM.
            host = 2 * max((b.slab_bytes for c in self.network.components for b in c.blocks), default=0)
        if self.tier == "mixed":
            # The ring, and room for about half of the blocks.
            blocks = [b.slab_bytes for c in self.network.components for b in c.blocks]
            host = 2 * max(blocks) + sum(blocks) // 2
        self.machine = machine(self.device, host, pinnable)
        self._host_bytes = None if self.device.on_host else host

    def limits(self, budget_bytes: int) -> Limits:
        return Limits.exactly(device_memory=budget_bytes, reserve=self.reserve_bytes, host_memory=self._host_bytes)

    @property
    def smallest_bytes(self) -> int:
        return smallest_budget_bytes(self.network, self.machine, self.limits(PLENTY))

    @property
    def whole_bytes(self) -> int:
        return make_plan(self.network, self.machine, Workload(), self.limits(PLENTY)).estimate.device_peak_bytes

    def plan(self) -> Plan:
        budget = self.smallest_bytes if self.budget_bytes is None else self.budget_bytes
        return make_plan(self.network, self.machine, Workload(), self.limits(budget))

    def engine(self, folder: Path, plan: Plan | None = None) -> Engine:
        """An engine that is not attached yet."""
        return Engine(plan or self.plan(), self.network, self.device, folder)

    def attach(self, folder: Path) -> Engine:
        return self.engine(folder).attach(self.modules, self.loading)

    @contextlib.contextmanager
    def attached(self, folder: Path) -> Iterator[Engine]:
        """Attached for a while, whatever happens in it."""
        engine = self.attach(folder)
        try:
            yield engine
        finally:
            engine.detach()


def job(module: nn.Module | Mapping[str, nn.Module], device: Device | None = None, **options: Any) -> Job:
    modules = module if isinstance(module, Mapping) else {"model": module}
    return Job(modules, device or HostDevice(), **options)


def virtual() -> StreamDevice:
    return StreamDevice(torch.device("vgpu"))


def slots_budget(module: nn.Module, slots: int, resident: int = 0) -> int:
    """A budget for equal blocks: so many slots and so many residents."""
    component = describe_module(module, "model")
    return component.resident_bytes + (slots + resident) * max(b.slab_bytes for b in component.blocks)


# ---- files


def save(tensors: Mapping[str, torch.Tensor], path: Path) -> Path:
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path)
    return path


def origins(path: Path) -> dict[str, Origin]:
    """Where each tensor of a safetensors file lies."""
    header = read_header(path)
    return {t.name: Origin(path, t.offset_bytes, t.nbytes, t.dtype, t.shape) for t in header.tensors}


def on_meta(module: nn.Module, path: Path, dtype: torch.dtype | None = None) -> tuple[nn.Module, Loading]:
    """An unread twin of a module, with the file as the origin of its weights; ``dtype`` is what it shall be used in."""
    twin = copy.deepcopy(module)
    loading, known = Loading(Limits()), origins(path)
    tied: dict[int, nn.Parameter] = {}
    for prefix, inner in twin.named_modules():
        for attribute, parameter in list(inner._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in tied:
                wanted = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
                empty = nn.Parameter(torch.empty_like(parameter, device="meta", dtype=wanted), requires_grad=parameter.requires_grad)
                loading.defer(empty, known[f"{prefix}.{attribute}" if prefix else attribute])
                tied[id(parameter)] = empty
            inner._parameters[attribute] = tied[id(parameter)]
    return twin, loading


# ---- comparing


def snapshot(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything about a module's tensors that detaching must restore."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, p in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        found[name] = (id(p), type(p), p.dtype, p.device, p.requires_grad, tuple(p.shape), p.stride(), raw(p))
    return found


def raw(tensor: torch.Tensor) -> bytes:
    """The elements in logical order as bytes, so that NaN equals NaN and -0 is not 0."""
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and raw(left) == raw(right)


def settled(engine: Engine) -> None:
    """Wait until the reader threads have handed over all copies that were asked for."""
    deadline_s = time.monotonic() + TIMEOUT_S
    for phase in engine._phases:
        for slot in phase.streamer._live:
            while slot.request is not None and not slot.request.done.is_open:
                assert time.monotonic() < deadline_s, "a read hangs"
                time.sleep(0.0005)


def twice(work: Callable[[], object]) -> None:
    """The first call after a fault may still find in its slots what it needs, or meet the error of a prefetch."""
    work()
    work()


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run work in several threads at once; a thread that does not end is a failure, and so is one that raises."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(index: int) -> None:
        try:
            barrier.wait(TIMEOUT_S)
            work(index)
        except BaseException as error:  # noqa: BLE001 -- raised in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
