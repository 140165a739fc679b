"""What there is to run a model: accelerators, RAM, rates between and in them. Frozen values; knows nothing of how they were found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ComputeRate:
    """Floating-point operations a second of one kind of work (a member of ``WORK_KINDS``) in one dtype ("BF16")."""

    kind: str
    dtype: str
    flop_per_s: float


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a device computes, and how fast bytes move between the tiers. 0 is unknown; ``source`` says where the numbers are from.

    Attributes:
        h2d_bytes_per_s, d2h_bytes_per_s: pinned RAM to the device and back.
        disk_bytes_per_s: sequential direct reads.
        source: "measured", "datasheet" or "assumed".
        pageable_h2d_bytes_per_s, pageable_d2h_bytes_per_s: the same links from and to pageable RAM.
        memory_bytes_per_s: the device's own memory, reads and writes together.
        compute: floating-point rates by kind of work and dtype.
        launch_s: what an operation costs at least in a model's own Python code, however small.
        op_seconds: (signature, seconds of one call) of operations that were measured one by one on this machine.
    """

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    disk_bytes_per_s: float
    source: str = "assumed"
    pageable_h2d_bytes_per_s: float = 0.0
    pageable_d2h_bytes_per_s: float = 0.0
    memory_bytes_per_s: float = 0.0
    compute: tuple[ComputeRate, ...] = ()
    launch_s: float = 0.0
    op_seconds: tuple[tuple[str, float], ...] = ()

    @property
    def measured(self) -> bool:
        """Whether they were measured on the machine itself."""
        return self.source == "measured"

    def flop_per_s(self, kind: str, dtype: str) -> float:
        """The rate of this kind of work; of matrix products in the same dtype where it has none of its own; 0 where nothing is known."""
        best = 0.0
        for rate in self.compute:
            if rate.dtype == dtype and rate.kind == kind:
                return rate.flop_per_s
            if rate.dtype == dtype and rate.kind == "matmul":
                best = rate.flop_per_s
        return best


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A device that computes.

    Attributes:
        kind: torch's device type ("cuda", "mps", "xpu", "cpu", or a virtual one).
        name: as the driver names it.
        index: among devices of its kind.
        total_bytes: memory of the device.
        free_bytes: what was free when it was detected.
        unified: it computes in host memory, so nothing is gained by copying there.
        backend: "cuda", "rocm", "mps", "xpu" or "cpu"; ROCm devices have the kind "cuda".
        rates: its own, None where the machine's hold for it.
        features: dtypes and abilities of the hardware: "bf16", "fp8", "int8", "nvfp4".
        capability: as the vendor counts it ("8.9", "gfx1100"); empty where nobody said.
        driver: version of the driver; empty where nobody said.
        link: how it is connected now, for people ("PCIe 4.0 x16"); empty where nobody said.
    """

    kind: str
    name: str
    index: int
    total_bytes: int
    free_bytes: int
    unified: bool = False
    backend: str = ""
    rates: Rates | None = None
    features: frozenset[str] = frozenset()
    capability: str = ""
    driver: str = ""
    link: str = ""

    @property
    def torch_name(self) -> str:
        """The string that ``torch.device`` takes."""
        return self.kind if self.kind in ("cpu", "mps") else f"{self.kind}:{self.index}"


@dataclass(frozen=True, slots=True)
class HostMemory:
    """RAM and cores as this process may use them (a container's limits, not the machine's).

    Attributes:
        total_bytes: memory limit.
        available_bytes: what can be taken without swapping.
        pinnable_bytes: what may be page-locked without starving the system.
        core_count: cores that this process may run on.
        swap_bytes: free swap space; never planned with, named in advice.
        isa: vector extensions of the CPU that matter here ("avx2", "avx512f", "amx_bf16", "neon").
        cpu_name: as the CPU names itself; empty where nobody said.
    """

    total_bytes: int
    available_bytes: int
    pinnable_bytes: int
    core_count: int
    swap_bytes: int = 0
    isa: frozenset[str] = frozenset()
    cpu_name: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan is made for. ``accelerators`` may be empty: then RAM under the budget is the compute tier.

    Attributes:
        accelerators: the one that runs the model first.
        host: RAM and cores.
        rates: of the compute device and the disk.
        disk_free_bytes: where a packed copy of the weights would be written.
        environment: what traps ask for: "linux", "windows", "macos", "wsl2", "wddm", "container".
        cpu_rates: of the CPU as a compute device, None where unknown or where it is the compute device.
        named: the machine was described, not detected (``--gpu``, ``--machine``): nothing on it is free or taken but what was said.
    """

    accelerators: tuple[Accelerator, ...]
    host: HostMemory
    rates: Rates
    disk_free_bytes: int
    environment: frozenset[str] = frozenset()
    cpu_rates: Rates | None = None
    named: bool = False

    @property
    def compute(self) -> Accelerator:
        """The device that runs the model: the first accelerator, else the CPU."""
        if self.accelerators:
            return self.accelerators[0]
        return self.cpu

    @property
    def cpu(self) -> Accelerator:
        """The CPU as a compute device."""
        return Accelerator(
            kind="cpu",
            name="CPU",
            index=0,
            total_bytes=self.host.total_bytes,
            free_bytes=self.host.available_bytes,
            unified=True,
            backend="cpu",
        )

    def rates_of(self, index: int) -> Rates:
        """Rates of an accelerator by its place in ``accelerators``."""
        own = self.accelerators[index].rates if index < len(self.accelerators) else None
        return self.rates if own is None else own


@dataclass(frozen=True, slots=True)
class Kind:
    """Machines that are alike.

    Attributes:
        name: what people call them.
        count: how many there are.
        machine: one of them.
    """

    name: str
    count: int
    machine: Machine
