"""What is missing is named with the way to install it."""

from __future__ import annotations

import pytest

from overflowml_core.errors import OverflowmlError
from overflowml_core.requirements import require


def test_what_is_there_passes():
    require("This", "all", "json", "pluggy")


def test_what_is_missing_is_named_with_its_extra():
    with pytest.raises(OverflowmlError, match=r"^x: a model needs no_such_package; install it with: pip install 'overflowml\[quantize\]'$"):
        require("x: a model", "quantize", "json", "no_such_package")
