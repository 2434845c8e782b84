"""The moving pictures of README and docs/results.md, made from the notebook's cells."""

import movies
import pytest
from PIL import Image


def test_steps_are_ever_farther_apart():
    steps = movies.steps_of(720)
    assert (steps[0], steps[1], steps[-1]) == (0, 1, 720)
    assert steps == sorted(set(steps))
    assert len(steps) <= movies.N_FRAMES
    assert steps[-1] - steps[-2] > 50


@pytest.mark.slow
def test_movie_is_made_from_the_notebook_s_cell(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(movies, "IMAGES", tmp_path)
    monkeypatch.setattr(movies, "EPOCHS", 1)
    for name, value in {
        "EPOCHS": "1",
        "RUN_DIR": str(tmp_path),
        "DATA_ROOT": str(tmp_path / "none"),
        "MPLBACKEND": "Agg",
    }.items():
        monkeypatch.setenv(name, value)
    movies.make_movie("online_contrastive")
    with Image.open(tmp_path / "mnist_online_contrastive.gif") as movie:
        n_shown = movie.n_frames
    n_made = len(movies.steps_of(16))  # 4,000 images in batches of 250
    assert n_made <= n_shown <= n_made + 10  # the last one stays
    assert f"{n_made} frames" in capsys.readouterr().out
