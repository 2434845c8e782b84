"""The wheel: one package, which does not get in the way of a `utils` or `datasets` of the user's."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [
    "checkpoints", "datasets", "demo_data", "evaluation", "losses", "metrics", "networks", "plots", "trainer", "utils",
]  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("package")]


def run(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of what it is made of."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in [*(f"{module}.py" for module in MODULES), "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).write_bytes((ROOT / name).read_bytes())
    run("-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", target)
    return next(target.glob("*.whl"))


def test_wheel_holds_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"siamese_triplet"}
    assert {name for name in names if name.endswith(".py")} == {f"siamese_triplet/{module}.py" for module in MODULES}
    assert any(name.endswith("LICENSE") for name in names)


def test_installed_package_is_imported_from_elsewhere(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "pip", "install", wheel, "--no-deps", "--quiet", "--target", site)
    code = f"""
import importlib, pathlib, sys
for name in {MODULES}:
    module = importlib.import_module("siamese_triplet." + name)
    assert pathlib.Path(module.__file__).parent == pathlib.Path({str(site)!r}, "siamese_triplet"), module.__file__
    assert importlib.util.find_spec(name) is None, name
from siamese_triplet.losses import OnlineTripletLoss
from siamese_triplet.utils import SemihardNegativeTripletSelector
import torch
loss_fn = OnlineTripletLoss(1.0, SemihardNegativeTripletSelector(1.0))
print(loss_fn(torch.randn(12, 3), torch.arange(12) % 3)[1])
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    assert run("-P" if sys.version_info >= (3, 11) else "-B", "-c", code, cwd=elsewhere, env=environment)
