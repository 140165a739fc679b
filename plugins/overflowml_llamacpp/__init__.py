"""``overflowml llamacpp``: flags of llama-server and a Modelfile of Ollama for a GGUF file. Imports nothing but the hook."""

from __future__ import annotations

from typing import Any

from overflowml_core.hookspecs import hookimpl


@hookimpl
def overflowml_register_commands(app: Any) -> None:
    """Add the command ``llamacpp``."""
    from overflowml_core.cli.ending import EPILOG
    from overflowml_llamacpp.command import llamacpp

    app.command("llamacpp", short_help="Print flags of llama-server and a Modelfile for a GGUF file.", epilog=EPILOG)(llamacpp)
