"""The experiments' results: run from the notebooks' cells, kept in results/, shown in README.md and docs/results.md."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import reproduce
from test_demo_data import write_characters, write_idx, write_runs

SETTINGS = {"seed": 0, "epochs": reproduce.EPOCHS, "n_train": 60_000}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Folders of their own for results and runs."""
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def made_up_fashion(tmp_path_factory):
    """A folder with a FashionMNIST of ten made-up classes: 500 training images, 260 test images."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    templates = rng.integers(200, size=(10, 28, 28))
    for part, n in (("train", 500), ("t10k", 260)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = templates[labels] + rng.integers(56, size=(n, 28, 28))
        write_idx(raw / f"{part}-images-idx3-ubyte", images.astype(np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    return root


def keep(path, metrics, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": SETTINGS | settings, "metrics": metrics, "history": []}))


def test_summary_and_pages_agree_with_the_results():
    assert json.loads((reproduce.RESULTS / "summary.json").read_text()) == reproduce.summary()
    texts = [page.read_text() for page in reproduce.PAGES]
    assert [reproduce.with_tables(text, reproduce.summary()) for text in texts] == texts
    for name in reproduce.tables_of(reproduce.summary()):
        assert sum(f"<!-- {name} -->" in text for text in texts) == 1


def test_cells_of_the_short_table_are_those_of_the_whole():
    tables = reproduce.tables_of(reproduce.summary())
    whole = [line.split(" | ") for line in tables["results mnist"].splitlines()]
    columns = [0, *(whole[0].index(name) for name in ("5-nn", "MAP@R", "EER"))]
    for short, row in zip(tables["results short"].splitlines(), whole, strict=True):
        assert short.strip(" |").split(" | ") == [row[i].strip(" |") for i in columns if row[i].strip(" |")]


def test_every_result_is_of_all_data_and_epochs():
    paths = list(reproduce.RESULTS.glob("*/*.json"))
    assert paths
    for path in paths:
        experiment, seed = path.stem.rsplit("-", 1)
        assert experiment in reproduce.EXPERIMENTS[path.parent.name]
        assert reproduce.is_wanted(path, path.parent.name, int(seed)), path


@pytest.mark.parametrize("dataset", reproduce.NOTEBOOKS)
def test_notebook_has_a_cell_for_each_experiment(dataset):
    cells = json.loads((reproduce.ROOT / reproduce.NOTEBOOKS[dataset]).read_text())["cells"]
    tags = [tag for cell in cells for tag in cell["metadata"].get("tags", [])]
    assert all(tags.count(experiment) == 1 for experiment in reproduce.EXPERIMENTS[dataset])
    assert "setup" in tags


def test_mean_and_deviation_over_seeds(elsewhere):
    for seed, loss in enumerate([1.0, 2.0, 4.5]):
        keep(reproduce.path_of("mnist", "siamese", seed), {"val_loss": loss})
    keep(reproduce.path_of("mnist", "triplet", 1), {"val_loss": 3.0})
    table = reproduce.summary()
    assert table["mnist"]["siamese"]["val_loss"] == {"mean": 2.5, "std": pytest.approx(1.8027756), "n": 3}
    assert table["mnist"]["triplet"]["val_loss"] == {"mean": 3.0, "std": None, "n": 1}
    text = reproduce.with_tables("a\n<!-- results mnist -->\nold\n<!-- end -->\nb", table)
    assert "| 2.5000 ± 1.8028 |" in text
    assert "| 3.0000 |" in text
    assert "old" not in text
    assert (text[:2], text[-2:]) == ("a\n", "\nb")


def test_numbers_of_the_notebooks_own_run_are_taken(elsewhere):
    keep(elsewhere / "runs" / "mnist" / "softmax.json", {"val_loss": 0.5})
    reproduce.run("mnist", "softmax", 0)
    assert json.loads(reproduce.path_of("mnist", "softmax", 0).read_text())["metrics"] == {"val_loss": 0.5}
    assert list((elsewhere / "results" / "mnist").iterdir()) == [reproduce.path_of("mnist", "softmax", 0)]


@pytest.mark.parametrize("other", [{"seed": 1}, {"epochs": 1}, {"n_train": 4000}])
def test_a_run_of_other_settings_is_not_taken(tmp_path, other):
    keep(tmp_path / "softmax.json", {}, **other)
    assert not reproduce.is_wanted(tmp_path / "softmax.json", "mnist", 0)
    assert not reproduce.is_wanted(tmp_path / "missing.json", "mnist", 0)


def test_a_run_that_was_stopped_while_it_wrote_is_not_taken(tmp_path):
    keep(tmp_path / "softmax.json", {})
    whole = (tmp_path / "softmax.json").read_text()
    (tmp_path / "softmax.json").write_text(whole[:-20])
    assert not reproduce.is_wanted(tmp_path / "softmax.json", "mnist", 0)


@pytest.mark.slow
def test_experiment_is_run_from_the_notebooks_cells(tmp_path, monkeypatch, made_up_fashion):
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(reproduce, "RUNS", reproduce.ROOT / "runs" / "test")
    monkeypatch.setattr(reproduce, "EPOCHS", 1)
    monkeypatch.setitem(reproduce.N_TRAIN, "fashion_mnist", 500)
    monkeypatch.setenv("DATA_ROOT", str(made_up_fashion))
    line = reproduce.run("fashion_mnist", "online_contrastive", 1)
    result = json.loads(reproduce.path_of("fashion_mnist", "online_contrastive", 1).read_text())
    assert str(result["metrics"]) in line
    assert set(result["metrics"]) == {"val_loss", "knn5", "recall@1", "map@r", "auc", "eer"}
    assert (result["settings"]["seed"], result["settings"]["n_train"]) == (1, 500)
    assert len(result["history"]) == 1

    monkeypatch.setitem(reproduce.N_TRAIN, "fashion_mnist", 60_000)
    assert "did not have all 60,000" in reproduce.run("fashion_mnist", "online_contrastive", 2)
    assert not reproduce.path_of("fashion_mnist", "online_contrastive", 2).exists()


def run_notebook(name, monkeypatch, **variables):
    """Execute the code of a notebook in this process; what it prints is what pytest captures."""
    for key, value in ({"MPLBACKEND": "Agg"} | variables).items():
        monkeypatch.setenv(key, str(value))
    namespace = {}
    for cell in json.loads((reproduce.ROOT / name).read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)


@pytest.mark.slow
def test_fashion_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, made_up_fashion):
    run_notebook("Experiments_FashionMNIST.ipynb", monkeypatch, DATA_ROOT=made_up_fashion, RUN_DIR=tmp_path, EPOCHS=1)
    made = {path.name for path in tmp_path.iterdir()}
    assert {f"{experiment}.json" for experiment in reproduce.EXPERIMENTS["fashion_mnist"]} <= made
    assert {"fashion_neighbors.png", "fashion_tsne.png", "fashion_roc.png"} <= made


@pytest.mark.slow
def test_omniglot_notebook_runs_on_made_up_characters(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "omniglot"
    rng = np.random.default_rng(0)
    entries = []
    for part, n_characters in (("background", 1180), ("evaluation", 80)):
        strokes = rng.random((n_characters, 1, 7, 7)) < 0.3
        images = np.kron(strokes, np.ones((4, 4), bool)) ^ (rng.random((n_characters, 20, 28, 28)) < 0.1)
        write_characters(folder, ~images, part)
        ends = range(0, n_characters + 1, 40) if part == "evaluation" else [0, 32, 64, n_characters]
        entries += [
            {"alphabet": f"{part} {first}", "set": part, "first": first, "last": end - 1}
            for first, end in itertools.pairwise(ends)
        ]
    (folder / "alphabets.json").write_text(json.dumps(entries))
    write_runs(folder / "all_runs.zip", n=20)
    run_dir = tmp_path / "runs"
    run_notebook("Experiments_Omniglot.ipynb", monkeypatch, DATA_ROOT=tmp_path, RUN_DIR=run_dir, EPOCHS=0, ALPHABETS=2)
    made = {path.name for path in run_dir.iterdir()}
    assert {f"{experiment}.json" for experiment in reproduce.EXPERIMENTS["omniglot"]} <= made
    assert {"omniglot_run.png", "omniglot_answers.png", "omniglot_unseen.png", "omniglot_collapsed.png"} <= made
    assert "40 questions" in capsys.readouterr().out


@pytest.mark.slow
def test_omniglot_notebook_takes_a_minute_on_the_first_alphabets(tmp_path, monkeypatch):
    root = os.environ.get("DATA_ROOT", "data")
    if not (Path(root) / "omniglot" / "all_runs.zip").exists():
        pytest.skip("needs Omniglot, with all_runs.zip, in the folder omniglot of DATA_ROOT")
    run_notebook("Experiments_Omniglot.ipynb", monkeypatch, DATA_ROOT=root, RUN_DIR=tmp_path, EPOCHS=1, ALPHABETS=5)
    results = {path.stem: json.loads(path.read_text())["metrics"] for path in tmp_path.glob("*.json")}
    assert results["official_runs"]["error"] < 60  # raw pixels: 81
    assert results["split_1200_423"]["5way_1shot"] > 75
