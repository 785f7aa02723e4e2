"""Section 11, figures: heat is drawn on a scale that is stated, and a window opens only where one can."""

from __future__ import annotations

import io
import os
import pty
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SCRIPT
from matplotlib.figure import Figure
from PIL import Image

import mura_anomaly_detection as mad


def panel(heat: float, shape: tuple[int, int] = (40, 60), **more: Any) -> mad.Panel:
    """Make a panel whose left half carries `heat` logits, on mid grey."""
    values = np.zeros(shape, np.float32)
    values[:, : shape[1] // 2] = heat
    return mad.Panel(np.full(shape, 128, np.uint8), values, **{"title": "image1.png", **more})


def drawn(*panels: mad.Panel, heading: str = "study1") -> tuple[Figure, list[Any]]:
    """Draw panels; returns the figure and its axes: three a row, and the colour bar last."""
    figure = Figure(figsize=(10.5, 0.7 + 3.4 * len(panels)), layout="constrained")
    mad.draw_explanation(figure, panels, heading, "evidence, logits")
    return figure, figure.axes


def rendered(figure: Figure) -> np.ndarray:
    """Draw a figure to pixels, (H, W, 3) uint8."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=60)
    return np.array(Image.open(file).convert("RGB"))


def content(figure: Figure, axes: Any) -> np.ndarray:
    """Cut the pixels of one axes out of the drawn figure."""
    pixels = rendered(figure)
    figure.set_dpi(60)
    box = axes.get_window_extent()
    return pixels[
        round(len(pixels) - box.y1) + 2 : round(len(pixels) - box.y0) - 2, round(box.x0) + 2 : round(box.x1) - 2
    ]


def test_three_panels_a_row_and_one_colour_bar() -> None:
    for rows in (1, 3):
        figure, axes = drawn(*[panel(2, title=f"image{i}.png") for i in range(rows)])
        assert len(axes) == 3 * rows + 1
        assert [a.get_title() for a in axes[0:-1:3]] == [f"image{i}.png" for i in range(rows)]
        assert {a.get_title() for a in axes[1:-1:3]} == {"heatmap"}
        assert {a.get_title() for a in axes[2:-1:3]} == {"overlay"}
        assert axes[-1].get_ylabel() == "evidence, logits"
        assert figure.get_suptitle() == "study1"


def test_original_is_drawn_on_the_full_grey_scale() -> None:
    """An image that uses few grey levels is not stretched: 100 to 140 stay mid grey."""
    figure, axes = drawn(
        mad.Panel(np.linspace(100, 140, 2400).reshape(40, 60).astype(np.uint8), np.zeros((40, 60)), "x")
    )
    grey = content(figure, axes[0])
    assert 98 <= grey.min() <= grey.max() <= 142


def test_faint_map_stays_faint() -> None:
    """One logit on a scale of FAINT: a quarter of the colours, not their end."""
    _, axes = drawn(panel(1.0))
    shown = axes[1].images[0]
    assert shown.get_clim() == (0, mad.FAINT)
    assert shown.norm(1.0) == pytest.approx(1 / mad.FAINT)
    overlay = axes[2].images[1]
    assert overlay.get_clim() == shown.get_clim()
    assert overlay.get_alpha().max() == pytest.approx(0.65 / mad.FAINT)


def test_strong_map_sets_the_scale_for_all_views() -> None:
    """Views of one study are comparable: the weaker one is not stretched to look like the stronger."""
    _, axes = drawn(panel(10.0), panel(5.0))
    assert [a.images[-1].get_clim() for a in (axes[1], axes[4])] == [(0, 10), (0, 10)]
    assert axes[2].images[1].get_alpha().max() == pytest.approx(0.65)
    assert axes[5].images[1].get_alpha().max() == pytest.approx(0.325)


def test_opacity_follows_the_evidence_so_that_bone_shows_where_there_is_none() -> None:
    figure, axes = drawn(panel(8.0))
    pixels = content(figure, axes[2]).astype(int)
    left, right = pixels[10:-10, 10:50], pixels[10:-10, -50:-10]
    assert np.ptp(right, axis=2).max() == 0, "no heat: plain grey"
    assert np.abs(right - 128).max() <= 1
    assert np.ptp(left, axis=2).min() > 30, "heat: coloured"


def test_empty_map_is_an_empty_overlay() -> None:
    with np.errstate(all="raise"):
        figure, axes = drawn(panel(0.0))
        overlay, original = content(figure, axes[2]), content(figure, axes[0])
    assert axes[2].images[1].get_alpha().max() == 0
    assert np.isfinite(axes[2].images[1].get_alpha()).all()
    assert overlay.min() == overlay.max() == original.max()


def test_colours_are_perceptually_uniform() -> None:
    """Lightness must rise with the evidence; with a rainbow it would not."""
    _, axes = drawn(panel(8.0))
    for image in (axes[1].images[0], axes[2].images[1]):
        colours = image.get_cmap()(np.linspace(0, 1, 64))[:, :3]
        lightness = colours @ (0.2126, 0.7152, 0.0722)
        assert (np.diff(lightness) > -1e-3).all()


def test_known_lesion_is_boxed_on_original_and_overlay() -> None:
    _, axes = drawn(panel(2.0, box=(5, 7, 25, 17)), panel(2.0))
    boxes = [[(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in a.patches] for a in axes[:-1]]
    assert boxes == [[(5, 7, 20, 10)], [], [(5, 7, 20, 10)], [], [], []]


@pytest.mark.parametrize("name", ["cost$5$.png", "$\\frac{.png", "a_{b}^c$x.png", "50%.png", "a\nb.png"])
def test_names_are_shown_as_they_are(name: str) -> None:
    """A dollar sign in a file's name is no formula."""
    figure, axes = drawn(panel(1.0, title=name), heading=name)
    rendered(figure)
    assert axes[0].get_title() == figure.get_suptitle() == name
    assert not axes[0].title.get_parse_math()


def test_drawing_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    figure, _ = drawn(panel(1.0, title="Röntgen.png"))
    rendered(figure)
    assert not recwarn.list


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2000, 1500)])
def test_any_shape_can_be_drawn(shape: tuple[int, int], tmp_path: Path) -> None:
    mad.save_explanation(tmp_path / "x.png", [panel(3.0, shape)], "x", "y", show=False)
    assert Image.open(tmp_path / "x.png").width > 800


