"""A server of a bundle on a free port, and Chromium without a window to look at its page."""

import base64
import itertools
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from heartbeat_fast.generator import Generator
from heartbeat_fast.serve.application import Settings, application
from heartbeat_fast.serve.web import server


@contextmanager
def serving(generator: Generator, settings: Settings | None = None) -> Iterator[str]:
    """Yields host:port of a server in a thread of this process, warmed up."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn comes with the extra `web`")
    pytest.importorskip("websockets", reason="websockets comes with the extra `web`")
    pytest.importorskip("fastapi", reason="FastAPI comes with the extra `web`")
    listening = socket.create_server(("127.0.0.1", 0))
    app = application(generator, settings)
    running = server(uvicorn, app)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        assert app.state.worker.ready.wait(60), app.state.worker.failure
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def ask(
    address: str, path: str, body: Any = None, timeout: float = 60, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and content; a body is sent as JSON unless it is bytes."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if data is not None:
        named = {"Content-Type": "application/json", **named}
    request = urllib.request.Request(f"http://{address}{path}", data, named)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            content, status, found = answer.read(), answer.status, answer.headers
    except urllib.error.HTTPError as error:
        content, status, found = error.read(), error.code, error.headers
    return status, {name.lower(): value for name, value in found.items()}, content


def chromium() -> str:
    """The browser's path; skips aloud where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip(
        "no Chromium on this machine (Debian: apt-get install chromium): page not looked at"
    )


class Browser:
    """One page of headless Chromium, driven over its DevTools protocol."""

    FLAGS = (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--remote-debugging-port=0",
        "--hide-scrollbars",
    )  # fmt: skip

    def __init__(self, folder: Path, width: int = 1280, height: int = 820) -> None:
        from websockets.sync.client import connect

        command = [chromium(), *self.FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        lines = iter(self.process.stderr.readline, "")
        host = next(m[1] for line in lines if (m := re.search(r"ws://(\S+?)/devtools", line)))
        threading.Thread(target=lambda: list(lines), daemon=True).start()
        with urllib.request.urlopen(f"http://{host}/json/list", timeout=30) as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        self.socket = connect(page["webSocketDebuggerUrl"], max_size=2**26)
        self.numbers, self.events = itertools.count(1), list[dict[str, Any]]()
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            if not message["method"].startswith("Network.webSocket"):
                self.events.append(message)

    def js(self, code: str) -> Any:
        """The value of an expression on the page; promises are waited for."""
        result = self.call(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, code: str, seconds: float = 60) -> None:
        """Waits for an expression to be true."""
        end = time.monotonic() + seconds
        while not self.js(code):
            assert time.monotonic() < end, f"{code}: not within {seconds} s"
            time.sleep(0.05)

    def drag(self, *places: tuple[float, float]) -> None:
        """Presses at the first place, moves over all, lets go at the last."""
        for k, (x, y) in enumerate((places[0], *places, places[-1])):
            last = k == len(places) + 1
            kind = "mousePressed" if k == 0 else "mouseReleased" if last else "mouseMoved"
            self.call(
                "Input.dispatchMouseEvent",
                type=kind, x=x, y=y, button="left", buttons=0 if last else 1, clickCount=1,
            )  # fmt: skip

    def screenshot(self) -> bytes:
        """The page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def complaints(self) -> list[dict[str, Any]]:
        """Exceptions and errors that the page met."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Every address that the page asked for."""
        sent = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
