"""Execute a notebook from top to bottom, showing what it prints as it goes.

    python scripts/run_notebook.py Experiments_MNIST.ipynb runs/mnist

The executed notebook is written to the given folder, whole or, where a cell fails, up to that cell. The notebook finds
the folder in the environment as RUN_DIR, for its own pictures and results.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


class EchoingClient(NotebookClient):
    """Prints what cells print, at once."""

    def output(self, outs, msg, display_id, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        return super().output(outs, msg, display_id, cell_index)


def main(notebook_path, run_dir):
    """Execute the notebook; exit status 1 where a cell fails."""
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    os.environ["RUN_DIR"] = str(run_dir)
    os.environ["TQDM_DISABLE"] = "1"  # lines instead of bars, which would stay in the notebook as noise
    notebook = nbformat.read(notebook_path, as_version=4)
    client = EchoingClient(notebook, timeout=None, kernel_name="python3", extra_arguments=["--log-level=ERROR"])
    try:
        client.execute()
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        nbformat.write(notebook, run_dir / Path(notebook_path).name)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
