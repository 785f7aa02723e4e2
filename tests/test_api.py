"""Block 12: the Python API, `main` and its exit codes, the demo, and what the README says."""

from __future__ import annotations

import ast
import contextlib
import csv
import doctest
import io
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from conftest import SCRIPT, TINY, run_inside, thin_networks
from matplotlib.figure import Figure
from PIL import Image

import mura_anomaly_detection as mura

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENDINGS = (".pth", ".last.pth", ".history.csv", ".history.png", ".split.csv", ".test.csv",
           ".report.json", ".report.png")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def small_networks(trained: Path) -> Iterator[None]:
    """A network of a few channels from here on; `trained`, for the real command, is a real one."""
    with thin_networks():
        yield


@pytest.fixture(scope="module")
def small(phantoms: Path, small_networks: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a finished run of that network, with its other files beside it."""
    path = tmp_path_factory.mktemp("small") / "small.pth"
    assert run_inside("--data-dir", phantoms, "--checkpoint", path, *TINY) == 0
    return path


def variant(model: Path, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a model that differs from another in what `change` changes."""
    content = torch.load(model, weights_only=True)
    change(content)
    for name in ("format", "version"):
        del content[name]
    mura.write_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def study(phantoms: Path) -> Path:
    """An abnormal study of several views."""
    studies = sorted((phantoms / "valid").rglob("*_positive"))
    return next(path for path in studies if len(list(path.iterdir())) > 1)


@pytest.fixture(scope="module")
def pair(small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models that differ in all that a model keeps for itself."""
    def change(content: dict[str, Any]) -> None:
        content["state_dict"]["head.weight"] *= -1
        content |= {"image_size": 80, "resize": "letterbox", "temperature": 1.7, "threshold": 0.4,
                    "threshold_source": "auto"}

    return [small, variant(small, tmp_path_factory.mktemp("pair") / "other.pth", change)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the Python API ----


@pytest.mark.parametrize("which", ["image", "study", "ensemble"])
def test_the_api_answers_as_the_command_to_the_last_digit(
    which: str, pair: list[Path], study: Path, here: Path
) -> None:
    models = pair if which == "ensemble" else pair[:1]
    path = study / "image1.png" if which == "image" else study
    asked = ["--predict", path, "--checkpoint", *models, "--device", "cpu", "--no-show"]
    assert run_inside(*asked, "--output", "r.json", "--save-cam", "maps.npz") == 0
    (row,) = json.loads(Path("r.json").read_text())
    if which == "image":
        result = mura.load(str(models[0]), device="cpu").predict(str(path))
    else:
        result = mura.load(*models, device="cpu").predict(path)
    assert (result.probability, result.label) == (row["probability"], row["prediction"])
    assert (result.threshold, result.confidence) == (row["threshold"], row["confidence"])
    assert result.threshold == pytest.approx(0.45 if which == "ensemble" else 0.5)
    files = [path] if which == "image" else sorted(path.iterdir())
    assert [view.path for view in result.views] == files
    views = {Path(view["path"]).name: view for view in row["views"]} if which != "image" else {}
    maps = np.load("maps.npz")
    assert len(result.views) == len(result.heatmaps) == len(maps.files)
    for view, heatmap in zip(result.views, result.heatmaps, strict=True):
        assert np.array_equal(heatmap, maps[str(view.path)]) and heatmap.dtype == np.float32
        assert heatmap.shape == matplotlib.image.imread(view.path).shape[:2]
        if views:
            assert view.probability == views[view.path.name]["probability"]
    if result.label == "abnormal":
        strongest = max(result.views, key=lambda view: view.probability)
        box = strongest.box or (None,) * 4
        assert list(box) == [row[side] for side in ("left", "top", "right", "bottom")]


def test_the_api_answers_as_the_evaluation(small: Path, phantoms: Path, study: Path) -> None:
    """Whose batches are others: sums of floats may differ in their last digits."""
    rows = rows_of(small.with_name("small.test.csv"))
    table = {row["path"]: float(row["probability"]) for row in rows}
    result = mura.load(small, device="cpu", precision="fp32").predict(study)
    for view in result.views:
        name = view.path.relative_to(phantoms).as_posix()
        assert view.probability == pytest.approx(table[name], abs=1e-5)
    mean = np.mean([view.probability for view in result.views])
    assert result.probability == pytest.approx(mean, abs=0.02)


def test_an_ensemble_is_the_mean_of_its_models(pair: list[Path], study: Path) -> None:
    alone = [mura.load(path, device="cpu").predict(study / "image1.png") for path in pair]
    together = mura.load(*pair, device="cpu").predict(study / "image1.png")
    assert abs(alone[0].probability - alone[1].probability) > 1e-3
    mean = (alone[0].probability + alone[1].probability) / 2
    assert together.probability == pytest.approx(mean, abs=1e-6)


def test_the_threshold_can_be_given(small: Path, study: Path) -> None:
    image = study / "image1.png"
    for threshold, label in ((1e-6, "abnormal"), (1 - 1e-6, "normal")):
        result = mura.load(small, device="cpu", threshold=threshold).predict(image)
        assert (result.label, result.threshold) == (label, threshold)


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), 0.25])
def test_a_threshold_of_any_type_counts(number: Any, small: Path, study: Path) -> None:
    result = mura.load(small, device=torch.device("cpu"), threshold=number).predict(study)
    assert result.threshold == 0.25


@pytest.mark.parametrize(("options", "said"), [
    ({"threshold": 2}, "threshold 2: is not"), ({"threshold": 0}, "threshold 0: is not"),
    ({"precision": "float16"}, "--precision float16: is none of auto, bf16"),
])
def test_values_that_mean_nothing_are_refused(
    options: dict[str, Any], said: str, small: Path
) -> None:
    with pytest.raises(mura.UserError, match=said):
        mura.load(small, device="cpu", **options)
    with pytest.raises(ValueError, match="auto"):
        mura.load(small, device="cpu", threshold="auto")


def test_the_precision_can_be_given(small: Path) -> None:
    """tf32 is refused as by --precision, so it is not passed over for auto."""
    with pytest.raises(mura.UserError, match="--precision tf32: needs a CUDA device"):
        mura.load(small, device="cpu", precision="tf32")


def test_the_api_finds_in_a_folder_what_the_command_finds(
    small: Path, study: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(study, tmp_path / "study7"))
    (folder / "notes.txt").write_text("no image")
    model = mura.load(small, device="cpu")
    expected = model.predict(study)
    picture = mura.save_explanation(*expected.explanation)  # as --predict saves it beside an image
    (folder / "image1_heatmap.png").write_bytes(picture)
    assert model.predict(folder).probability == expected.probability
    with pytest.raises(mura.UserError, match="holds 2 images or studies; name one image, or"):
        shutil.copytree(folder, tmp_path / "study8")
        model.predict(tmp_path)


def test_a_result_prints_without_its_pixels(small: Path, study: Path) -> None:
    text = repr(mura.load(small, device="cpu").predict(study))
    assert "probability=" in text and "image1.png" in text
    assert "array" not in text and len(text) < 2000


def test_errors_of_the_api_name_the_file(small: Path, tmp_path: Path, here: Path) -> None:
    with pytest.raises(mura.UserError, match=r"mura_model\.pth: cannot be read"):
        mura.load()  # the command's default
    with pytest.raises(mura.UserError, match=r"missing\.pth: cannot be read"):
        mura.load(tmp_path / "missing.pth")
    model = mura.load(small, device="cpu")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_text("no image")
    for name in ("missing.png", "empty", "bad.png"):
        with pytest.raises(mura.UserError, match=re.escape(name)) as caught:
            model.predict(tmp_path / name)
        assert caught.value.exit_code == mura.EXIT_FAILED, "as of the command"


def test_a_result_draws_its_figure(small: Path, study: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.text import Text

    result = mura.load(small, device="cpu").predict(study)
    before = pyplot.get_fignums()
    figure = result.figure()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    assert pyplot.get_fignums() == before  # none of pyplot's, which a notebook would show twice
    assert content.getvalue().startswith(b"\x89PNG")
    texts = " ".join(text.get_text() for text in figure.findobj(Text))
    assert result.label in texts and "not for diagnosis" in texts


NOTEBOOK = """
import json, logging, os, signal, sys, threading, warnings
sys.argv = ["notebook", "--no-such-flag"]
signal.signal(signal.SIGINT, signal.default_int_handler)  # as a kernel has it, whatever started it
import torch, torchvision, PIL.Image, PIL.ImageFile, tqdm.auto

def state():
    return {"handlers": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
            "threads": torch.get_num_threads(), "count": threading.active_count(),
            "limit": PIL.Image.MAX_IMAGE_PIXELS, "lenient": PIL.ImageFile.LOAD_TRUNCATED_IMAGES,
            "grad": torch.is_grad_enabled(), "dtype": str(torch.get_default_dtype()),
            "backend": os.environ.get("MPLBACKEND"), "cwd": os.getcwd(),
            "hook": str(sys.excepthook),
            "logging": len(logging.getLogger().handlers), "level": logging.getLogger().level,
            "streams": [type(sys.stdout).__name__, type(sys.stderr).__name__],
            "seed": torch.initial_seed(), "umask": os.umask(0o022)}

before, filters = state(), list(warnings.filters)
import mura_anomaly_detection as mura
assert state() == before, (before, state())
for module in ("matplotlib", "pydicom", "onnx", "sklearn"):
    assert module not in sys.modules, module
added = [f for f in warnings.filters if f not in filters]
for name in ("__main__", "numpy", "torch.nn", "mylibrary", "sklearn"):
    assert not any(f[3] is None or f[3].match(name) for f in added), added
model = mura.load(sys.argv[0] and MODEL, precision="fp32")
result = model.predict(IMAGE)
result.figure()
assert {**state(), "count": 0} == {**before, "count": 0}, (before, state())
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print(json.dumps([result.label, result.probability]))
try:
    words = ["--predict", "missing.png", "--checkpoint", MODEL, "--device", "cpu"]
    mura.main(mura.parse_options(words))
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print("interrupted")
"""


def test_importing_and_predicting_leave_a_notebook_as_it_was(
    trained: Path, phantoms: Path, study: Path, here: Path
) -> None:
    """Handlers, streams, filters; and an interrupt afterwards is a KeyboardInterrupt."""
    image = study / "image1.png"
    script = NOTEBOOK.replace("MODEL", repr(str(trained))).replace("IMAGE)", f"{str(image)!r})")
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    label, probability = json.loads(first)
    tested = rows_of(trained.with_name("tiny.test.csv"))
    table = {row["path"]: float(row["probability"]) for row in tested}
    assert probability == pytest.approx(table[image.relative_to(phantoms).as_posix()], abs=1e-5)
    assert label == mura.CLASSES[probability > 0.5]
    assert second == "interrupted"
    assert "Traceback" not in done.stderr
    assert not list(here.iterdir())


# ---- main: exit codes, one line an error ----


def one_line(text: str) -> str:
    """The single line on stderr, without a traceback."""
    lines = [line for line in text.splitlines() if "not for diagnosis" not in line]
    assert len(lines) == 1, text
    return lines[0]


def test_a_run_in_rough_surroundings_ends_with_3_and_leaves_its_files(
    trained: Path, study: Path, here: Path
) -> None:
    """Real command: one input of two fails, the log's disk is full, the backend is unknown."""
    inputs = [study / "image1.png", "missing.png"]
    command = [sys.executable, SCRIPT, "--predict", *inputs, "--checkpoint", trained,
               "--device", "cpu", "--output", "r.csv", "--figure", "figures"]
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join(map(str, command))} > /dev/full"], capture_output=True,
        text=True, check=False, timeout=300,
        env={**os.environ, "MPLBACKEND": "module://no_such_package.backend"})
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    notes = [line for line in done.stderr.splitlines() if "MPLBACKEND" in line]
    assert len(notes) == 1 and "cannot be imported" in notes[0]
    assert "missing.png: " in done.stderr
    good, bad = rows_of(Path("r.csv"))
    assert good["prediction"] and not good["error"] and bad["error"] and not bad["prediction"]
    (figure,) = Path("figures").iterdir()
    assert matplotlib.image.imread(figure).ndim == 3


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_pipe_shows_in_the_exit_code(
    unbuffered: str, trained: Path, study: Path, here: Path
) -> None:
    """Also where Python writes past its buffer, and a part would be lost without an error."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    asked = ["--predict", study, "--checkpoint", trained, "--device", "cpu", "--output", "r.json"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, asked)], stdout=writer, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, timeout=300, check=False)
    os.close(reader)
    os.close(writer)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert json.loads(Path("r.json").read_text())[0]["prediction"]


@pytest.mark.parametrize(("stream", "code"), [("full", 1), ("unread", 0)])
def test_output_that_cannot_be_written_does_not_end_the_work(
    stream: str, code: int, small: Path, study: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full log disk shows in the exit code; a reader that has gone, such as head, does not."""
    reader, writer = os.pipe()
    os.close(reader)
    out = Path("/dev/full").open("w") if stream == "full" else os.fdopen(writer, "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    asked = ["--predict", study, "--checkpoint", small, "--device", "cpu", "--output", "r.json"]
    assert mura.run_as_script(mura.parse_options(list(map(str, asked)))) == code
    assert json.loads(Path("r.json").read_text())[0]["prediction"]
    assert Path(f"{study.name}_heatmap.png").is_file()


def test_an_interrupt_saves_the_state(phantoms: Path, here: Path) -> None:
    """Ctrl-C, once, on the real command."""
    command = ["--data-dir", phantoms, "--checkpoint", "m.v2.pth", *TINY, "--tasks", "HUMERUS",
               "--epochs", "40"]
    with Path("err").open("w") as err:
        run = subprocess.Popen(
            [sys.executable, SCRIPT, *map(str, command)], stdout=subprocess.DEVNULL, stderr=err)
        wait_for(lambda: Path("m.v2.history.csv").exists() or run.poll() is not None)
        run.send_signal(signal.SIGINT)
        assert run.wait(120) == 130
    *_, acknowledged, last = filter(None, Path("err").read_text().splitlines())
    assert acknowledged == ("mura_anomaly_detection: stopping after this batch; "
                            "Ctrl-C again stops at once")
    assert last.startswith(
        "mura_anomaly_detection: stopped by SIGINT; the state is in m.v2.last.pth; ")
    words = shlex.split(last.partition("; to go on: ")[2])
    assert shutil.which(words[0]) == sys.executable
    assert words[1:] == [str(SCRIPT), *map(str, command), "--resume"]
    assert Path("m.v2.last.pth").is_file() and Path("m.v2.pth").is_file()
    assert not Path("m.v2.lock").exists()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_stopped_run_names_the_command_that_goes_on(
    phantoms: Path, small_networks: None, here: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGTERM; then that very command, until SIGTERM again: a run with the same settings."""
    configs: list[mura.Config] = []
    fit = mura.Trainer.fit

    def noted_fit(trainer: mura.Trainer) -> None:
        configs.append(trainer.config)
        fit(trainer)

    monkeypatch.setattr(mura.Trainer, "fit", noted_fit)
    history = Path("my runs/m.history.csv")

    def run_until_terminated(words: list[str]) -> int:
        before = len(rows_of(history)) if history.exists() else 0

        over = threading.Event()

        def terminate() -> None:
            wait_for(lambda: over.is_set() or (history.exists() and len(rows_of(history)) > before))
            if not over.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

        watcher = threading.Thread(target=terminate)
        watcher.start()
        code = run_inside(*words)
        over.set()
        watcher.join()
        return code

    flags = [*TINY, "--epochs", "900", "--patience", "800", "--grad-accum-steps", "2",
             "--save-every", "5", "--on-bad-image", "skip", "--prevalence", "0.1", "--overwrite"]
    command = list(map(str, ["--data-dir", phantoms, "--checkpoint", "my runs/m.pth", *flags]))
    assert run_until_terminated(command) == 143
    line = capsys.readouterr().err.splitlines()[-1]
    state = Path("my runs/m.last.pth")
    assert line.startswith(f"mura_anomaly_detection: stopped by SIGTERM; the state is in {state}; ")
    program, script, *words = shlex.split(line.partition("; to go on: ")[2])
    assert script == sys.argv[0] and shutil.which(program) == sys.executable
    done = len(rows_of(history))
    assert run_until_terminated(words) == 143
    out, err = capsys.readouterr()
    assert "resumed from" in out and f"epoch {done + 1}/900" in out
    assert err.splitlines()[-1] == line  # the same command goes on again
    first, second = (asdict(config) for config in configs)
    assert {name for name in first if first[name] != second[name]} == {
        "resume", "overwrite", "given", "command"}
    epochs = [int(row["epoch"]) for row in rows_of(history)]
    assert epochs == list(range(1, len(epochs) + 1)) and len(epochs) > done


def test_a_run_that_goes_on_by_itself_names_its_own_command(here: Path) -> None:
    Path("a b.last.pth").touch()
    words = ["--data-dir", "d", "--checkpoint", "a b.pth", "--resume", "auto"]
    line = mura.how_to_go_on(mura.parse_options(words), time.time())
    assert shlex.split(line.partition("; to go on: ")[2])[2:] == words


def test_a_torchrun_job_goes_on_by_its_own_command(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of one process would start the run without the others."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    Path("m.last.pth").touch()
    words = ["--data-dir", "d", "--checkpoint", "m.pth"]
    line = mura.how_to_go_on(mura.parse_options(words), 0)
    assert line == "; the state is in m.last.pth; to go on: the same torchrun command with --resume"


def test_the_state_of_a_run_that_was_to_be_replaced_is_not_gone_on_with(here: Path) -> None:
    """A run that was stopped before it saved would become the old one."""
    config = mura.parse_options(["--data-dir", "d", "--checkpoint", "m.pth", "--overwrite"])
    Path("m.last.pth").touch()
    written = Path("m.last.pth").stat().st_mtime
    assert mura.how_to_go_on(config, written + 1) == ""
    assert "--resume" in mura.how_to_go_on(config, written - 1)


WRONG = {  # the command, its exit code, what the line names
    "no such folder": ("--data-dir {tmp}/nowhere", 2, "nowhere"),
    "an empty folder": ("--data-dir {tmp}", 2, "train/"),
    "an unknown body part": ("--data-dir {data} --tasks HUMERAS", 2, "HUMERUS"),
    "weights that are not there": ("--data-dir {data} --weights {tmp}/w.pth", 2, "w.pth"),
    "no checkpoint": ("--data-dir {data} --evaluate --checkpoint no.pth", 2, "no.pth"),
    "no state": ("--data-dir {data} --resume --checkpoint {tmp}/m.pth", 2, "--resume auto"),
    "a run that is there": ("--data-dir {data} --checkpoint {model}", 2, "--overwrite"),
    "no model": ("--predict {image} --checkpoint {image}", 2, "image1.png"),
    "no CUDA": ("--data-dir {data} --device cuda:99", 2, "cuda:99"),
    "tf32 on a CPU": ("--data-dir {data} --device cpu --precision tf32", 2, "tf32"),
    "no image": ("--predict {data}/phantoms.csv --checkpoint {model} --device cpu", 1,
                 "phantoms.csv"),
    "no table": ("--labels t.csv --evaluate --checkpoint {model} --output o", 2, "t.csv"),
    "a folder is in the way": ("--export d.onnx --checkpoint {model}", 1, "d.onnx"),
    "several inputs, one picture": (
        "--predict {image} {image} --figure f.png --checkpoint {model}", 2, "f.png"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_line_that_names_it(
    case: str, small: Path, phantoms: Path, study: Path, here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "d.onnx").mkdir()
    command, code, named = WRONG[case]
    places = {"tmp": here, "data": phantoms, "image": study / "image1.png", "model": small}
    given = command.format(**places).split()
    assert run_inside(*given) == code
    line = one_line(capsys.readouterr().err)
    assert named in line and line.startswith("mura_anomaly_detection: ")
    assert {path.name for path in here.iterdir()} == {"d.onnx"}  # no half of anything
    if code == 2:
        assert run_inside(*given, "--debug") == code
        traced = capsys.readouterr().err
        assert "Traceback" in traced and traced.splitlines()[-1] == line


@pytest.mark.parametrize(("error", "said"), [
    (RuntimeError("boom\nsecond line"), "RuntimeError: boom (--debug shows where)"),
    (MemoryError(), "MemoryError: no message (--debug shows where)"),
    (ZeroDivisionError(" \n"), "ZeroDivisionError: no message (--debug shows where)"),
    (OSError(5, "Input/output error", "/mnt/a\x1b[2J"),
     r"OSError: [Errno 5] Input/output error: '/mnt/a\x1b[2J' (--debug shows where)"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
     "out of memory: use a smaller --batch-size, or --device cpu"),
    (mura.UserError("x.png: is bad; mend it", 3), "x.png: is bad; mend it"),
])
def test_any_failure_becomes_one_line_and_an_exit_code(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(mura, "load_ensemble", fail)
    assert run_inside("--predict", "x.png", "--device", "cpu") == getattr(error, "exit_code", 1)
    line = one_line(capsys.readouterr().err)
    assert line.replace(r"\\x1b", r"\x1b") == f"mura_anomaly_detection: {said}"


def test_memory_that_does_not_suffice_for_training_has_a_way_out(
    phantoms: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(mura.Trainer, "fit", short)
    assert run_inside("--data-dir", phantoms, *TINY) == 1
    assert "out of memory: use a larger --grad-accum-steps, or" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(("mode", "remedy"), [
    (["--demo"], "a larger --grad-accum-steps"), (["--predict", "x.png"], "a smaller --batch-size")])
def test_memory_that_does_not_suffice_has_a_remedy_in_each_mode(
    mode: list[str], remedy: str, here: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def short(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("demo_command", "predict_command"):
        monkeypatch.setattr(mura, name, short)
    assert run_inside(*mode) == 1
    assert f"out of memory: use {remedy}" in one_line(capsys.readouterr().err)


def test_an_error_while_predicting_is_not_blamed_on_the_file_of_heatmaps(
    small: Path, study: Path, here: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(mura, "read_radiograph", failing)
    asked = ["--predict", study / "image1.png", "--checkpoint", small, "--device", "cpu"]
    run_inside(*asked, "--save-cam", "maps.npz")
    assert "maps.npz" not in capsys.readouterr().err


def test_a_full_disk_while_predicting_is_one_line(
    small: Path, study: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted(study.iterdir())[:2]
    for words, named in ((["--save-cam", "maps.npz"], "maps.npz"), (["--output", "r.csv"], "r.csv"),
                         (["--figure", "figures"], "0001_image1_heatmap.png")):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # as on a disk without space
        try:
            code = run_inside(
                "--predict", *images, "--checkpoint", small, "--device", "cpu", *words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        line = capsys.readouterr().err.splitlines()[-1]
        assert code == 1 and named in line and "cannot be written (File too large)" in line
        assert not [path for path in here.rglob("*") if path.is_file()]


def test_main_restores_the_signal_handlers(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    assert mura.main(mura.parse_options(["--predict", "x.png", "--checkpoint", "none.pth"])) == 2
    assert [signal.getsignal(number) for number in numbers] == before
    assert "none.pth" in one_line(capsys.readouterr().err)


def test_main_works_in_a_thread(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    config = mura.parse_options(["--predict", "x.png", "--checkpoint", "none.pth"])
    thread = threading.Thread(target=lambda: codes.append(mura.main(config)))
    thread.start()
    thread.join()
    assert codes == [2] and "none.pth" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(("ending", "value"), [
    (".weight", "nan"), (".weight", "-inf"), ("running_var", "inf")])
def test_weights_that_are_not_finite_are_never_a_class(
    ending: str, value: str, small: Path, phantoms: Path, study: Path, here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: list[str] = []

    def change(content: dict[str, Any]) -> None:
        found.extend(name for name in content["state_dict"] if name.endswith(ending))
        name = found[len(found) // 2]
        tensor = content["state_dict"][name].contiguous()
        tensor.view(-1)[-1] = float(value)
        content["state_dict"][name] = tensor

    variant(small, here / "m.pth", change)
    commands = ["--predict", study], ["--data-dir", phantoms, "--evaluate"], ["--export", "m.onnx"]
    for command in commands:
        assert run_inside(*command, "--checkpoint", "m.pth") == 2
        out, err = capsys.readouterr()
        line = one_line(err)
        assert "m.pth" in line and found[len(found) // 2] in line and "not finite" in line
        assert "probability of" not in out and "AUROC" not in out
    training = ["--data-dir", phantoms, "--checkpoint", "n.pth", *TINY, "--weights", "m.pth"]
    assert run_inside(*training) == 2
    assert "not finite" in one_line(capsys.readouterr().err)
    with pytest.raises(mura.UserError, match="not finite"):
        mura.load("m.pth")


def test_names_are_shown_escaped(
    small: Path, study: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file's name can hold a command for the terminal, a new line, or bytes that are no text."""
    names = [b"\x1b[2J.png", b"two\r\nlines.png", b"p\xe9.png", b"x**y.png", b"$a_b$.png"]
    for name in names:
        shutil.copy(study / "image1.png", os.fsdecode(name))
    paths = [f"./{os.fsdecode(name)}" for name in names]
    asked = ["--predict", *paths, "--checkpoint", small, "--device", "cpu", "--no-show"]
    for words in (["--output", "r.csv", "--figure", "figures"], ["--output", "r.json"]):
        assert run_inside(*asked, *words) == 0
        out, err = capsys.readouterr()
        assert all(char == "\n" or char.isprintable() for char in out + err)
    table = Path("r.csv").read_bytes()
    assert b"\r" not in table and b"\x1b" not in table and table.count(b"\n") == 1 + len(names)
    text = io.StringIO(table.decode(errors="surrogateescape"), newline="")
    assert len(list(csv.DictReader(text))) == len(names)
    assert [os.fsencode(row["path"]) for row in json.loads(Path("r.json").read_text())] == names
    assert len(os.listdir("figures")) == len(names)


def test_stray_variables_of_a_scheduler_do_not_silence_a_run(
    small: Path, study: Path, here: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "3")
    image = study / "image1.png"
    assert run_inside("--predict", image, "--checkpoint", small, "--device", "cpu") == 0
    assert str(image) in capsys.readouterr().out


def test_torchrun_is_for_training_and_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                        "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    for mode in (["--predict", "x.png"], ["--export", "m.onnx"], ["--demo"]):
        assert run_inside(*mode) == 2
        assert "torchrun" in one_line(capsys.readouterr().err)


# ---- the demo ----


def test_the_demo_learns_to_tell_patients_it_never_saw(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    report = json.loads((folder / "demo.report.json").read_text())
    assert report["levels"]["study"]["count"] >= 60
    assert report["levels"]["study"]["auroc"]["value"] >= 0.85
    seen = {row["patient"] for row in rows_of(folder / "demo.split.csv")}
    assert seen and not seen & {row["patient"] for row in rows_of(folder / "demo.test.csv")}


def test_the_demo_leaves_the_files_of_the_contract(demo: tuple[Path, str]) -> None:
    folder, out = demo
    assert {f"demo{ending}" for ending in ENDINGS} <= {path.name for path in folder.iterdir()}
    assert {path.name for path in folder.iterdir()} - {f"demo{ending}" for ending in ENDINGS} == {
        "MURA-v1.1", "demo_heatmap.png"}
    picture = matplotlib.image.imread(folder / "demo_heatmap.png")
    assert picture.shape[0] > 200 and picture.shape[1] > 600
    assert "demo_heatmap.png" in out and "demo.report.png" in out


def test_the_demo_plays_the_pointing_game(demo: tuple[Path, str]) -> None:
    """The heatmap peaks on the lesion more often than by chance; an abnormal image is explained."""
    (line,) = [line for line in demo[1].splitlines() if "lesion's box" in line]
    hits, _, chance = (int(text) for text in re.findall(r"(\d+)%", line))
    assert hits > 2 * chance > 0
    (shown,) = [line for line in demo[1].splitlines() if "abnormal, " in line]
    assert "_positive" in shown


class EverySecond:
    """A predictor that calls every second image abnormal."""

    def studies(self, inputs: list[mura.Study]) -> Iterator[mura.Study]:
        for number, study in enumerate(inputs):
            pixels, probability = mura.read_radiograph(study.path).pixels, (0.1, 0.9)[number % 2]
            heat = np.ones(pixels.shape, np.float32)
            view = mura.ViewResult(study.path, pixels, probability, heat)
            scale = mura.heat_scale("abnormal", "", [heat])
            yield replace(study, views=[view], probability=probability, scale=scale)


def test_its_heat_rests_on_the_weights_that_it_learnt(demo: tuple[Path, str]) -> None:
    """Sanity check of arXiv 1810.03292: with a head drawn anew the maps are other ones, correlation below 0.3."""
    folder, _ = demo
    ensemble = mura.load(folder / "demo.pth", device="cpu", precision="fp32").ensemble
    (model,), fine = ensemble.models, mura.CAM_METHODS["fine"]
    paths = list(mura.read_lesion_boxes(folder / "MURA-v1.1"))[::8]
    squares = [mura.resize_square(mura.read_radiograph(path).pixels, *model.resizing) for path in paths]
    images = [torch.from_numpy(np.stack(squares))[:, None]]
    logits, (learnt,) = ensemble.explain(images, fine, 1.0)
    abnormal = (logits[0] > 0) & (learnt.amax((1, 2)) > 0)
    assert abnormal.sum() > len(paths) / 2, "most of them are called so, and have heat"
    correlations = []
    for seed in range(6):
        torch.manual_seed(seed)
        model.network.head.reset_parameters()
        _, (other,) = ensemble.explain(images, fine, 1.0)
        for first, second in zip(learnt[abnormal].flatten(1), other[abnormal].flatten(1), strict=True):
            correlations.append(float(np.corrcoef(first, second)[0, 1]) if second.any() else 0.0)
    assert np.mean(correlations) < 0.3


def test_the_demo_is_about_images_that_were_called_abnormal(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mura, "DEMO_STUDIES", (2, 6))
    monkeypatch.setattr(mura, "train_command", lambda *_: 0)
    monkeypatch.setattr(mura, "load_predictor", lambda _: EverySecond())
    assert run_inside("--demo", "d", "--no-show", "--prevalence", "0.2") == 0
    out, count = capsys.readouterr().out, len(mura.read_lesion_boxes(Path("d/MURA-v1.1")))
    assert "abnormal 90.0%, 69.2% at --prevalence" in out, "odds of 9 times 1 to 4"
    assert f" of {count // 2} abnormal images that were called so" in out


def drawn_demo(monkeypatch: pytest.MonkeyPatch, predictor: type[EverySecond]) -> list[Figure]:
    """Leave of the demo what is quick, with a predictor; returns where its figures are collected.

    The files of the figures stay empty.
    """
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    monkeypatch.setattr(mura, "DEMO_STUDIES", (0, 2))
    monkeypatch.setattr(mura, "write_phantoms", partial(mura.write_phantoms, parts=["XR_FOREARM"]))
    monkeypatch.setattr(mura, "train_command", lambda *_: 0)
    monkeypatch.setattr(mura, "load_predictor", lambda _: predictor())
    return figures


@pytest.mark.parametrize("windows", [False, True])
def test_the_demo_marks_the_lesion_and_opens_a_window_where_one_can_open(
    here: Path, monkeypatch: pytest.MonkeyPatch, windows: bool
) -> None:
    """The window comes last: it waits for its user."""
    from matplotlib import pyplot

    figures = drawn_demo(monkeypatch, EverySecond)
    monkeypatch.setattr(mura, "can_show", lambda no_show: not no_show)
    shown: list[bool] = []
    monkeypatch.setattr(mura, "show_windows", lambda: shown.append(Path("d/f.png").exists()))
    flags = [] if windows else ["--no-show"]
    assert run_inside("--demo", "d", "--figure", "d/f.png", *flags) == 0
    assert shown == [True] * windows
    pyplot.close("all")
    (figure,) = figures
    original, _, overlay = (np.asarray(image.get_array()) for image in figure.axes[0].images)
    for picture in (original, overlay):
        assert (picture[..., :3] == (124, 252, 0)).all(axis=2).sum() > 100


class NeverAbnormal(EverySecond):
    """A predictor that calls every image normal."""

    def studies(self, inputs: list[mura.Study]) -> Iterator[mura.Study]:
        for study in super().studies(inputs):
            yield replace(study, probability=0.1)


def test_the_demo_ends_well_where_nothing_is_called_abnormal(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = drawn_demo(monkeypatch, NeverAbnormal)
    assert run_inside("--demo", "d", "--no-show") == 0
    said = capsys.readouterr()
    assert "nan" not in said.out and "called so" not in said.out
    assert "demo: done" in said.out and said.err == ""
    assert len(figures) == 1 and Path("d/demo_heatmap.png").exists()


def test_the_demo_draws_into_no_folder_of_radiographs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mura, "write_phantoms", pytest.fail)
    study = Path("d/MURA-v1.1/train/XR_FOREARM/patient00001/study1_negative")
    study.mkdir(parents=True)
    for flags in ([], ["--overwrite"]):
        assert run_inside("--demo", "d", *flags) == 2
        assert "d/MURA-v1.1 holds no phantoms; give another" in one_line(capsys.readouterr().err)
    assert [path.name for path in Path("d").iterdir()] == ["MURA-v1.1"]


def test_the_demo_replaces_a_finished_run_only_if_told(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise mura.UserError("drawn")

    monkeypatch.setattr(mura, "write_phantoms", pytest.fail)
    Path("d").mkdir()
    Path("d/demo.report.json").touch()
    assert run_inside("--demo", "d") == 2
    said = one_line(capsys.readouterr().err)
    assert "d/demo.report.json: is there already; --overwrite replaces it" in said
    monkeypatch.setattr(mura, "write_phantoms", stop)
    assert run_inside("--demo", "d", "--overwrite") == 2
    assert "drawn" in one_line(capsys.readouterr().err)


def test_the_seed_decides_what_the_demo_draws(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise mura.UserError("drawn")

    monkeypatch.setattr(mura, "DEMO_STUDIES", (2, 2))
    monkeypatch.setattr(mura, "train_command", stop)
    for seed in "12":
        assert run_inside("--demo", seed, "--seed", seed) == 2
    first, second = (
        {path.relative_to(seed): path.read_bytes() for path in Path(seed).rglob("*.png")}
        for seed in "12")
    assert first and all(first[name] != second[name] for name in first)


def test_the_demo_replaces_no_foreign_figure(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mura, "write_phantoms", pytest.fail)
    Image.new("L", (9, 9)).save("mine.png")
    for flags in (["--figure", "mine.png"], []):
        assert run_inside("--demo", "d", *flags) == 2
        assert "is there and not a file of this program" in one_line(capsys.readouterr().err)
        Path("d").mkdir(exist_ok=True)
        shutil.copy("mine.png", "d/demo_heatmap.png")
    assert {path.name for path in Path("d").iterdir()} == {"demo_heatmap.png"}


def test_the_demo_prints_lines_for_each_epoch(demo: tuple[Path, str]) -> None:
    text, history = demo[1], rows_of(demo[0] / "demo.history.csv")
    assert len(re.findall(r"(?m)^epoch ", text)) == len(history) >= 2
    for row in history:
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auroc"):
            assert f"{float(row[name]):.4f}" in text
    assert max(map(len, text.splitlines())) <= 200


# ---- the lists of packages, the docstrings, the top level ----


def pep723() -> dict[str, Any]:
    """The script's own metadata, read as PEP 723 says."""
    text = SCRIPT.read_text(encoding="utf-8")
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text)
    assert block
    return tomllib.loads("".join(line[2:] for line in block["content"].splitlines(keepends=True)))


def test_the_lists_of_packages_are_the_same() -> None:
    script = pep723()
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    listed = {entry for entry in conda if isinstance(entry, str) and entry != "pip"}
    listed.update(*(entry["pip"] for entry in conda if isinstance(entry, dict)))
    assert listed == {*script["dependencies"], f"python{script['requires-python']}"}
    tests = (ROOT / "tests" / "requirements.txt").read_text().splitlines()
    assert set(script["dependencies"]) <= {line.strip() for line in tests}
    assert {re.split(r"[<>=]", line)[0] for line in script["dependencies"]} == {
        "torch", "torchvision", "pillow", "matplotlib", "tqdm", "numpy"}
    assert {"torch>=2.10", "torchvision>=0.25"} <= set(script["dependencies"])  # CVE-2026-24747


def test_docstring_examples() -> None:
    result = doctest.testmod(mura)
    assert result.attempted >= 5 and result.failed == 0


def test_the_top_level_holds_the_four_and_nothing_else() -> None:
    ignored = {"__pycache__", "mura_demo", "MURA-v1.1"}
    assert {path.name for path in ROOT.iterdir() if path.name[0] != "."} - ignored == {
        "README.md", "environment.yml", "mura_anomaly_detection.py", "tests"}


# ---- the README ----


def blocks(*languages: str) -> list[str]:
    """The README's code blocks in some languages."""
    return [text for language, text in re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
            if language in languages]


def commands(text: str) -> list[list[str]]:
    """The arguments of each command in a text that calls the script."""
    lines = re.sub(r"[\\`^]\n\s*", " ", text).splitlines()
    called = [line.partition("mura_anomaly_detection.py ")[2] for line in lines
              if "mura_anomaly_detection.py " in line]
    return [shlex.split(re.split(r"\s(?:&&|\||>|#)\s", line)[0], comments=True) for line in called]


SHELL_BLOCKS = [block for block in blocks("sh", "bash", "console") if commands(block)]
CODE = "\n".join(blocks("sh", "bash", "console", "powershell", "bat", "python"))
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))


@pytest.mark.parametrize("line", [
    shlex.join(words) for words in commands("\n".join([CODE, *INLINE]))])
def test_commands_of_the_readme_are_taken(line: str) -> None:
    mura.parse_options(shlex.split(line))


@pytest.fixture(scope="module")
def radiographs(
    phantoms: Path, small_networks: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Phantoms with the body parts that the README names, and a finished run `done` beside them."""
    root = tmp_path_factory.mktemp("radiographs") / "MURA-v1.1"
    shutil.copytree(phantoms, root, ignore=shutil.ignore_patterns(".mura_cache", "*.csv"))
    parts = [part for part in ("ELBOW", "FINGER", "HAND", "SHOULDER", "WRIST") if part in CODE]
    for folder, part in itertools.product((root / "train", root / "valid"), parts):
        shutil.copytree(folder / "XR_HUMERUS", folder / f"XR_{part}")
    assert run_inside("--data-dir", root, "--checkpoint", root.parent / "done.pth", *TINY) == 0
    return root


@pytest.fixture
def reader(radiographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who follows the README, with pictures that take no time."""
    def dot(_: object, file: Any, **__: object) -> None:
        Image.new("L", (1, 1)).save(file, "png")

    monkeypatch.setattr(Figure, "savefig", dot)
    monkeypatch.chdir(tmp_path)


def provide(path: Path, radiographs: Path) -> None:
    """Put what the README presumes at a path: data, a model, an image, a study, a table."""
    study = sorted((radiographs / "valid").rglob("*_positive"))[0]
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pth":
        for ending in (".pth", ".last.pth"):
            shutil.copy(radiographs.parent / f"done{ending}", path.with_suffix(ending))
    elif path.suffix == ".csv":
        images = sorted((radiographs / "valid").rglob("*.png"))
        rows = [f"{image},{int('positive' in str(image))},{image.parts[-3]}" for image in images]
        path.write_text("\n".join(["path,label,patient", *rows]) + "\n")
    elif path.suffix in (".png", ".jpg", ".jpeg", ".dcm"):
        shutil.copy(study / "image1.png", path)
    elif re.search("mura|data", path.name, re.IGNORECASE):
        path.symlink_to(radiographs, target_is_directory=True)
    else:
        shutil.copytree(study, path)


def run_small(words: list[str], radiographs: Path) -> int:
    """Run a command of the README on small data with small networks; returns the exit code."""
    words = [Path(word).name if word.startswith(("/", "~", "../")) else word for word in words]
    config = mura.parse_options(words)
    state = config.checkpoint[0].with_suffix(".last.pth")
    goes_on = config.resume and (config.resume != "auto" or state.exists())
    reads = [config.data_dir, config.labels, *config.predict]
    if config.evaluate or config.predict or config.export or goes_on:
        reads += config.checkpoint
    if config.weights not in ("imagenet", "none"):
        reads += [Path(config.weights)]
    for path in reads:
        if path:
            provide(path, radiographs)
    small = ["--device", "cpu", "--workers", "1"]
    if config.evaluate or goes_on:
        small += ["--bootstrap", "100"]
    elif config.predict:
        small += ["--no-show"]
    elif config.export:
        small = []
    else:
        from_file = config.weights not in ("imagenet", "none")
        small = [word for word in TINY if not (from_file and word in ("--weights", "none"))]
    if goes_on and "epochs" in config.given:
        small += ["--epochs", "2"]
    return run_inside(*words, *small)


@pytest.mark.parametrize("block", SHELL_BLOCKS)
def test_shell_blocks_of_the_readme_work(
    block: str, reader: None, radiographs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each from a folder of its own, line by line; the demo has its own tests."""
    for words in commands(block):
        if "--demo" not in words:
            code = run_small(words, radiographs)
            assert code == 0, f"{shlex.join(words)}\n{capfd.readouterr().err}"


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_of_the_readme_work(block: str, reader: None, radiographs: Path) -> None:
    for call in ast.walk(ast.parse(block)):
        name = getattr(call, "func", None)
        if getattr(name, "attr", getattr(name, "id", "")) in ("load", "predict", "from_folder"):
            for value in call.args[: 1 if getattr(name, "attr", "") == "from_folder" else None]:
                provide(Path(ast.literal_eval(value)), radiographs)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_readme_shows_every_mode() -> None:
    assert len(SHELL_BLOCKS) >= 3 and len(blocks("python")) >= 1
    configs = [mura.parse_options(words) for words in commands(CODE)]
    for has in (lambda c: c.demo, lambda c: c.evaluate, lambda c: c.predict, lambda c: c.resume,
                lambda c: c.evaluate and len(c.checkpoint) > 1,
                lambda c: c.data_dir and not (c.evaluate or c.resume)):
        assert any(map(has, configs))


def test_flags_named_in_the_readme_exist() -> None:
    others = {"--nproc-per-node", "--nnodes", "--node-rank", "--max-restarts", "--rdzv-endpoint",
              "--rdzv-backend", "--rdzv-id", "--index-url", "--extra-index-url", "--many", "--dist"}
    known = {*mura.build_parser()._option_string_actions, *others}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_files_named_in_the_readme_exist(demo: tuple[Path, str]) -> None:
    """In the repository, left by a run or by the demo, or named in a command."""
    suffixes = (".md", ".py", ".yml", ".txt", ".png", ".csv", ".json", ".pth", ".npz", ".pt2",
                ".onnx")
    code = " ".join([CODE, *(token for token in INLINE if " " in token)])
    typed = {Path(word).name for word in re.split(r"[\s\"'()=]+", code)}
    left = {f"{name[:-4]}{ending}" for name in typed for ending in ENDINGS if name.endswith(".pth")}
    left |= {f"{name[:-4]}_heatmap.png" for name in typed if name.endswith(".png")}
    for token in INLINE:
        path = Path(token.strip("/"))
        if path.suffix not in suffixes or " " in token or "FILE" in token or "NAME" in token:
            continue
        if token.startswith("STEM."):
            assert token.removeprefix("STEM") in {*ENDINGS, ".train.csv"}, token
        elif path.parts[0] == "mura_demo":
            assert (demo[0].parent / path).exists(), token
        else:
            places = ROOT, demo[0], demo[0] / "MURA-v1.1"
            found = any((place / path).exists() for place in places)
            assert found or path.name in typed | left, token
    for ending in ENDINGS:
        assert f"{ending}`" in README or (ending.endswith(".png") and "`.png`" in README), ending
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_nothing_in_the_readme_is_left_to_fill_in() -> None:
    assert not re.findall(r"@[A-Z]+@|TODO|FIXME|XXX", README)


def test_a_run_goes_on_to_the_epochs_that_it_began_with(reader: None, radiographs: Path) -> None:
    """--resume takes its settings from the state; a larger --epochs goes further."""
    provide(Path("m.pth"), radiographs)
    command = ["--data-dir", radiographs, "--checkpoint", "m.pth", "--resume", "--device", "cpu",
               "--bootstrap", "100"]
    for flags, epochs in (([], 1), (["--epochs", "2"], 2)):
        assert run_inside(*command, *flags) == 0
        assert len(torch.load("m.last.pth", weights_only=True)["state"]["history"]) == epochs