# ----- the file


@pytest.mark.parametrize("views", [1, 4])
def test_saved_file_is_a_picture_with_a_row_a_view(views: int, tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "x.png"
    mad.save_explanation(file, [panel(2.0)] * views, "x", "y", show=False)
    picture = Image.open(file)
    picture.load()
    assert picture.format == "PNG"
    assert picture.width == 1155
    assert picture.height == pytest.approx(110 * (0.7 + 3.4 * views), abs=2)
    assert [path.name for path in file.parent.iterdir()] == ["x.png"], "no temporary file is left"


@pytest.mark.parametrize(("name", "kind"), [("x.jpg", "JPEG"), ("x", "PNG"), ("x.PNG", "PNG")])
def test_suffix_decides_the_format(name: str, kind: str, tmp_path: Path) -> None:
    mad.save_explanation(tmp_path / name, [panel(2.0)], "x", "y", show=False)
    assert Image.open(tmp_path / name).format == kind


def test_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(mad.UserError, match=r"x\.png: cannot be written"):
        mad.save_explanation(tmp_path / "file" / "x.png", [panel(2.0)], "x", "y", show=False)


# ----- curves


def history(**columns: list[float | None]) -> list[dict[str, float | None]]:
    """Make rows of a history; a column not given is None throughout."""
    count = len(next(iter(columns.values())))
    names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auroc", "val_kappa")
    return [{"epoch": i + 1.0, **{name: columns.get(name, [None] * count)[i] for name in names}} for i in range(count)]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def test_curves_show_the_history(figures: list[Figure]) -> None:
    file = io.BytesIO()
    mad.draw_history(
        history(train_loss=[0.7, 0.5], val_loss=[0.8, 0.6], val_auroc=[0.6, None], val_kappa=[None, None]), file
    )
    loss, accuracy, study = figures[0].axes
    assert [a.get_title() for a in (loss, accuracy, study)] == ["loss", "accuracy", "study level"]
    curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in loss.lines}
    assert curves == {"train loss": ([1, 2], [0.7, 0.5]), "val loss": ([1, 2], [0.8, 0.6])}
    assert [line.get_label() for line in accuracy.lines] == ["train accuracy", "val accuracy"]
    auroc, kappa = (np.array(line.get_ydata(), float) for line in study.lines)
    assert auroc[0] == 0.6
    assert np.isnan(auroc[1])
    assert np.isnan(kappa).all(), "undefined is a gap, not a zero"
    assert Image.open(file).size == (1320, 408)


