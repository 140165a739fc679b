"""``python -m overflowml``: the command line."""

from overflowml_core.cli import main

if __name__ == "__main__":
    main()
