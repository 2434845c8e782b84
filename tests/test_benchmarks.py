"""The benchmarks' own tools, and their tables in README.md and docs/benchmarks.md."""

import contextlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import precision
import pytest
import readme
import scaling
import selection
import selection_gpu
import torch
from common import RESULTS, Budget, read, time_in_turn, try_alone
from tables import markdown

import losses
import utils

ROOT = Path(__file__).parent.parent

has_results = pytest.mark.skipif(not (RESULTS / "epoch.json").exists(), reason="no benchmark has been run")


@has_results
def test_pages_carry_the_tables_of_the_results():
    texts = [page.read_text() for page in readme.PAGES]
    assert [readme.with_tables(text) for text in texts] == texts
    for path in RESULTS.glob("*.json"):
        assert f"<!-- {path.stem} -->" in texts[1]


@has_results
def test_cells_of_the_short_table_are_those_of_the_whole():
    results = read("selection")
    short, whole = selection.short_table(results), selection.table(results)
    cells = [cell.removesuffix(" \\*") for line in short.splitlines()[2:] for cell in line.strip("| ").split(" | ")[1:]]
    assert len(cells) == 12
    assert all(f"| {cell} |" in whole for cell in cells)


def test_trial_alone_reports_how_it_ended():
    assert try_alone(lambda: None)[0] == "ok"
    assert try_alone(lambda: torch.ones(2**28), memory=2**29)[0] == "out of memory"
    assert try_alone(lambda: time.sleep(5), seconds=1) == ("over 1 s", None, None)
    assert try_alone(lambda: torch.ones(2) @ torch.ones(3))[0].startswith("fails: ")


def test_trial_alone_measures_the_peak_above_the_base():
    peak = try_alone(lambda: torch.ones(2**26))[2]  # 256 MiB
    assert 250 * 2**20 < peak < 350 * 2**20


def test_timing_in_turn_calls_every_function():
    calls = []
    medians = time_in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, budget=0)
    assert set(medians) == set(calls) == {"a", "b"}


def test_timing_in_turn_repeats_slow_functions_less(monkeypatch):
    calls = []
    functions = {"slow": lambda: calls.append("slow")}
    monkeypatch.setattr("time.perf_counter", iter(range(1000)).__next__)  # a second passes between any two readings
    assert time_in_turn(functions, budget=0, wait=lambda: calls.append("wait")) == {"slow": 2}
    assert calls == ["wait", "slow", "wait"] * 3
    monkeypatch.setattr("time.perf_counter", iter(range(0, 10000, 10)).__next__)
    assert time_in_turn(functions) == {"slow": 20}
    assert calls[9:] == ["slow"]


def test_budget_names_what_it_leaves_out():
    assert Budget(60).allows("first")
    budget = Budget(0)
    assert not budget.allows("second")
    assert budget.left_out == ["second"]


def test_exponent_of_a_power_is_its_exponent():
    assert scaling.exponent([1024, 2048, 4096, 8192], [9, 1, 4, 16]) == pytest.approx(2)
    assert scaling.exponent([2048, 4096], [1, 4]) is None


def test_growth_stops_at_the_first_size_that_does_not_finish(monkeypatch):
    outcomes = iter([("ok", 1.0, 2**20)] * 3 + [("ok", 9.0, 2**21), ("out of memory", None, 2**22)])
    monkeypatch.setattr("scaling.try_alone", lambda *args, **kwargs: next(outcomes))  # one run of a slow one
    entries = scaling.measure(None)
    assert [entry["status"] for entry in entries] == ["ok", "ok"] + ["out of memory"] * (len(scaling.SIZES) - 2)
    assert [entry["mib"] for entry in entries[:2]] == [1, 2]


def test_table_shows_what_did_not_finish():
    done, failed = {"status": "ok", "ms": 2.0, "mib": 30.0}, {"status": "out of memory", "ms": None, "mib": None}
    results = {"strategies": {"batch-all": {"2x2x2": {"ours": done, "PML": failed, "OTL": {**done, "ms": 9.0}}}}}
    table = selection.table(results)
    assert "out of memory" in table
    assert "**4.5**" in table


def test_markdown_table_has_a_row_for_each():
    assert markdown(["a", "b"], [[1, 2]]) == "| a | b |\n| :-- | --: |\n| 1 | 2 |"


