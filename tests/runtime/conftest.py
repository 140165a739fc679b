"""Fixtures of the engine's tests. Only tests that ask for ``vgpu`` see the virtual accelerator."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator

import pytest

from overflowml_core.runtime.device import HostDevice, StreamDevice
from tests.runtime.build import virtual
from tests.vdevice import Config, SimDevice, install


@dataclasses.dataclass
class Virtual:
    """The simulated machine and the runtime's view of it. Bytes are counted from where the test began."""

    sim: SimDevice
    device: StreamDevice
    base_bytes: int
    base_pinned_bytes: int

    @property
    def taken_bytes(self) -> int:
        return self.sim.allocated_bytes - self.base_bytes

    @property
    def peak_bytes(self) -> int:
        return self.sim.peak_bytes - self.base_bytes

    @property
    def pinned_bytes(self) -> int:
        return self.sim.pinned_bytes - self.base_pinned_bytes

    def reset(self, **settings: object) -> None:
        """The same device with other settings; time and counts from zero. No reader thread may be at work: see ``settled``."""
        install(Config(**{"align_bytes": 512, "hazards": "raise", **settings}))  # type: ignore[arg-type]

    def limit(self, budget_bytes: int) -> None:
        """From now on one byte more than this is out of memory, and the peak is that from now on."""
        with self.sim.lock:
            self.sim.config = dataclasses.replace(self.sim.config, budget_bytes=self.base_bytes + budget_bytes)
            self.sim.peak_bytes = self.sim.allocated_bytes


@pytest.fixture
def vgpu() -> Iterator[Virtual]:
    """A virtual accelerator that starts clean and is checked for hazards at the end. It stays installed in the process."""
    install().synchronize()
    gc.collect()
    gc.freeze()  # what lives now is mostly torch itself; looking through it again for every test takes longer than the tests
    sim = install(Config(align_bytes=512, hazards="raise"))
    yield Virtual(sim, virtual(), sim.allocated_bytes, sim.pinned_bytes)
    assert sim.hazards == []
    install()


@pytest.fixture
def host() -> HostDevice:
    return HostDevice()
