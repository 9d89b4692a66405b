"""Pictures: every pixel where it belongs, labels and points where they are wanted, files whole or not there."""

import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

from tinydiff import Tensor, backend, plot
from tinydiff.models import tutorial


def tiles(path, rows, columns, side, scale):
    """The images of a sheet without labels, one value per pixel: (rows, columns, side, side)."""
    sheet = imread(path)[..., 0]
    assert sheet.shape == ((rows * (side + 2) + 2) * scale, (columns * (side + 2) + 2) * scale)
    blocks = sheet.reshape(sheet.shape[0] // scale, scale, -1, scale)
    assert (blocks == blocks[:, :1, :, :1]).all()  # no smoothing
    sheet = sheet[::scale, ::scale]
    sheet = sheet[2:, 2:].reshape(rows, side + 2, columns, side + 2).swapaxes(1, 2)
    assert (sheet[:, :, side:] == 1).all() and (sheet[..., side:] == 1).all()  # white gaps
    return sheet[:, :, :side, :side]


def test_every_pixel_is_where_it_belongs(each_backend, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 1)).astype(np.float32) / 255
    plot.image_grid(Tensor(backend.to_device(images)), tmp_path / "a.png", rows=2)
    got = tiles(tmp_path / "a.png", 2, 3, 5, 3).reshape(6, 5, 5)
    np.testing.assert_allclose(got, images[..., 0], atol=1 / 255)


def test_a_short_last_row_is_white_and_what_lies_beyond_is_cut(numpy_backend, tmp_path):
    images = np.array([0.0, 0.5, 1.0, -7.0, np.inf], np.float32).reshape(5, 1, 1) * np.ones((1, 4, 4), np.float32)
    plot.image_grid(images, tmp_path / "a.png", rows=2, scale=1)
    got = tiles(tmp_path / "a.png", 2, 3, 4, 1)[:, :, 0, 0].ravel()
    np.testing.assert_allclose(got, [0, 0.5, 1, 0, 1, 1], atol=1 / 255)
    plot.image_grid(images[:3], tmp_path / "b.png", rows=1, scale=1, low=-1.0, high=1.0)
    np.testing.assert_allclose(tiles(tmp_path / "b.png", 1, 3, 4, 1)[0, :, 0, 0], [0.5, 0.75, 1], atol=1 / 255)


def test_what_is_not_a_number_is_red(numpy_backend, tmp_path):
    images = np.ones((1, 2, 2), np.float32)
    images[0, 0, 1] = np.nan
    plot.image_grid(images, tmp_path / "a.png", scale=1, low=-1.0)
    sheet = imread(tmp_path / "a.png")[2:4, 2:4, :3]
    assert sheet[0, 1, 0] > 0.7 and sheet[0, 1, 1:].max() < 0.4
    assert (sheet.reshape(4, 3)[[0, 2, 3]] == 1).all()


def test_colour_and_the_default_number_of_rows(numpy_backend, tmp_path):
    images = np.zeros((12, 2, 2, 3))
    images[..., 2] = 1
    plot.image_grid(images, tmp_path / "a.png", scale=2)
    sheet = imread(tmp_path / "a.png")
    assert sheet.shape[:2] == ((3 * 4 + 2) * 2, (4 * 4 + 2) * 2)
    assert sheet[5, 5, :3].tolist() == [0, 0, 1]


def test_labels_make_room_at_the_left_and_titles_above(numpy_backend, tmp_path):
    images = np.zeros((4, 28, 28))
    plot.image_grid(images, tmp_path / "bare.png", rows=2)
    plot.image_grid(images, tmp_path / "labelled.png", rows=2, row_labels=["zero", "twenty"], title="two rows")
    bare, labelled = imread(tmp_path / "bare.png"), imread(tmp_path / "labelled.png")
    assert labelled.shape[0] > bare.shape[0] and labelled.shape[1] > bare.shape[1]
    margin = labelled[-bare.shape[0] :, : labelled.shape[1] - bare.shape[1], 0]
    upper, lower = np.array_split(margin, 2)
    assert upper.min() < 0.5 and lower.min() < 0.5  # a text in each
    assert (labelled[: labelled.shape[0] - bare.shape[0], :, 0] < 0.5).any()
    assert (labelled[:, 0, 0] == 1).all()  # and none is cut off


