#!/usr/bin/env python3
"""How far the service is from what its shape allows, measured beside it.

    python3 .ci/ceiling.py [--rounds 5] [--seconds 5]

The ceiling keeps the promise and does none of the work: asyncio streams, JSON, a queue,
one thread that commits all that waits to one plain table with synchronous=FULL, and an
answer after the commit. It has no dedup, no validation, no books, no order to read by,
and hardly any HTTP. Both run by turns, so a ratio holds where a rate does not. Needs
wrk, the load generator; without it this is skipped.
"""

import argparse
import asyncio
import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "aggregator.py")
ANSWER = b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\n{}"

# Connections, events a request.
LOADS = {
    "64 connections, an event a request": (64, 1),
    "one connection, an event a request": (1, 1),
    "8 connections, 100 events a request": (8, 100),
}

# One event in five is sent twice, and ids are as scattered as random ones.
SCRIPT = """
local batch, n = tonumber(os.getenv("BATCH")), 0
local run = tostring(os.time()) .. "-" .. tostring(os.clock())
function event()
  n = n + 1
  local number = n
  if n % 5 == 0 then number = n - 1 end
  return string.format('{"topic":"t/%d","event_id":"%08x-%s-%d","timestamp":"2026-01-01T00:00:00.5Z","source":"s","payload":{"n":%d}}',
                       number % 20, (number * 2654435761) % 4294967296, run, number, number)
end
function request()
  local events = {}
  for i = 1, batch do events[i] = event() end
  return wrk.format("POST", "/publish", nil, "[" .. table.concat(events, ",") .. "]")
end
"""


class Ceiling:
    """The server that only stores."""

    def __init__(self, path):
        self.path = path
        self.queue = asyncio.Queue()
        self.thread = concurrent.futures.ThreadPoolExecutor(1)

    def open(self):
        self.db = sqlite3.connect(self.path, isolation_level=None)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.execute(
            "CREATE TABLE log(seq INTEGER PRIMARY KEY, topic, id, time, source, payload)"
        )

    def commit(self, rows):
        self.db.execute("BEGIN IMMEDIATE")
        for start in range(0, len(rows), 2000):
            part = rows[start : start + 2000]
            marks = ",".join(["(?,?,?,?,?)"] * len(part))
            values = [value for row in part for value in row]
            self.db.execute(
                f"INSERT INTO log(topic, id, time, source, payload) VALUES {marks}", values
            )
        self.db.execute("COMMIT")

    async def consume(self):
        while True:
            group = [await self.queue.get()]
            while not self.queue.empty():
                group.append(self.queue.get_nowait())
            rows = [row for batch, _ in group for row in batch]
            await asyncio.get_running_loop().run_in_executor(self.thread, self.commit, rows)
            for _, done in group:
                done.set_result(None)

    async def serve(self, reader, writer):
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            length = int(re.search(rb"(?i)content-length: *([0-9]+)", head).group(1))
            rows = []
            for event in json.loads(await reader.readexactly(length)):
                payload = str(event["payload"])
                rows.append(
                    (
                        event["topic"],
                        event["event_id"],
                        event["timestamp"],
                        event["source"],
                        payload,
                    )
                )
            done = asyncio.get_running_loop().create_future()
            self.queue.put_nowait((rows, done))
            await done
            writer.write(ANSWER)
        writer.close()

    async def run(self, port):
        await asyncio.get_running_loop().run_in_executor(self.thread, self.open)
        consumer = asyncio.create_task(self.consume())
        await asyncio.start_server(self.serve, "127.0.0.1", port, limit=1 << 22)
        await consumer


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def load(port, connections, batch, seconds, script):
    """Events a second, and the median of the time to an answer in ms."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--latency", "-s", script]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/publish"],
        env={**os.environ, "BATCH": str(batch)},
        capture_output=True,
        text=True,
        check=True,
    )
    if "Non-2xx" in done.stdout:
        sys.exit(done.stdout)
    rate = float(re.search(r"Requests/sec: *([0-9.]+)", done.stdout).group(1)) * batch
    median, unit = re.search(r" 50% +([0-9.]+)(us|ms|s)", done.stdout).groups()
    return rate, float(median) * {"us": 0.001, "ms": 1, "s": 1000}[unit]


def measure(words, seconds, folder):
    """Each load against one server, which `words` start."""
    script = os.path.join(folder, "load.lua")
    with open(script, "w", encoding="ascii") as file:
        file.write(SCRIPT)
    port = free_port()
    server = subprocess.Popen([sys.executable, *words(str(port), folder)])
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    sys.exit("the server does not listen")
                time.sleep(0.02)
        return [load(port, *sizes, seconds, script) for sizes in LOADS.values()]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)


def the_ceiling(port, folder):
    return [os.path.abspath(__file__), "--serve", port, os.path.join(folder, "ceiling.db")]


def the_service(port, folder):
    store = os.path.join(folder, "service.db")
    return [PROGRAM, "--port", port, "--db", store, "--log-level", "WARNING"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("CEILING_ROUNDS", "5")))
    parser.add_argument("--seconds", type=int, default=int(os.environ.get("CEILING_SECONDS", "5")))
    parser.add_argument("--serve", nargs=2, metavar=("PORT", "FILE"), help="be the ceiling")
    given = parser.parse_args()
    if given.serve:
        port, path = given.serve
        asyncio.run(Ceiling(path).run(int(port)))
        return
    if shutil.which("wrk") is None:
        print("skipped: there is no wrk")
        return
    rates = {name: [] for name in LOADS}
    medians = {name: [] for name in LOADS}
    own = {name: [] for name in LOADS}
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            above = measure(the_ceiling, given.seconds, folder)
            ours = measure(the_service, given.seconds, folder)
        for name, (rate, median), (most, least) in zip(LOADS, ours, above):
            own[name].append(rate)
            rates[name].append(rate / most)
            medians[name].append(median / least)
    for name in LOADS:
        print(
            f"{name}: {statistics.median(own[name]):,.0f} events/s,"
            f" {statistics.median(rates[name]):.2f} of the ceiling's,"
            f" half answered within {statistics.median(medians[name]):.2f} times its time"
        )


if __name__ == "__main__":
    main()
