"""OpenIGTLink clients in a process of their own: some read steadily and measure, some misbehave.

A frame's age is the time from its composition in the server to its last byte in the client: both
clocks are this machine's. Run by soak.py; prints one JSON object.
"""

import argparse
import json
import random
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Any

HEADER, FRACTION = 58, 2.0**-32
KILL = struct.pack("ii", 1, 0)  # SO_LINGER: the connection is reset, as when a process dies


class Steady:
    """A blocking reader: ages in ms, and the composition times of the frames it got."""

    def __init__(self, port: int, seconds: float) -> None:
        self.ages: list[float] = []
        self.stamps: list[float] = []
        self._port, self._end = port, time.monotonic() + seconds

    def run(self) -> None:
        """Reads until the time is over."""
        with connect(self._port) as connection:
            while time.monotonic() < self._end:
                kind, stamp, size = header(exactly(connection, HEADER))
                exactly(connection, size)
                if kind == "IMAGE":
                    self.ages.append((time.time() - stamp) * 1e3)
                    self.stamps.append(stamp)


class Pyigtl(Steady):
    """pyigtl's own client, which looks for messages every ten milliseconds."""

    def run(self) -> None:
        """Reads until the time is over."""
        import pyigtl

        client = pyigtl.OpenIGTLinkClient("127.0.0.1", self._port)
        try:
            while time.monotonic() < self._end:
                message = client.wait_for_message("Echo", timeout=5)
                if message is not None:
                    self.ages.append((time.time() - message.timestamp) * 1e3)
                    self.stamps.append(message.timestamp)
        finally:
            client.stop()


class Bad(threading.Thread):
    """Connects, reads a little or nothing, dies or stalls, and comes back, until time is over."""

    def __init__(self, port: int, seconds: float, seed: int) -> None:
        super().__init__(daemon=True)
        self.deeds: dict[str, int] = {"killed": 0, "stalled": 0, "noise": 0}
        self._port, self._end, self._chance = port, time.monotonic() + seconds, random.Random(seed)

    def run(self) -> None:
        """Misbehaves."""
        while time.monotonic() < self._end:
            deed = self._chance.choice(list(self.deeds))
            with suppress(OSError), connect(self._port) as connection:
                if deed == "killed":
                    exactly(connection, self._chance.randrange(1, 300_000))
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, KILL)
                elif deed == "stalled":
                    time.sleep(self._chance.uniform(0.5, 8))
                else:
                    connection.sendall(self._chance.randbytes(200))
                    exactly(connection, 2**40)
            self.deeds[deed] += 1
            time.sleep(0.2)


def connect(port: int) -> socket.socket:
    """A connection to a server on this machine."""
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def exactly(connection: socket.socket, count: int) -> bytes:
    """The last of so many bytes, at most a MiB of them. Raises: OSError: the connection ended."""
    content = bytearray(min(count, 2**20))
    done = 0
    while done < count:
        place = done % len(content)
        got = connection.recv_into(memoryview(content)[place:], min(count - done, len(content)))
        if not got:
            raise ConnectionResetError("closed by the server")
        done += got
    return bytes(content)


def header(content: bytes) -> tuple[str, float, int]:
    """Type, time stamp and body size of a message."""
    _, kind, _, seconds, fraction, size, _ = struct.unpack("> H 12s 20s II Q Q", content)
    return kind.rstrip(b"\0").decode(), seconds + fraction * FRACTION, size


def main() -> None:
    """Runs the clients that are asked for and prints what they saw."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("port", "blocking", "pyigtl", "bad"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    steady = [Steady(options.port, options.seconds) for _ in range(options.blocking)]
    polling = [Pyigtl(options.port, options.seconds) for _ in range(options.pyigtl)]
    bad = [Bad(options.port, options.seconds, seed) for seed in range(options.bad)]
    threads = [threading.Thread(target=one.run) for one in (*steady, *polling)]
    for thread in (*threads, *bad):
        thread.start()
    for thread in threads:
        thread.join()
    found: dict[str, Any] = {
        "blocking": [{"ages_ms": one.ages, "stamps": one.stamps} for one in steady],
        "pyigtl": [{"ages_ms": one.ages, "stamps": one.stamps} for one in polling],
        "deeds": {deed: sum(one.deeds[deed] for one in bad) for deed in Bad(0, 0, 0).deeds},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
