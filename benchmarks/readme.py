"""Write the tables of the last benchmarks into README.md and docs/benchmarks.md, between their markers.

python benchmarks/readme.py
"""

from pathlib import Path

import chunks
import epoch
import large_sets
import precision
import retrieval
import scaling
import selection
import selection_gpu
import shares
from common import RESULTS, read
from tables import insert

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"]
COMMANDS = {
    "precision": "make precision",  # which trains, for half an hour
    "selection_gpu": "make benchmark-gpu",
}


def with_tables(text):
    """The text with what stands between `<!-- NAME -->` and `<!-- end -->` replaced by that benchmark's table."""
    for benchmark in (selection, selection_gpu, scaling, shares, epoch, chunks, precision, retrieval, large_sets):
        name = benchmark.__name__
        if not (RESULTS / f"{name}.json").exists():  # as that of a GPU, where none has been at hand
            continue
        results = read(name)
        source = source_of(name, results)
        text = insert(text, name, benchmark.table(results), source)
        if name == "selection":
            text = insert(text, "selection short", benchmark.short_table(results), source)
    return text


def source_of(name, results):
    """The line under a table: its command, date and machine."""
    machine = results["machine"]
    on_gpu = results.get("device") == "cuda"
    where = machine["gpu"] if on_gpu else f"{machine['processor']}, {machine['cores']} cores"
    return f"`{COMMANDS.get(name, 'make benchmark')}`, {machine['date']}: {where}, torch {machine['torch']}."


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