def boxes(figure, texts):
    """Where these texts are, in pixels: (left, bottom, right, top) of each."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    return [Text.get_window_extent(text, renderer).extents for text in texts]


def all_apart(figure, texts):
    """Is each of these texts inside the picture, and do no two of them touch?"""
    whole, found = figure.bbox, boxes(figure, texts)
    inside = all(a >= 0 and b >= 0 and c <= whole.width and d <= whole.height for a, b, c, d in found)
    over = [(p, q) for i, p in enumerate(found) for q in found[:i]
            if p[0] < q[2] and q[0] < p[2] and p[1] < q[3] and q[1] < p[3]]  # fmt: skip
    return inside and not over


STYLES = ["sans", "sans leaning right", "sans bold", "sans bold leaning right", "serif"]


@pytest.mark.parametrize(("side", "scale", "turned"), [(28, 3, 0), (8, 3, 90), (64, 4, 0)])
def test_columns_have_names_that_do_not_touch(numpy_backend, tmp_path, side, scale, turned):
    images = np.random.default_rng(0).random((10, side, side))
    rows = ["heun\n35 evaluations", "rk45\n122 evaluations"]
    options = {"rows": 2, "scale": scale, "row_labels": rows, "column_labels": STYLES, "title": "five styles of two"}
    figure = plot.image_grid(images, tmp_path / "a.png", **options)
    (axes,) = figure.axes
    assert all_apart(figure, [*axes.texts, *figure.texts])
    names = [text for text in axes.texts if text.get_text().replace("\n", " ") in STYLES]
    assert [text.get_text().replace("\n", " ") for text in names] == STYLES
    assert {text.get_rotation() for text in names} == {turned}
    size = (side + 2) * scale  # of an image and its gap, in pixels
    middles = [(box[0] + box[2]) / 2 for box in boxes(figure, names)]
    np.testing.assert_allclose(np.diff(middles), size, atol=3)
    sheet = imread(tmp_path / "a.png")[..., 0]
    drawn = sheet[-(2 * (side + 2) + 2) * scale :, -(5 * (side + 2) + 2) * scale :][::scale, ::scale]
    np.testing.assert_allclose(drawn[2 : side + 2, 2 : side + 2], images[0], atol=1 / 255)  # no pixel is smeared


def test_a_title_may_be_wider_than_the_picture(numpy_backend, tmp_path):
    figure = plot.image_grid(np.zeros((4, 4)), title="a title that is longer than the picture is wide")
    assert all_apart(figure, figure.texts) and figure.bbox.width > 200
    figure = plot.matrix(
        np.zeros((1, 1)), labels=["a"], low=-1, high=1, title="cosines between the vectors of the words"
    )
    assert all_apart(figure, [figure.axes[0].title])


def test_row_labels_shrink_where_rows_are_low(numpy_backend):
    figure = plot.image_grid(np.zeros((6, 4, 4)), rows=6, scale=2, row_labels=["one\ntwo"] * 6)
    assert all_apart(figure, figure.axes[0].texts)


def test_without_a_path_nothing_is_written_and_the_figure_shows_itself(numpy_backend, tmp_path, monkeypatch):
    """IPython asks an object for _repr_png_."""
    monkeypatch.chdir(tmp_path)
    draw = {
        "grid": lambda *path: plot.image_grid(np.zeros((4, 4)), *path),
        "curve": lambda *path: plot.loss_curve(RECORDS, *path),
        "matrix": lambda *path: plot.matrix(np.zeros((1, 1)), *path, labels=["a"], low=-1, high=1),
    }
    for name, figure in draw.items():
        shown = figure()._repr_png_()
        assert list(tmp_path.iterdir()) == [] and shown[:8] == b"\x89PNG\r\n\x1a\n"
        assert figure(tmp_path / "a.png")._repr_png_() == shown, name
        np.testing.assert_array_equal(imread(io.BytesIO(shown)), imread(tmp_path / "a.png"))
        (tmp_path / "a.png").unlink()


def as_seen(colour, kind):
    """A colour as the colour-blind see it: Vienot, Brettel and Mollon 1999, in linear RGB."""
    rgb = np.array([((c + 0.055) / 1.055) ** 2.4 if c > 0.04 else c / 12.92 for c in to_rgb(colour)])
    lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    l, m, s = lms @ rgb  # noqa: E741
    l, m = (2.02344 * m - 2.52581 * s, m) if kind == "protan" else (l, 0.494207 * l + 1.24827 * s)  # noqa: E741
    return np.clip(np.linalg.solve(lms, [l, m, s]), 0, 1) ** (1 / 2.2)


@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_colour_blind_readers_can_tell_the_colours_apart(kind):
    def nearest(colours):
        seen = [as_seen(colour, kind) for colour in colours]
        return min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i])

    assert nearest(plot.COLOURS) > 0.2 > nearest([f"C{i}" for i in range(5)])  # matplotlib's own are too near


def test_a_matrix_is_blue_below_and_red_above(numpy_backend, tmp_path):
    labels = ["zero", "one"]
    for values, colours in (([[1, -1], [-1, 1]], "rbbr"), ([[-1, 1], [-1, 1]], "brbr")):
        plot.matrix(np.array(values), tmp_path / "a.png", labels=labels, low=-1, high=1)
        pixels = imread(tmp_path / "a.png")[..., :3]
        red, blue = (pixels[..., i] - pixels[..., 2 - i] > 0.2 for i in (0, 2))
        box = np.argwhere(red | blue)
        (top, left), (bottom, right) = box.min(0), box.max(0)
        middle = (top + bottom) // 2, (left + right) // 2
        quarters = [(rows, columns) for rows in (slice(top, middle[0]), slice(middle[0], bottom))
                    for columns in (slice(left, middle[1]), slice(middle[1], right))]  # fmt: skip
        assert "".join("r" if red[q].sum() > blue[q].sum() else "b" for q in quarters) == colours


@pytest.mark.parametrize(
    "values, options, message",
    [
        (np.zeros(3), {}, r"a matrix of numbers, not float64 of shape \(3,\)"),
        (np.zeros((2, 3)), {}, r"2 and 2 labels do not fit the shape \(2, 3\)"),
        (np.zeros((2, 2)), {"low": 1}, "low must be less than high, not 1.0 and 1.0"),
        (np.zeros((2, 2)), {"high": float("nan")}, "high must be a number .* not nan"),
    ],
)
def test_a_matrix_that_cannot_be_drawn_is_an_error(numpy_backend, tmp_path, values, options, message):
    with pytest.raises(ValueError, match=message):
        plot.matrix(values, tmp_path / "a.png", **{"labels": ["a", "b"], "low": -1, "high": 1, **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "images, options, message",
    [
        (np.zeros(3), {}, r"must be \(N, H, W\).* not \(3,\)"),
        (np.zeros((2, 3, 3, 2)), {}, r"not \(2, 3, 3, 2\)"),
        (np.zeros((0, 4, 4)), {}, r"not \(0, 4, 4\)"),
        (np.zeros((3, 4, 4)), {"rows": 5}, "3 images do not fill 5 rows"),
        (np.zeros((3, 4, 4)), {"rows": 0}, "rows must be an integer of 1 or more, not 0"),
        (np.zeros((3, 4, 4)), {"rows": 1.5}, "rows must be an integer of 1 or more, not 1.5"),
        (np.zeros((3, 4, 4)), {"scale": 1.5}, "scale must be an integer of 1 or more, not 1.5"),
        (np.zeros((3, 4, 4)), {"scale": 0}, "scale must be an integer of 1 or more, not 0"),
        (np.zeros((3, 4, 4)), {"low": float("nan")}, "low must be a number .* not nan"),
        (np.zeros((3, 4, 4)), {"high": float("inf")}, "high must be a number .* not inf"),
        (np.zeros((3, 4, 4), int), {}, "of int64 it is not known which values .* give low and high, not None and None"),
        (np.zeros((3, 4, 4), "uint16"), {"high": 9}, "of uint16 it is not known .* not None and 9"),
        (np.zeros((3, 0, 4)), {}, r"not \(3, 0, 4\)"),
        (np.zeros((3, 4, 4)), {"low": 1}, "low must be less than high, not 1.0 and 1.0"),
        (np.zeros((3, 4, 4)), {"rows": 3, "row_labels": ["a"]}, "1 row labels for 3 rows"),
        (np.zeros((3, 4, 4)), {"rows": 2, "column_labels": ["a"]}, "1 column labels for 2 columns"),
    ],
)
def test_bad_images_are_quoted(numpy_backend, tmp_path, images, options, message):
    with pytest.raises(ValueError, match=message):
        plot.image_grid(images, tmp_path / "a.png", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_array_of_real_numbers_is_quoted(numpy_backend, tmp_path):
    for images in (np.zeros((3, 4, 4), complex), np.full((3, 4, 4), "a")):
        with pytest.raises(TypeError, match="image_grid: images must be of real numbers, not "):
            plot.image_grid(images, tmp_path / "a.png")


@pytest.mark.parametrize(
    ("dtype", "values", "options", "greys"),
    [
        ("uint8", [0, 51, 255], {}, [0, 0.2, 1]),
        ("uint8", [0, 51, 102], {"high": np.float64(102)}, [0, 0.5, 1]),
        ("uint8", [0, 1, 1], {"low": 0, "high": 1}, [0, 1, 1]),
        ("bool", [False, True, True], {}, [0, 1, 1]),
        ("int64", [-4, 0, 4], {"low": -4, "high": np.int64(4)}, [0, 0.5, 1]),
        ("uint16", [0, 1, 65535], {"low": 0, "high": 65535}, [0, 0, 1]),
        ("float16", [0, 0.5, 1], {}, [0, 0.5, 1]),
    ],
)
def test_bytes_and_other_integers_have_their_own_black_and_white(
    numpy_backend, tmp_path, dtype, values, options, greys
):
    images = np.array(values, dtype).reshape(3, 1, 1) * np.ones((1, 4, 4), dtype)
    plot.image_grid(images, tmp_path / "a.png", rows=np.int64(1), scale=np.int64(1), **options)
    np.testing.assert_allclose(tiles(tmp_path / "a.png", 1, 3, 4, 1)[0, :, 0, 0], greys, atol=1 / 255)


@pytest.mark.parametrize("shape", [(5, 5), (5, 5, 1), (5, 5, 3), (3, 3), (1, 1), (3, 3, 3)])
def test_one_image_is_one_image_and_no_strips(numpy_backend, tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    plot.image_grid(image, tmp_path / "a.png", scale=1)
    sheet = imread(tmp_path / "a.png")[..., :3]
    assert sheet.shape == (shape[0] + 4, shape[1] + 4, 3)
    whole = np.broadcast_to(image.reshape(*shape[:2], -1), (*shape[:2], 3))
    np.testing.assert_allclose(sheet[2:-2, 2:-2], whole / 255, atol=1 / 255)


RECORDS = [{"epoch": e, "step": 59 * (e + 1), "loss": 1000 / (1 + e) ** 1.2} for e in range(30)]


def drawn(monkeypatch, tmp_path, *arguments, **options):
    """The axes that loss_curve draws on."""
    figures = []
    real = plot.new_figure
    monkeypatch.setattr(plot, "new_figure", lambda *a: figures.append(real(*a)) or figures[-1])
    plot.loss_curve(*arguments, tmp_path / "loss.png", **options)
    assert imread(tmp_path / "loss.png").shape[2] == 4
    return figures[0].axes[0]


def test_loss_curve_draws_ours_theirs_and_the_scale(monkeypatch, tmp_path):
    axes = drawn(monkeypatch, tmp_path, RECORDS, reference=tutorial.PUBLISHED_LOSS["add"], levels=tutorial.SIMPLE_LOSS)
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_allclose(lines["training"], [(r["epoch"], r["loss"]) for r in RECORDS])
    assert lines["published"].tolist()[-1] == [74, 24.75]
    assert len(axes.lines) == 2 + len(tutorial.SIMPLE_LOSS)
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "epoch"


@pytest.mark.parametrize("last", [0.98, 1.0, 1.062, 30.0])
def test_names_of_lines_do_not_touch_each_other_nor_a_line(tmp_path, last):
    records = [{"epoch": e, "loss": last + 30 / (1 + e), "validation": 1.01 * last + 30 / (1 + e)} for e in range(300)]
    levels = {"RealNVP": 1.06, "FFJORD": 0.99, "each pixel by itself, on test images": 1.07, "zero": 31.0, "x": 30.9}
    figure = plot.loss_curve(records, tmp_path / "a.png", levels=levels, reference={0: 1.061, 299: 0.991})
    (axes,) = figure.axes
    assert len(axes.texts) == 8 and all_apart(figure, [*axes.texts, axes.title])
    found = np.array(boxes(figure, axes.texts))
    assert (found[:, 0] > axes.bbox.x1).all()
    middles = (found[:, 1] + found[:, 3]) / 2
    assert (middles >= axes.bbox.y0).all() and (middles <= axes.bbox.y1).all()
    by_height = [float(text.get_text().rsplit(", ", 1)[1]) for text in sorted(axes.texts, key=lambda t: t.xyann[1])]
    assert by_height == sorted(by_height)


def test_a_loss_curve_has_the_validation_loss_of_the_records_that_have_one(monkeypatch, tmp_path):
    records = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "validation": 2.5}]
    axes = drawn(monkeypatch, tmp_path, records, x="step", label="bound", validation_label="bound, others")
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {"bound": [[1, 3], [2, 2]], "bound, others": [[2, 2.5]]}
    assert {text.get_text() for text in axes.texts} == {"bound, 2", "bound, others, 2.5"}
    with pytest.raises(ValueError, match="a validation loss, on a logarithmic scale, must be a number .* not None"):
        plot.loss_curve([{"epoch": 1, "loss": 3.0, "validation": None}])


def test_learning_rates_are_on_a_logarithmic_scale_if_asked_for(monkeypatch, tmp_path):
    records = [{"lr": 10.0**-k, "loss": 1.0} for k in range(5)]
    axes = drawn(monkeypatch, tmp_path, records, x="lr", log_x=True)
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "learning rate"
    with pytest.raises(ValueError, match="lr, on a logarithmic scale, must be a number .* not 0.0"):
        plot.loss_curve([{"lr": 0.0, "loss": 1.0}], x="lr", log_x=True)


def test_loss_curve_of_one_record_by_another_key(monkeypatch, tmp_path):
    axes = drawn(monkeypatch, tmp_path, RECORDS[:1], x="step", y="bits", title="one")
    assert axes.lines[0].get_xydata().tolist() == [[59, 1000]] and axes.get_title() == "one"
    assert axes.get_xlabel() == "step" and axes.get_ylabel() == "bits"
    axes = drawn(monkeypatch, tmp_path, RECORDS[:1])
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [0]  # and no -0.045


@pytest.mark.parametrize(
    "records, message",
    [
        ([], "no records"),
        ([{"epoch": 0, "loss": float("nan")}], "not nan"),
        ([{"epoch": 0, "loss": 0.0}], "not 0.0"),
        ([{"epoch": 0, "loss": None}], "a loss, on a logarithmic scale, must be a number .* not None"),
        ([{"epoch": 0, "loss": np.float32("nan")}], "not nan"),
        ([{"epoch": float("nan"), "loss": 1.0}], "epoch must be a number .* not nan"),
        (
            [{"epoch": 0, "loss": 1.0}, {"step": 1, "loss": 1.0}],
            r"must have 'epoch' and 'loss', not only \['step', 'loss'",
        ),
    ],
)
def test_a_curve_that_cannot_be_drawn_is_an_error(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        plot.loss_curve(records, tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_levels_and_references_that_cannot_be_drawn_are_errors(tmp_path):
    for bad in (0.0, -1.0, float("nan"), float("inf"), None):
        with pytest.raises(ValueError, match=f"the level 'zero', .* must be a number .* not {bad}"):
            plot.loss_curve(RECORDS, tmp_path / "loss.png", levels={"zero": bad})
        with pytest.raises(ValueError, match=f"a loss of the reference, .* must be a number .* not {bad}"):
            plot.loss_curve(RECORDS, tmp_path / "loss.png", reference={1: bad})


def test_a_curve_of_numpy_scalars_and_tensors(numpy_backend, monkeypatch, tmp_path):
    records = [{"epoch": np.int64(0), "loss": np.float32(2)}, {"epoch": np.float64(1), "loss": Tensor(np.ones(()))}]
    axes = drawn(monkeypatch, tmp_path, records, reference={np.int64(1): np.float64(3)}, levels={"one": np.float32(1)})
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["training"] == [[0, 2], [1, 1]] and lines["published"] == [[1, 3]]


@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_other_formats(tmp_path, kind):
    plot.loss_curve(RECORDS, tmp_path / f"loss.{kind}")
    assert (tmp_path / f"loss.{kind}").read_bytes()[:5] in (b"<?xml", b"%PDF-")


def test_a_picture_replaces_the_last_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "loss.png"
    plot.loss_curve(RECORDS, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Format 'nonsense'"):
        plot.loss_curve(RECORDS, tmp_path / "loss.nonsense")
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plot.loss_curve(RECORDS, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="its files have no modes")
def test_a_picture_can_be_read_by_those_who_can_read_other_files(tmp_path):
    (tmp_path / "other").touch()
    plot.loss_curve(RECORDS, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_matplotlib_comes_only_with_the_first_picture_and_never_pyplot(tmp_path):
    code = f"""
import sys, numpy
from tinydiff import plot, training, diffusion
assert "matplotlib" not in sys.modules
plot.image_grid(numpy.zeros((1, 2, 2)), {str(tmp_path / "a.png")!r})
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_long_labels_and_a_long_title_are_on_the_picture(numpy_backend, tmp_path):
    """No ink at the edges, where it would be cut off."""
    plot.matrix(
        np.zeros((3, 2)), tmp_path / "a.png", labels=["down_blocks.0.attentions.0, values"] * 3,
        column_labels=["incomprehensibility"] * 2, low=-1, high=1, title="which words the loss pulls on, of the most",
    )  # fmt: skip
    image = imread(tmp_path / "a.png")[..., :3]
    edges = [image[:2], image[-2:], image[:, :2], image[:, -2:]]
    assert all((edge == image[0, 0]).all() for edge in edges) and (image != image[0, 0]).any()