def value_of(loss_fn, embeddings, labels):
    value = loss_fn(embeddings, labels)
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize("strategy", ["hardest", "batch-hard", "all pairs", "hard negative pairs"])
def test_loops_choose_what_the_selectors_choose(strategy):
    both = selection.ours(losses, utils)[strategy], selection.naive()[strategy][1]
    torch.testing.assert_close(*(value_of(loss_fn, *selection.batch(5, 4, 3)) for loss_fn in both))


@pytest.mark.slow
def test_peers_without_a_mark_compute_what_ours_computes():
    for name in selection.PEERS:
        pytest.importorskip(name)
    unmarked = []
    for strategy, by_name in selection.contenders().items():
        for name in by_name:
            if name in ("PML", "OTL", "ST"):
                both = by_name["ours"], by_name[name]
                torch.testing.assert_close(*(value_of(loss_fn, *selection.batch(5, 4, 3)) for loss_fn in both))
                unmarked.append((strategy, name))
    assert unmarked == [(strategy, name) for strategy in ("batch-all", "batch-hard") for name in ("PML", "OTL", "ST")]


def test_who_did_not_finish_is_not_tried_on_larger_batches():
    small, large, other = (2, 16, 8), (4, 16, 8), (4, 8, 8)

    def reason(status, milliseconds=None, shape=large):
        return selection.not_to_try("a", shape, {small: {"a": {"status": status, "ms": milliseconds}}}, limit=4)

    assert reason("out of memory") == "out of memory"
    assert reason("over 60 s") == "over 60 s"
    assert reason("out of memory", shape=other) is None  # which has fewer samples a class
    assert reason("fails: no reason") is None
    assert reason("ok", 999) is None  # 4 times as long: 3,996 ms
    assert reason("ok", 1001) == "not tried"
    assert selection.not_to_try("b", large, {small: {"a": {"status": "out of memory", "ms": None}}}, limit=4) is None


def test_another_version_is_timed_beside_ours(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["selection.py", "--against", str(ROOT), "--shapes", "3x3x2"])
    monkeypatch.setattr("selection.write", None)
    monkeypatch.setattr("selection.try_alone", lambda function, *limits: ("ok", function() or 1e-3, 0))
    monkeypatch.setattr("selection.time_in_turn", lambda steps, budget: {"ours": 2.0, "other": 3.0})
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    selection.main()
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| other / ours | 3x3x2 |"
    assert [row.endswith("| 1.50 |") for row in rows[2:]] == [True] * 9
    assert sys.modules["other_losses"].BatchAllTripletLoss is not losses.BatchAllTripletLoss


def test_version_that_does_not_finish_is_named_in_place_of_a_ratio():
    entries = {"ours": {"status": "ok", "ms": 1.0}, "other": {"status": "out of memory", "ms": None}}
    assert selection.ratio_of_versions(entries) == "other: out of memory"


def test_gpu_benchmark_says_that_there_is_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["selection_gpu.py"])
    with pytest.raises(SystemExit) as stop:
        selection_gpu.main()
    assert isinstance(stop.value.code, str)  # printed, with exit status 1
    assert "needs a GPU" in stop.value.code
    assert "\n" not in stop.value.code


def test_gpu_benchmark_runs_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["selection_gpu.py", "--device", "cpu", "--shapes", "3x3x2", "4x3x2"])
    monkeypatch.setattr("selection_gpu.COMPILED", [(3, 3, 2)])
    monkeypatch.setattr("selection.LARGEST", (4, 3, 2))
    monkeypatch.setattr("selection_gpu.PEERS", {"of_nobody": None})
    monkeypatch.setattr("selection_gpu.compiled", lambda loss_fn, mode: loss_fn)
    monkeypatch.setattr("selection_gpu.time_in_turn", lambda steps, budget, wait: dict.fromkeys(steps, 2e-3))
    monkeypatch.setattr("selection_gpu.write", None)
    selection_gpu.main()
    output = capsys.readouterr()
    rows = output.out.splitlines()
    assert rows[0] == "| strategy | by | 3x3x2 | 4x3x2 | kernels | reads |"
    assert rows[2:6] == [
        "| batch-all | ours | 2 | 2 |  |  |",
        "|  | ours, compiled | 2 |  |  |  |",
        "| hardest | ours | 2 |  |  |  |",
        "|  | ours, compiled | 2 |  |  |  |",
    ]
    assert len(rows) == 2 + 2 * 7
    assert "missing: of_nobody" in output.err


