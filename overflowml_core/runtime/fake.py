"""Runs a host's real code on tensors without data and notes what it computes and how much memory it holds; knows no host.

"Small real, large fake": what is computed from nothing but small real tensors (schedules, token ids, positions) is computed for real, so
that code may read its values; everything that meets a weight or is large has a shape, a dtype and a layout, and no bytes. All of it has the
device type of the CPU, so that every build of torch serves, with kernels taken as a GPU has them (fused attention and RMS norm).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from overflowml_core.errors import OverflowmlError
from overflowml_core.runtime.fake_cache import ShapeCache
from overflowml_core.runtime.fake_calls import Call, CallBook
from overflowml_core.runtime.fake_memory import LiveMemory
from overflowml_core.runtime.probe_works import FusedKernels, Recipe, Seen, tensors_in
from overflowml_core.runtime.structure import own_blocks

__all__ = ["REAL_ELEMENTS", "Call", "NoValues", "TooLong", "Tracer", "is_fake", "tracing"]

REAL_ELEMENTS = 65536
"""Elements up to which a tensor may have data: schedules of 1000 steps and prompts of 64 thousand tokens do, images do not."""

_READS_VALUE = torch.ops.aten._local_scalar_dense.default
_COMPARES = torch.ops.aten.equal.default


class TooLong(OverflowmlError):
    """A block takes so many operations that tracing it is not worth the time: code that goes token after token."""

    def __init__(self, operations: int) -> None:
        self.operations = operations
        super().__init__(f"one call of a block takes more than {operations} operations; trace fewer tokens")


class NoValues(OverflowmlError):
    """The code needs the values of a tensor that has none: what it computes depends on data."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        super().__init__(f"{operation}: the shape of its result depends on values, and a trace has none; estimate this model by arithmetic")


