"""The benchmarks' own tools, and their tables in README.md and docs/benchmarks.md."""

import contextlib
import time

import precision
import pytest
import readme
import scaling
import selection
import torch
from common import RESULTS, read, time_in_turn, try_alone
from tables import markdown

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


def test_exponent_of_a_power_is_its_exponent():
    assert scaling.exponent([512, 1024, 2048, 4096], [9, 1, 4, 16]) == pytest.approx(2)
    assert scaling.exponent([1024, 2048], [1, 4]) is None


def test_table_shows_what_did_not_finish():
    done, failed = {"status": "ok", "ms": 2.0, "mib": 30.0}, {"status": "out of memory", "ms": None, "mib": None}
    results = {"strategies": {"batch-all": {"2x2x2": {"ours": done, "PML": failed, "OTL": {**done, "ms": 9.0}}}}}
    table = selection.table(results)
    assert "out of memory" in table
    assert "**4.5**" in table


def test_markdown_table_has_a_row_for_each():
    assert markdown(["a", "b"], [[1, 2]]) == "| a | b |\n| :-- | --: |\n| 1 | 2 |"


@pytest.mark.parametrize("strategy", ["batch-hard", "all pairs", "hard negative pairs"])
def test_loops_choose_what_the_selectors_choose(strategy):
    pytest.importorskip("pytorch_metric_learning")
    embeddings, labels = selection.batch(5, 4, 3)
    losses = selection.contenders()[strategy]
    values = [losses[name](embeddings, labels) for name in ("ours", "loop")]
    values = [value[0] if isinstance(value, tuple) else value for value in values]
    torch.testing.assert_close(*values)


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
