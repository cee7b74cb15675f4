import io
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image
from shared import slow

from tinytl_hf.reports import plots
from tinytl_hf.reports.fonts import families_for

METHODS = ("FT-Last", "TinyTL-B", "TinyTL-L", "TinyTL-L+B", "FT-Norm+Last", "FT-Full", "FT-Layerwise")


def pixels(draw, *arguments):
    """The picture that a function draws, as RGB values."""
    return np.asarray(Image.open(io.BytesIO(draw(*arguments))).convert("RGB"))


def share_of(colour, picture):
    """Share of the picture's pixels that have a colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (picture == wanted).all(-1).mean()


def curve(epochs, level):
    figures = {"accuracy": level, "loss": 1 - level}
    within = {key: [value] * 20 for key, value in figures.items()}
    return [{"epoch": i + 1, "train": figures, "eval": figures, "train_curve": within} for i in range(epochs)]


def test_short_runs_show_the_training_set_within_epochs():
    (line,) = curve(1, 0.5)
    flat = pixels(plots.draw_curves, {"FT-Last": [line]})
    line = {**line, "train_curve": {"accuracy": [0.1, 0.9] * 10, "loss": [0.1, 0.9] * 10}}
    steep = pixels(plots.draw_curves, {"FT-Last": [line]})
    assert share_of(plots.COLOURS[0], steep) > 3 * share_of(plots.COLOURS[0], flat)


def test_an_epoch_of_one_batch_shows_the_training_set():
    (line,) = curve(1, 0.5)
    pictures = [
        pixels(plots.draw_curves, {"FT-Last": [{**line, "train_curve": {"accuracy": [level], "loss": [level]}}]})
        for level in (0.5, 0.9)
    ]
    alone, apart = (share_of(plots.COLOURS[0], picture) for picture in pictures)
    assert apart > alone


@pytest.mark.parametrize("epochs", [1, 12])
def test_every_run_has_a_colour_of_its_own_in_the_curves(epochs):
    picture = pixels(plots.draw_curves, {method: curve(epochs, 0.1 * i) for i, method in enumerate(METHODS)})
    assert all(share_of(colour, picture) > 2e-4 for colour in plots.COLOURS)


def test_names_with_dollars_are_drawn_as_they_are():
    runs = {r"$\frac{$": curve(2, 0.5)}
    assert share_of(plots.COLOURS[0], pixels(plots.draw_curves, runs)) > 2e-4


@pytest.mark.parametrize("classes", [2, slow(10), slow(100)])
def test_a_confusion_matrix_is_dark_where_the_counts_are(classes):
    right = pixels(plots.draw_confusion, np.eye(classes, dtype=int) * 7, [f"class {i}" for i in range(classes)])
    one_column = np.zeros((classes, classes), dtype=int)
    one_column[:, 0] = 7
    wrong = pixels(plots.draw_confusion, one_column, [f"class {i}" for i in range(classes)])
    assert right.shape == wrong.shape
    dark_right, dark_wrong = ((picture[..., 0] < 30) & (picture[..., 2] > 90) for picture in (right, wrong))
    assert dark_right.sum() == pytest.approx(dark_wrong.sum(), rel=0.1)
    assert not (dark_right == dark_wrong).all()


def test_a_class_without_images_is_drawn_as_an_empty_row():
    assert pixels(plots.draw_confusion, [[3, 1], [0, 0]], ["a", "b"]).size


@pytest.mark.slow
def test_memory_bars_are_as_long_as_their_parts():
    peak = dict.fromkeys(plots.MEMORY_PARTS, 10_000_000)
    rows = [{"method": method, "engine": engine, "peak": peak} for method in METHODS for engine in ("stock", "lean")]
    picture = pixels(plots.draw_memory_bars, rows)
    shares = [share_of(colour, picture) for colour in plots.MEMORY_COLOURS]
    assert len(shares) == len(peak) and max(shares) < 1.1 * min(shares) and min(shares) > 0.03
    rows = [{**row, "peak": {**peak, "kept_activations": 0}} for row in rows]
    kept = plots.MEMORY_COLOURS[list(plots.MEMORY_PARTS).index("kept_activations")]
    assert share_of(kept, pixels(plots.draw_memory_bars, rows)) == 0  # nor is it in the legend


def test_accuracy_and_memory_of_every_method_are_marked():
    points = [plots.AccuracyMemory(method, 0.7, 0.01, 10.0 * (i + 1)) for i, method in enumerate(METHODS)]
    picture = pixels(plots.draw_accuracy_memory, points)
    assert all(share_of(colour, picture) > 1e-4 for colour in plots.COLOURS)


def test_memory_in_stock_pytorch_is_a_second_marker_at_the_same_accuracy():
    lean, both = (
        pixels(plots.draw_accuracy_memory, [plots.AccuracyMemory("TinyTL-L+B", 0.7, None, 10.0, stock)])
        for stock in (None, 90.0)
    )
    wanted = [int(plots.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    columns = [np.flatnonzero((picture == wanted).all(-1)[: len(picture) // 2].any(0)) for picture in (lean, both)]
    assert np.ptp(columns[0]) < 20 and np.ptp(columns[1]) > 400


@pytest.mark.slow
def test_no_label_is_cut_off_at_an_edge():
    names = [f"a class of a long name {i}" for i in range(102)]
    for classes in (2, 3, 10, 102):
        picture = pixels(plots.draw_confusion, np.ones((classes, classes), dtype=int), names[:classes])
        edges = (picture[:8], picture[-8:], picture[:, :8], picture[:, -8:])
        assert all((edge == 255).all() for edge in edges)


@pytest.fixture
def font(tmp_path):
    """A font that has a filled square for a cat, and nothing else."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("\u732b"): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Cats of tests", "styleName": "Regular"})
    builder.setupPost()
    builder.save(tmp_path / "cat.ttf")
    return str(tmp_path / "cat.ttf")