class Tracer(TorchDispatchMode):
    """Sees every operation between ``tracing()`` and its end. One thread's; made by :func:`tracing`.

    Attributes:
        memory: what is alive.
        fake: the mode that tensors without data belong to.
        recipes: by signature of a work what is needed to run one of its operations on real data.
    """

    def __init__(self, block_operations: int | None = None) -> None:
        super().__init__()
        self._block_operations = block_operations
        self.recipes: dict[str, Recipe] = {}
        self.memory = LiveMemory()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._shapes = ShapeCache(self.fake)
        self._seen = Seen(self.memory.is_weight, self.recipes)
        self._tainted: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._book = CallBook(self.memory)
        self._undo: list[Callable[[], object]] = []
        self._kept: list[nn.Module] = []

    # ---- components

    @property
    def calls(self) -> list[Call]:
        """Finished outermost calls of components, in order; a call that failed is one, too."""
        return self._book.calls

    @property
    def guesses(self) -> int:
        """Values that code read from tensors that have none; they were taken as zero."""
        return self._book.guesses

    def watch(self, name: str, module: nn.Module, methods: tuple[str, ...] = ()) -> None:
        """Note the calls of a component from now on.

        Its parameters lose their data, and so do its large buffers; both no longer count as activations. The module must be one
        that was built for the trace.

        Args:
            name: of the component.
            module: built inside ``tracing()``, or on the meta device.
            methods: names of methods that count as calls of their own, beside ``forward``. A call inside another is part of that one.
        """
        self._kept.append(module)
        self._empty(module)
        blocks = own_blocks(module)
        self._book.expect(name, len(blocks))
        self._hook(module, lambda arguments: self._book.enter(name, "forward", arguments), self._book.leave)
        for index, (_, block) in enumerate(blocks):
            self._hook(block, lambda _, index=index: self._book.enter_block(name, index), self._book.leave_block)
        for method in methods:
            self._wrap(name, module, method)

    @contextlib.contextmanager
    def calling(self, component: str, method: str, arguments: object = ()) -> Iterator[None]:
        """Take what happens inside as one call of a watched component: of a part of it that runs by itself.

        Args:
            component: the name that it is watched under.
            method: what the call is named.
            arguments: its tensors, in any container.
        """
        self._book.enter(component, method, arguments)
        try:
            yield
        finally:
            self._book.leave()

    def live_bytes(self) -> int:
        """Bytes of activations that are alive now, each storage rounded up to what an allocator hands out."""
        return self.memory.current

    @property
    def peak_bytes(self) -> int:
        """Most bytes of activations that were alive at once, inside calls or between them."""
        return self.memory.peak

    def _empty(self, module: nn.Module) -> None:
        emptied: dict[int, torch.Tensor] = {}
        for inner in module.modules():
            for attribute, parameter in inner._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in emptied:
                    emptied[id(parameter)] = (
                        parameter if is_fake(parameter) else nn.Parameter(self._without_data(parameter), requires_grad=False)
                    )
                    self.memory.exclude(emptied[id(parameter)], is_weight=True)
                inner._parameters[attribute] = emptied[id(parameter)]  # type: ignore[assignment]
            for attribute, buffer in inner._buffers.items():
                if buffer is None:
                    continue
                if not is_fake(buffer) and (buffer.device.type == "meta" or buffer.numel() > REAL_ELEMENTS):
                    inner._buffers[attribute] = buffer = self._without_data(buffer)
                self.memory.exclude(buffer, is_weight=False)

    def _without_data(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    def _hook(self, module: nn.Module, before: Callable[..., None], after: Callable[[], None]) -> None:
        entered: list[bool] = []

        def pre(inner: nn.Module, args: Any, kwargs: Any) -> None:
            before((args, kwargs))
            entered.append(True)

        def post(inner: nn.Module, args: Any, output: Any) -> None:
            if entered:  # the hook runs too where the call failed before ours was reached
                entered.pop()
                after()

        self._undo.append(module.register_forward_pre_hook(pre, with_kwargs=True).remove)
        self._undo.append(module.register_forward_hook(post, always_call=True).remove)

    def _wrap(self, name: str, module: nn.Module, method: str) -> None:
        bound = getattr(module, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.calling(name, method, (args, kwargs)):
                return bound(*args, **kwargs)

        vars(module)[method] = call
        self._undo.append(lambda: vars(module).pop(method, None))

    # ---- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, for real or without data, and note it."""
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs))
        if func is _READS_VALUE or func is _COMPARES:
            if any(map(self.has_no_data, tensors)):
                return self._guess(func, tensors[0])
            return func(*args, **kwargs)
        out = self._perform(func, args, kwargs, tensors)
        self.note(func, args, kwargs, tensors, out)
        return out

    def note(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> None:
        """Add one operation to the books: its memory, and its work where a component is running."""
        returns = getattr(func, "_schema", None)
        if returns is None or any(value.alias_info is None for value in returns.returns):
            for tensor in tensors_in(out):
                self.memory.track(tensor)
        if self._block_operations is not None and self._book.count_operation() > self._block_operations:
            raise TooLong(self._block_operations)
        ledger = self._book.ledger
        if ledger is not None:
            self._seen.note(ledger, func, args, kwargs, tensors, out)

    def _perform(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        if any(map(self.has_no_data, tensors)):
            return self._pretend(func, args, kwargs)
        if (tensors and all(t.device.type == "meta" for t in tensors)) or _asks_meta(kwargs):
            return func(*args, **kwargs)
        if any(t.numel() > REAL_ELEMENTS for t in tensors):
            return self._pretend(func, args, kwargs)
        if tensors and (func._schema.is_mutable or all(r.alias_info is not None for r in func._schema.returns)):
            return func(*args, **kwargs)
        try:
            out = self._pretend(func, args, kwargs)
        except NoValues:
            return func(*args, **kwargs)
        # Small inputs may make a large result: a mask of a long prompt from its positions.
        if all(t.numel() <= REAL_ELEMENTS for t in tensors_in(out)):
            return func(*args, **kwargs)
        return out

    def _pretend(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func._schema.is_mutable:
            for tensor in _written(func, args, kwargs):
                self._taint(tensor)
        key = self._shapes.key(func, args, kwargs)
        known = None if key is None else self._shapes.get(key)
        if known is not None:
            return known
        try:
            with self.fake:
                out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise NoValues(str(func)) from error
        if key is not None:
            self._shapes.put(key, tensors_in((args, kwargs)), out)
        return out

    def _taint(self, tensor: torch.Tensor) -> None:
        """Values are written into a real tensor that nobody knows: what is read from there later is not known either."""
        if not is_fake(tensor) and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            key = storage._cdata
            # The address may be another storage's later.
            self._tainted[key] = weakref.ref(storage, lambda _: self._tainted.pop(key, None))

    def has_no_data(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's values are unknown: it never had any, or unknown ones were written into it."""
        if is_fake(tensor):
            return True
        return bool(self._tainted) and tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._tainted

    def _guess(self, func: Any, tensor: torch.Tensor) -> object:
        self._book.guesses += 1
        if func is _COMPARES or tensor.dtype is torch.bool:
            return False
        return 0.0 if tensor.dtype.is_floating_point else 0

    def close(self) -> None:
        """Take all hooks back and let go of everything."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._kept.clear()
        self._book.close()
        self.memory.close()


def is_fake(tensor: object) -> bool:
    """Whether a tensor has no data and stands for one that has."""
    return isinstance(tensor, FakeTensor)


def _asks_meta(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that an operation writes into, by its schema."""
    found: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
            found += tensors_in(value)
    return found


_torch_log = logging.getLogger("torch._subclasses.fake_tensor")
"""Writes a traceback for what a trace cannot do; whoever traces hears of it by an exception."""


class _Here(threading.local):
    busy = False
    collected: dict[str, Recipe] | None = None


_here = _Here()


@contextlib.contextmanager
def collecting() -> Iterator[dict[str, Recipe]]:
    """Gather the recipes of all traces in this thread, by the signature of their works, so that their operations can be measured."""
    before, _here.collected = _here.collected, {}
    try:
        yield _here.collected
    finally:
        _here.collected = before


@contextlib.contextmanager
def tracing(block_operations: int | None = None) -> Iterator[Tracer]:
    """Run what follows without data.

    Modules that are to be watched are built inside, or on the meta device. Gradients are off, the random state is given back, and all hooks
    are gone afterwards, also after an exception.

    Args:
        block_operations: operations in one call of a block beyond which the trace gives up; None never does.

    Raises:
        TooLong: a block took more operations than that.
        OverflowmlError: a trace is under way in this thread already.
    """
    if _here.busy:
        raise OverflowmlError("tracing(): a trace is under way in this thread; end it first, or use its tracer")
    _here.busy = True
    tracer = Tracer(block_operations)
    thread = threading.get_ident()

    def is_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    _torch_log.addFilter(is_elsewhere)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), FusedKernels(tracer.has_no_data, tracer.note), tracer:
            yield tracer
    finally:
        _torch_log.removeFilter(is_elsewhere)
        _here.busy = False
        if _here.collected is not None:
            _here.collected.update(tracer.recipes)
        tracer.close()
