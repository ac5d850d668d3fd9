"""Measures the overhead of the package over raw JSON-RPC calls, and how long importing it takes.

    MSB_SERVER_URL=… MSB_API_KEY=… python bench/overhead.py [RUNS]

It runs 1+1 in one sandbox, alternating between raw calls with httpx and the package's run(). Then it does the same
with print(2), whose output both read from a stream of events.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable

import httpx

import microsandbox
import microsandbox.sync
from microsandbox._config import load

WARM_UP = 20
STREAMED = "print(2)"


async def measure(runs: int) -> None:
    """Print p50 and p99 of each client, and the ratio of the package to raw calls."""
    config = load()
    headers = {"Content-Type": "application/json"}
    if config.key is not None:
        headers["Authorization"] = config.key.header()
    url = f"{config.server_url}/api/v1/rpc"
    name = f"bench-{os.getpid()}"
    params = {"sandbox": name, "language": "python", "code": "1+1", "results": True}
    request = {"jsonrpc": "2.0", "method": "sandbox.repl.run", "params": params, "id": 1}
    streaming = {**request, "params": {**params, "code": STREAMED}}
    events = {"Accept": "text/event-stream"}
    times: dict[str, list[float]] = {}

    def record(client: str, began: float, text: str) -> None:
        times.setdefault(client, []).append((time.perf_counter() - began) * 1000)
        assert text == "2", text

    def printed(lines: Iterable[str]) -> str:
        """Return the output in the events of a stream."""
        data = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        return "".join(event.get("text", "") for event in data).strip()

    with microsandbox.sync.PythonSandbox.create(name=name) as blocking:
        sandbox = microsandbox.PythonSandbox(name=name)
        await sandbox.start()
        with httpx.Client(headers=headers, timeout=None, trust_env=False) as raw_blocking:
            async with httpx.AsyncClient(headers=headers, timeout=None, trust_env=False) as raw:
                for _ in range(runs + WARM_UP):
                    began = time.perf_counter()
                    response = await raw.post(url, json=request)
                    record("httpx, asyncio", began, response.json()["result"]["results"][0]["data"]["text/plain"])
                    began = time.perf_counter()
                    record("microsandbox", began, (await sandbox.run("1+1")).stdout)
                    began = time.perf_counter()
                    response = raw_blocking.post(url, json=request)
                    record("httpx, blocking", began, response.json()["result"]["results"][0]["data"]["text/plain"])
                    began = time.perf_counter()
                    record("microsandbox.sync", began, blocking.run("1+1").stdout)
                for _ in range(runs + WARM_UP):
                    began = time.perf_counter()
                    async with raw.stream("POST", url, json=streaming, headers=events) as stream:
                        record("httpx, asyncio, stream", began, printed([line async for line in stream.aiter_lines()]))
                    began = time.perf_counter()
                    heard: list[str] = []
                    await sandbox.run(STREAMED, on_stdout=heard.append)
                    record("microsandbox, stream", began, "".join(heard).strip())
                    began = time.perf_counter()
                    with raw_blocking.stream("POST", url, json=streaming, headers=events) as lines:
                        record("httpx, blocking, stream", began, printed(lines.iter_lines()))
                    began = time.perf_counter()
                    heard = []
                    blocking.run(STREAMED, on_stdout=heard.append)
                    record("microsandbox.sync, stream", began, "".join(heard).strip())
        await sandbox.close()

    def quantiles(client: str) -> tuple[float, float]:
        cuts = statistics.quantiles(times[client][WARM_UP:], n=100)
        return cuts[49], cuts[98]

    print(f"{'run of 1+1, n=' + str(runs):26}{'p50 ms':>10}{'p99 ms':>10}{'ratio of p50, p99':>22}")
    for raw_client, client in (
        ("httpx, asyncio", "microsandbox"),
        ("httpx, blocking", "microsandbox.sync"),
        ("httpx, asyncio, stream", "microsandbox, stream"),
        ("httpx, blocking, stream", "microsandbox.sync, stream"),
    ):
        base, package = quantiles(raw_client), quantiles(client)
        print(f"{raw_client:26}{base[0]:10.2f}{base[1]:10.2f}")
        print(f"{client:26}{package[0]:10.2f}{package[1]:10.2f}{package[0] / base[0]:16.2f}{package[1] / base[1]:6.2f}")


def import_time(module: str) -> float:
    """Return the median time that importing a module takes in a new process, in milliseconds."""
    measured = []
    for _ in range(7):
        trace = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", f"import {module}"], check=True, capture_output=True, text=True
        ).stderr
        measured.append(int(trace.splitlines()[-1].split("|")[1]) / 1000)
    return statistics.median(measured)


if __name__ == "__main__":
    for each in ("microsandbox", "microsandbox.sync", "httpx", "asyncio"):
        print(f"{'import ' + each:24}{import_time(each):10.1f} ms")
    asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
