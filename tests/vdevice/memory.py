"""Device memory: blocks of host bytes that torch sees as storages of the device, and CPU tensors over the same bytes.

A 1-D uint8 tensor *of the device, with a real storage* is made by handing torch a DLPack capsule whose device type is
the one torch maps to PrivateUse1. Typed tensors and views are made by sending the view operator to its CPU kernel. A
block is refunded by a weak reference callback on the storage: torch keeps that Python object alive exactly as long as
the C++ storage, and such callbacks, unlike a deleter of the capsule, are safe while an exception unwinds.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import weakref
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint8, c_uint16, c_uint64, c_void_p
from typing import Any

import torch

from .config import DEVICE_NAME
from .device import DEVICE
from .hazards import Access
from .internals import DLPACK_EXT_DEV, cpu_keys, private

_aten = torch.ops.aten
_MAX_ALIASES = 64
_serials = itertools.count(1)


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    """DLManagedTensor of dlpack.h, followed by the one size and the one stride of a 1-D tensor."""

    _fields_ = (
        ("tensor", _DLTensor),
        ("context", c_void_p),
        ("deleter", c_void_p),
        ("size", c_int64),
        ("stride", c_int64),
    )


_libc = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
_libc.malloc.restype, _libc.malloc.argtypes = c_void_p, [ctypes.c_size_t]
_free = ctypes.cast(_libc.free, c_void_p).value
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]


class Block:
    """One device allocation.

    Attributes:
        memory: the host bytes that play the device's; at least one, so that the address is unique.
        charged: bytes taken from the budget.
        stream: the stream it was allocated on, which may reuse the bytes when the block dies.
        shared_with: streams named by `record_stream`.
        aliases: CPU tensors over the bytes, by (dtype, offset, shape, stride).
        storage: the device storage; its death is the death of the block.
    """

    __slots__ = ("accesses", "aliases", "charged", "memory", "nbytes", "serial", "shared_with", "storage", "stream")

    def __init__(self, memory: torch.UntypedStorage, nbytes: int, charged: int) -> None:
        owner = DEVICE.clock.current()
        self.serial = next(_serials)
        self.memory, self.nbytes, self.charged, self.stream = memory, nbytes, charged, owner.id
        # the allocator may hand out bytes that earlier work of this stream still uses: other streams must come after it
        self.accesses = [Access(0, nbytes, owner.id, owner.tick, True, "allocation")]
        self.shared_with: set[int] = set()
        self.aliases: dict[Any, torch.Tensor] = {}
        self.storage: weakref.ref[torch.UntypedStorage] | None = None


_blocks: dict[int, Block] = {}  # by address


def forget_accesses() -> None:
    """Ticks start again: what happened to live blocks so far is in order with everything that follows."""
    for block in list(_blocks.values()):
        block.accesses = []
        block.shared_with = set()


def _bytes_at(address: int, nbytes: int) -> torch.Tensor:
    place = _libc.malloc(ctypes.sizeof(_DLManagedTensor))
    managed = _DLManagedTensor.from_address(place)
    managed.size, managed.stride = nbytes, 1
    managed.context, managed.deleter = None, _free  # only this structure: the bytes belong to the block
    tensor = managed.tensor
    tensor.data, tensor.byte_offset, tensor.ndim = address, 0, 1
    tensor.device_type, tensor.device_id = DLPACK_EXT_DEV, 0
    tensor.code, tensor.bits, tensor.lanes = 1, 8, 1  # kDLUInt
    tensor.shape = ctypes.cast(place + _DLManagedTensor.size.offset, POINTER(c_int64))
    tensor.strides = ctypes.cast(place + _DLManagedTensor.stride.offset, POINTER(c_int64))
    result: torch.Tensor = private("_C._from_dlpack")(_new_capsule(place, b"dltensor", None))
    return result


def _allocate(memory: torch.UntypedStorage) -> torch.Tensor:
    """The bytes of a host storage become a device allocation, charged to the budget."""
    nbytes = memory.nbytes()
    charged = DEVICE.charge(nbytes)
    block = Block(memory if nbytes else torch.UntypedStorage(1), nbytes, charged)
    address = block.memory.data_ptr()
    result = _bytes_at(address, nbytes)

    def died(_: object) -> None:
        if _blocks.get(address) is block:
            del _blocks[address]
        DEVICE.refund(block.charged)
        owner = DEVICE.clock.streams[block.stream]
        DEVICE.hazard_checks.freed(block, owner.seen, DEVICE.clock.host_seen)

    block.storage = weakref.ref(result.untyped_storage(), died)
    _blocks[address] = block
    return result


def _reopen(block: Block) -> torch.Tensor:
    """A byte tensor over the storage of a live block."""
    assert block.storage is not None
    storage, empty = block.storage(), _bytes_at(block.memory.data_ptr(), 0)
    return redispatch(_aten.set_.source_Storage_storage_offset, empty, storage, 0, [block.nbytes], [1])


def redispatch(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs the operator's CPU kernel on device tensors; right only for operators that touch no bytes."""
    return op.redispatch(_CPU_KEYS, *args, **kwargs)


