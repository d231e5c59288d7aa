"""`heartbeat serve igtl`: a warm session as an OpenIGTLink scanner.

One session, any number of clients: all see the same heart and each may steer it. Every client has
threads and a newest-frame slot of its own, so one that reads slowly loses frames and delays nobody.
"""

import contextlib
import errno
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from heartbeat_fast.anatomy import Anatomy
from heartbeat_fast.controls import check_control
from heartbeat_fast.errors import HeartBeatError, ServeError
from heartbeat_fast.serve import wire
from heartbeat_fast.serve.commands import IGTL_PORT
from heartbeat_fast.serve.wire import Message, Pose
from heartbeat_fast.stream import Session

STALLED = 5.0  # seconds without a byte, within a message in either direction
MAX_CLIENTS = 32
STATUS_EVERY = 1.0  # seconds


@dataclass
class Client:
    """One connection: a slot for the newest frame, a few words, and what was lost."""

    connection: socket.socket
    address: str
    frame: bytes | None = None
    words: bytes | None = None
    dropped: int = 0
    refused: int = 0
    error: str | None = None
    closed: bool = False

    def __post_init__(self) -> None:
        self.changed = threading.Condition()

    def offer(self, frame: bytes) -> None:
        """The newest frame replaces one that was not sent."""
        with self.changed:
            self.dropped += self.frame is not None
            self.frame = frame
            self.changed.notify()

    def say(self, words: bytes) -> None:
        """The newest status likewise."""
        with self.changed:
            self.words = words
            self.changed.notify()

    def close(self) -> None:
        """Ends both directions; its threads follow."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def send(self) -> None:
        """Sends whatever is newest until closed.

        Raises:
            OSError: the client went, or took nothing for STALLED seconds.
        """
        while True:
            with self.changed:
                while not (self.closed or self.frame or self.words):
                    self.changed.wait()
                frame, words, self.frame, self.words = self.frame, self.words, None, None
            if self.closed:
                return
            for content in (words, frame):
                if content is not None:
                    self.connection.sendall(content)


class IgtlServer:
    """Sends a session's frames to every client and takes conditions from them.

    Args:
        session: whose frames; closed by whoever opened it.
        host: loopback unless said otherwise: OpenIGTLink has no passwords.
        port: 0 takes a free one; `port` tells which.
        rate: frames a second.

    Raises:
        ServeError: the address is in use, or not this machine's; or no such rate.
        MissingDependency: pyigtl is not installed.
    """

    def __init__(
        self, session: Session, host: str = "127.0.0.1", port: int = IGTL_PORT, rate: float = 25.0
    ) -> None:
        wire.codec()
        if not 0 < rate <= 1000:
            raise ServeError(f"rate: {rate:g} came; wanted up to 1000 frames a second")
        self.session, self.rate = session, rate
        self.broken = 0  # connections ended for what they sent
        self._heart: Anatomy | None = session.wish.anatomy
        self._pose: Pose | None = None
        self._clients: list[Client] = []
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._said = 0.0
        try:
            self._socket = socket.create_server((host, port), backlog=MAX_CLIENTS)
        except OSError as error:
            why = "is in use: choose another --port" if error.errno == errno.EADDRINUSE else error
            raise ServeError(f"{host}:{port}: {why}") from error
        self.host, self.port = self._socket.getsockname()[:2]
        self._threads = [
            threading.Thread(target=target, name=f"igtl-{target.__name__}", daemon=True)
            for target in (self._accept, self._play)
        ]

    def __enter__(self) -> "IgtlServer":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def clients(self) -> tuple[Client, ...]:
        """Those connected now."""
        with self._lock:
            return tuple(self._clients)

    def close(self) -> None:
        """Ends listening and every connection."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._socket.close()
        for client in self.clients:
            client.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(STALLED)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, address = self._socket.accept()
            except OSError:
                if self._closed.is_set():
                    return
                time.sleep(0.1)  # out of file handles: others may close theirs
                continue
            if len(self.clients) >= MAX_CLIENTS:
                connection.close()
                continue
            manifest = self.session.manifest
            connection.settimeout(STALLED)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Two frames at most wait in the kernel: more would be shown late instead of left out.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, manifest.size**2)
            client = Client(connection, f"{address[0]}:{address[1]}")
            with self._lock:
                self._clients.append(client)
            for target in (self._send, self._receive):
                threading.Thread(target=target, args=(client,), daemon=True).start()

    def _play(self) -> None:
        """Composes and packs each frame once, at a steady rate."""
        while not self._closed.is_set():
            try:
                for frame in self.session.frames(self.rate):
                    if self._closed.is_set():
                        return
                    if clients := self.clients:
                        packed = wire.image(frame, self.session.spacing_mm)
                        for client in clients:
                            client.offer(packed)
                    self._report(frame.version)
                return  # the session was closed
            except HeartBeatError as error:  # no first clip yet; the session tries again
                self._report(None, str(error))
                self._closed.wait(0.2)

    def _send(self, client: Client) -> None:
        with contextlib.suppress(OSError):
            client.send()
        self._forget(client)

    def _receive(self, client: Client) -> None:
        manifest = self.session.manifest
        most = wire.largest(manifest.frames, manifest.size)
        while not client.closed:
            try:
                self._obey(wire.receive(client.connection, most))
                client.error = None
            except (wire.Broken, OSError) as error:
                self.broken += isinstance(error, wire.Broken)
                break
            except HeartBeatError as error:
                client.refused += 1
                client.error = str(error)
                client.say(wire.text(wire.STATUS, self._status(client, None)))
        self._forget(client)

    def _forget(self, client: Client) -> None:
        client.close()
        with self._lock:
            if client in self._clients:
                self._clients.remove(client)

    def _obey(self, message: Message) -> None:
        """Does what a message asks for. Raises: HeartBeatError: it cannot be done."""
        if message.kind == "STRING":
            if message.device != wire.CONDITION:
                raise wire.WireError(
                    f"STRING {message.device[:20]!r}: wanted the device {wire.CONDITION}"
                )
            self._set(dict(message.content))
        elif message.kind == "TRANSFORM":
            self._move(message.content)
        else:
            self.session.set(**{wire.PICTURES[message.device]: message.content})

    def _set(self, fields: dict[str, Any]) -> None:
        version = fields.pop("schema_version", 1)
        if version != 1:
            raise wire.WireError(f"schema_version: {str(version)[:20]} came; wanted 1")
        if "anatomy" not in fields:
            self.session.set(**fields)
            return
        heart = check_control("anatomy", fields.pop("anatomy"))
        self.session.set(**fields, anatomy=wire.under(heart, self._pose))
        self._heart = heart

    def _move(self, pose: Pose) -> None:
        """The probe moved: the anatomy, where there is one, lies elsewhere in its image."""
        if self._pose is not None and pose.near(self._pose):
            return
        self._pose = pose
        if self._heart is not None:
            self.session.set(anatomy=wire.under(self._heart, pose))

    def _report(self, shown: int | None, error: str | None = None) -> None:
        if (now := time.monotonic()) - self._said < STATUS_EVERY:
            return
        self._said = now
        for client in self.clients:
            client.say(wire.text(wire.STATUS, self._status(client, shown, error)))

    def _status(
        self, client: Client, shown: int | None, error: str | None = None
    ) -> dict[str, Any]:
        session, stats = self.session, self.session.stats
        fault = error or (str(session.fault) if session.fault else None)
        pose = self._pose
        return {
            "schema_version": 1,
            "time": time.time(),
            "version": session.wish.version,
            "shown_version": shown,
            "heart_rate": session.wish.heart_rate,
            "ef": session.wish.values.get("ef"),
            "probe": None if pose is None else vars(pose),
            "rate": self.rate,
            "clients": len(self.clients),
            "broken": self.broken,
            "dropped": client.dropped,
            "refused": client.refused,
            "error": client.error,
            "missed": stats.missed,
            "clips": stats.clips,
            "faults": stats.faults,
            "fault": fault,
            "latency_s": round(stats.latencies[-1], 4) if stats.latencies else None,
            "bundle": session.manifest.name,
            "weights": session.manifest.fingerprints.get("weights", ""),
            "synthetic": True,
            "not_for_diagnosis": True,
        }
