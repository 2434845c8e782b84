"""README and the guides: their code runs, their links lead somewhere, their figures have a source."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
FIGURES = [ROOT / "docs" / "results.md", ROOT / "docs" / "benchmarks.md"]
SLOW = {"after": [pytest.mark.slow], "speed": [pytest.mark.slow]}  # which export and compile
GUIDES = [pytest.param(page, id=page.stem, marks=SLOW.get(page.stem, [])) for page in PAGES if page not in FIGURES]
each_page = pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)


def prose(text):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text):
    """`(file, anchor)` of the links and pictures of a page that do not lead to another site."""
    found = re.findall(r'(?:\]\(|src=")([^)"#\s]*)(?:#([^)"\s]*))?', prose(text))
    return [(file, anchor) for file, anchor in found if "://" not in file]


def anchors(text):
    """The headings of a page as a code host names them in links."""
    titles = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def tables(text):
    """`(rows of cells, the line that follows)` of each table of a page."""
    for match in re.finditer(r"((?:^\|.*\|\n)+)\s*(.*)", text, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in match[1].splitlines()]
        yield rows[2:], match[2]


def numbers(text):
    return set(re.findall(r"\d+(?:[.,]\d+)*", text))


def run_blocks(page):
    """Execute the Python of a page, block after block. What it has defined."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    namespace = {"__name__": page.stem}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
    return namespace


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are using `torch.load`")  # torch 2.4's own torch.export.load does
@pytest.mark.parametrize("page", GUIDES)
def test_code_of_a_guide_runs_as_printed(page, tmp_path, monkeypatch):
    if page.stem == "search":
        pytest.importorskip("faiss", reason="docs/search.md needs faiss: pip install faiss-cpu")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    values = run_blocks(page)
    if page.stem == "two_encoders":
        assert values["before"] < 0.2
        assert values["after"] > 0.6
    if page.stem == "after":
        assert values["honest"]["map"] < values["easy"]["map"] - 0.05
        assert values["by_accuracy"][0] < 0.3
        assert values["by_equal_errors"][0] > 0.85
        assert values["by_equal_errors"][0] + values["by_equal_errors"][1] == pytest.approx(1, abs=0.05)
    if page.stem == "search":
        recall = values["recall"]
        assert 0.5 < recall["ivfpq"] < recall["reranked"] <= 1
        assert min(recall["reranked"], recall["hnsw"]) > 0.95


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_guide_opens_with_the_code_that_answers_its_question(page):
    title, rest = page.read_text().split("\n", maxsplit=1)
    assert title.startswith("# ")
    assert rest.lstrip().startswith("```")


def test_readme_is_short_and_begins_with_the_two_commands_and_code():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    first = lines.index("```") + 1
    assert [line.split("  ")[0] for line in lines[first : first + 2]] == ["make experiments", "make test"]
    assert first < lines.index("```python") < 25


def test_readme_leads_to_every_guide():
    assert {file for file, _ in links(README.read_text())} >= {f"docs/{page.name}" for page in PAGES}


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *PAGES, *ROOT.glob("*.ipynb")], ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    for file, anchor in links(text):
        target = path.parent / file if file else path
        assert target.exists(), file
        assert not anchor or anchor in anchors(target.read_text()), f"{file}#{anchor}"


@each_page
def test_files_named_in_a_page_exist(page):
    names = re.findall(r"`((?:\w+/)*\w+\.(?:py|md|ipynb))`", prose(page.read_text()))
    assert [name for name in names if not (ROOT / name).exists()] == []


@each_page
def test_table_of_figures_names_the_command_that_makes_it(page):
    makefile, n_found = (ROOT / "Makefile").read_text(), 0
    for rows, line_below in tables(page.read_text()):
        cells = [cell for row in rows for cell in row[1:] if cell]
        if 3 * sum(bool(re.match(r"\W*\d", cell)) for cell in cells) > len(cells):
            command = re.match(r"\*`make ([\w-]+)`", line_below)
            assert command, f"no command below the table of {rows[0]}"
            assert f"\n{command[1]}:" in makefile
            n_found += 1
    assert n_found == page.read_text().count("<!-- end -->")  # all of them are found


def test_every_number_of_readme_is_in_the_docs_or_the_results():
    shown = re.sub(r"\]\([^)]*\)|<[^>]*>", "", prose(README.read_text()))
    sources = [*PAGES, ROOT / "results" / "summary.json", ROOT / "pyproject.toml"]
    assert numbers(shown) - numbers("\n".join(path.read_text() for path in sources)) == set()
    assert len(numbers(shown)) > 40


def test_what_these_tests_look_for_is_found():
    text = "# A b-c, d!\n[x](y.md#z) ![p](i.png) [w](https://a.b)\n```\n[no](no)\n```\n"
    text += "| a | b |\n|---|---|\n| 1 | 2 |\n\n*`make it`*\n"
    assert links(text) == [("y.md", "z"), ("i.png", "")]
    assert anchors(text) == {"a-b-c-d"}
    assert list(tables(text)) == [([["1", "2"]], "*`make it`*")]
    assert numbers("1,024 of 3.5 ± 2") == {"1,024", "3.5", "2"}
