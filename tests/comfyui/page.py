"""Runs in the host's interpreter, with playwright: opens the page in a browser, queues a graph, prints what our nodes show.

``python page.py URL BROWSER FOLDER`` reads the graph from standard input and leaves one picture for each of the host's two canvases.
"""

from __future__ import annotations

import json
import sys
import urllib.request

from playwright.sync_api import Page, sync_playwright

_PLACES = {
    "UNETLoader": [60, 60],
    "SeededConditioning": [60, 240],
    "EmptySD3LatentImage": [60, 380],
    "OverflowMLOptimize": [420, 60],
    "KSampler": [880, 40],
    "OverflowMLPlanPreview": [880, 370],
    "SaveLatent": [1300, 60],
}
_ARRANGE = """places => {
  for (const node of app.graph._nodes) {
    if (places[node.type]) node.pos = places[node.type];
    if (node.type.startsWith("OverflowML")) node.setSize([400, 520]);
  }
  app.canvas.ds.scale = 0.9; app.canvas.ds.offset = [40, 60]; app.canvas.setDirty(true, true);
}"""
_SHOWN = "() => [...document.querySelectorAll('.overflowml-plan')].map(box => box.innerText)"
_MEASURED = "() => [...document.querySelectorAll('.overflowml-plan')].some(box => /measured \\d/.test(box.innerText))"


def look(page: Page, url: str, graph: dict[str, dict], picture: str) -> list[str]:
    """Load the graph, run it, and return the texts of our nodes."""
    page.goto(url)
    page.wait_for_function("window.app && window.app.graph && window.app.extensionManager", timeout=90_000)
    page.wait_for_timeout(3000)  # the page opens its own first graph after that
    page.evaluate("async graph => { await window.app.loadApiJson(graph, 'plan'); }", graph)
    page.wait_for_timeout(1000)
    page.evaluate(_ARRANGE, _PLACES)
    page.evaluate("async () => { await window.app.queuePrompt(0); }")
    page.wait_for_function(_MEASURED, timeout=60_000)
    page.wait_for_timeout(500)
    page.screenshot(path=picture)
    return page.evaluate(_SHOWN)


def main() -> None:
    """Both canvases, one after the other."""
    url, browser_path, folder = sys.argv[1:4]
    graph = json.load(sys.stdin)
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--no-proxy-server"])
        for name, nodes_2 in (("classic", False), ("nodes-2", True)):
            for key, value in (("Comfy.VueNodes.Enabled", nodes_2), ("Comfy.TutorialCompleted", True)):
                body = json.dumps(value).encode()
                urllib.request.urlopen(urllib.request.Request(f"{url}/settings/{key}", body, {"Content-Type": "application/json"})).close()
            graph["5"]["inputs"]["seed"] += 1  # the host samples nothing twice
            page = browser.new_page(viewport={"width": 1500, "height": 950})
            faults: list[str] = []
            page.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
            texts = look(page, url, graph, f"{folder}/comfyui-{name}.png")
            print(json.dumps({"canvas": name, "texts": texts, "faults": faults}))  # noqa: T201 -- read by the test
            page.close()
        browser.close()


main()
