"""What the benchmarks share: a trial in a process of its own, timing in turn, tables, and the machine's description."""

import json
import os
import platform
import resource
import signal
import statistics
import time
import warnings
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
GIB = 2**30


def machine():
    """Where the figures come from."""
    rows = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((row.split(":")[1].strip() for row in rows if row.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def try_alone(function, seconds=60, memory=12 * GIB):
    """Call a function once in a forked process.

    Returns:
        `(status, seconds, peak)`: "ok", "out of memory", "over 60 s", "killed" or "fails: ..."; peak bytes above base.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: the child starts none of its own
        child = os.fork()
    if child == 0:
        os.close(reader)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        in_use = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (in_use + memory, in_use + memory))
        try:
            began = time.perf_counter()
            function()
            outcome = ["ok", time.perf_counter() - began]
        except Exception as error:  # nothing may leave the child alive
            outcome = [reason_of(error), None]
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        os.write(writer, json.dumps([*outcome, peak]).encode())
        os._exit(0)
    os.close(writer)
    late = []
    signal.signal(signal.SIGALRM, lambda *_: late.append(os.kill(child, signal.SIGKILL)))
    signal.alarm(seconds)
    try:
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
    finally:
        signal.alarm(0)
    if text:
        return tuple(json.loads(text))
    return (f"over {seconds} s" if late else "killed"), None, None


def reason_of(error):
    """Why a contender has no figures: "out of memory", or "fails: " and the error's first words."""
    if isinstance(error, MemoryError) or "alloc" in str(error).lower():
        return "out of memory"
    return f"fails: {(str(error) or repr(error)).splitlines()[0][:60]}"


def time_in_turn(functions, budget=20.0, most=25, wait=lambda: None):
    """Median seconds a call of each function, timed in turn so that a busy machine slows all alike.

    A quick function is called for 20 ms in each turn, so that it does not pay for the caches that a slow one emptied.
    A first call is for warming up, but counts where it takes a second or more, and is enough where it takes ten.

    Args:
        functions: dict from name to function without arguments.
        budget: stop after the round in which this many seconds are over, but not before each function has three times.
        most: rounds at most.
        wait: called after each call, as `torch.cuda.synchronize` for a GPU.
    """
    first = {name: _seconds_a_call(function, 0, wait) for name, function in functions.items()}
    times = {name: [seconds] if seconds >= 1 else [] for name, seconds in first.items()}
    again = [name for name in functions if first[name] < 10]
    began = time.perf_counter()
    for _ in range(most if again else 0):
        if min(len(times[name]) for name in again) >= 3 and time.perf_counter() - began > budget:
            break
        for name in again:
            times[name].append(_seconds_a_call(functions[name], 0.02, wait))
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds_a_call(function, at_least, wait):
    """Mean seconds of as many calls as it takes to fill `at_least` seconds, or of one."""
    wait()
    n_calls, began = 0, time.perf_counter()
    while n_calls == 0 or time.perf_counter() - began < at_least:
        function()
        wait()
        n_calls += 1
    return (time.perf_counter() - began) / n_calls


class Budget:
    """Seconds that a benchmark may take; what does not fit is left out, and named.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds):
        self.stop = time.perf_counter() + seconds
        self.left_out = []

    def allows(self, name):
        """Whether there is time for one more entry; if not, its name is noted in `left_out`."""
        if time.perf_counter() < self.stop:
            return True
        self.left_out.append(name)
        return False


def write(name, data):
    """Write a benchmark's figures with the machine's description to results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **data}, indent=1) + "\n")


def read(name):
    """The figures of results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())
