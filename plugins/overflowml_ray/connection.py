"""Reaches a cluster within a bounded time, or says why not; and leaves nothing of Ray behind in this process."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
from collections.abc import Iterator
from typing import Any

from overflowml_core.environment import ray_address
from overflowml_ray.errors import NoCluster

REACH_S = 10.0
"""How long a machine may take to answer at all. What answers and is no Ray is given up by Ray itself, after two minutes."""
_START = "start one with `ray start --head` and give HOST:PORT, or give local"


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Be the driver of a cluster while the context is open. A cluster that this process is in already is used, and not left.

    Args:
        address: "local" begins one on this machine that ends with the context; "auto" finds one that runs here; else "HOST:PORT".

    Yields:
        The module ``ray``.

    Raises:
        NoCluster: Ray is missing, or nothing answers.
    """
    check_address(address)
    import ray

    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError, SystemExit) as error:  # SystemExit: Ray's way to give up
        with contextlib.suppress(Exception):
            ray.shutdown()
        if isinstance(error, SystemExit):
            raise NoCluster(address, "something answers there that is no Ray of this version", _START) from None
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise NoCluster(address, line.rstrip("."), _START) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Refuse what cannot be a cluster, before Ray waits for it.

    Raises:
        NoCluster: Ray is missing, the address is none, or nothing answers there.
    """
    if importlib.util.find_spec("ray") is None:
        raise NoCluster(address, "Ray is not installed", "pip install 'overflowml[ray]', on each node")
    if address == "auto":
        address = ray_address() or address
    if address in ("auto", "local"):
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise NoCluster(
            address, "no address of a cluster", "give local, auto or HOST:PORT, such as 10.0.0.1:6379, on a machine of the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise NoCluster(address, f"nothing answers there ({error.strerror or error})", _START) from None
