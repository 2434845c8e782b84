"""Selection, loss, forward and backward on a GPU: time, memory, and kernels and reads of the device in a step.

    python benchmarks/selection_gpu.py            # print the table, write results/selection_gpu.json
    python benchmarks/selection_gpu.py --print    # print the table of the last run
    python benchmarks/selection_gpu.py --device cpu --shapes 10x25x2    # a trial without a GPU; writes nothing

The losses and batches of selection.py, without the loops. The contenders of a strategy and shape run once, for their
peak memory and a count of kernels and of copies to the host, and are then timed in turn. Ours compiled comes last, at
the shapes of COMPILED. What does not fit into four minutes is left out, and named.
"""

import argparse
import functools
import itertools
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import selection
import torch
from common import Budget, read, reason_of, time_in_turn, write
from selection import PEERS, batch, name_of, not_to_try, ours, report, shape_of, shapes_of, step
from torch.profiler import ProfilerActivity, profile

import losses
import utils

SHAPES = [(10, 25, 2), *((C, 16, 128) for C in (64, 128, 512, 1024, 4096))]
COMPILED = SHAPES[:2]
BUDGET_S = 200  # the last entry may begin just before, and imports come on top
LIMIT_S = 5  # who would take longer at a shape, by the growth of B^2, is not tried
UNKNOWN = {"ms": None, "mib": None, "kernels": None, "reads": None}


def contenders():
    """Strategy -> contender -> loss of (embeddings, labels), and the names of peers that are not installed."""
    strategies = {strategy: {"ours": loss} for strategy, loss in ours(losses, utils).items()}
    missing = [name for name in PEERS if find_spec(name) is None]
    for name, add in PEERS.items():
        if name not in missing:
            add(strategies)
    return strategies, missing


def compiled(loss_fn, mode):
    """The loss compiled; the outputs of its CUDA graphs are free for the next call."""
    torch.compiler.reset()
    fast = torch.compile(loss_fn, mode=mode, dynamic=False)

    def call(embeddings, labels):
        torch.compiler.cudagraph_mark_step_begin()
        return fast(embeddings, labels)

    return call


def steps_of(by_name, shape, device):
    """Contender -> forward and backward on the batch of a shape, on the device."""
    embeddings, labels = batch(*shape)
    embeddings, labels = embeddings.detach().to(device).requires_grad_(), labels.to(device)
    return {name: functools.partial(step, loss_fn, embeddings, labels) for name, loss_fn in by_name.items()}


def count(events):
    """Kernels, and copies from the device to the host, among the events of a profiler's trace; None if it saw none."""
    n_kernels = sum(event.get("cat") == "kernel" for event in events)
    n_reads = sum(event.get("cat") == "gpu_memcpy" and "DtoH" in event["name"] for event in events)
    return {"kernels": n_kernels or None, "reads": n_reads if n_kernels else None}


def profiled(function):
    """The counts of one call."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return count(json.loads(trace.read_text())["traceEvents"])


def entry_of(function, device):
    """{"status", "ms", "mib", "kernels", "reads"} of a contender; the milliseconds are left to be measured."""
    try:
        for _ in range(3):  # a CUDA graph is recorded in the second call
            function()
        if device.type != "cuda":
            return {"status": "ok", **UNKNOWN}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - base
        return {"status": "ok", "ms": None, "mib": peak / 2**20, **profiled(function)}
    except Exception as error:  # what a peer or the compiler raises is its result
        return {"status": reason_of(error), **UNKNOWN}


def measure_together(steps, shape, earlier, device):
    """Contender -> entry, for those of one strategy and shape."""
    entries = {}
    for name, function in steps.items():
        reason = not_to_try(name, shape, earlier, LIMIT_S)
        entries[name] = {"status": reason, **UNKNOWN} if reason else entry_of(function, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finished = {name: steps[name] for name, entry in entries.items() if entry["status"] == "ok"}
    for name, seconds in time_in_turn(finished, budget=1, wait=wait).items():
        entries[name]["ms"] = 1e3 * seconds
    return entries


def measure(shapes, device, budget):
    """Strategy -> shape -> contender -> entry, small shapes first, and what is not there: {"missing", "left_out"}."""
    strategies, missing = contenders()
    results = {strategy: {} for strategy in strategies}
    if device.type == "cuda":
        profiled(lambda: torch.ones(1, device=device))  # the first profile of a process may miss kernels
    for shape, strategy in itertools.product(shapes, strategies):
        if shape in shapes_of(strategy, shapes) and budget.allows(f"{strategy} {name_of(shape)}"):
            steps = steps_of(strategies[strategy], shape, device)
            results[strategy][shape] = measure_together(steps, shape, results[strategy], device)
            report(strategy, shape, results[strategy][shape])
    for shape, strategy in itertools.product([shape for shape in shapes if shape in COMPILED], strategies):
        if shape in results[strategy] and budget.allows(f"{strategy} {name_of(shape)} compiled"):
            entry = measure_compiled(strategies[strategy]["ours"], shape, device)
            results[strategy][shape]["ours, compiled"] = entry
            report(strategy, shape, {"ours, compiled": entry})
    named = {strategy: {name_of(shape): x for shape, x in by_shape.items()} for strategy, by_shape in results.items()}
    return {"strategies": named, "missing": missing, "left_out": budget.left_out}


def measure_compiled(loss_fn, shape, device):
    """The entry of a loss compiled, in the first mode that works; its memory, kept by the graphs, is not measured."""
    for mode in ("reduce-overhead", "default"):
        steps = steps_of({"compiled": compiled(loss_fn, mode)}, shape, device)
        entry = measure_together(steps, shape, {}, device)["compiled"] | {"mib": None, "mode": mode}
        if entry["status"] == "ok":
            break
    return entry


def table(results):
    """As that of selection.py, with kernels and reads in a step."""
    return selection.table(results, counts=("kernels", "reads"))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the table of the last run")
    parser.add_argument("--device", type=torch.device, default="cuda", help="cpu for a trial, which writes nothing")
    parser.add_argument("--shapes", nargs="+", type=shape_of, help="classes x samples x dimension; writes nothing")
    return parser.parse_args()


def main():
    args = arguments()
    if not args.print:
        if args.device.type == "cuda" and not torch.cuda.is_available():
            sys.exit("this benchmark needs a GPU, and torch finds none; --device cpu tries it without one")
        on_gpu = args.device.type == "cuda"
        results = measure(args.shapes or (SHAPES if on_gpu else SHAPES[:1]), args.device, Budget(BUDGET_S))
        for kind in ("missing", "left_out"):
            if results[kind]:
                print(f"{kind.replace('_', ' ')}: {', '.join(results[kind])}", file=sys.stderr)
        if args.shapes or not on_gpu:
            print(table(results))
            return
        write("selection_gpu", {"device": "cuda", "budget_s": BUDGET_S, **results})
    print(table(read("selection_gpu")))


if __name__ == "__main__":
    main()
