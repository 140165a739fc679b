"""Plans a whole graph when it is queued, before anything is loaded, and tells the page. Never holds the queue up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from overflowml_comfyui.decision import Decision, Part, Recall, decide_file
from overflowml_comfyui.graph import loads_of
from overflowml_comfyui.request import request_of
from overflowml_core.errors import OverflowmlError
from overflowml_core.facts import Machine

_log = logging.getLogger("overflowml")


def decide_graph(
    prompt: object,
    find_file: Callable[[str, str], Path | None],
    machine: Machine,
    recall: Recall = lambda _: None,
    foresee: Callable[[str, Mapping[str, object]], Part] | None = None,
) -> Decision:
    """Plan for every file that a graph loads, by headers alone.

    A file that cannot be described (an unknown format, a missing one, which the host itself complains of) is left out.

    Args:
        prompt: as the host queues it.
        find_file: where a file of a folder kind lies.
        machine: where it would run.
        recall: what earlier runs took.
        foresee: plans for a file that will be quantized, by its label and the node's fields; None leaves such files out.
    """
    parts: dict[tuple[str, str], Part] = {}
    for load in loads_of(prompt):
        path = find_file(load.folder, load.file)
        if path is None:
            continue
        try:
            if "format" not in load.fields:
                parts.setdefault((load.folder, load.file), decide_file(path, request_of(load.fields), machine, recall))
            elif foresee is not None:
                parts[load.folder, load.file] = foresee(f"{load.folder}/{load.file}", load.fields)
        except (OverflowmlError, OSError) as error:
            _log.info("%s is not predicted: %s", load.file, error)
    return Decision(tuple(parts.values()))


class Preflight:
    """The host's prompt handler. Planning happens on a thread of its own; the page hears of it when it is done.

    Args:
        decide: the decision for a prompt.
        tell: (decision, page) that hears of it.
    """

    def __init__(self, decide: Callable[[object], Decision], tell: Callable[[Decision, str | None], None]) -> None:
        self._decide, self._tell = decide, tell
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="overflowml-preflight")

    def __call__(self, request: Any) -> Any:
        """Take a queued request and hand it back as it is."""
        if isinstance(request, Mapping):
            client = request.get("client_id")
            self._thread.submit(self._run, request.get("prompt"), client if isinstance(client, str) else None)
        return request

    def _run(self, prompt: object, client: str | None) -> None:
        try:
            decision = self._decide(prompt)
            if decision.parts:
                self._tell(decision, client)
        except Exception as error:  # noqa: BLE001 -- on a thread of ours; a graph of a kind nobody knows must only cost its prediction
            _log.warning("the graph is not predicted (%s: %s)", type(error).__name__, error)

    def wait(self) -> None:
        """Until everything that was handed over so far is decided."""
        self._thread.submit(lambda: None).result()
