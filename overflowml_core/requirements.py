"""Names what is missing and how to install it, before an import fails somewhere deep."""

from __future__ import annotations

import importlib.util

from overflowml_core.errors import OverflowmlError


def require(purpose: str, extra: str, *packages: str) -> None:
    """Make sure that packages can be imported.

    Args:
        purpose: what they are needed for, as a beginning of a sentence.
        extra: the extra of this distribution that brings them.
        packages: import names.

    Raises:
        OverflowmlError: one is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise OverflowmlError(f"{purpose} needs {' and '.join(missing)}; install it with: pip install 'overflowml[{extra}]'")
