"""Tests of `embedding_page` of plots.py: the page in a real browser, without a screen, and the file."""

import base64
import io
import os
import re
import sys

import numpy as np
import page_picture
import pytest
import torch
from PIL import Image

from plots import embedding_page

NASTY = ["<b>cat</b> & \"dog\" 'owl'", "<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>"]
FORMULA = " $$x_{$$"


@pytest.fixture(scope="module")
def browser():
    try:
        with page_picture.browser() as launched:
            yield launched
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(f"needs playwright and Chromium or Chrome: {error}")


@pytest.fixture
def opened(browser):
    """A function that opens a file; at the end, that nothing else was asked for and nothing went wrong."""
    requests, errors = [], []
    context = browser.new_context(viewport={"width": 900, "height": 650})

    def answer(route):
        requests.append(route.request.url)
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            route.abort()

    def open_file(path):
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
        page.route("**/*", answer)
        page_picture.show(page, path)
        return page

    yield open_file
    pages = [page.url for page in context.pages]
    context.close()
    assert errors == []
    assert [url for url in requests if not url.startswith("data:")] == pages


def grid(n):
    """Points in a square, far from each other."""
    return np.stack(np.divmod(np.arange(n), int(np.ceil(n**0.5))), axis=1).astype(np.float32)


def images_of(n, *shape):
    return np.random.default_rng(0).normal(size=(n, *shape)).astype(np.float32)


def decoded(uri):
    kind, _, text = uri.partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int)


def naive_levels(images, image):
    """What an image of a set looks like, 0..255: the least of all values black; grey ones the other way round."""
    low, high = min(float(x.min()) for x in images), max(float(x.max()) for x in images)
    levels = [[[255 * (float(v) - low) / (high - low) for v in row] for row in channel] for channel in image]
    return np.moveaxis(levels, 0, 2) if len(image) == 3 else 255 - np.array(levels[0])


def tip(page):
    """Text and source of the image in the tooltip; None if there is none."""
    shown = [part for part in page.locator(page_picture.TOOLTIP).all() if part.is_visible()]
    assert len(shown) <= 1
    return (shown[0].inner_text().strip(), shown[0].locator("img").get_attribute("src")) if shown else None


def test_hover_shows_the_image_and_the_label_of_the_point(tmp_path, opened):
    images, labels = images_of(9, 1, 5, 7), np.arange(9) % 3 + 4
    embedding_page(grid(9), labels, images, tmp_path / "page.html", class_names={4: "four", 6: "six"})
    page = opened(tmp_path / "page.html")
    assert tip(page) is None
    points = page.evaluate(page_picture.POINTS)
    assert sorted(point["row"] for point in points) == list(range(9))
    for point in points:
        page_picture.hover(page, point)
        text, source = tip(page)
        assert text == f"{['four', '5', 'six'][point['row'] % 3]} row {point['row']}"
        np.testing.assert_allclose(decoded(source), naive_levels(images, images[point["row"]]), atol=0.51)
    shown = page.locator("img").evaluate("async (image) => (await image.decode(), "
        "[image.naturalWidth, image.naturalHeight, image.width, getComputedStyle(image).imageRendering])")  # fmt: skip
    assert shown == [7, 5, 98, "pixelated"]
    page_picture.hover(page, {"x": 1, "y": 1})
    assert tip(page) is None


