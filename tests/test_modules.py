"""Tests of the repository as a whole: modules that stand alone, docstrings, the README's code, the notebooks."""

import ast
import importlib
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
MODULES = [
    "checkpoints", "datasets", "demo_data", "evaluation", "losses", "metrics", "networks", "trainer", "utils",
]  # fmt: skip
NOTEBOOKS = sorted(ROOT.glob("Experiments_*.ipynb"))

# An absolute path of Unix or Windows, not a fraction, a URL or a closing tag.
ABSOLUTE_PATH = re.compile(r"""(?:^|[\s'"`(\[=:,])(?:/[\w.~-]+(?:/[\w.~-]+)+|[A-Za-z]:\\\w)""", re.MULTILINE)

each_module = pytest.mark.parametrize("name", MODULES)
each_module_and_plots = pytest.mark.parametrize("name", [*MODULES, "plots"])
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def imported_packages(name):
    """Top-level names that a module imports, at its head or within a function."""
    packages = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            packages.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            packages.add("." if node.level else node.module.split(".")[0])
    return packages


def code_cells(path):
    """Sources of a notebook's code cells, without magics."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return [re.sub(r"^[%!].*$", "", "".join(cell["source"]), flags=re.MULTILINE) for cell in cells]


def outputs(path):
    return [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]


# --- modules


def test_each_module_works_when_copied_alone(tmp_path):
    # One process for all: importing torch takes seconds.
    for name in MODULES:
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
    code = f"""
import importlib, sys
for name in {MODULES}:
    sys.path.insert(0, name)
    module = importlib.import_module(name)
    assert module.__file__.endswith(name + "/" + name + ".py"), module.__file__
    del sys.path[0], sys.modules[name]
    print(name)
