"""One who watches the dashboard page over its websocket, as a browser does, without a browser."""

from __future__ import annotations

import asyncio
import re
import threading
import urllib.request
from typing import Any

from tornado.websocket import websocket_connect


class Watcher:
    """Loads the page of ``url`` and takes all that the server pushes, in a thread of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._taken: list[str] = []
        self.taken_bytes = 0
        self._loop = asyncio.new_event_loop()
        self._open = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watcher")

    def __enter__(self) -> Watcher:
        self._thread.start()
        if not self._open.wait(30):
            raise AssertionError(f"no websocket at {self._url}")
        return self

    def __exit__(self, *error: Any) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    def text(self) -> str:
        """Everything that was pushed so far."""
        with self._lock:
            return "".join(self._taken)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._watch())

    async def _watch(self) -> None:
        page = await self._loop.run_in_executor(None, self._fetch)
        token = re.search(r'"token":"([^"]+)"', page)
        assert token is not None
        socket = await websocket_connect(
            self._url.replace("http", "ws", 1) + "/ws",
            subprotocols=["bokeh", token[1]],
            on_message_callback=self._take,
        )
        self._open.set()
        await self._stop.wait()
        socket.close()
        await asyncio.sleep(0.1)

    def _fetch(self) -> str:
        with urllib.request.urlopen(self._url, timeout=20) as answer:
            return str(answer.read().decode())

    def _take(self, message: str | bytes | None) -> None:
        if isinstance(message, str):
            with self._lock:
                self.taken_bytes += len(message)
                self._taken = [*self._taken[-2000:], message]
