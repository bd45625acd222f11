"""Many clients at once ask a server of the tiny system, some of which leave early or send what is no request.

    python tools/load_serve.py                 64 clients with 10 requests each, at batch 8 and at batch 1
    python tools/load_serve.py --memory 2000   and how much memory the server takes after so many more

It needs the extra `serve`, and works on loopback only. Every good request has to be answered as `System.run` answers
the question alone. The exit status is 1 if one is not.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import minimas
from minimas.tiny.task import questions

PATH = "/v1/chat/completions"


@dataclass
class Load:
    """What is asked: `expected` has the text for each question, and shares are of all requests."""

    expected: dict[str, str]
    clients: int = 64
    requests: int = 10
    disconnects: float = 0.05
    broken: float = 0.05


@dataclass
class Outcome:
    """What became of the requests.

    counts   {right, wrong, left, refused: requests}; wrong ones have a reason besides
    seconds  that each right one took
    elapsed  from the first to the last of all
    """

    counts: Counter = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    elapsed: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {what}" for what, n in sorted(self.counts.items()))
        if len(self.seconds) < 2:
            return counts
        cuts = statistics.quantiles(self.seconds, n=20, method="inclusive")
        rate = len(self.seconds) / self.elapsed
        return f"{counts}; {rate:.1f} right/s, p50 {cuts[9]:.2f} s, p95 {cuts[18]:.2f} s"


class Server:
    """`python -m minimas.serve` in a process of its own."""

    def __init__(self, batch_size: int) -> None:
        command = [sys.executable, "-m", "minimas.serve", "--port", "0", "--device", "cpu"]
        command += ["--batch-size", str(batch_size), "--queue", "1000"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said = self.process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", said)
        if found is None:
            raise SystemExit(f"the server did not start: {said}{self.process.stderr.read()}")
        self.port = int(found[1])

    def memory(self) -> int:
        """Its resident memory in bytes."""
        with open(f"/proc/{self.process.pid}/status") as status:
            found = re.search(r"VmRSS:\s*(\d+) kB", status.read())
        assert found is not None
        return int(found[1]) * 1024

    def end(self) -> str:
        """End it -> what it said meanwhile."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=15)
        return said


# Requests


def request(data: bytes) -> bytes:
    """A request whose response ends with the connection: HTTP/1.0 knows no chunks."""
    head = f"POST {PATH} HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def exchange(port: int, data: bytes, leave: bool = False) -> tuple[int, str]:
    """Send a body -> status and body of the response; whoever leaves does so without waiting for it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request(data))
        await writer.drain()
        if leave:
            await asyncio.sleep(random.uniform(0, 0.5))
            return 0, ""
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        return int(head.split()[1]), body.decode()
    finally:
        writer.close()


def text_of(body: str, stream: bool) -> str:
    """The text in a response."""
    if not stream:
        return json.loads(body)["choices"][0]["message"]["content"]
    text = ""
    for event in body.strip().split("\n\n")[:-1]:
        text += json.loads(event.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
    return text


BROKEN = (
    b"{",
    b"",
    b'{"model": "tiny"}',
    b'{"model": "tiny", "messages": [{"role": "user"}]}',
    b"\xff",
)


async def ask(port: int, load: Load, outcome: Outcome, rng: random.Random) -> None:
    """One request of a client."""
    fate = rng.random()
    if fate < load.broken:
        status, body = await exchange(port, rng.choice(BROKEN))
        right = status == 400 and "error" in json.loads(body)
        outcome.counts["refused" if right else "wrong"] += 1
        return
    question = rng.choice(list(load.expected))
    stream = rng.random() < 0.5
    messages = [{"role": "user", "content": question}]
    data = json.dumps({"model": "tiny", "messages": messages, "stream": stream}).encode()
    leave = fate < load.broken + load.disconnects
    began = time.perf_counter()
    status, body = await exchange(port, data, leave)
    if leave:
        outcome.counts["left"] += 1
    elif status == 200 and text_of(body, stream) == load.expected[question]:
        outcome.counts["right"] += 1
        outcome.seconds.append(time.perf_counter() - began)
    else:
        outcome.counts["wrong"] += 1
        outcome.reasons.append(f"{question}: {status} {body:.200}")


async def put_under(load: Load, port: int, seed: int = 0) -> Outcome:
    """All clients at once, each with one request after another."""
    outcome = Outcome()

    async def client(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        for _ in range(load.requests):
            await ask(port, load, outcome, rng)

    began = time.perf_counter()
    await asyncio.gather(*[client(number) for number in range(load.clients)])
    outcome.elapsed = time.perf_counter() - began
    return outcome


def warm(load: Load, port: int, requests: int) -> None:
    """Let a server answer so many requests of each client before anything is measured."""
    few = Load(load.expected, load.clients, requests)
    asyncio.run(put_under(few, port, seed=1))


# What is measured


def throughput(load: Load, batch_size: int) -> Outcome:
    """The outcome at a batch size, in a server of its own."""
    server = Server(batch_size)
    try:
        warm(load, server.port, 3)
        outcome = asyncio.run(put_under(load, server.port))
    finally:
        said = server.end()
    print(f"batch {batch_size}: {outcome}", flush=True)
    if "Traceback" in said:
        print(said)
        outcome.counts["wrong"] += 1
    return outcome


def growth(load: Load, n: int) -> Outcome:
    """The outcome of n requests more, and how much memory the server then has."""
    server = Server(8)
    try:
        warm(load, server.port, load.requests)
        before = server.memory()
        more = Load(
            load.expected, load.clients, -(-n // load.clients), load.disconnects, load.broken
        )
        outcome = asyncio.run(put_under(more, server.port, seed=2))
        after = server.memory()
    finally:
        server.end()
    print(
        f"memory after {sum(outcome.counts.values())} requests more: {before / 1e6:.1f} MB, then "
        f"{after / 1e6:.1f} MB ({100 * (after / before - 1):+.1f} %); {outcome}"
    )
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a server of the tiny system under load.")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=10, help="of each client (default 10)")
    parser.add_argument("--batch-sizes", default="8,1", help="servers to compare (default 8,1)")
    parser.add_argument("--memory", type=int, help="measure memory over so many requests instead")
    parser.add_argument("--questions", type=int, default=64, help="different ones (default 64)")
    args = parser.parse_args()
    asked = [chain.question for chain in questions("test", -(-args.questions // 8))]
    system = minimas.load_mas_system("tiny", device="cpu", fast=True)
    expected = {result.question: result.text for result in system.run(asked, batch_size=1)}
    load = Load(expected, args.clients, args.requests)
    if args.memory:
        outcomes = [growth(load, args.memory)]
    else:
        sizes = [int(size) for size in args.batch_sizes.split(",")]
        outcomes = [throughput(load, size) for size in sizes]
        rates = [len(outcome.seconds) / outcome.elapsed for outcome in outcomes]
        for size, rate in zip(sizes[1:], rates[1:]):
            print(f"batch {sizes[0]} is {rates[0] / rate:.2f} times as fast as batch {size}")
    for outcome in outcomes:
        print("\n".join(outcome.reasons[:5]), end="")
    if any(outcome.counts["wrong"] for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
