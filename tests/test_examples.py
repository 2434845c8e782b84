"""The examples run as their docstrings say."""

import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_distributed.py"


def start(folder, *arguments, n_processes=None):
    """A process that runs the example; through a proxy that nobody serves, so that nothing is downloaded."""
    nowhere = "http://127.0.0.1:9"
    environment = os.environ | {"https_proxy": nowhere, "http_proxy": nowhere, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"] if n_processes else []
    command = [sys.executable, *launcher, str(EXAMPLE), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def run(folder, *arguments, n_processes=None, status=0):
    """What the example prints."""
    process = start(folder, *arguments, n_processes=n_processes)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's store needs another set-up there")
def test_two_processes_train_on_mnist_and_resume_when_interrupted(tmp_path):
    options = ["--epochs", 4, "--classes", 5, "--samples", 20, "--data-root", tmp_path]
    file = tmp_path / "runs" / "distributed.pt"
    first = start(tmp_path, *options, n_processes=2)
    while not file.exists() and first.poll() is None:
        time.sleep(0.02)
    first.terminate()  # torchrun ends its processes
    output, _ = first.communicate()
    assert file.exists(), output
    n_done = len(torch.load(file, weights_only=True)["history"])
    assert n_done < 4

    second = run(tmp_path, *options, n_processes=2)
    assert re.findall(r"Epoch (\d)/4, ", second) == [str(epoch) for epoch in range(n_done + 1, 5)]  # of one process
    history = torch.load(file, weights_only=True)["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert history[-1]["val_map@r"] > 0.5


@pytest.mark.slow
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
    assert "T_max: 1, here: 2" in run(tmp_path, *options[:-1], 2, "--backbone", "resnet18", status=1)


@pytest.fixture(scope="module")
def backbone():
    return runpy.run_path(str(EXAMPLE))["backbone"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "vit_b_32"])
def test_backbones_end_in_the_embedding(backbone, name):
    with torch.device("meta"):  # shapes alone
        model = backbone(name, "none", 7)
        assert model.eval()(torch.empty(1, 3, 224, 224)).shape == (1, 7)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("squeezenet1_0", r"does not end in a Linear layer: its output is \(2, 1000\)"),  # in a convolution
        ("googlenet", "does not turn a batch of images into one tensor"),  # three outputs while training
        ("r3d_18", "does not turn a batch of images into one tensor"),  # of videos
    ],
)
def test_a_backbone_of_another_kind_is_refused_in_words(backbone, name, words):
    with torch.device("meta"), pytest.raises(SystemExit, match=f"--backbone {name} {words}"):
        backbone(name, "none", 7)