def test_gpu_benchmark_leaves_out_what_does_not_fit(monkeypatch):
    monkeypatch.setattr("selection_gpu.PEERS", {})
    results = selection_gpu.measure([(10, 25, 2)], torch.device("cpu"), Budget(0))
    assert results["left_out"][:2] == ["batch-all 10x25x2", "hardest 10x25x2"]
    assert len(results["left_out"]) == 7
    assert set(map(str, results["strategies"].values())) == {"{}"}


def test_mode_of_compiling_that_fails_gives_way_to_the_next(monkeypatch):
    def compiled(loss_fn, mode):
        return loss_fn if mode == "default" else lambda embeddings, labels: 1 / 0

    monkeypatch.setattr("selection_gpu.compiled", compiled)
    entry = selection_gpu.measure_compiled(losses.BatchAllTripletLoss(1.0), (3, 3, 2), torch.device("cpu"))
    assert (entry["status"], entry["mode"]) == ("ok", "default")


class ProfilerOfThreeKernels(contextlib.nullcontext):
    def export_chrome_trace(self, path):
        Path(path).write_text(json.dumps({"traceEvents": [{"cat": "kernel", "name": "add"}] * 3}))

    def __enter__(self):
        return self


def test_gpu_entry_has_time_memory_and_counts(monkeypatch):
    calls = []
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda name=name: calls.append(name))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: 2**20)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr("selection_gpu.profile", lambda activities: ProfilerOfThreeKernels())
    monkeypatch.setattr("selection_gpu.time_in_turn", lambda steps, budget, wait: dict.fromkeys(steps, 2e-3))
    steps = {"ours": lambda: calls.append("ours"), "PML": lambda: torch.ones(2) @ torch.ones(3)}
    entries = selection_gpu.measure_together(steps, (3, 3, 2), {}, SimpleNamespace(type="cuda"))
    assert entries["ours"] == {"status": "ok", "ms": 2, "mib": 2, "kernels": 3, "reads": 0}
    assert entries["PML"]["status"].startswith("fails: ")
    assert calls[:6] == ["ours"] * 3 + ["synchronize", "reset_peak_memory_stats", "ours"]


def test_kernels_and_reads_are_counted_in_a_trace():
    names = [("kernel", "add"), ("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)"), ("cpu_op", "aten::add")]
    names += [("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)"), ("kernel", "sort"), ("gpu_memset", "Memset (Device)")]
    events = [{"ph": "M", "name": "process_name"}, *({"cat": cat, "name": name} for cat, name in names)]
    assert selection_gpu.count(events) == {"kernels": 2, "reads": 1}
    assert selection_gpu.count(events[:1]) == {"kernels": None, "reads": None}


def test_table_names_the_gpu_only_where_it_was_used():
    machine = {"gpu": "a GPU", "processor": "a CPU", "cores": 2, "date": "today", "torch": "2"}
    assert readme.source_of("selection", {"machine": machine}) == "`make benchmark`, today: a CPU, 2 cores, torch 2."
    on_gpu = readme.source_of("selection_gpu", {"machine": machine, "device": "cuda"})
    assert on_gpu == "`make benchmark-gpu`, today: a GPU, torch 2."


@pytest.mark.slow
def test_precision_is_of_the_notebook_s_fit_in_half_precision(monkeypatch, tmp_path):
    for name, value in {"EPOCHS": "1", "RUN_DIR": str(tmp_path), "DATA_ROOT": str(tmp_path / "none")}.items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr("torch.autocast", lambda *args: seen.append(args) or contextlib.nullcontext())
    with pytest.raises(ValueError, match="expected all 60,000 images"):
        precision.knn5("online_contrastive")
    monkeypatch.setitem(precision.N_TRAIN, "mnist", 4000)
    numbers = precision.knn5("online_contrastive")
    assert set(seen) == {("cpu", torch.bfloat16)}
    assert numbers["float32"] > 99  # of all data, from results/
    assert 50 < numbers["bfloat16"] < 99  # of this run: one epoch of the bundled images