"""
    run = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == MODULES


@each_module
def test_module_imports_no_other(name):
    assert imported_packages(name).isdisjoint({*MODULES, "plots", "."})


@pytest.mark.parametrize("name", ["utils", "losses"])
def test_selectors_and_losses_need_torch_and_numpy_only(name):
    assert imported_packages(name) - sys.stdlib_module_names <= {"torch", "numpy"}


COPIED = {
    "_Comparison": ["utils", "losses"],
    "_code_labels": ["utils", "losses"],
    "_gathered": ["trainer", "metrics", "checkpoints"],
    "_in_turn": ["trainer", "metrics"],
    "_rank": ["trainer", "checkpoints", "evaluation"],
}


@pytest.mark.parametrize("name", COPIED)
def test_helper_that_stands_twice_is_the_same(name):
    assert len({inspect.getsource(getattr(importlib.import_module(module), name)) for module in COPIED[name]}) == 1


@each_module_and_plots
def test_module_docstring_is_short(name):
    docstring = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()), clean=False)
    assert 1 <= len(docstring.strip().splitlines()) <= 8


def public_members(name):
    """`(qualified name, documented)` of what a module defines; an override may leave the words to its base class."""
    module = importlib.import_module(name)
    for member_name, member in vars(module).items():
        if member_name.startswith("_") or getattr(member, "__module__", None) != name:
            continue
        yield member_name, bool(member.__doc__)
        if inspect.isclass(member):
            own_classes = [c for c in member.__mro__ if c.__module__ == name]
            for method_name, method in vars(member).items():
                if not method_name.startswith("_") and callable(method):
                    versions = [vars(c)[method_name] for c in own_classes if method_name in vars(c)]
                    yield f"{member_name}.{method_name}", any(version.__doc__ for version in versions)


@each_module_and_plots
def test_everything_public_is_documented(name):
    members = dict(public_members(name))
    assert members
    assert [member for member, documented in members.items() if not documented] == []


@each_module_and_plots
def test_everything_public_has_type_hints(name):
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        for function in getattr(node, "body", []) if isinstance(node, (ast.Module, ast.ClassDef)) else []:
            is_public = isinstance(function, ast.FunctionDef) and not function.name.startswith("_")
            if not is_public or getattr(node, "name", "").startswith("_"):
                continue
            arguments = [*function.args.args, *function.args.kwonlyargs]
            without = [argument.arg for argument in arguments if argument.annotation is None and argument.arg != "self"]
            assert without == [], function.name
            assert function.returns is not None, function.name


ORIGINAL_ARGUMENTS = {
    "datasets.SiameseMNIST": "mnist_dataset",
    "datasets.TripletMNIST": "mnist_dataset",
    "datasets.BalancedBatchSampler": "labels n_classes n_samples",
    "losses.ContrastiveLoss": "margin",
    "losses.TripletLoss": "margin",
    "losses.OnlineContrastiveLoss": "margin pair_selector",
    "losses.OnlineTripletLoss": "margin triplet_selector",
    "networks.ClassificationNet": "embedding_net n_classes",
    "networks.SiameseNet": "embedding_net",
    "networks.TripletNet": "embedding_net",
    "trainer.fit": "train_loader val_loader model loss_fn optimizer scheduler n_epochs cuda log_interval metrics "
    "start_epoch",
    "trainer.train_epoch": "train_loader model loss_fn optimizer cuda log_interval metrics",
    "trainer.test_epoch": "val_loader model loss_fn cuda metrics",
    "utils.pdist": "vectors",
    "utils.AllPositivePairSelector": "balance",
    "utils.HardNegativePairSelector": "cpu",
    "utils.AllTripletSelector": "",
    "utils.FunctionNegativeTripletSelector": "margin negative_selection_fn cpu",
    "utils.HardestNegativeTripletSelector": "margin cpu",
    "utils.RandomNegativeTripletSelector": "margin cpu",
    "utils.SemihardNegativeTripletSelector": "margin cpu",
    "utils.semihard_negative": "loss_values margin",
}


@pytest.mark.parametrize("name", ORIGINAL_ARGUMENTS)
def test_arguments_of_the_original_keep_their_places_and_ours_go_by_name(name):
    module, member = name.split(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), member)).parameters.values()
    by_place = [parameter for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    assert " ".join(parameter.name for parameter in by_place) == ORIGINAL_ARGUMENTS[name]
    assert {parameter.kind for parameter in by_place} <= {inspect.Parameter.POSITIONAL_OR_KEYWORD}


# --- README


def test_readme_code_runs_as_printed(tmp_path, monkeypatch):
    if not (ROOT / "README.md").exists():
        pytest.skip("there is no README.md")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks

    def refuse(*args, **kwargs):
        raise URLError("no connection in tests")

    for name, number in itertools.product(["ants", "bees"], range(3)):  # the reader's own
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((60, 40), 64).convert("RGB").save(tmp_path / "photos" / name / f"{number}.png")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    namespace = {"__name__": "readme"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)


# --- notebooks


@each_notebook
def test_notebook_is_thin(path):
    for source in code_cells(path):
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.ClassDef), node.name
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 5, node.name


@each_notebook
def test_notebook_has_a_cell_of_constants(path):
    cells = [ast.parse(source).body for source in code_cells(path)]
    assigned = [
        [node.targets[0].id for node in cell]
        for cell in cells
        if all(isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) for node in cell)
    ]
    assert any("SEED" in names and all(name.isupper() for name in names) for names in assigned)


@each_notebook
def test_notebook_outputs_hold_no_error(path):
    assert [output for output in outputs(path) if output["output_type"] == "error"] == []


@each_notebook
def test_notebook_outputs_hold_no_absolute_path(path):
    for output in outputs(path):
        texts = [output.get("text", [])] + [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
        for text in texts:
            found = ABSOLUTE_PATH.search("".join(text))
            assert not found, found


@pytest.mark.parametrize("text", ["at /home/me/data", "'/tmp/x/y.py'", r"C:\Users\me", "/usr/lib", "file=/a/b"])
def test_absolute_path_is_recognised(text):
    assert ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize(
    "text", ["train / validation: 1 / 2", "runs/mnist/a.png", "https://a.org/b/c", "</div>", "1/2/3"]
)
def test_other_slashes_are_no_absolute_path(text):
    assert not ABSOLUTE_PATH.search(text)
