"""The examples run as their docstrings say."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_distributed.py"


def run(folder, *arguments, n_processes=None):
    """What the example prints; through a proxy that nobody serves, so that nothing is downloaded."""
    nowhere = "http://127.0.0.1:9"
    environment = os.environ | {"https_proxy": nowhere, "http_proxy": nowhere, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"] if n_processes else []
    command = [sys.executable, *launcher, str(EXAMPLE), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's store needs another set-up there")
def test_two_processes_train_on_mnist_and_resume(tmp_path):
    options = ["--classes", 5, "--samples", 20, "--data-root", tmp_path]
    first = run(tmp_path, "--epochs", 1, *options, n_processes=2)
    assert first.count("Epoch 1/1") == 1  # one process prints
    second = run(tmp_path, "--epochs", 2, *options, n_processes=2)
    assert "Epoch 1/2" not in second
    assert second.count("Epoch 2/2") == 1
    history = torch.load(tmp_path / "runs" / "distributed.pt", weights_only=True)["history"]
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[-1]["val_map@r"] > 0.5


def test_one_process_trains_on_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(256, size=(40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / part / name / f"{i}.png")
    options = ["--images", "photos", "--weights", "none", "--classes", 2, "--samples", 2, "--epochs", 1]
    assert "recall@1" in run(tmp_path, *options, "--backbone", "resnet18")
    state = torch.load(tmp_path / "runs" / "distributed.pt", weights_only=True)["model"]
    assert state["fc.weight"].shape == (64, 512)