def solid(picture):
    """Where 7 x 7 pixels are dark: within a filled square, and not on the lines of an empty box."""
    dark = (picture < 60).all(-1)
    return np.lib.stride_tricks.sliding_window_view(dark, (7, 7)).all((2, 3))


def test_a_script_that_matplotlibs_font_lacks_is_shown_where_another_font_has_it(font, monkeypatch, caplog):
    drawn = []
    for fonts in ([], [font]):
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda found=fonts: found)
        monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
        with warnings.catch_warnings():
            warnings.simplefilter("error" if fonts else "ignore")  # as matplotlib warns of each glyph that it lacks
            drawn.append(pixels(plots.draw_confusion, [[3, 1], [0, 4]], ["\u732b" * 6, "dog"]))
    assert caplog.text.count("pictures show boxes in place of \u732b") == 1
    boxes, squares = (solid(picture[:, :140]).sum() for picture in drawn)
    assert squares > 20 * max(1, boxes)


@pytest.mark.parametrize(("named", "kept"), [("nonsense", ""), ("svg", "svg")])
def test_pictures_are_drawn_whatever_backend_the_environment_names(named, kept, tmp_path):
    code = """if True:
        import os, sys
        from tinytl_hf.reports.plots import draw_confusion
        open(sys.argv[1], "wb").write(draw_confusion([[1, 0], [0, 1]], ["a", "b"]))
        import matplotlib
        backend = dict.__getitem__(matplotlib.rcParams, "backend")
        print(os.environ["MPLBACKEND"], backend if isinstance(backend, str) else "")
    """
    environment = {**os.environ, "MPLBACKEND": named}
    words = [sys.executable, "-c", code, tmp_path / "a.png"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [named, *kept.split()] and (tmp_path / "a.png").is_file()


def test_what_no_font_has_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    for _ in range(2):
        families_for(["\u306d\U0001f600\u200d", "dog"])
    assert caplog.text.count("pictures show boxes in place of") == 1 and "fonts-noto-cjk" in caplog.text
    assert families_for(["d\u00f6g", "\u00bfqu\u00e9?"]) == ["DejaVu Sans"]
