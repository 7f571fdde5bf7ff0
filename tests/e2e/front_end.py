"""The real front end of a running server, in a headless Chromium."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from host_server import HostServer
from playwright.sync_api import ConsoleMessage, Page, sync_playwright

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--use-angle=swiftshader"]
SIZE = {"width": 1920, "height": 1080}
# No tour, no default graph of a person who has not been here before, the classic canvas.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
DISMISSED = "localStorage.setItem('vueNodesBannerDismissed', 'true')"
# What the console says on a fresh profile without network, with or without this pack: the host looks for models of
# its default graph, and for a help page in the language of the page first (/en.md).
KNOWN_COMPLAINTS = ("/user.css", "/api/userdata", "/favicon.ico", "//api.comfy.org/", "//huggingface.co/", "/en.md")
FIRST_START_MS = 300_000  # ten seconds on a machine with nothing else to do


class FrontEnd:
    """`with FrontEnd(server, chromium) as front_end:` opens the page; `complaints` is what its console reported."""

    def __init__(self, server: HostServer, chromium: str) -> None:
        self.server, self.chromium = server, chromium
        self.complaints: list[str] = []
        self.page: Page | None = None

    def __enter__(self) -> FrontEnd:
        for name, value in SETTINGS.items():
            self.server.post("/api/settings", {name: value})
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=self.chromium, args=ARGUMENTS)
        self.page = self._browser.new_page(viewport=SIZE)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        self.page.add_init_script(DISMISSED)
        self.page.goto(self.server.url, timeout=FIRST_START_MS)
        self.page.wait_for_function("window.app?.vueAppReady", timeout=FIRST_START_MS)
        self.page.wait_for_function("app.graph.nodes.length > 0", timeout=FIRST_START_MS)  # the host's default graph
        self.complaints.clear()  # of the host's own start, before anything of ours was opened
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._browser.close()
        self._playwright.stop()

    def _on_console(self, message: ConsoleMessage) -> None:
        text = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and not any(known in text for known in KNOWN_COMPLAINTS):
            self.complaints.append(text)

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Run a JavaScript function in the page and return what it returns."""
        return self.page.evaluate(script, argument)

    def open(self, path: Path) -> dict[str, Any]:
        """Open a canvas workflow, as Workflow > Open does; its content."""
        canvas = json.loads(path.read_text(encoding="utf-8"))
        self.evaluate("([canvas, name]) => app.loadGraphData(canvas, true, true, name)", [canvas, path.stem])
        self.page.wait_for_timeout(500)  # the view is fitted in the next frames
        return canvas

    def drop(self, data: bytes, name: str, kind: str) -> None:
        """Drop a file on the canvas."""
        script = """async ([data, name, type]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            await app.handleFile(new File([bytes], name, {type}));
        }"""
        self.evaluate(script, [base64.b64encode(data).decode(), name, kind])
        self.page.wait_for_timeout(500)

    def prompt(self) -> dict[str, Any]:
        """The open graph in API format, as the front end converts it."""
        return self.evaluate("async () => (await app.graphToPrompt()).output")

    def run(self, patience_ms: float = 600_000.0) -> dict[str, Any]:
        """Press Run and wait for the end: the event's `type` and `detail`."""
        script = """async (patience) => {
            const kinds = ["execution_success", "execution_error", "execution_interrupted"];
            const ended = new Promise((resolve, reject) => {
                for (const kind of kinds)
                    app.api.addEventListener(kind, ({detail}) => resolve({type: kind, detail}), {once: true});
                setTimeout(() => reject(new Error("the graph did not finish in time")), patience);
            });
            await app.queuePrompt(0, 1);
            if (Object.keys(app.lastNodeErrors ?? {}).length)
                return {type: "refused", detail: app.lastNodeErrors};
            return await ended;
        }"""
        return self.evaluate(script, patience_ms)

    def screenshot(self, path: Path) -> None:
        """Save what a person would see."""
        self.page.screenshot(path=path)
