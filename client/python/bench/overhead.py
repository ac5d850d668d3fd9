"""What the package adds to the JSON-RPC call below it, and how long it takes to import.

    MSB_SERVER_URL=… MSB_API_KEY=… python bench/overhead.py [RUNS]

Runs of 1+1 in one sandbox, the ways to make them interleaved: raw calls with httpx, and run() of the package.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time

import httpx

import microsandbox
import microsandbox.sync
from microsandbox._config import load

WARM_UP = 20


async def measure(runs: int) -> None:
    """Print p50 and p99 of each way, and its ratio to the raw one."""
    config = load()
    headers = {"Content-Type": "application/json"}
    if config.key is not None:
        headers["Authorization"] = config.key.header()
    url = f"{config.server_url}/api/v1/rpc"
    name = f"bench-{os.getpid()}"
    params = {"sandbox": name, "language": "python", "code": "1+1"}
    request = {"jsonrpc": "2.0", "method": "sandbox.repl.run", "params": params, "id": 1}
    times: dict[str, list[float]] = {}

    def note(way: str, began: float, text: str) -> None:
        times.setdefault(way, []).append((time.perf_counter() - began) * 1000)
        assert text == "2", text

    with microsandbox.sync.PythonSandbox.create(name=name) as blocking:
        ours = microsandbox.PythonSandbox(name=name)
        await ours.start()
        with httpx.Client(headers=headers, timeout=None, trust_env=False) as raw_blocking:
            async with httpx.AsyncClient(headers=headers, timeout=None, trust_env=False) as raw:
                for _ in range(runs + WARM_UP):
                    began = time.perf_counter()
                    answer = await raw.post(url, json=request)
                    note("httpx, asyncio", began, answer.json()["result"]["output"][0]["text"])
                    began = time.perf_counter()
                    note("microsandbox", began, (await ours.run("1+1")).stdout)
                    began = time.perf_counter()
                    answer = raw_blocking.post(url, json=request)
                    note("httpx, blocking", began, answer.json()["result"]["output"][0]["text"])
                    began = time.perf_counter()
                    note("microsandbox.sync", began, blocking.run("1+1").stdout)
        await ours.close()

    def quantiles(way: str) -> tuple[float, float]:
        cuts = statistics.quantiles(times[way][WARM_UP:], n=100)
        return cuts[49], cuts[98]

    print(f"{'run of 1+1, n=' + str(runs):24}{'p50 ms':>10}{'p99 ms':>10}{'ratio of p50, p99':>22}")
    for raw_way, way in (("httpx, asyncio", "microsandbox"), ("httpx, blocking", "microsandbox.sync")):
        base, mine = quantiles(raw_way), quantiles(way)
        print(f"{raw_way:24}{base[0]:10.2f}{base[1]:10.2f}")
        print(f"{way:24}{mine[0]:10.2f}{mine[1]:10.2f}{mine[0] / base[0]:16.2f}{mine[1] / base[1]:6.2f}")


def import_time(module: str) -> float:
    """Return the median of the milliseconds that importing a module takes in a new process."""
    taken = []
    for _ in range(7):
        trace = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", f"import {module}"], check=True, capture_output=True, text=True
        ).stderr
        taken.append(int(trace.splitlines()[-1].split("|")[1]) / 1000)
    return statistics.median(taken)


if __name__ == "__main__":
    for each in ("microsandbox", "microsandbox.sync", "httpx", "asyncio"):
        print(f"{'import ' + each:24}{import_time(each):10.1f} ms")
    asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
