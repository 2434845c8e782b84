"""Tables in Markdown, and their places in a text; for the scripts and benchmarks."""

import re


def markdown(header, rows):
    """A Markdown table, first column to the left, the others to the right."""
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def insert(text, name, table, source):
    """The text with what stands between `<!-- NAME -->` and `<!-- end -->` replaced by a table and its source."""
    block = f"<!-- {name} -->\n{table}\n\n*{source}*\n<!-- end -->"
    return re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL)