def test_click_in_the_legend_hides_a_class_and_a_second_one_shows_it(tmp_path, opened):
    embedding_page(grid(4), ["a", "b", "a", "b"], images_of(4, 6, 6), tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    visible = "() => Bokeh.documents[0].roots()[0].renderers.map((renderer) => renderer.visible)"
    points = page.evaluate(page_picture.POINTS)
    for states in ([True, True], [True, False], [True, True]):
        assert page.evaluate(visible) == states
        for point in points:
            page_picture.hover(page, point)
            expected = f"{point['name']} row {point['row']}" if states[point["name"] == "b"] else None
            assert (tip(page) or [None])[0] == expected
        page.locator(".bk-item", has_text="b").click()


def test_markup_in_names_and_title_appears_as_text(tmp_path, opened):
    title = " ".join(NASTY) + FORMULA
    embedding_page(grid(3), [0, 1, 2], images_of(3, 6, 6), tmp_path / "page.html", class_names=NASTY, title=title)
    page = opened(tmp_path / "page.html")
    assert page.title() == title
    for name in NASTY:
        shown = name if len(name) <= 24 else name[:23] + "…"
        assert page.get_by_text(shown, exact=True).count() == 1  # in the legend
    for point in page.evaluate(page_picture.POINTS):
        page_picture.hover(page, point)
        assert tip(page)[0] == f"{NASTY[point['row']]} row {point['row']}"


def test_wheel_zooms_and_dragging_moves(tmp_path, opened):
    embedding_page(grid(9), np.zeros(9), images_of(9, 6, 6), tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    x_range = "() => { const {start, end} = Bokeh.documents[0].roots()[0].x_range; return [start, end] }"
    low, high = page.evaluate(x_range)
    page_picture.hover(page, page.evaluate(page_picture.POINTS)[4])  # in the middle
    assert tip(page)[0] == "0 row 4"
    page.mouse.wheel(0, -200)
    page.wait_for_function(f"() => ({x_range})()[1] < {high}")
    zoomed = page.evaluate(x_range)
    assert low < zoomed[0] < zoomed[1] < high
    page.mouse.move(400, 420)
    page.mouse.down()
    page.mouse.move(300, 420, steps=4)
    page.mouse.up()
    page.wait_for_function(f"() => ({x_range})()[0] > {zoomed[0]}")
    point = min(page.evaluate(page_picture.POINTS), key=lambda p: abs(p["x"] - 400) + abs(p["y"] - 400))
    page_picture.hover(page, point)
    assert tip(page)[0] == f"0 row {point['row']}"


def test_page_of_many_classes_has_no_legend(tmp_path, opened):
    n = 964
    embedding_page(grid(n), np.arange(n), images_of(n, 6, 6), tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    assert page.locator(".bk-item").count() == 0
    page_picture.hover(page, page.evaluate(page_picture.POINTS)[500])
    assert tip(page)[0] == "500 row 500"


@pytest.mark.slow
def test_page_of_ten_thousand_points_answers(tmp_path, opened):
    embeddings = np.random.default_rng(0).normal(size=(10_000, 16))
    embedding_page(embeddings, np.arange(10_000) % 10, images_of(10_000, 1, 28, 28) > 0, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 10 * 2**20
    page = opened(tmp_path / "page.html")
    points = page.evaluate(page_picture.POINTS)
    assert len(points) == 10_000
    corner = max(points, key=lambda point: point["x"] + point["y"])
    page_picture.hover(page, corner)
    assert tip(page)[0] == f"{corner['row'] % 10} row {corner['row']}"
    title = page.evaluate("() => Bokeh.documents[0].roots()[0].title.text.text")
    assert re.fullmatch(r"10,000 embeddings of 10 classes\nfirst two of 16 principal components, \d+% .*", title)


@pytest.mark.slow
def test_picture_shows_the_tooltip(tmp_path, browser):
    embedding_page(grid(9), np.zeros(9), np.zeros((9, 3, 8, 8)), tmp_path / "page.html")
    page_picture.take_picture(browser, tmp_path / "page.html", tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (900, 650)
        pixels = np.asarray(picture.convert("L"))
    assert (pixels < 60).sum() > 90**2  # the black image, through which the plot shines a little


# --- the file


def levels_in(path):
    """The images of a file, in the order of classes and rows."""
    text = path.read_text(encoding="utf-8")
    return [decoded(uri) for uri in re.findall(r'"(data:image/(?:png|jpeg);base64,[^"]+)"', text)]


@pytest.mark.parametrize(
    "kind",
    [
        torch.tensor,
        list,
        lambda images: [torch.tensor(image, requires_grad=True) for image in images],
        lambda images: torch.tensor(images).bfloat16(),
        lambda images: images[:, 0],
        lambda images: images > 0,
        lambda images: np.rint(100 + 40 * images).clip(0, 255).astype(np.uint8),
    ],
    ids=["tensor", "list", "leaves", "bfloat16", "without channel", "bool", "uint8"],
)
def test_grey_images_of_any_kind_are_dark_on_light_over_the_range_of_all(tmp_path, kind):
    images = kind(images_of(6, 1, 4, 5))
    embedding_page(grid(6), np.zeros(6), images, tmp_path / "page.html")
    as_numbers = [np.asarray(torch.as_tensor(image).detach().double()).reshape(1, 4, 5) for image in images]
    for shown, image in zip(levels_in(tmp_path / "page.html"), as_numbers, strict=True):
        np.testing.assert_allclose(shown, naive_levels(as_numbers, image), atol=0.51)


def test_images_in_colour_are_shown_and_large_ones_made_smaller(tmp_path):
    ramp = np.linspace(-1, 1, 200, dtype=np.float32)
    image = np.stack(np.broadcast_arrays(ramp[:100, None], ramp[None], -ramp[None]))  # (3, 100, 200)
    embedding_page(grid(2), np.zeros(2), np.stack((image, image[:, ::-1])), tmp_path / "page.html")
    for shown, large in zip(levels_in(tmp_path / "page.html"), (image, image[:, ::-1]), strict=True):
        assert shown.shape == (32, 64, 3)
        expected = np.asarray(naive_levels([image], large))[1::3, 1::3][:32, :64]
        assert np.abs(shown - expected).mean() < 8  # of 255


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (images_of(5, 6, 6), "expected an image for each of at least one embedding, got 5 for 6"),
        (images_of(6, 2, 6, 6), r"expected images of shape .*got \(2, 6, 6\)"),
        (images_of(6, 6, 6, 3), r"expected images of shape .*got \(6, 6, 3\)"),
        (images_of(6, 6), r"expected images of shape .*got \(6,\)"),
        (np.full((6, 6, 6), np.nan), "expected finite images"),
    ],
)
def test_images_that_do_not_fit_are_an_error_and_leave_nothing(tmp_path, images, message):
    with pytest.raises(ValueError, match=message):
        embedding_page(grid(6), np.zeros(6), images, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("before")
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")

    def write(title):
        embedding_page(grid(1), [0], images_of(1, 6, 6), str(tmp_path / "link.html"), title=title)

    with pytest.raises(UnicodeEncodeError):
        write("\ud800")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *paths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write("interrupted")
    assert (tmp_path / "page.html").read_text() == "before"
    write("naïve")
    assert "<title>naïve</title>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.html", "page.html"]
    assert (tmp_path / "link.html").is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_page_keeps_the_mode_of_the_one_before(tmp_path, mode):
    path = tmp_path / "page.html"
    path.write_text("before")
    path.chmod(mode)
    embedding_page(grid(1), [0], images_of(1, 6, 6), path)
    assert path.stat().st_mode & 0o777 == mode


def test_page_takes_the_place_of_nothing_but_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "nowhere/page.html"):
        with pytest.raises(OSError, match="expected path to be a file in a folder that exists, got"):
            embedding_page(grid(1), [0], images_of(1, 6, 6), tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_page_without_bokeh_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)
    with pytest.raises(ImportError, match="pip install bokeh"):
        embedding_page(grid(1), [0], images_of(1, 6, 6), tmp_path / "page.html")
