"""Moving pictures of the MNIST experiments: how each embedding comes about, in the first epochs of training.

    python scripts/movies.py [siamese ...]    # images/mnist_NAME.gif for all five, or for those named

Trains as the notebook's cell of that name does, and looks at 2,000 test images after 1, 2, 3, 5, ... batches.
DATA_ROOT says where MNIST lies; without it the bundled images are taken.
"""

import os
import sys

from reproduce import DIGITS_AND_CLOTHES, ORIGINAL, ROOT, run_cells

from plots import embedding_movie
from trainer import extract_embeddings

IMAGES = ROOT / "images"
EPOCHS = 3
N_FRAMES = 36
N_POINTS = 2000


def steps_of(n_steps, n_frames=N_FRAMES):
    """Numbers of batches to look after: 0, then ever farther apart, as a network learns ever slower."""
    return sorted({0, *(round(n_steps ** (i / (n_frames - 2))) for i in range(n_frames - 1))})


def watch(names, frames):
    """A `fit` for the notebook that fills `frames`, number of batches -> embeddings and labels, as it trains."""
    fit, view = names["fit"], [next(iter(names["make_loader"](names["test"], N_POINTS)))]

    def watched_fit(train_loader, val_loader, model, loss_fn, *args, **options):
        wanted, n_done = steps_of(EPOCHS * len(train_loader)), 0

        def watched_loss(*outputs):
            nonlocal n_done
            if model.training:
                if n_done in wanted:
                    frames[n_done] = extract_embeddings(view, model)
                n_done += 1
            return loss_fn(*outputs)

        history = fit(train_loader, val_loader, model, watched_loss, *args, **options)
        frames[n_done] = extract_embeddings(view, model)
        return history

    return watched_fit


def make_movie(experiment):
    """Train, and write the GIF."""
    frames = {}
    names = run_cells("Experiments_MNIST.ipynb", experiment, lambda names: {"fit": watch(names, frames)})
    titles = [f"{DIGITS_AND_CLOTHES[experiment]}\nafter {n:,} batches" for n in frames]
    path = IMAGES / f"mnist_{experiment}.gif"
    embedding_movie(list(frames.values()), path, class_names=names["CLASS_NAMES"], titles=titles, fps=5)
    print(f"{path.name}: {len(frames)} frames, {path.stat().st_size / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    os.environ |= {"EPOCHS": str(EPOCHS), "RUN_DIR": str(ROOT / "runs" / "movies"), "TQDM_DISABLE": "1"}
    for experiment in sys.argv[1:] or ORIGINAL["mnist"]:
        make_movie(experiment)
