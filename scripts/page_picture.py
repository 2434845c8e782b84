"""Picture of a page that `embedding_page` of plots.py wrote, with the mouse over a point.

    python scripts/page_picture.py runs/mnist/embeddings.html images/mnist_page.png

Needs playwright, and the browser Chromium or Chrome on this machine.
"""

import contextlib
import shutil
import sys
from pathlib import Path

BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
# In a container there is no sandbox and no GPU; the others keep the browser from calling home.
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
WIDTH, HEIGHT = 900, 650
TOOLTIP = "div:has(> img)"

# Of all points: row, name, and where they are on the screen.
POINTS = """() => {
  const plot = Bokeh.documents[0].roots()[0]
  const {frame} = Bokeh.index[plot.id] ?? Bokeh.index.get_by_id(plot.id)
  const {left, top} = document.querySelector("body > *").getBoundingClientRect()
  return plot.renderers.flatMap(({data_source: {data}}) => Array.from(data.x, (x, i) => ({
    row: data.row[i], name: data.name[i], x: left + frame.x_scale.compute(x), y: top + frame.y_scale.compute(data.y[i]),
  })))
}"""


@contextlib.contextmanager
def browser():
    """A headless browser; FileNotFoundError if there is none, ImportError without playwright."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise FileNotFoundError(f"found no browser: none of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        try:
            yield launched
        finally:
            launched.close()


def show(page, path):
    """Open a file that `embedding_page` wrote, and wait until it is drawn."""
    page.goto(Path(path).resolve().as_uri())
    page.wait_for_function("() => window.Bokeh && Bokeh.documents.length > 0 && Bokeh.documents[0].is_idle")


def hover(page, point):
    """Move the mouse over a point of `POINTS`, and wait for what the page then draws."""
    page.mouse.move(point["x"], point["y"])
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def take_picture(launched, path, picture):
    """Write a picture of the page, the mouse over the point that is nearest to the middle."""
    page = launched.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    show(page, path)
    points = page.evaluate(POINTS)
    hover(page, min(points, key=lambda point: abs(point["x"] - WIDTH / 2) + abs(point["y"] - HEIGHT / 2)))
    page.locator(TOOLTIP).first.wait_for()
    page.screenshot(path=picture)
    page.close()


if __name__ == "__main__":
    with browser() as launched:
        take_picture(launched, *sys.argv[1:])
