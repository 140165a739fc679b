"""Runs in the host's interpreter: queues the graph on standard input as a page would, and prints our events until the graph ends."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import aiohttp

_LONGEST_S = 60.0
_AFTER_S = 2.0


async def main(address: str, prompt: object) -> None:
    """Listen as a page does."""
    async with aiohttp.ClientSession() as session, session.ws_connect(f"ws://{address}/ws?clientId=page") as socket:
        async with session.post(f"http://{address}/prompt", json={"prompt": prompt, "client_id": "page"}) as answer:
            assert answer.status == 200, await answer.text()
        until = time.monotonic() + _LONGEST_S
        while time.monotonic() < until:
            try:
                message = await socket.receive(timeout=max(until - time.monotonic(), 0.01))
            except asyncio.TimeoutError:
                return
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            if event["type"].startswith("overflowml."):
                print(json.dumps(event), flush=True)  # noqa: T201 -- read by the test
            if event["type"] == "execution_success":
                until = min(until, time.monotonic() + _AFTER_S)


asyncio.run(main(sys.argv[1], json.load(sys.stdin)))
