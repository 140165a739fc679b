"""Runs in the host's interpreter, with playwright: opens workflows in the page, prints their API form, queues them there, prints what came.

``python examples_page.py URL BROWSER`` reads a list of workflows from standard input.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request

from playwright.sync_api import Page, sync_playwright

_LONGEST_S = 90.0


def history(url: str) -> dict[str, dict]:
    """What the host ran."""
    with urllib.request.urlopen(f"{url}/history", timeout=30) as answer:
        return json.load(answer)


def queue(page: Page, url: str, workflow: dict[str, object]) -> dict[str, object]:
    """Load a workflow as a user does, queue it, and wait for its end."""
    before = set(history(url))
    page.evaluate("async workflow => { await window.app.loadGraphData(workflow); }", workflow)
    page.wait_for_timeout(500)
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    page.evaluate("async () => { await window.app.queuePrompt(0); }")
    until = time.monotonic() + _LONGEST_S
    while time.monotonic() < until:
        ended = [one for key, one in history(url).items() if key not in before]
        if ended and ended[0]["status"]["completed"] is not None:
            return {"prompt": prompt, "status": ended[0]["status"], "outputs": ended[0]["outputs"]}
        time.sleep(0.1)
    return {"prompt": prompt, "status": None, "outputs": {}}


def main() -> None:
    """One page for all."""
    url, browser_path = sys.argv[1:3]
    workflows = json.load(sys.stdin)
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--no-proxy-server"])
        page = browser.new_page(viewport={"width": 1500, "height": 950})
        console: list[str] = []
        missing: list[str] = []
        page.on("console", lambda message: console.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: console.append(f"pageerror: {error}"))
        page.on("response", lambda answer: missing.append(answer.url) if answer.status >= 400 else None)
        page.goto(url)
        page.wait_for_function("window.app && window.app.graph && window.app.extensionManager", timeout=90_000)
        page.wait_for_timeout(3000)  # the page opens its own first graph after that
        for workflow in workflows:
            print(json.dumps(queue(page, url, workflow)))  # noqa: T201 -- read by the test
        print(json.dumps({"console": console, "missing": missing}))  # noqa: T201 -- read by the test
        browser.close()


main()