def test_one_epoch_leaves_a_visible_mark(figures: list[Figure]) -> None:
    mad.draw_history(history(train_loss=[0.7]), io.BytesIO())
    assert figures[0].axes[0].lines[0].get_marker() == "o"
    assert all(tick == int(tick) for tick in figures[0].axes[0].get_xticks())


# ----- windows


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stdout be a terminal, and matplotlib prefer windows that open."""
    import matplotlib.pyplot as plt

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(plt, "get_backend", lambda: "TkAgg")
    monkeypatch.setattr(plt, "switch_backend", lambda name: None)


def test_window_on_a_terminal_with_a_display(terminal: None) -> None:
    assert mad.can_show(mad.Config())


def test_no_window_when_told_so(terminal: None) -> None:
    assert not mad.can_show(mad.Config(no_show=True))


def test_no_window_off_a_terminal(terminal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert not mad.can_show(mad.Config())


@pytest.mark.parametrize("backend", ["agg", "Agg", "pdf", "svg"])
def test_no_window_where_mplbackend_only_writes_files(
    backend: str, terminal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matplotlib.pyplot.get_backend", lambda: backend)
    assert not mad.can_show(mad.Config())


def test_no_window_where_the_toolkit_cannot_start(terminal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPLBACKEND=TkAgg without a display: matplotlib says so only when the backend is loaded."""

    def refuse(name: str) -> None:
        raise ImportError(
            "Cannot load backend 'TkAgg' which requires the 'tk' interactive framework, as 'headless' is running"
        )

    monkeypatch.setattr("matplotlib.pyplot.switch_backend", refuse)
    assert not mad.can_show(mad.Config())


def test_figure_for_a_window_is_kept_open_and_saved(tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    plt.close("all")
    mad.save_explanation(tmp_path / "shown.png", [panel(2.0)], "x", "y", show=True)
    mad.save_explanation(tmp_path / "not.png", [panel(2.0)], "x", "y", show=False)
    assert len(plt.get_fignums()) == 1
    assert (tmp_path / "shown.png").stat().st_size > 10_000
    plt.close("all")


@pytest.fixture
def display() -> Iterator[str]:
    """Start a virtual screen."""
    pytest.importorskip("tkinter")
    if not shutil.which("Xvfb"):
        pytest.skip("Xvfb is not installed")
    reading, writing = os.pipe()
    with subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-screen", "0", "1600x1000x24"],
        pass_fds=[writing],
        stderr=subprocess.DEVNULL,
    ) as server:
        os.close(writing)
        with os.fdopen(reading) as number:
            yield f":{number.readline().strip()}"
        server.terminate()


WINDOW = """
    import sys
    from matplotlib import pyplot
    import mura_anomaly_detection as mad

    show = pyplot.show

    def look_and_close():
        show(block=False)
        for number in pyplot.get_fignums():
            window = pyplot.figure(number).canvas.manager.window
            window.update()
            print("window", window.winfo_viewable(), window.winfo_width() > 500)
        pyplot.close("all")

    pyplot.show = look_and_close
    sys.exit(mad.main(mad.parse_options(sys.argv[1:])))
"""


@pytest.mark.parametrize("choice", ["window", "no window"])
def test_real_window(choice: str, display: str, trained: Path, phantoms: Path, tmp_path: Path) -> None:
    """On a terminal with a display the figure opens in a window; it is saved in any case."""
    image = next((phantoms / "valid").rglob("image1.png"))
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | {
        "DISPLAY": display,
        "PYTHONPATH": str(SCRIPT.parent),
    }
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(WINDOW),
        "--predict",
        str(image),
        "--checkpoint",
        str(trained),
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        command + ["--no-show"] * (choice == "no window"),
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
    )
    os.close(theirs)
    printed = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0, done.stderr
    assert ("window 1 True" in printed) is (choice == "window"), printed
    assert (tmp_path / "image1_heatmap.png").stat().st_size > 10_000
