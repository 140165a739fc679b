"""What an activated environment runs at the start of every interpreter: waits for a host, and imports overflowml just before it.

``activation`` writes the code of this module into a ``.pth`` file; nothing imports it. It uses nothing but ``sys`` until a host comes,
and an error of ours never reaches the program.
"""

import sys


class OverflowmlStart:
    """A finder that finds nothing: it sees the first import of a host, steps aside, and lets overflowml wait for the rest."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        """The host's own spec, after overflowml was imported; None for whatever is no host."""
        if name not in ("transformers", "diffusers") or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        try:
            import overflowml  # noqa: F401
        except Exception as error:  # noqa: BLE001 -- the program asked for its host, not for us
            if sys.stderr is not None:
                sys.stderr.write(
                    f"overflowml: not active ({type(error).__name__}: {error}); install it, or remove overflowml-activate.pth\n"
                )
        from importlib.util import find_spec

        # The list of finders has changed while somebody walks through it: ask all of them again.
        return find_spec(name)


# In a virtual environment some versions of Python execute every file twice.
if not any(type(finder).__name__ == "OverflowmlStart" for finder in sys.meta_path):
    sys.meta_path.insert(0, OverflowmlStart())