_CPU_KEYS = cpu_keys()


def to_device(host: torch.Tensor) -> torch.Tensor:
    """The result of a CPU kernel as a device tensor over the same bytes: a new allocation, or a view of an argument."""
    storage = host.untyped_storage()
    block = _blocks.get(storage.data_ptr()) if storage.nbytes() else None
    base = _allocate(storage) if block is None else _reopen(block)
    if host.dtype is not torch.uint8:
        base = redispatch(_aten.view.dtype, redispatch(_aten.as_strided.default, base, [0], [1], 0), host.dtype)
    result: torch.Tensor = redispatch(_aten.as_strided.default, base, host.shape, host.stride(), host.storage_offset())
    if host.is_neg():
        result = torch._neg_view(result)
    return torch._conj(result) if host.is_conj() else result


def is_device(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == DEVICE_NAME


def block_of(tensor: torch.Tensor) -> Block:
    return _blocks[tensor.untyped_storage().data_ptr()]


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """The CPU tensor over the same bytes as a device tensor."""
    block = block_of(tensor)
    key = (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
    host = block.aliases.get(key)
    if host is None:
        # never an inference tensor: the cache outlives the mode it was filled in
        with torch.inference_mode(False), torch.no_grad():
            host = torch.empty(0, dtype=tensor.dtype).set_(block.memory, key[1], key[2], key[3])
        if len(block.aliases) >= _MAX_ALIASES:
            block.aliases.clear()
        block.aliases[key] = host
    if tensor.is_neg():
        host = torch._neg_view(host)
    return torch._conj(host) if tensor.is_conj() else host


def span(tensor: torch.Tensor) -> tuple[Block, int, int]:
    """The block of a device tensor and the first and one past the last byte it may touch."""
    return (block_of(tensor), *byte_range(tensor))


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """First and one past the last byte of its storage that a tensor may touch."""
    if tensor.numel() == 0:
        return 0, 0
    lo = tensor.storage_offset()
    hi = lo + 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return lo * tensor.element_size(), hi * tensor.element_size()


def rebind(tensor: torch.Tensor, resized: torch.Tensor) -> None:
    """Makes device tensor `tensor` what a kernel has made of its CPU alias by resizing it."""
    block, storage = block_of(tensor), resized.untyped_storage()
    block.aliases.clear()
    if storage.data_ptr() == block.memory.data_ptr() and storage.nbytes() <= block.nbytes:
        target = tensor
    else:
        target = resized = to_device(resized)
    redispatch(
        _aten.set_.source_Storage_storage_offset,
        tensor,
        target.untyped_storage(),
        resized.storage_offset(),
        resized.shape,
        resized.stride(),
    )
