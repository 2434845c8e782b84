"""Writes the tables of the last benchmark into README.md, between their markers.

python benchmarks/readme.py
"""

from pathlib import Path

import chunks
import epoch
import precision
import retrieval
import scaling
import selection
from common import read
from tables import insert

README = Path(__file__).parent.parent / "README.md"
COMMANDS = {"precision": "make precision"}  # which trains, for half an hour


def with_tables(text):
    """The text with what stands between `<!-- NAME -->` and `<!-- end -->` replaced by that benchmark's table."""
    for benchmark in (selection, scaling, epoch, chunks, precision, retrieval):
        name = benchmark.__name__
        results = read(name)
        machine = results["machine"]
        where = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
        source = f"`{COMMANDS.get(name, 'make benchmark')}`, {machine['date']}: {where}, torch {machine['torch']}."
        text = insert(text, name, benchmark.table(results), source)
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
