"""Block 10: evaluate, predict, export: one answer an image in every mode, or why there is none."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from conftest import TINY, mura, run_command, run_inside, thin_networks
from PIL import Image, PngImagePlugin
from pydicom.dataset import FileMetaDataset
from scipy.ndimage import label as label_regions
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    recall_score,
    roc_auc_score,
)

PLAIN = ("--device", "cpu", "--precision", "fp32")
METRICS = ("auroc", "average_precision", "kappa", "accuracy", "sensitivity", "specificity", "f1",
           "ppv", "npv", "brier", "ece")
ROW = ["path", "prediction", "confidence", "probability", "error", "left", "top", "right", "bottom"]
SIDES = ROW[5:]
BAD = ("cut.png", "text.png", "zero.png", "empty", "missing.png", "pipe.png", "loop.png")

draw = mura.save_explanation  # figures take long, so most tests have blank ones

Ask = Callable[..., int]
Captured = pytest.CaptureFixture[str]


def blank_picture(*arguments: Any, **options: Any) -> bytes:
    """Return a PNG of one pixel, signed by this program, in the place of plots, which take long."""
    file, about = io.BytesIO(), PngImagePlugin.PngInfo()
    about.add_text("Software", f"{mura.PROGRAM} {mura.__version__}")
    Image.new("L", (1, 1)).save(file, format="png", pnginfo=about)
    return file.getvalue()


@pytest.fixture(scope="module", autouse=True)
def thin() -> Iterator[None]:
    """A resnet50 of a few channels, and no plots of reports: what they show is tested elsewhere."""
    with thin_networks(), pytest.MonkeyPatch.context() as patch:
        for name in [name for name in vars(mura) if name.startswith("plot_")]:
            patch.setattr(mura, name, blank_picture)
        yield


def fail(*arguments: Any, **options: Any) -> None:
    """Stand in for work that is not to begin."""
    pytest.fail("worked first")


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


def write_model(path: Path, content: dict[str, Any], **changes: Any) -> Path:
    """Write a model file with some of its content changed."""
    own = {key: value for key, value in content.items() if key not in ("format", "version")}
    mura.write_checkpoint(path, own | changes)
    return path


def read_square(content: dict[str, Any], image: Path) -> np.ndarray:
    """Return a model's input, (S, S) from 0 to 1."""
    pixels = mura.read_radiograph(image).pixels
    square = mura.resize_square(pixels, content["image_size"], content["resize"])
    return square.astype(np.float32) / 255


def sigmoid(logits: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(logits, float)))


def logit(probability: Any) -> Any:
    return np.log(np.asarray(probability, float) / (1 - np.asarray(probability, float)))


def read_batch(checkpoint: Path, images: Sequence[Path]) -> tuple[Any, torch.Tensor]:
    """Return a model's network and its input, (B, 3, S, S)."""
    content = torch.load(checkpoint, weights_only=True)
    network = mura.Network(content["model"])
    network.load_state_dict(content["state_dict"])
    inputs = np.stack([read_square(content, image) for image in images])[:, None]
    kind, mean, std = content["normalization"].values()
    if kind == "image":
        std = inputs.std((2, 3), ddof=1, keepdims=True)
        inputs = (inputs - inputs.mean((2, 3), keepdims=True)) / std
    else:
        inputs = (inputs - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    repeated = np.repeat(inputs, 4 - inputs.shape[1], 1)[:, :3].astype(np.float32)
    return network.eval(), torch.from_numpy(repeated)


def compute_logits(checkpoint: Path, images: Sequence[Path], tta: bool | None = None) -> np.ndarray:
    """Return the logits of images, step by step and without the program's Ensemble."""
    network, batch = read_batch(checkpoint, images)
    with torch.inference_mode():
        logits = network(batch)
        if torch.load(checkpoint, weights_only=True)["tta"] if tta is None else tta:
            logits = (logits + network(batch.flip(3))) / 2
    return logits.double().numpy()


def compute_probabilities(
    checkpoint: Path, images: Sequence[Path], tta: bool | None = None
) -> np.ndarray:
    """Return the calibrated probabilities of images."""
    temperature = torch.load(checkpoint, weights_only=True)["temperature"]
    return sigmoid(compute_logits(checkpoint, images, tta) / temperature)


def pool(probabilities: Sequence[float], temperature: float) -> float:
    """Return a study's probability: the mean of its views, its logit over T + (1 - T) / n."""
    n, mean = len(probabilities), float(np.mean(probabilities))
    return float(sigmoid(logit(mean) / (temperature + (1 - temperature) / n)))


# ---- what the tests look at ----


@pytest.fixture(scope="module")
def valid(phantoms: Path) -> list[Path]:
    return sorted((phantoms / "valid").rglob("*.png"))


@pytest.fixture(scope="module")
def trained_thin(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run whose val called for temperatures, by the real flow."""
    path = tmp_path_factory.mktemp("trained") / "thin.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mura, "fit_temperature", lambda *arguments, **options: 1.5)
        patch.setattr(mura, "fit_study_temperature", lambda *arguments, **options: 0.6)
        command = ["--data-dir", phantoms, "--checkpoint", path, *TINY, "--precision", "fp32"]
        assert run_inside(*command, "--threshold", "sens=0.9") == 0
    return path


def spread(
    path: Path, content: dict[str, Any], images: Sequence[Path], seed: int, **changes: Any
) -> Path:
    """Write a model that calls bright images abnormal, with probabilities on both sides of 1/2.

    Half of the channels of each stage see brightness, the others darkness, with random weights, and
    the head takes them for what they are: as of a trained network, all of them agree.
    """
    torch.manual_seed(seed)
    state = dict(content["state_dict"])
    for name, value in state.items():
        if value.dim() == 4:
            kinds = [torch.arange(count) < count // 2 for count in value.shape[:2]]
            weight = torch.rand_like(value) ** 8
            alike = (kinds[0][:, None] == kinds[1])[..., None, None]
            if value.shape[1] == 3:
                alike = 2.0 * kinds[0][:, None, None, None] - 1
            state[name] = weight * alike
    write_model(path, content, **changes, state_dict=state)
    network, features = read_batch(path, images)
    with torch.inference_mode():
        for stage in network.architecture.stages:
            features = network.run_stage(stage, features)
    cells = features.transpose(0, 1).flatten(1)
    state["backbone.layer4.bias"] = state["backbone.layer4.bias"] - cells.mean(1)
    state["head.weight"] = ((2.0 * (torch.arange(len(cells)) < len(cells) // 2) - 1) / cells.std(1))[None]
    write_model(path, content, **changes, state_dict=state)
    logits = compute_logits(path, images)
    scale = 1.5 * torch.load(path, weights_only=True)["temperature"] / logits.std()
    state["head.bias"] = (state["head.bias"] - float(np.median(logits))) * scale
    state["head.weight"] = state["head.weight"] * scale
    return write_model(path, content, **changes, state_dict=state)


@pytest.fixture(scope="module")
def pair(
    trained_thin: Path, valid: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Two models that differ in all that a model keeps for itself."""
    folder, content = tmp_path_factory.mktemp("pair"), torch.load(trained_thin, weights_only=True)
    grey = {"kind": "given", "mean": [0.3] * 3, "std": [0.25] * 3}
    return [
        spread(folder / "first.pth", content, valid, 1, threshold=0.45,
               threshold_source="auto on val"),
        spread(folder / "second.pth", content, valid, 2, threshold=0.6, image_size=96,
               resize="letterbox", tta=False, normalization=grey, temperature=0.8,
               study_temperature=1.4),
    ]


@pytest.fixture(scope="module")
def expected(pair: list[Path], valid: list[Path]) -> dict[str, np.ndarray]:
    """The probabilities of valid/ by each model, and by both."""
    first, second = (compute_probabilities(path, valid) for path in pair)
    assert np.abs(first - second).mean() > 0.05
    return {"first": first, "second": second, "both": (first + second) / 2}


@pytest.fixture(scope="module")
def evaluated(
    pair: list[Path], phantoms: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Stems of the evaluations of each model and of both."""
    folder = tmp_path_factory.mktemp("evaluated")
    stems = {name: folder / name for name in ("first", "second", "both")}
    for stem, models in zip(stems.values(), (pair[:1], pair[1:], pair), strict=True):
        command = ["--data-dir", phantoms, "--evaluate", "--checkpoint", *models, "--output", stem]
        assert run_inside(*command, *PLAIN, "--bootstrap", "100") == 0
    return stems


def report_of(stem: Path) -> dict[str, Any]:
    return dict(read_json(f"{stem}.report.json"))


def table_of(stem: Path, split: str = "test") -> list[dict[str, str]]:
    return read_rows(Path(f"{stem}.{split}.csv"))


def pool_table(stem: Path, temperature: float) -> dict[str, tuple[int, float]]:
    """Return label and probability of each study of a table of images."""
    views, label = defaultdict(list), {}
    for row in table_of(stem):
        views[row["study"]].append(float(row["probability"]))
        label[row["study"]] = int(row["label"])
    return {study: (label[study], pool(values, temperature)) for study, values in views.items()}


@pytest.fixture
def evaluate(
    pair: list[Path], phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Ask:
    """Run --evaluate of the first model in an empty folder; files are there as e.*."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, models: Sequence[Path] = pair[:1]) -> int:
        named = {"--data-dir": [phantoms], "--output": ["e"], "--checkpoint": models}
        given: list[object] = []
        for flag, values in named.items():
            if flag not in arguments and (flag != "--data-dir" or "--labels" not in arguments):
                given += [flag, *values]
        return run_inside("--evaluate", *arguments, *given, *PLAIN, "--bootstrap", "100")

    return run


@pytest.fixture
def ask(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Run --predict with the first model in an empty folder; figures are blank."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mura, "save_explanation", blank_picture)

    def run(*arguments: object) -> int:
        checkpoint = [] if "--checkpoint" in arguments else ["--checkpoint", pair[0]]
        return run_inside("--predict", *arguments, *checkpoint, *PLAIN, "--no-show")

    return run


@pytest.fixture(scope="module")
def study(valid: list[Path], expected: dict[str, np.ndarray]) -> Path:
    """The most abnormal study of valid/ to the first model whose first view is not the worst."""
    found = defaultdict(list)
    for path, probability in zip(valid, expected["first"], strict=True):
        found[path.parent].append(float(probability))
    chosen = {path: pool(p, 0.6) for path, p in found.items() if p[0] < max(p)}
    return max(chosen, key=lambda path: chosen[path])


@pytest.fixture(scope="module")
def image(valid: list[Path], expected: dict[str, np.ndarray]) -> Path:
    """The most abnormal image of valid/ to the first model."""
    return valid[int(expected["first"].argmax())]


@pytest.fixture(scope="module")
def normal_image(valid: list[Path], expected: dict[str, np.ndarray]) -> Path:
    """The most normal one."""
    return valid[int(expected["first"].argmin())]


@pytest.fixture
def bad(image: Path, tmp_path: Path) -> dict[str, Path]:
    """What cannot be predicted."""
    folder = tmp_path / "bad"
    (folder / "empty").mkdir(parents=True)
    (folder / "cut.png").write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    (folder / "text.png").write_text("this is no image")
    (folder / "zero.png").touch()
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    return {name: folder / name for name in BAD}


def error_line(printed: Any) -> str:
    """The one line on stderr."""
    assert "Traceback" not in printed.err
    (line,) = [line for line in printed.err.splitlines() if "not for diagnosis" not in line]
    return line


# ---- evaluation ----


def test_each_member_evaluates_with_its_own_preprocessing(
    evaluated: dict[str, Path], expected: dict[str, np.ndarray], valid: list[Path], phantoms: Path
) -> None:
    """Size, resize, normalisation, TTA and temperature: image by image as computed by hand."""
    for name, stem in evaluated.items():
        rows = {row["path"]: row for row in table_of(stem)}
        assert list(rows) == sorted(rows) and len(rows) == len(valid)
        for path, probability in zip(valid, expected[name], strict=True):
            row = rows[path.relative_to(phantoms).as_posix()]
            part, patient, study = path.relative_to(phantoms / "valid").parts[:3]
            assert float(row["probability"]) == pytest.approx(probability, abs=2e-6)
            assert (row["body_part"], row["patient"]) == (part, patient)
            assert row["study"] == f"{part}/{patient}/{study}"
            assert row["label"] == str(int(study.endswith("positive")))
            wrong = abs(int(row["label"]) - float(row["probability"]))
            assert float(row["absolute_error"]) == pytest.approx(wrong, abs=1e-12)
    assert list(row) == [
        "path", "body_part", "patient", "study", "label", "probability", "absolute_error"]


def test_prediction_equals_evaluation(
    ask: Ask, pair: list[Path], evaluated: dict[str, Path], phantoms: Path
) -> None:
    """Study by study, and view by view, for one model and for both."""
    for name, models in (("first", pair[:1]), ("both", pair)):
        arguments = ["--checkpoint", *models, "--output", "r.json", "--overwrite"]
        assert ask(phantoms / "valid", *arguments, "--batch-size", 1) == 0
        images = {row["path"]: float(row["probability"]) for row in table_of(evaluated[name])}
        temperature = {"first": 0.6, "both": (0.6 * 1.4) ** 0.5}[name]
        studies = pool_table(evaluated[name], temperature)
        rows = read_json("r.json")
        assert len(rows) == len(studies)
        for row in rows:
            folder = Path(row["path"])
            key = folder.relative_to(phantoms / "valid").as_posix()
            assert row["probability"] == pytest.approx(studies[key][1], abs=2e-6)
            assert len(row["views"]) == len(list(folder.iterdir()))
            for view in row["views"]:
                key = Path(view["path"]).relative_to(phantoms).as_posix()
                assert view["probability"] == pytest.approx(images[key], abs=2e-6)


def test_the_test_after_training_is_calibrated_and_equals_evaluation(
    trained_thin: Path, valid: list[Path], evaluate: Ask
) -> None:
    content = torch.load(trained_thin, weights_only=True)
    assert (content["temperature"], content["study_temperature"]) == (1.5, 0.6)
    stem = trained_thin.with_suffix("")
    found = [float(row["probability"]) for row in table_of(stem)]
    np.testing.assert_allclose(found, sigmoid(compute_logits(trained_thin, valid) / 1.5), atol=2e-6)
    assert evaluate(models=[trained_thin]) == 0
    first, second = report_of(stem), report_of(Path("e"))
    assert (first["levels"], first["body_parts"]) == (second["levels"], second["body_parts"])
    assert table_of(stem) == table_of(Path("e"))
    for report in (first, second):
        assert report["threshold"] == content["threshold"]
        assert report["threshold_source"] == "sens=0.9 on val"


def test_report_has_the_keys_of_the_contract(evaluated: dict[str, Path], pair: list[Path]) -> None:
    report = report_of(evaluated["both"])
    assert report["split"] == "valid" and report["checkpoints"] == list(map(str, pair))
    assert report["version"] == mura.__version__
    assert abs(datetime.now().astimezone() - datetime.fromisoformat(report["date"])).days == 0
    assert set(report["body_parts"]) == {"XR_FOREARM", "XR_HUMERUS"}
    for levels in (report["levels"], *report["body_parts"].values()):
        for level in ("image", "study"):
            assert {"count", "positives", *METRICS} <= set(levels[level])
            assert all(set(levels[level][name]) == {"value", "low", "high"} for name in METRICS)
    notes = " ".join(report["notes"])
    assert "--prevalence" in notes and "207 studies" not in notes  # these are no images of MURA


@pytest.mark.parametrize("name", ["first", "both"])
def test_report_agrees_with_its_table(name: str, evaluated: dict[str, Path]) -> None:
    """At the models' threshold; studies are pooled with the members' study temperature."""
    report = report_of(evaluated[name])
    temperature, threshold, source = {
        "first": (0.6, 0.45, "auto on val"),
        "both": ((0.6 * 1.4) ** 0.5, 0.525, "the mean of the models' own"),
    }[name]
    assert report["threshold"] == pytest.approx(threshold)
    assert report["threshold_source"] == source
    rows = table_of(evaluated[name])
    studies = pool_table(evaluated[name], temperature)
    for part in ("XR_FOREARM", "XR_HUMERUS", ""):
        levels = report["body_parts"][part] if part else report["levels"]
        chosen = [row for row in rows if part in (row["body_part"], "")]
        images = [(int(row["label"]), float(row["probability"])) for row in chosen]
        pooled = [value for key, value in studies.items() if key.startswith(part)]
        for level, pairs in (("image", images), ("study", pooled)):
            labels, probabilities = map(np.array, zip(*pairs, strict=True))
            predicted, found = probabilities > threshold, levels[level]
            assert (found["count"], found["positives"]) == (len(labels), labels.sum())
            values = {key: found[key]["value"] for key in METRICS}
            assert values["auroc"] == pytest.approx(roc_auc_score(labels, probabilities))
            brier = brier_score_loss(labels, probabilities)
            assert values["brier"] == pytest.approx(brier, abs=1e-6)
            assert values["kappa"] == pytest.approx(cohen_kappa_score(labels, predicted))
            assert values["sensitivity"] == pytest.approx(recall_score(labels, predicted))
            assert values["accuracy"] == pytest.approx(accuracy_score(labels, predicted))


@pytest.mark.parametrize("rule", ["0.3", "auto", "sens=0.95", "spec=0.95"])
def test_threshold_of_the_report_and_its_source(rule: str, evaluate: Ask) -> None:
    assert evaluate("--threshold", rule) == 0
    report = report_of(Path("e"))
    optimistic = [note for note in report["notes"] if "metrics at it are optimistic" in note]
    if rule == "0.3":
        assert (report["threshold"], report["threshold_source"], optimistic) == (0.3, "given", [])
        return
    assert report["threshold_source"] == f"{rule} here" and len(optimistic) == 1
    studies = pool_table(Path("e"), 0.6)
    labels, probabilities = map(np.array, zip(*studies.values(), strict=True))
    predicted = probabilities > report["threshold"]
    found = report["levels"]["study"]
    if rule == "auto":
        kappas = [cohen_kappa_score(labels, probabilities > t) for t in [0, *probabilities]]
        assert cohen_kappa_score(labels, predicted) == pytest.approx(max(kappas))
    else:
        name, of_class = {"sens": ("sensitivity", 1), "spec": ("specificity", 0)}[rule[:4]]
        rate = recall_score(labels, predicted, pos_label=of_class)
        assert found[name]["value"] == pytest.approx(rate) and rate >= 0.95


def test_differences_of_models_are_paired(evaluated: dict[str, Path], pair: list[Path]) -> None:
    report = report_of(evaluated["both"])
    alone = [report_of(evaluated[name]) for name in ("first", "second")]
    assert list(report["models"]) == list(map(str, pair))
    assert list(report["differences"]) == [str(pair[1]), "ensemble"]
    aurocs = [one["levels"]["study"]["auroc"]["value"] for one in alone]
    for path, value, one in zip(pair, aurocs, alone, strict=True):
        assert report["models"][str(path)]["study"]["auroc"]["value"] == pytest.approx(value)
        assert report["models"][str(path)]["image"]["brier"] == one["levels"]["image"]["brier"]
    threshold = report["threshold"]
    temperatures = {"first": 0.6, "second": 1.4, "both": (0.6 * 1.4) ** 0.5}
    studies = [pool_table(evaluated[name], value) for name, value in temperatures.items()]
    labels = np.array([label for label, _ in studies[0].values()])
    predicted = [np.array([p for _, p in found.values()]) > threshold for found in studies]
    kappas = [cohen_kappa_score(labels, found) for found in predicted]
    for other, name in ((1, str(pair[1])), (2, "ensemble")):
        found = report["differences"][name]
        assert set(found) == {"auroc", "kappa", "sensitivity", "specificity"}
        assert found["kappa"]["value"] == pytest.approx(kappas[other] - kappas[0])
    aurocs.append(report["levels"]["study"]["auroc"]["value"])
    for name, auroc in zip((str(pair[1]), "ensemble"), aurocs[1:], strict=True):
        assert report["differences"][name]["auroc"]["value"] == pytest.approx(auroc - aurocs[0])
    assert "models" not in alone[0] and "differences" not in alone[0]


def test_all_intervals_of_a_report_follow_seed_and_bootstrap() -> None:
    """Of the ensemble, of each model and of their differences; the values are those of the data."""
    random, names = np.random.default_rng(0), np.array([f"p{i:02}" for i in range(24)])
    label, part = np.arange(24) % 2, np.full(24, "XR_HAND")
    given = (names, part, names, names, label)
    members = [mura.Predictions(*given, (label + 2 * random.random(24)) / 3) for _ in range(2)]
    models = [
        mura.LoadedModel(Path(name), mura.Network("resnet50"), mura.Normalization("image"), 64,
                         "stretch", tta=False, body_parts=("XR_HAND",),
                         patients={"train": [], "val": []})
        for name in ("a.pth", "b.pth")]
    scan = mura.Scan("valid", Path("valid"), (), ())

    def report(*flags: str) -> Any:
        config = mura.parse_options(["--data-dir", "d", "--evaluate", *flags])
        return mura.make_report(config, mura.Ensemble(models, mura.CPU), scan, members, [])[0]

    asked = (("100", "1"), ("100", "2"), ("120", "1"))
    reports = [report("--bootstrap", count, "--seed", seed) for count, seed in asked]
    for keys in (("levels", "study"), ("models", "b.pth", "image"), ("differences", "b.pth")):
        one, *others = ([reduce(dict.__getitem__, keys, found)[name] for name in ("auroc", "kappa")]
                        for found in reports)
        for other in others:
            assert [entry["value"] for entry in one] == [entry["value"] for entry in other]
            assert one != other, keys


def test_the_report_of_other_data_is_not_replaced(
    evaluate: Ask, pair: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    """Neither of fewer body parts; but of the same data and model by another path it is."""
    assert evaluate() == 0
    before = Path("e.report.json").read_bytes()
    assert evaluate("--tasks", "HUMERUS") == mura.EXIT_USAGE
    assert "it is of another split, model, data or options" in error_line(capsys.readouterr())
    assert Path("e.report.json").read_bytes() == before
    assert evaluate(models=[Path(os.path.relpath(pair[0]))]) == 0
    assert evaluate("--tasks", "HUMERUS", "--overwrite") == 0


def test_the_report_of_another_table_is_not_replaced(
    evaluate: Ask, valid: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    """Nor that of a table that was changed, or of one with its name in another folder."""
    rows = [f"{path},{int('positive' in path.parent.name)}" for path in valid]

    def write(table: str, lines: list[str]) -> str:
        Path(table).parent.mkdir(exist_ok=True)
        Path(table).write_text("path,label\n" + "\n".join(lines))
        return table

    first = write("t.csv", rows)
    assert evaluate("--labels", first) == evaluate("--labels", first) == 0
    before = Path("e.report.json").read_bytes()
    other = [f"{rows[0][:-1]}{1 - int(rows[0][-1])}", *rows[1:]]
    for table, lines in (("t.csv", rows[2:]), ("t.csv", other), ("s/t.csv", rows[2:])):
        assert evaluate("--labels", write(table, lines)) == mura.EXIT_USAGE
        assert "it is of another split, model, data or options" in capsys.readouterr().err
    assert evaluate("--labels", write("s/t.csv", rows), "--data-dir", "s") == mura.EXIT_USAGE
    assert Path("e.report.json").read_bytes() == before


def test_the_report_of_a_model_that_is_named_otherwise_is_its_own(
    evaluate: Ask, pair: list[Path], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a relative path, or by a link; another folder's model of that name is another one."""
    assert evaluate() == 0
    monkeypatch.setattr(mura, "evaluate_ensemble", stop)
    Path("link.pth").symlink_to(pair[0])
    capsys.readouterr()
    for name in (os.path.relpath(pair[0]), "link.pth"):
        assert evaluate(models=[Path(name)]) == mura.EXIT_USAGE
        assert "it began" in error_line(capsys.readouterr())
    shutil.copy(pair[1], pair[0].name)
    assert evaluate(models=[Path(pair[0].name)]) == mura.EXIT_USAGE
    assert "--overwrite" in error_line(capsys.readouterr())


def test_the_report_of_another_split_or_ensemble_is_not_replaced(
    evaluate: Ask, pair: list[Path], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate() == evaluate() == 0  # its own may be
    before = Path("e.report.json").read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(mura, "decode_scan", fail)
        for arguments, models in ((["--split", "train"], pair[:1]), ([], pair), ([], pair[1:])):
            assert evaluate(*arguments, models=models) == mura.EXIT_USAGE
            line = error_line(capsys.readouterr())
            assert "e.report.json" in line and "--overwrite" in line and "--output" in line
        Path("e.report.json").write_text("somebody's")
        assert evaluate() == mura.EXIT_USAGE
    assert Path("e.report.json").read_text() == "somebody's"
    Path("e.report.json").write_bytes(before)
    assert evaluate("--output", "f", "--split", "train") == 0
    assert Path("f.train.csv").exists() and not Path("f.test.csv").exists()
    assert evaluate("--overwrite", models=pair) == 0
    assert report_of(Path("e"))["checkpoints"] == list(map(str, pair))


@pytest.mark.parametrize("name", ["e.test.csv", "e.report.png", "gallery/false_positives_1.png"])
def test_evaluation_replaces_nothing_foreign(
    name: str, evaluate: Ask, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mura, "gallery_sheet", blank_picture)
    Path("gallery").mkdir()
    Path(name).write_text("somebody's")
    flags = ["--figure", "gallery"] if "gallery" in name else []
    assert evaluate(*flags) == mura.EXIT_USAGE
    assert name.partition("/")[0] in error_line(capsys.readouterr())
    assert Path(name).read_text() == "somebody's" and not Path("e.report.json").exists()
    assert evaluate(*flags, "--overwrite") == 0
    assert Path(name).read_bytes().startswith(b"path," if name.endswith("csv") else b"\x89PNG")


@pytest.mark.parametrize("name", mura.GALLERY)
@pytest.mark.parametrize("page", [1, 2])
def test_no_sheet_of_a_gallery_replaces_a_foreign_picture(
    name: str, page: int, evaluate: Ask, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mura, "load_ensemble", fail)
    sheet = Path("gallery") / f"{name}_{page}.png"
    sheet.parent.mkdir()
    sheet.write_text("somebody's")
    assert evaluate("--figure", "gallery") == mura.EXIT_USAGE
    assert f"--figure {sheet}: is there and not" in error_line(capsys.readouterr())


def test_sheets_of_an_earlier_gallery_go(
    evaluate: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be taken for further sheets of this one; what is not of this program stays."""
    monkeypatch.setattr(mura, "gallery_sheet", blank_picture)
    gallery = Path("gallery")
    gallery.mkdir()
    for name in ("false_negatives_2.png", "right_2.png"):
        (gallery / name).write_bytes(blank_picture())
    (gallery / "false_positives_2.png").write_text("somebody's")
    (gallery / "mine.png").write_bytes(blank_picture())
    assert evaluate("--figure", "gallery", "--overwrite") == 0
    left = {path.name for path in gallery.iterdir()}
    assert left >= {"mine.png", "false_positives_2.png", "right_1.png"}
    assert not left & {"false_negatives_2.png", "right_2.png"}


def test_an_image_that_has_gone_is_left_out_of_the_gallery(
    evaluate: Ask, phantom_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a folder that is tidied while the report is made."""
    sizes: list[int] = []
    report, gone = mura.write_report, next((phantom_copy / "valid").rglob("image1.png"))

    def tidy(*arguments: Any) -> None:
        report(*arguments)
        gone.unlink()

    def count(tiles: Sequence[Any], *_: Any) -> bytes:
        sizes.extend(pixels.size for pixels, *_ in tiles)
        return blank_picture()

    monkeypatch.setattr(mura, "write_report", tidy)
    monkeypatch.setattr(mura, "gallery_sheet", count)
    monkeypatch.setattr(mura, "SHEET_TILES", 100)  # all images
    assert evaluate("--data-dir", phantom_copy, "--figure", "gallery") == 0
    assert sizes and all(sizes) and not gone.exists()


def test_a_gallery_of_two_classes_on_one_scale_is_refused(evaluate: Ask, capsys: Captured) -> None:
    assert evaluate("--figure", "gallery", "--cam-class", "predicted") == mura.EXIT_USAGE
    assert "--cam-class predicted" in error_line(capsys.readouterr()) and not os.listdir()
    assert evaluate("--figure", "gallery", "--cam-class", "normal") == 0


def test_the_gallery_is_worst_first_with_heatmaps(
    evaluate: Ask, evaluated: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 12 on a sheet; each group in order, and every picture with the map of its pixels."""
    sheets, draw_sheet = [], mura.gallery_sheet

    def spy(tiles: Any, heading: str, *rest: Any) -> bytes:
        sheets.append((list(tiles), heading))
        return blank_picture() if len(sheets) > 1 else draw_sheet(tiles, heading, *rest)

    monkeypatch.setattr(mura, "gallery_sheet", spy)
    assert evaluate("--figure", "gallery") == 0
    images = {row["path"]: row for row in table_of(evaluated["first"])}
    seen = defaultdict(list)
    for tiles, heading in sheets:
        assert 0 < len(tiles) <= 12
        for pixels, heat, caption in tiles:
            assert pixels.ndim == 2 and heat.min() >= 0
            assert heat.shape == pixels.shape  # phantoms are small: the map is at their pixels
            where, numbers = caption.split("\n")
            (row,) = [row for path, row in images.items() if path.endswith(where)]
            probability = float(row["probability"])
            assert numbers == (f"label {mura.CLASSES[int(row['label'])]}, p "
                               f"{mura.percent(probability)}")
            assert (heat.max() > 0) == (probability > 0.45)
            seen[heading.rpartition(" (")[0]].append((int(row["label"]), probability))
    false_positives, false_negatives, least, right = seen.values()
    all_rows = [(int(row["label"]), float(row["probability"])) for row in images.values()]
    normal, abnormal = ([row for row in all_rows if row[0] == label] for label in (0, 1))
    highest = sorted(normal, key=lambda row: -row[1])
    lowest = sorted(abnormal, key=lambda row: row[1])
    assert false_positives == [row for row in highest if row[1] > 0.45][:24]
    assert false_negatives == [row for row in lowest if row[1] <= 0.45][:24]
    assert least == sorted(all_rows, key=lambda row: abs(row[1] - 0.45))[:12]
    assert right and all(found[0] == (found[1] > 0.45) for found in right)
    names = sorted(path.name for path in Path("gallery").iterdir())
    assert len(names) == len(sheets) and Image.open(f"gallery/{names[1]}").width > 600
    assert [heading.lower() for heading in seen] == [
        "most confident false positives", "most confident false negatives", "least certain",
        "right, for comparison"]


def test_the_gallery_follows_a_threshold_that_was_found(
    evaluate: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the model's own: groups, and which pictures have heat, are by that of the report."""
    found = defaultdict(list)

    def spy(tiles: Any, heading: str, *rest: Any) -> bytes:
        for _, heat, caption in tiles:
            found[heading.rpartition(" (")[0]].append((caption, heat.max() > 0))
        return blank_picture()

    monkeypatch.setattr(mura, "gallery_sheet", spy)
    assert evaluate("--figure", "gallery", "--threshold", "sens=0.99") == 0
    threshold, rows = report_of(Path("e"))["threshold"], table_of(Path("e"))
    assert abs(threshold - 0.45) > 0.05
    normal = [row for row in rows if row["label"] == "0" and float(row["probability"]) > threshold]
    positives = found["Most confident false positives"]
    assert len(positives) == min(24, len(normal)) > 0
    assert all(hot for _, hot in positives)
    assert not any(hot for _, hot in found["Most confident false negatives"])


def test_labels_of_a_table_are_evaluated_as_those_of_folders(
    evaluate: Ask, evaluated: dict[str, Path], phantoms: Path, capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full table gives the report of valid/; what is missing in one is said."""
    rows = table_of(evaluated["first"])
    lines = [f"{r['path']},{r['label']},{r['patient']},{r['study']},{r['body_part']}" for r in rows]
    Path("full.csv").write_text("\n".join(["path,label,patient,study,body_part", *lines]))
    assert evaluate("--labels", "full.csv", "--data-dir", phantoms) == 0
    report, twin = report_of(Path("e")), report_of(evaluated["first"])
    assert report["split"] == "full.csv" and report["levels"] == twin["levels"]
    found = {row["path"]: row["probability"] for row in table_of(Path("e"))}
    assert found == {row["path"]: row["probability"] for row in rows}
    assert evaluate("--labels", "full.csv", "--data-dir", phantoms) == 0, "its own report"
    assert evaluate() == mura.EXIT_USAGE, "that of another set"
    capsys.readouterr()

    monkeypatch.setattr(mura, "gallery_sheet", blank_picture)
    root = Path("scans")  # relative paths start beside the table
    root.mkdir()
    words = {"0": "normal", "1": "abnormal"}
    lines = [f"{i}.png,{words[row['label']]}" for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        shutil.copy(phantoms / row["path"], root / f"{i}.png")
    (root / "cut.png").write_bytes((root / "0.png").read_bytes()[:400])
    (root / "short.csv").write_text("\n".join(["path,label", *lines, "cut.png,0"]))
    flags = ["--labels", "scans/short.csv", "--output", "f", "--on-bad-image", "skip"]
    assert evaluate(*flags, "--figure", "gallery") == 0
    report, printed = report_of(Path("f")), capsys.readouterr()
    assert list(report["bad_images"]) == ["cut.png"]
    for column in ("patient", "study"):
        assert f"no {column} column" in printed.err
        assert any(f"no {column} column" in note for note in report["notes"])
    assert "body part" not in printed.err
    before, after = (
        sorted(float(row["probability"]) for row in table) for table in (rows, table_of(Path("f"))))
    np.testing.assert_allclose(after, before, atol=2e-6)
    assert report["levels"]["study"]["count"] == len(rows)
    assert len(list(Path("gallery").iterdir())) >= 3


def test_patients_of_training_and_unknown_body_parts_are_warned_about(
    evaluate: Ask, pair: list[Path], phantoms: Path, capsys: Captured, tmp_path: Path
) -> None:
    assert evaluate("--split", "train") == 0
    err = capsys.readouterr().err
    known = torch.load(pair[0], weights_only=True)["patients"]
    total = len({path.name for path in (phantoms / "train").glob("*/*")})
    text = (f"{len(known['train'])} of the {total} patients of train were trained on, "
            f"{len(known['val'])} used for validation")
    assert text in err and "leakage" in err
    assert any(text in note for note in report_of(Path("e"))["notes"])
    found = {row["path"] for row in table_of(Path("e"), "train")}
    images = (phantoms / "train").rglob("*.png")
    assert found == {path.relative_to(phantoms).as_posix() for path in images}
    content = torch.load(pair[0], weights_only=True)
    other = write_model(tmp_path / "m.pth", content, body_parts=["XR_HUMERUS"])
    assert evaluate("--output", "f", models=[other]) == 0
    err = capsys.readouterr().err
    assert err.count("XR_FOREARM") == 1 and "XR_HUMERUS)" not in err and "unreliable" in err
    assert any("XR_FOREARM" in note for note in report_of(Path("f"))["notes"])
    assert evaluate("--output", "g", "--tasks", "humerus", models=[other]) == 0
    assert "unreliable" not in capsys.readouterr().err
    assert {row["body_part"] for row in table_of(Path("g"))} == {"XR_HUMERUS"}


def test_patients_of_each_member_are_warned_about(
    evaluate: Ask, pair: list[Path], valid: list[Path], capsys: Captured, tmp_path: Path
) -> None:
    content = torch.load(pair[1], weights_only=True)
    seen = {"train": [], "val": [valid[0].parts[-3]]}
    second = write_model(tmp_path / "m.pth", content, patients=seen)
    assert evaluate(models=[pair[0], second]) == 0
    err = capsys.readouterr().err
    assert err.count("leakage") == 1
    assert f"{second}: 0 of the " in err and "were trained on, 1 used for validation" in err


def test_images_that_are_also_in_training_are_named_and_left_out_on_request(
    evaluate: Ask, phantom_copy: Path, capsys: Captured
) -> None:
    """By the test after training, and by --evaluate where training has decoded its images."""
    for table in phantom_copy.glob("*.csv"):
        table.unlink()
    source = next((phantom_copy / "train").rglob("image1.png"))
    target = next((phantom_copy / "valid").rglob("image1.png")).with_name("image9.png")
    shutil.copy(source, target)
    name = target.relative_to(phantom_copy / "valid").as_posix()
    here = ["--data-dir", phantom_copy]
    assert run_inside(*here, "--checkpoint", "m.pth", *TINY) == 0
    assert name in capsys.readouterr().err
    assert any(name in note for note in report_of(Path("m"))["notes"])
    cases = (([], True, "are kept"), (["--drop-duplicates"], False, "were left out"))
    for flags, kept, done in cases:
        if flags:
            assert evaluate(*here, *flags) == mura.EXIT_USAGE, "what is left out is another test"
            flags = [*flags, "--overwrite"]
        capsys.readouterr()
        assert evaluate(*here, *flags) == 0
        err = capsys.readouterr().err
        assert name in err and f"1 duplicate images of valid {done}" in err
        assert any(name in note for note in report_of(Path("e"))["notes"])
        assert (f"valid/{name}" in {row["path"] for row in table_of(Path("e"))}) == kept


def test_images_of_training_that_are_not_decoded_are_no_duplicates(
    evaluate: Ask, capsys: Captured
) -> None:
    """As where a model came without its cache: that they were not compared is said."""
    asked = ("--cache-dir", "cache", "--tasks", "HUMERUS")
    assert evaluate(*asked) == 0
    err = capsys.readouterr().err
    assert "pixel-identical" not in err and "images of train/ are not in the cache" in err
    assert not any("pixel-identical" in note for note in report_of(Path("e"))["notes"])
    for _ in range(2):  # decoded, then from the cache
        assert evaluate(*asked, "--drop-duplicates", "--output", "d") == 0
        assert "not in the cache" not in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    ("--threshold", "auto"), ("--threshold", "0.3"), ("--no-tta",), ("--tta",),
])
def test_the_report_of_other_options_is_not_replaced(
    flags: Sequence[str], evaluate: Ask, capsys: Captured
) -> None:
    """As that of the test after training by one whose threshold was chosen on the same studies."""
    assert evaluate() == 0
    before = Path("e.report.json").read_bytes()
    assert evaluate(*flags) == mura.EXIT_USAGE
    assert "data or options" in error_line(capsys.readouterr())
    assert Path("e.report.json").read_bytes() == before
    assert evaluate(*flags, "--output", "other") == evaluate(*flags, "--output", "other") == 0


@pytest.mark.parametrize("fault", ["empty", "of other body parts", "with a damaged list"])
def test_a_train_folder_that_cannot_be_searched_costs_no_report(
    fault: str, evaluate: Ask, phantom_copy: Path
) -> None:
    """It is not what is evaluated: its images only cannot be found again in valid/."""
    train, flags = phantom_copy / "train", ["--tasks", "HUMERUS"]
    shutil.rmtree(train / "XR_HUMERUS")
    if fault == "empty":
        shutil.rmtree(train)
        train.mkdir()
    if fault == "with a damaged list":
        (phantom_copy / "train_image_paths.csv").write_text("no/paths/of/train\n" * 2)
    assert evaluate("--data-dir", phantom_copy, *flags) == 0
    assert report_of(Path("e"))["levels"]["image"]["count"] > 0


def test_prevalence_is_in_report_and_rows(
    evaluate: Ask, ask: Ask, image: Path, capsys: Captured
) -> None:
    assert evaluate("--prevalence", "0.1") == 0
    report, row = report_of(Path("e")), table_of(Path("e"))[3]

    def corrected(p: float) -> float:
        return p * 0.1 / (p * 0.1 + (1 - p) * 0.9)

    value = corrected(float(row["probability"]))
    assert float(row["probability_at_prevalence"]) == pytest.approx(value)
    found = report["levels"]["study"]
    hits, alarms = 0.1 * found["sensitivity"]["value"], 0.9 * (1 - found["specificity"]["value"])
    assert found["ppv_at_prevalence"]["value"] == pytest.approx(hits / (hits + alarms))
    assert report["prevalence"] == 0.1
    capsys.readouterr()
    assert ask(image, "--prevalence", "0.1", "--output", "r.json", "--figure", "x.png") == 0
    (row,) = read_json("r.json")
    assert row["probability_at_prevalence"] == pytest.approx(corrected(row["probability"]))
    shown = mura.percent(corrected(row["probability"]))
    assert f"{shown} at --prevalence" in capsys.readouterr().out


def test_what_failed_has_no_probability_at_prevalence(
    ask: Ask, image: Path, bad: dict[str, Path]
) -> None:
    """Its row is there, and the others are."""
    flags = ("--prevalence", "0.1", "--output", "r.json")
    assert ask(bad["cut.png"], image, *flags) == mura.EXIT_SOME_FAILED
    failed, answered = read_json("r.json")
    assert failed["error"] and not failed.get("probability_at_prevalence")
    assert 0 < answered["probability_at_prevalence"] < answered["probability"]


@pytest.mark.parametrize(("flag", "averaged"), [("--tta", True), ("--no-tta", False)])
def test_tta_flag_overrules_the_models(
    flag: str, averaged: bool, ask: Ask, evaluate: Ask, pair: list[Path], valid: list[Path]
) -> None:
    values = np.mean([compute_probabilities(path, valid, averaged) for path in pair], axis=0)
    assert evaluate(flag, models=pair) == 0
    found = [float(row["probability"]) for row in table_of(Path("e"))]
    np.testing.assert_allclose(found, values, atol=2e-6)
    assert ask(*valid[:3], flag, "--checkpoint", *pair, "--output", "r.json") == 0
    found = [row["probability"] for row in read_json("r.json")]
    np.testing.assert_allclose(found, values[:3], atol=2e-6)


# ---- the command that trains ----


def test_training_says_what_is_best_and_what_comes_next(
    phantom_copy: Path, tmp_path: Path, capsys: Captured
) -> None:
    """Without valid/ there is no test, which is said."""
    shutil.rmtree(phantom_copy / "valid")
    model = tmp_path / "my models" / "m.pth"
    assert run_inside("--data-dir", phantom_copy, "--checkpoint", model, *TINY) == 0
    printed = capsys.readouterr()
    assert "no valid/" in printed.err and not model.with_name("m.report.json").exists()
    best, following = printed.out.splitlines()[-2:]
    assert best == f"best model: {model} (epoch 1 of 1, by val accuracy)"
    assert following.endswith(f" {sys.argv[0]} --predict IMAGE --checkpoint '{model}'")


def test_a_table_of_labels_is_trained_on(phantoms: Path, tmp_path: Path, capsys: Captured) -> None:
    """Patients of the table are split; what was trained on is known when it is evaluated."""
    table, model = tmp_path / "t.csv", tmp_path / "m.pth"
    paths = sorted((phantoms / "train").rglob("*.png"))
    lines = ["path,label,patient,study"]
    for path in paths:
        label = "abnormal" if "positive" in path.parent.name else "normal"
        lines.append(f"{path.relative_to(phantoms)},{label},{path.parts[-3]},{path.parent}")
    table.write_text("\n".join(lines))
    asked = ["--labels", table, "--data-dir", phantoms, "--checkpoint", model]
    assert run_inside(*asked, *TINY) == 0
    split = read_rows(tmp_path / "m.split.csv")
    assert {row["patient"] for row in split} == {path.parts[-3] for path in paths}
    assert {row["split"] for row in split} == {"train", "val"}
    assert not (tmp_path / "m.report.json").exists()
    capsys.readouterr()
    assert run_inside("--evaluate", *asked, *PLAIN, "--bootstrap", "100") == 0
    trained = sum(row["split"] == "train" for row in split)
    err = capsys.readouterr().err
    assert f"{trained} of the {len(split)} patients of t.csv were trained on" in err
    assert len(read_rows(tmp_path / "m.test.csv")) == len(paths)


def test_what_a_table_lacks_is_told_before_training(
    valid: list[Path], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without patients, images of one may be on both sides: a leak that nothing else shows."""
    monkeypatch.setattr(mura, "make_trainer", stop)
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["path,label", *(f"{p},{i % 2}" for i, p in enumerate(valid))]))
    asked = ["--labels", table, "--checkpoint", tmp_path / "m.pth", *TINY]
    assert run_inside(*asked) == mura.EXIT_USAGE
    told = capsys.readouterr().err.splitlines()
    assert [line.partition("no ")[2].partition(":")[0] for line in told[:-1]] == [
        "patient column", "study column"]


def test_data_that_cannot_be_trained_or_tested_on_is_refused_before_the_work(
    phantom_copy: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in phantom_copy.glob("*.csv"):
        table.unlink()
    monkeypatch.setattr(mura, "decode_scan", fail)
    asked = ["--data-dir", phantom_copy, "--checkpoint", tmp_path / "m.pth", *TINY]
    shutil.rmtree(phantom_copy / "valid")
    (phantom_copy / "valid").mkdir()
    assert run_inside(*asked) == mura.EXIT_USAGE
    assert "valid" in error_line(capsys.readouterr())
    (phantom_copy / "valid").rmdir()
    for study in (phantom_copy / "train").rglob("study*_positive"):
        shutil.rmtree(study)
    assert run_inside(*asked) == mura.EXIT_USAGE
    assert "abnormal" in error_line(capsys.readouterr())
    assert not (tmp_path / "m.pth").exists()


def test_weights_of_another_model_bring_their_architecture(
    phantoms: Path, pair: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    asked = ["--data-dir", phantoms, "--checkpoint", tmp_path / "m.pth", *TINY[2:],
             "--weights", pair[0]]
    assert run_inside(*asked, "--model", "densenet169") == mura.EXIT_USAGE
    assert "is a resnet50, not a densenet169" in capsys.readouterr().err.splitlines()[-1]
    assert run_inside(*asked, "--resize", "letterbox") == 0
    found = torch.load(tmp_path / "m.pth", weights_only=True)
    assert (found["model"], found["resize"], found["image_size"]) == ("resnet50", "letterbox", 64)


def test_patients_in_any_bytes_are_trained_on_and_evaluated(
    phantom_copy: Path, tmp_path: Path
) -> None:
    """A copy from an old system may have names that are not UTF-8."""
    for split in ("train", "valid"):
        patient = sorted((phantom_copy / split).rglob("patient*"))[0]
        patient.rename(os.fsdecode(bytes(patient.parent) + b"/patient\xe9"))
    for table in phantom_copy.glob("*.csv"):
        table.unlink()
    asked = ["--data-dir", phantom_copy, "--checkpoint", tmp_path / "m.pth"]
    assert run_inside(*asked, *TINY) == 0
    assert run_inside(*asked, "--evaluate", *PLAIN, "--bootstrap", "100") == 0
    assert any("patient\udce9" in row["path"] for row in read_rows(tmp_path / "m.test.csv"))


# ---- numbers that are not finite ----


@pytest.fixture(scope="module")
def overflowing(pair: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with finite weights whose output for all but a black image is not finite."""
    content = torch.load(pair[0], weights_only=True)
    state = dict(content["state_dict"])
    state["backbone.conv1.weight"] = torch.full_like(state["backbone.conv1.weight"], 3e38)
    black_is_zero = {"kind": "given", "mean": [0.0] * 3, "std": [1.0] * 3}
    path = tmp_path_factory.mktemp("overflowing") / "m.pth"
    return write_model(path, content, state_dict=state, normalization=black_is_zero)


def test_an_output_that_is_not_finite_is_that_inputs_error(
    ask: Ask, image: Path, overflowing: Path, pair: list[Path], capsys: Captured
) -> None:
    Image.new("L", (64, 64)).save("black.png")
    models = ["--checkpoint", overflowing, pair[0]]
    assert ask("black.png", image, *models, "--output", "r.json", "--save-cam", "m.npz") == 3
    good, failed = read_json("r.json")
    assert good["prediction"] and not good["error"]
    assert "not finite" in failed["error"]
    assert [failed[key] for key in ("prediction", "confidence", "probability")] == [None] * 3
    assert np.load("m.npz").files == ["black.png"]
    printed = capsys.readouterr()
    assert f"{image}: the model's output is not finite" in printed.err
    assert str(image) not in printed.out
    assert ask(image, *models, "--output", "r.json") == mura.EXIT_FAILED
    assert not list(Path().glob("*_heatmap.png"))


def test_an_evaluation_with_an_output_that_is_not_finite_prints_no_metric(
    evaluate: Ask, overflowing: Path, pair: list[Path], capsys: Captured
) -> None:
    assert evaluate(models=[pair[0], overflowing]) == mura.EXIT_FAILED
    printed = capsys.readouterr()
    line = error_line(printed)
    assert "not finite" in line and "image1.png" in line and "AUROC" not in printed.out
    assert not list(Path().glob("e.*"))


# ---- which inputs ----


def plant(root: Path, image: Path, *names: str) -> Path:
    """Copy an image to several places."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, root / name)
    return root


def collected(*paths: Path, root: Path) -> list[tuple[str, list[str], str]]:
    """Collect inputs as path, files and error, relative to a folder."""
    found = []
    for item in mura.collect_inputs(paths):
        path, *files = (p.relative_to(root).as_posix() for p in (item.path, *item.files))
        found.append((path, files, item.error))
    return found


def test_study_folders_pool_and_other_folders_do_not(tmp_path: Path, image: Path) -> None:
    study = [f"p1/study1_positive/image{i}.png" for i in (2, 10)]
    plain = ["loose/a.jpg", "loose/b.png", "studyroom/x.png", "wards/study2/1.png"]
    plant(tmp_path, image, *study, *plain)
    found = collected(tmp_path, root=tmp_path)
    assert sorted(found) == sorted([
        *[(name, [name], "") for name in plain[:3]], ("p1/study1_positive", study, ""),
        ("wards/study2", plain[3:], "")])


def test_order_is_as_given_and_natural_within(tmp_path: Path, image: Path) -> None:
    studies = [f"in/patient{i}/study1/image1.png" for i in (10, 9, 100)]
    plant(tmp_path, image, *studies, "z.png", "a.png")
    given = [tmp_path / name for name in ("z.png", "in", "a.png", "gone.png", "a.png")]
    assert [path for path, _, _ in collected(*given, root=tmp_path)] == [
        "z.png", "in/patient9/study1", "in/patient10/study1", "in/patient100/study1", "a.png",
        "gone.png", "a.png"]


def test_content_decides_in_folders_and_what_is_left_out_is_counted_once(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    root = plant(tmp_path, image, "in/scan", "in/x.dat", "in/image1.png/inner.png",
                 "in/.hidden.png", "in/.thumbs/y.png", "in/study1/._image1.png", "in/study1/a.png",
                 "in/study1/b.png")
    for name in ("in/notes.png", "in/Thumbs.db", "in/study1/list.csv"):
        (root / name).write_text("no image")
    os.mkfifo(root / "in/pipe.png")
    found = {path: len(files) for path, files, _ in collected(root / "in", root=root)}
    assert found == {"in/scan": 1, "in/x.dat": 1, "in/image1.png/inner.png": 1, "in/study1": 2,
                     "in/notes.png": 1, "in/pipe.png": 1}, "what is named as an image is one"
    line = error_line(capsys.readouterr())
    assert f"{root / 'in'}: 2 of the files are no images, left out" in line
    monkeypatch.chdir(root / "in" / "study1")
    (item,) = mura.collect_inputs([Path()])
    assert len(item.files) == 2, "a study folder is known from within"


def test_a_dicom_report_beside_the_images_is_left_out(
    tmp_path: Path, image: Path, capsys: Captured
) -> None:
    """Its suffix is an image's, but it is whole and holds none: no input, so no failure."""
    root = plant(tmp_path, image, "in/study1/a.png")
    report = new_dicom(pydicom.uid.BasicTextSRStorage)
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID
    report.save_as(root / "in/study1/report.dcm", enforce_file_format=True)
    assert collected(root / "in", root=root) == [("in/study1", ["in/study1/a.png"], "")]
    line = error_line(capsys.readouterr())
    assert "1 of the files are no images, left out, such as report.dcm" in line


def test_linked_folders_are_searched_once_and_closed_ones_reported(
    ask: Ask, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    plant(tmp_path, image, "top/x.png", "elsewhere/study1/image1.png", "top/closed/y.png")
    (tmp_path / "top" / "ward").mkdir()
    (tmp_path / "top/ward/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "top", target_is_directory=True)
    scan = os.scandir

    def scandir(folder: Any = ".") -> Any:
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert ask(tmp_path / "top", "--output", "r.csv") == mura.EXIT_SOME_FAILED
    rows = {row["path"].removeprefix(f"{tmp_path}/"): row for row in read_rows(Path("r.csv"))}
    assert set(rows) == {"top/x.png", "top/ward/link/study1", "top/closed"}
    assert "Permission denied" in rows["top/closed"]["error"]
    assert f"{tmp_path / 'top' / 'closed'}: " in capsys.readouterr().err


def new_dicom(kind: str) -> pydicom.Dataset:
    """Return an empty data set with its file meta."""
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = kind
    dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    return dataset


def write_dicom(path: Path, pixels: np.ndarray, study: str, part: str) -> Path:
    """Write a DICOM file of one patient with a name."""
    header = new_dicom(pydicom.uid.ComputedRadiographyImageStorage)
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID
    header.StudyInstanceUID, header.BodyPartExamined = study, part
    header.PatientName, header.PatientBirthDate = "Doe^Jane", "19700102"
    header.Rows, header.Columns = pixels.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.PixelRepresentation = 0
    header.BitsAllocated, header.BitsStored, header.HighBit = 8, 8, 7
    header.PixelData = pixels.tobytes() + b"\0" * (pixels.size % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)
    return path


def test_a_cd_of_dicom_files_without_suffix_is_grouped_by_examination(
    ask: Ask, study: Path, image: Path, pair: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    """As studies pool; results carry the UID, and no name or birth date; DICOMDIR is no image."""
    views = sorted(study.glob("*.png"))
    cd = tmp_path / "CD"
    pixels = [np.asarray(Image.open(path)) for path in views]
    for i, content in enumerate(pixels):
        write_dicom(cd / f"DICOM/S{i}/IM{i}", content, "1.2.3.1", "FOREARM")
    write_dicom(cd / "DICOM/S0/IM9", np.asarray(Image.open(image)), "1.2.3.2", "KNEE")
    shutil.copy(image, cd / "page.png")
    (cd / "autorun.inf").write_text("[autorun]")
    directory = new_dicom(pydicom.uid.MediaStorageDirectoryStorage)
    directory.FileSetID = "CD"
    directory.save_as(cd / "DICOMDIR", enforce_file_format=True)

    assert ask(cd, "--output", "r.json") == 0
    printed, rows = capsys.readouterr(), {row["study_uid"]: row for row in read_json("r.json")}
    assert {uid: row["path"] for uid, row in rows.items()} == {
        "1.2.3.1": str(cd / "DICOM"), "1.2.3.2": str(cd / "DICOM/S0/IM9"),
        None: str(cd / "page.png")}
    assert len(rows["1.2.3.1"]["views"]) == len(views)
    probability = pool(list(compute_probabilities(pair[0], views)), 0.6)
    assert rows["1.2.3.1"]["probability"] == pytest.approx(probability, abs=2e-6)
    assert "2 of the files are no images" in printed.err
    assert "Doe" not in printed.out + printed.err + Path("r.json").read_text()
    assert "1970" not in printed.out + printed.err + Path("r.json").read_text()
    knee = [line for line in printed.err.splitlines() if "KNEE" in line]
    assert len(knee) == 1 and f"{cd / 'DICOM/S0/IM9'}: shows a body part (KNEE)" in knee[0]
    assert "body part (FOREARM)" not in printed.err
    assert ask(cd, "--output", "r.csv") == 0
    assert {row["study_uid"] for row in read_rows(Path("r.csv"))} == {"1.2.3.1", "1.2.3.2", ""}
    assert ask(cd / "DICOM/S0/IM9", "--output", "one.csv") == 0
    assert read_rows(Path("one.csv"))[0]["study_uid"] == "1.2.3.2", "also of a file that is named"


def test_a_damaged_view_is_told_and_not_left_out(
    ask: Ask, image: Path, pair: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    """Empty, cut or of another kind: the study has its answer, an error, and the exit code 3."""
    folder = plant(tmp_path, image, "study1/a.png") / "study1"
    whole = write_dicom(tmp_path / "whole", np.asarray(Image.open(image)), "1.2.3", "FOREARM")
    damaged = {"b.png": b"", "c.PNG": b"no image", "d.dcm": whole.read_bytes()[:200]}
    shutil.copy(whole, folder / "f.dcm")
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
    (folder / "e.png").symlink_to("nowhere.png")
    assert ask(folder, "--output", "r.json") == mura.EXIT_SOME_FAILED
    (row,) = read_json("r.json")
    assert row["prediction"] and [Path(view["path"]).name for view in row["views"]] == [
        "a.png", "b.png", "c.PNG", "d.dcm", "e.png", "f.dcm"]
    assert row["study_uid"] == "1.2.3"
    assert all(f"{name}: " in row["error"] for name in [*damaged, "e.png"])
    out, err = capsys.readouterr()
    assert "2 of 6 views" in out and f"{folder} (1.2.3): {row['error']}" in err
    assert "e.png: probability" not in out and " nan" not in out
    assert len(mura.load(pair[0], device="cpu").predict(folder).views) == 6


def test_examinations_that_share_a_folder_are_told_apart(
    ask: Ask, image: Path, tmp_path: Path, capsys: Captured
) -> None:
    """As in a flat export of a PACS: their path is the same."""
    for number in range(4):
        pixels = np.asarray(Image.open(image))
        write_dicom(tmp_path / f"flat/IM{number}", pixels, f"1.2.{number // 2}", "FOREARM")
    assert ask(tmp_path / "flat") == 0
    out = capsys.readouterr().out
    assert all(f"{tmp_path}/flat (1.2.{number}): " in out for number in (0, 1))


def test_a_study_folder_of_two_examinations_is_two_studies(
    ask: Ask, image: Path, pair: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    """The folder's name says one, its files' StudyInstanceUIDs say two; the API answers for one."""
    pixels, folder = np.asarray(Image.open(image)), tmp_path / "study1"
    for name, uid in (("a", "1.2.3.1"), ("b", "1.2.3.2"), ("c", "1.2.3.1")):
        write_dicom(folder / name, pixels, uid, "FOREARM")
    shutil.copy(image, folder / "d.png")  # of neither, but not left out
    assert ask(folder, "--output", "r.json") == 0
    rows = read_json("r.json")
    assert [(row["path"], row["study_uid"]) for row in rows] == [
        (str(folder), "1.2.3.1"), (str(folder), "1.2.3.2"), (str(folder), None)]
    assert [[Path(view["path"]).name for view in row["views"]] for row in rows] == [
        ["a", "c"], ["b"], ["d.png"]]
    model = mura.load(pair[0], device="cpu")
    with pytest.raises(mura.UserError, match="study1: holds 3 images or studies"):
        model.predict(folder)
    (folder / "b").unlink()
    found = model.predict(folder)
    assert (found.uid, len(found.views)) == ("1.2.3.1", 3)


# ---- what --predict answers ----


def test_one_image_gets_a_line_a_row_and_a_figure(
    ask: Ask, image: Path, pair: list[Path], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a threshold other than 1/2 a confidence would mislead: the threshold is said instead."""
    monkeypatch.setattr(mura, "save_explanation", draw)
    assert ask(image, "--output", "r.csv") == mura.EXIT_DONE
    printed = capsys.readouterr()
    probability = float(compute_probabilities(pair[0], [image])[0])
    shown = f"abnormal, threshold 0.45 (probability of abnormal {probability:.1%})"
    assert f"{image}: {shown}" in printed.out
    assert "figure: image" in printed.out and printed.err.count(mura.RESEARCH_ONLY) == 1
    with Image.open(f"{image.stem}_heatmap.png") as picture:
        assert picture.width > 600 and picture.height > 200
    (row,) = read_rows(Path("r.csv"))
    assert list(row)[:9] == ROW and "view" in row
    assert (row["path"], row["prediction"], row["error"]) == (str(image), "abnormal", "")
    assert float(row["probability"]) == pytest.approx(probability, abs=2e-6)
    assert row["confidence"] == row["probability"] and row["view"] == image.name
    assert (row["threshold"], row["model"]) == ("0.45", str(pair[0]))
    assert row["version"] == f"{mura.PROGRAM} {mura.__version__}"
    since = datetime.now().astimezone() - datetime.fromisoformat(row["date"])
    assert abs(since.total_seconds()) < 600


def test_threshold_decides_and_confidence_is_that_of_the_prediction(
    ask: Ask, image: Path, expected: dict[str, np.ndarray], capsys: Captured
) -> None:
    probability = float(expected["first"].max())
    for threshold, prediction in ((0.5, "abnormal"), (0.999, "normal")):
        assert ask(image, image, "--threshold", threshold, "--output", "r.json") == 0
        row = read_json("r.json")[0]
        boxed = {name for name in (*SIDES, "view") if row[name] is not None}
        assert boxed == ({*SIDES, "view"} if prediction == "abnormal" else set())
        assert (row["prediction"], row["threshold"]) == (prediction, threshold)
        confidence = probability if prediction == "abnormal" else 1 - probability
        assert row["confidence"] == pytest.approx(confidence, abs=2e-6)
    shown = f"{image}: abnormal, confidence {probability:.1%} (probability"
    assert shown in capsys.readouterr().out
    at = row["probability"]
    for threshold, prediction in ((at, "normal"), (at - 1e-9, "abnormal")):
        assert ask(image, image, "--threshold", repr(threshold), "--output", "r.json") == 0
        assert read_json("r.json")[0]["prediction"] == prediction, "abnormal is above, not at it"


def test_thresholds_that_models_store_are_used(ask: Ask, image: Path, pair: list[Path]) -> None:
    for models, threshold in ((pair[1:], 0.6), (pair, 0.525)):
        assert ask(image, image, "--checkpoint", *models, "--output", "r.json", "--overwrite") == 0
        assert read_json("r.json")[0]["threshold"] == pytest.approx(threshold)


def test_a_study_has_a_row_for_each_view_and_the_box_of_its_most_abnormal_one(
    ask: Ask, study: Path, pair: list[Path], capsys: Captured
) -> None:
    assert ask(study, "--output", "r.json", "--save-cam", "m.npz") == 0
    (row,) = read_json("r.json")
    files = sorted(study.glob("*.png"))
    probabilities = compute_probabilities(pair[0], files)
    assert row["probability"] == pytest.approx(pool(list(probabilities), 0.6), abs=2e-6)
    assert [Path(view["path"]) for view in row["views"]] == files
    found = [view["probability"] for view in row["views"]]
    np.testing.assert_allclose(found, probabilities, atol=2e-6)
    strongest = row["views"][int(probabilities.argmax())]
    assert row["view"] == Path(strongest["path"]).name
    assert [row[side] for side in SIDES] == [strongest[side] for side in SIDES]
    out = capsys.readouterr().out
    assert f", {len(files)} of {len(files)} views)" in out
    for path, probability in zip(files, probabilities, strict=True):
        assert f"    {path.name}: probability of abnormal {mura.percent(probability)}" in out
    maps = np.load("m.npz")
    assert set(maps) == {str(path) for path in files}
    for view, path in zip(row["views"], files, strict=True):
        heat = maps[str(path)]
        is_abnormal = view["probability"] > 0.45
        assert (view["prediction"] == "abnormal") == (heat.max() > 0) == is_abnormal
        assert (view["left"] is not None) == is_abnormal


def test_every_input_has_one_row(
    ask: Ask, image: Path, study: Path, bad: dict[str, Path], capsys: Captured
) -> None:
    """Files, a study and all that can be wrong, in the order given; CSV and JSON say the same."""
    broken = list(bad.values())
    inputs = [*broken[:3], image, *broken[3:], study]
    assert ask(*inputs, "--output", "r.csv") == mura.EXIT_SOME_FAILED
    printed, rows = capsys.readouterr(), read_rows(Path("r.csv"))
    assert [row["path"] for row in rows] == list(map(str, inputs))
    for row, path in zip(rows, inputs, strict=True):
        assert bool(row["prediction"]) == (path in (image, study)) != bool(row["error"])
    for path in broken:
        assert printed.err.count(f"{path}: ") == 1 and str(path) not in printed.out
    assert "Traceback" not in printed.err and printed.err.count(mura.RESEARCH_ONLY) == 1
    assert not list(Path().glob("*heatmap*")), "no figures of several inputs but on request"
    assert ask(*inputs, "--output", "r.json") == mura.EXIT_SOME_FAILED
    for row, twin in zip(rows, read_json("r.json"), strict=True):
        del twin["views"], twin["date"]
        same = {key: "" if value is None else str(value) for key, value in twin.items()}
        assert row | same == row and len(same) >= len(row) - 2


@pytest.mark.parametrize("name", BAD)
def test_a_single_failure_is_exit_1_with_one_line_and_one_row(
    name: str, ask: Ask, bad: dict[str, Path], capsys: Captured
) -> None:
    assert ask(bad[name], "--output", "r.csv") == mura.EXIT_FAILED
    printed = capsys.readouterr()
    assert printed.out == "" and f"{bad[name]}: " in error_line(printed)
    (row,) = read_rows(Path("r.csv"))
    assert row["error"] and not row["prediction"] and not list(Path().glob("*.png"))


def test_a_study_with_one_bad_view_is_predicted_from_the_others(
    ask: Ask, study: Path, bad: dict[str, Path], pair: list[Path], tmp_path: Path
) -> None:
    mixed = Path(shutil.copytree(study, tmp_path / "study9_positive"))
    shutil.copy(bad["cut.png"], mixed / "image9.png")
    assert ask(mixed, "--output", "r.json", "--figure", "x.png") == mura.EXIT_SOME_FAILED
    (row,) = read_json("r.json")
    views = sorted(study.glob("*.png"))
    probability = pool(list(compute_probabilities(pair[0], views)), 0.6)
    assert row["prediction"] == "abnormal"
    assert row["probability"] == pytest.approx(probability, abs=2e-6)
    assert row["error"].startswith("image9.png: ") and Path("x.png").exists()
    assert [bool(view["error"]) for view in row["views"]] == [False] * len(views) + [True]
    assert row["views"][-1]["probability"] is None


def test_batches_and_company_do_not_matter(
    ask: Ask, valid: list[Path], bad: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    for batch, order in ((1, valid[:9]), (3, [*valid[8::-1], bad["cut.png"]]), (64, valid[:9])):
        ask(*order, "--output", "r.json", "--batch-size", batch)
        found = {row["path"]: row["probability"] for row in read_json("r.json")}
        for path, probability in zip(valid[:9], expected["first"], strict=False):
            assert found[str(path)] == pytest.approx(probability, abs=2e-6)


@pytest.mark.parametrize("folder", ["XR_KNEE/patient1", "archive/xr_knee"])
def test_a_body_part_that_no_model_knows_is_warned_about(
    folder: str, ask: Ask, image: Path, tmp_path: Path, pair: list[Path], capsys: Captured
) -> None:
    names = [f"{folder}/a.png", "XR_FOREARM/b.png", "xr_humerus/c.png", "xr_0012.png"]
    plant(tmp_path, image, *names)
    content = torch.load(pair[1], weights_only=True)
    narrow = write_model(tmp_path / "m.pth", content, body_parts=["XR_FOREARM"])
    for models in (pair[:1], [pair[0], narrow], [narrow, pair[0]]):
        assert ask(*names, "--checkpoint", *models) == 0
        err = capsys.readouterr().err
        warned = [line for line in err.splitlines() if "body part" in line]
        assert len(warned) == 1 and f"{names[0]}: shows a body part" in warned[0]
        assert "knee" in warned[0].lower() and "FOREARM, HUMERUS" in warned[0]
    assert ask(*names, "--checkpoint", narrow) == 0
    assert len([line for line in capsys.readouterr().err.splitlines() if "body part" in line]) == 2


def test_the_nearest_folder_names_the_body_part(
    ask: Ask, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Also one that the path need not name, as the command was started there."""
    plant(tmp_path, image, "XR_KNEE/XR_FOREARM/a.png", "XR_FOREARM/XR_KNEE/b.png")
    assert ask("XR_KNEE/XR_FOREARM/a.png", "XR_FOREARM/XR_KNEE/b.png") == 0
    assert "XR_FOREARM/XR_KNEE/b.png: shows a body part" in error_line(capsys.readouterr())
    monkeypatch.chdir(tmp_path / "XR_FOREARM" / "XR_KNEE")
    assert ask("b.png") == 0
    assert "b.png: shows a body part (XR_KNEE)" in error_line(capsys.readouterr())


def test_a_model_of_a_table_without_body_parts_knows_them_all(
    ask: Ask, evaluate: Ask, image: Path, pair: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    """Training stores "all" for them, as the table of images has it."""
    plant(tmp_path, image, "XR_KNEE/a.png")
    content = torch.load(pair[1], weights_only=True)
    model = write_model(tmp_path / "m.pth", content, body_parts=["all"])
    assert ask("XR_KNEE/a.png", "--checkpoint", model) == evaluate(models=[model]) == 0
    assert "body part (" not in capsys.readouterr().err


def test_what_the_decoder_doubts_is_told_with_the_answer(
    ask: Ask, image: Path, tmp_path: Path, capsys: Captured
) -> None:
    """A raw exposure may be a negative, of which an answer means nothing."""
    path = write_dicom(tmp_path / "raw.dcm", np.asarray(Image.open(image)), "1.2.3", "FOREARM")
    header = pydicom.dcmread(path)
    header.PresentationIntentType = "FOR PROCESSING"
    header.save_as(path)
    assert ask(path, "--output", "r.json") == 0
    assert f"{path}: FOR PROCESSING: raw exposure" in error_line(capsys.readouterr())
    assert read_json("r.json")[0]["prediction"]


def test_a_coloured_picture_is_predicted_and_warned_about(
    ask: Ask, image: Path, capsys: Captured
) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (80, 80, 3)) * (1, 0.2, 0.1)
    Image.fromarray(colours.astype(np.uint8)).save("holiday.png")
    assert ask("holiday.png", image, "--output", "r.csv") == mura.EXIT_DONE
    assert "holiday.png: does not look like a radiograph" in error_line(capsys.readouterr())
    assert all(row["prediction"] and not row["error"] for row in read_rows(Path("r.csv")))


@pytest.mark.parametrize(("probability", "text"), [
    (1.0, "above 99.9%"), (0.9995, "above 99.9%"), (0.9994, "99.9%"), (0.5, "50.0%"),
    (0.0006, "0.1%"), (0.0004, "below 0.1%"), (0.0, "below 0.1%"),
])
def test_percent_is_never_certain(probability: float, text: str) -> None:
    assert mura.percent(probability) == text


def test_a_model_that_is_sure_does_not_say_100_percent(
    ask: Ask, image: Path, normal_image: Path, pair: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    sure = write_model(tmp_path / "m.pth", torch.load(pair[0], weights_only=True), temperature=1e-3,
                       threshold=0.5)
    assert ask(image, normal_image, "--checkpoint", sure, "--output", "r.json") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "abnormal, confidence above 99.9% (probability of abnormal above 99.9%)" in first
    assert "normal, confidence above 99.9% (probability of abnormal below 0.1%)" in second
    rows = read_json("r.json")
    assert [row["prediction"] for row in rows] == ["abnormal", "normal"]
    assert [row["probability"] for row in rows] == pytest.approx([1, 0])  # 0 is no missing value


# ---- heatmaps and boxes ----


def test_heatmaps_and_boxes_lie_on_the_pixels_of_the_originals(
    ask: Ask, image: Path, normal_image: Path
) -> None:
    """Warm where abnormal only, to the log odds above the threshold; the box is above half."""
    with Image.open(image) as original:
        original.resize((150, 70)).save("wide.png")
        original.resize((1100, 1500)).save("large.png")
    names = [str(image), "wide.png", "large.png", str(normal_image)]
    assert ask(*names, "--output", "r.json", "--save-cam", "out/maps.npz") == 0
    rows = read_json("r.json")
    with np.load("out/maps.npz") as maps:
        assert set(maps.files) == set(names)
        for name, row in zip(names, rows, strict=True):
            heat, (left, top, right, bottom) = maps[name], [row[side] for side in SIDES]
            with Image.open(name) as original:
                assert heat.shape == original.size[::-1]
            assert heat.dtype == np.float32 and heat.min() >= 0
            above = max(0.0, float(logit(row["probability"]) - logit(0.45)))
            assert heat.max() == pytest.approx(above, rel=1e-2 if name == "large.png" else 1e-4)
            if row["prediction"] == "normal":
                assert left is top is right is bottom is None and not heat.any()
                continue
            regions, _ = label_regions(heat >= heat.max() / 2)
            ys, xs = np.nonzero(regions == regions.flat[heat.argmax()])
            close = 4 if name == "large.png" else 0
            assert abs(left - xs.min()) <= close and abs(top - ys.min()) <= close
            assert abs(right - xs.max() - 1) <= close and abs(bottom - ys.max() - 1) <= close
    assert [row["prediction"] for row in rows][::3] == ["abnormal", "normal"]


def test_a_box_at_the_edge_has_zeros(
    ask: Ask, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mura, "strongest_region", lambda heat: (0, 0, *heat.shape[::-1]))
    for name in ("r.csv", "r.json"):
        assert ask(image, "--output", name) == 0
    (row,), (twin,) = read_rows(Path("r.csv")), read_json("r.json")
    with Image.open(image) as original:
        box = [0, 0, *original.size]
    assert [int(row[side]) for side in SIDES] == [twin[side] for side in SIDES] == box


@pytest.mark.parametrize("choice", ["abnormal", "normal", "predicted"])
def test_the_class_that_is_explained(
    choice: str, ask: Ask, image: Path, normal_image: Path
) -> None:
    """Its map is warm where that class was predicted; boxes are of abnormal heat only."""
    inputs = [image, normal_image]
    assert ask(*inputs, "--cam-class", choice, "--output", "r.json", "--save-cam", "m.npz") == 0
    maps, rows = np.load("m.npz"), read_json("r.json")
    for path, row, prediction in zip(inputs, rows, ("abnormal", "normal"), strict=True):
        assert row["prediction"] == prediction
        warm = choice in (prediction, "predicted")
        peak = abs(float(logit(row["probability"]) - logit(0.45))) if warm else 0
        assert maps[str(path)].max() == pytest.approx(peak, rel=1e-4)
        assert (row["left"] is not None) == (prediction == "abnormal" and choice != "normal")


@pytest.mark.parametrize(("method", "choice"), [
    ("fine", "abnormal"), ("fine", "normal"), ("fine", "predicted"), ("gradcam", "abnormal"),
])
def test_a_figure_has_boxes_of_abnormal_heat_only(
    method: str, choice: str, ask: Ask, image: Path, normal_image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A box around what speaks for a normal bone would be taken for a finding.

    Grad-CAM has heat on normal images, too.
    """
    boxed: list[bool] = []

    def draw_boxes(views: Sequence[Any], *arguments: Any, **options: Any) -> bytes:
        boxed.extend(view.box is not None for view in views)
        return blank_picture()

    monkeypatch.setattr(mura, "save_explanation", draw_boxes)
    flags = ("--cam", method, "--cam-class", choice, "--figure", "f")
    assert ask(image, normal_image, *flags) == 0
    assert boxed == [choice != "normal", False]


def test_every_view_of_a_study_shows_the_class_of_the_study(
    ask: Ask, image: Path, normal_image: Path
) -> None:
    """Also a view that says the other class by itself, and whichever of them is read first."""
    for number, source in enumerate([normal_image, image, image, image], 1):
        Path("study1").mkdir(exist_ok=True)
        shutil.copy(source, f"study1/image{number}.png")

    def maps_of(choice: str) -> dict[str, Any]:
        flags = ("--cam", "gradcam", "--cam-class", choice, "--save-cam", "m.npz")
        assert ask("study1", *flags, "--output", "r.json") == 0
        return dict(np.load("m.npz"))

    found, wanted = maps_of("predicted"), maps_of("abnormal")
    assert read_json("r.json")[0]["prediction"] == "abnormal"
    assert len(found) == 4
    for name, heat in found.items():
        assert heat.max() > 0
        np.testing.assert_array_equal(heat, wanted[name])


def test_maps_of_ensemble_tta_and_temperature(
    ask: Ask, image: Path, pair: list[Path], tmp_path: Path
) -> None:
    """Classical maps, in logits: the models' mean, over the temperature, flipped back with TTA."""
    with Image.open(image) as original:
        original.resize((64, 64)).save("a.png")
        original.resize((64, 64)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("b.png")
    hot = write_model(tmp_path / "hot.pth", torch.load(pair[0], weights_only=True), temperature=3.0)

    def maps_of(*flags: object) -> Any:
        assert ask("a.png", "b.png", "--cam", "gradcam", "--save-cam", "m.npz", *flags) == 0
        return {name: np.load("m.npz")[name] for name in ("a.png", "b.png")}

    first, second, both = (maps_of("--checkpoint", *m) for m in (pair[:1], pair[1:], pair))
    assert first["a.png"].max() > 0 and np.abs(first["a.png"] - second["a.png"]).max() > 0.01
    for name in ("a.png", "b.png"):
        np.testing.assert_allclose(both[name], (first[name] + second[name]) / 2, atol=1e-4)
    np.testing.assert_allclose(maps_of("--checkpoint", hot)["a.png"], first["a.png"] / 2, atol=1e-4)
    plain = maps_of("--no-tta")
    np.testing.assert_allclose(first["a.png"], first["b.png"][:, ::-1], atol=1e-4)
    mean = (plain["a.png"] + plain["b.png"][:, ::-1]) / 2
    np.testing.assert_allclose(first["a.png"], mean, atol=1e-4)
    assert np.abs(plain["a.png"] - first["a.png"]).max() > 1e-3


def test_the_map_of_a_letterboxed_image_leaves_the_padding_out(
    ask: Ask, image: Path, pair: list[Path]
) -> None:
    with Image.open(image) as original:
        wide = np.asarray(original.resize((96, 50)))
    Image.fromarray(wide).save("wide.png")
    Image.fromarray(np.pad(wide, ((23, 23), (0, 0)))).save("padded.png")
    flags = ["--checkpoint", pair[1], "--cam", "gradcam", "--save-cam", "m.npz"]
    assert ask("wide.png", "padded.png", *flags) == 0
    maps = np.load("m.npz")
    assert maps["wide.png"].shape == (50, 96) and maps["wide.png"].max() > 0
    np.testing.assert_allclose(maps["wide.png"], maps["padded.png"][23:73], atol=1e-5)


def test_maps_of_an_image_of_any_name(ask: Ask, image: Path) -> None:
    """numpy.savez has arguments of its own: an array may not be called "file" there."""
    names = ["file", "allow_pickle", "sub/x.png"]
    plant(Path(), image, *names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # zipfile has one for a name that comes twice
        assert ask(*names, "file", "sub", "--save-cam", "maps.npz") == mura.EXIT_DONE
    with np.load("maps.npz", allow_pickle=False) as maps:
        assert set(maps) == set(names)
        assert maps["file"].shape == Image.open(image).size[::-1]


# ---- files that are written ----


def test_a_figure_goes_where_it_is_wanted(ask: Ask, image: Path) -> None:
    """A picture's suffix is a file's, any other name is a folder's, whether it is there or not."""
    for name in ("a.png", "new/b.JPG", "new/c.pdf"):
        assert ask(image, "--figure", name) == mura.EXIT_DONE
        assert Path(name).is_file()
    for folder in ("there", "folder.v1"):
        assert ask(image, "--figure", folder) == mura.EXIT_DONE
        assert os.listdir(folder) == [f"{image.stem}_heatmap.png"]


def test_figures_of_several_inputs_fill_a_folder(
    ask: Ask, image: Path, study: Path, bad: dict[str, Path], capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Numbered as the inputs, so that equal names do not meet; a file in its place is refused."""
    inputs = [image, bad["cut.png"], image, study]
    assert ask(*inputs, "--figure", "figures") == mura.EXIT_SOME_FAILED
    stem = image.stem
    assert sorted(os.listdir("figures")) == [
        f"0001_{stem}_heatmap.png", f"0003_{stem}_heatmap.png", f"0004_{study.name}_heatmap.png"]
    Path("taken").write_text("a file")
    monkeypatch.setattr(mura, "load_ensemble", fail)
    for name, code in (("one.png", mura.EXIT_USAGE), ("taken", mura.EXIT_FAILED)):
        capsys.readouterr()
        assert ask(image, image, "--figure", name) == code
        assert name in error_line(capsys.readouterr())


@pytest.mark.parametrize(("count", "rest"), [(5, " (the first 2 of 5 views)"), (2, "")])
def test_a_figure_that_leaves_views_out_says_so(
    count: int, rest: str, ask: Ask, image: Path, tmp_path: Path, capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mura, "FIGURE_ROWS", 2)
    plant(tmp_path, image, *(f"study1_all/image{i}.png" for i in range(count)))
    assert ask("study1_all", "--figure", "x.png", "--output", "r.json") == mura.EXIT_DONE
    assert f"    figure: x.png{rest}" in capsys.readouterr().out.splitlines()
    assert len(read_json("r.json")[0]["views"]) == count


def test_windows_are_few_however_many_inputs(
    ask: Ask, image: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first eight inputs have one, all have their file; they are shown when all are done."""
    opened, shown = [], []

    def draw_window(*arguments: Any, window: str, **options: Any) -> bytes:
        opened.append(window)
        return blank_picture()

    monkeypatch.setattr(mura, "save_explanation", draw_window)
    monkeypatch.setattr(mura, "can_show", lambda no_show: True)
    monkeypatch.setattr(mura, "show_windows", lambda: shown.append(len(opened)))
    assert ask(*[image] * 10, "--figure", "f") == 0
    assert opened == [image.name] * 8 + [""] * 2
    assert shown == [10] and len(os.listdir("f")) == 10


def test_own_figures_in_a_searched_folder_are_not_predicted_again(
    ask: Ask, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--predict leaves them beside the images; a foreign file of such a name is an image."""
    monkeypatch.setattr(mura, "save_explanation", draw)
    folder = plant(tmp_path / "in", image, "a.png", "hand_heatmap.png")
    monkeypatch.chdir(folder)
    assert ask("a.png") == mura.EXIT_DONE
    assert (folder / "a_heatmap.png").exists()
    assert ask(folder, "--output", "r.json") == mura.EXIT_DONE
    assert [Path(row["path"]).name for row in read_json("r.json")] == ["a.png", "hand_heatmap.png"]


@pytest.mark.parametrize(("flag", "name", "start"), [
    ("--output", "x.csv", b"path,"), ("--output", "x.json", b"["), ("--save-cam", "x.npz", b"PK"),
    ("--figure", "x.png", b"\x89PNG"), ("--figure", "x.JPG", b"\xff\xd8"),
    ("--figure", "x.pdf", b"%PDF"), ("--figure", "x.svg", b"<?xml"),
])
def test_foreign_files_are_not_replaced_but_own_ones_are(
    flag: str, name: str, start: bytes, ask: Ask, image: Path, capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        if flag == "--figure":
            patch.setattr(mura, "save_explanation", draw)
        assert ask(image, flag, name) == mura.EXIT_DONE
    own = Path(name).read_bytes()
    assert own.startswith(start)
    assert ask(image, flag, name) == mura.EXIT_DONE, "its own"
    shutil.copy(image, name)  # of another kind
    foreign = Path(name).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(mura, "load_ensemble", fail)
        capsys.readouterr()
        assert ask(image, flag, name) == mura.EXIT_USAGE
    line = error_line(capsys.readouterr())
    assert f"{flag} {name}" in line and "--overwrite" in line
    assert Path(name).read_bytes() == foreign != own
    assert ask(image, flag, name, "--overwrite") == mura.EXIT_DONE
    assert Path(name).read_bytes() != foreign


@pytest.mark.parametrize(("flag", "name"), [("--output", "r.csv"), ("--figure", "x.png")])
def test_an_empty_file_is_foreign(
    flag: str, name: str, ask: Ask, image: Path, capsys: Captured
) -> None:
    Path(name).touch()
    assert ask(image, flag, name) == mura.EXIT_USAGE
    assert f"{flag} {name}: is there and not a file of" in error_line(capsys.readouterr())


@pytest.mark.parametrize("obstacle", ["foreign file", "folder"])
def test_a_default_figure_that_cannot_be_written_is_left_out(
    obstacle: str, ask: Ask, image: Path, capsys: Captured
) -> None:
    """Nobody asked for it: the answer comes, and one line says what is missing."""
    figure = Path(f"{image.stem}_heatmap.png")
    if obstacle == "folder":
        figure.mkdir()
    else:
        shutil.copy(image, figure)
    assert ask(image, "--output", "r.json") == 0
    printed = capsys.readouterr()
    assert f"{figure}: is there and not a file of this program" in printed.err or (
        f"{figure}: cannot be written" in printed.err)
    assert "the figure is not saved" in printed.err and "figure:" not in printed.out
    assert read_json("r.json")[0]["prediction"]
    assert figure.is_dir() or figure.read_bytes() == image.read_bytes()


def test_a_foreign_file_in_the_folder_of_figures_is_not_replaced(
    ask: Ask, image: Path, capsys: Captured
) -> None:
    foreign = Path("figures") / f"0002_{image.stem}_heatmap.png"
    plant(Path(), image, str(foreign))
    before = foreign.read_bytes()
    assert ask(image, image, "--figure", "figures") == mura.EXIT_USAGE
    assert str(foreign) in error_line(capsys.readouterr()) and foreign.read_bytes() == before


def test_a_model_is_never_replaced(
    ask: Ask, image: Path, pair: list[Path], capsys: Captured
) -> None:
    """A model of any name is of this program, which its output may replace."""
    shutil.copy(pair[0], "model.csv")
    before = Path("model.csv").read_bytes()
    for flags in ([], ["--overwrite"]):
        assert ask(image, "--checkpoint", "model.csv", "--output", "./model.csv", *flags) == mura.EXIT_USAGE
        assert "--output model.csv: is an input" in error_line(capsys.readouterr())
    assert Path("model.csv").read_bytes() == before


def test_an_input_is_never_replaced(ask: Ask, image: Path, capsys: Captured) -> None:
    """By whatever name, and with --overwrite too."""
    plant(Path(), image, "scan.png", "scan.csv", "sub/study1/a.npz", "sub/study1/b.png")
    Path("link.png").symlink_to("scan.png")
    before = image.read_bytes()
    for arguments in (["scan.png", "--figure", "./scan.png"], ["scan.png", "--figure", "link.png"],
                      ["link.png", "--figure", "scan.png"], ["scan.csv", "--output", "scan.csv"],
                      ["sub", "--save-cam", "sub/study1/a.npz"]):
        capsys.readouterr()
        assert ask(*arguments, "--overwrite") == mura.EXIT_USAGE
        line = error_line(capsys.readouterr())
        assert f"{arguments[1]} {Path(arguments[2])}: is an input" in line
    for name in ("scan.png", "scan.csv", "sub/study1/a.npz"):
        assert Path(name).read_bytes() == before


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    ask: Ask, evaluate: Ask, image: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("in the way")
    Path("folder.npz").mkdir()
    Path("e.report.json").mkdir()
    monkeypatch.setattr(mura, "load_ensemble", fail)
    places = {"--output": "file/r.csv", "--save-cam": "folder.npz", "--figure": "file/f.png"}
    for flag, name in places.items():
        assert ask(image, flag, name) == mura.EXIT_FAILED
        assert f"{name}: cannot be written" in error_line(capsys.readouterr())
    assert evaluate() == mura.EXIT_FAILED
    assert "e.report.json: cannot be written" in error_line(capsys.readouterr())
    assert evaluate("--output", "f", "--figure", "file/gallery") == mura.EXIT_FAILED
    assert "file/gallery" in error_line(capsys.readouterr())


ODD_NAMES = (
    "has space & $dollar$.png", "Röntgen 骨.png", 'quote"s, comma.png', "line\nbreak.png",
    "cr\rcr.png", "esc\x1b[2J\x1b]0;x\x07.png", "-dash.png", "x**y.png", "100%d {0}.png",
    "R\udcf6ntgen.png")


def test_names_are_data(
    ask: Ask, image: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown escaped on the terminal and in the CSV, exact in JSON; bytes that are no text stay."""
    folder = Path("XR_$\x1b^{_\udcff")
    plant(folder, image, *ODD_NAMES)
    inputs = [folder / name for name in ODD_NAMES]
    asked = [*inputs, "missing\n\x1b.png", "--figure", "f", "--save-cam", "m.npz"]
    assert ask(*asked, "--output", "r.csv") == mura.EXIT_SOME_FAILED
    printed = capsys.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", printed.out + printed.err)
    assert "\\n" in printed.out and "\\x1b" in printed.out
    assert "missing\\n\\x1b.png: " in printed.err
    lines = [line for line in printed.out.splitlines() if line.startswith("XR_")]
    assert len(lines) == len(inputs)
    rows = read_rows(Path("r.csv"))
    assert len(rows) == len(inputs) + 1 == len(Path("r.csv").read_bytes().splitlines()) - 1
    for row, path in zip(rows, inputs, strict=False):
        escaped = [c.encode("unicode_escape").decode() if ord(c) < 32 else c for c in str(path)]
        assert row["path"] == "".join(escaped)
    assert len(os.listdir("f")) == len(inputs)
    with np.load("m.npz") as maps:
        assert len(maps.files) == len(inputs) and str(inputs[0].name) in maps.files[0]
    assert ask(*asked, "--output", "r.json", "--overwrite") == mura.EXIT_SOME_FAILED
    assert [row["path"] for row in read_json("r.json")] == list(map(str, asked[: len(rows)]))
    monkeypatch.setattr(mura, "save_explanation", draw)
    assert ask(inputs[0]) == 0  # drawn, $ and all


def test_a_name_without_room_for_an_ending_is_cut(ask: Ask, image: Path) -> None:
    name = "x" * 250 + ".png"
    shutil.copy(image, name)
    assert ask(name, "--save-cam", "f.npz", "--output", "r.csv") == 0
    assert ask(name, image, "--figure", "figures") == 0
    assert len(list(Path().glob("x*_heatmap.png"))) == 1 and len(os.listdir("figures")) == 2


# ---- killed and stopped ----


class Child:
    """A command in a forked process, with its output in the file "log"; torch is loaded already."""

    def __init__(self, *arguments: object, setup: Callable[[], object] = lambda: None) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            sys.stdout = sys.stderr = Path("log").open("a", buffering=1)  # noqa: SIM115
            os.dup2(sys.stderr.fileno(), 2)
            sys.unraisablehook = sys.__unraisablehook__  # pytest's would keep what it says
            # tqdm's is shared with this process: one killed at the wrong time would lock it for ever
            mura.tqdm.set_lock(threading.RLock())
            setup()
            code = run_inside(*arguments)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def running_until(self, condition: Callable[[], object], limit: float = 90) -> None:
        """Wait for something; a child that ended before or takes very long fails the test."""
        deadline = time.monotonic() + limit
        while not condition():
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), Path("log").read_text()
            assert time.monotonic() < deadline, Path("log").read_text()
            time.sleep(0.02)

    def end(self, signum: int) -> int:
        """Send a signal; returns the exit code, or minus a signal that killed it."""
        os.kill(self.pid, signum)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def many(image: Path, tmp_path: Path) -> Path:
    """A folder of 60 images."""
    return plant(tmp_path / "many", image, *(f"{i:02}.png" for i in range(60)))


def lose_an_exception() -> None:
    """Have SIGTERM come in a finaliser, where Python drops what the handler raises."""
    explain = mura.Ensemble.explain

    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def followed(*arguments: Any, **options: Any) -> Any:
        if not Path("sent").exists():
            Path("sent").touch()
            Finalised()
        return explain(*arguments, **options)

    mura.Ensemble.explain = followed


def slow_explanation() -> None:
    """Have each batch take half a second."""
    explain = mura.Ensemble.explain

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return explain(*arguments, **options)

    mura.Ensemble.explain = slowly


@pytest.mark.parametrize("name", ["r.csv", "r.json"])
def test_rows_come_as_they_are_predicted_and_survive_sigkill(
    name: str, many: Path, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    child = Child("--predict", many, "--checkpoint", pair[0], *PLAIN, "--output", name,
                  "--batch-size", 1, setup=slow_explanation)
    child.running_until(Path(name).exists)
    assert child.end(signal.SIGKILL) == -signal.SIGKILL
    rows = read_rows(Path(name)) if name == "r.csv" else read_json(name)
    shown = Path("log").read_text().count("probability of abnormal")
    assert 4 <= len(rows) <= shown < 60
    assert shown - len(rows) <= 12, "a write a second: three batches at most"
    assert all(row["prediction"] == "abnormal" for row in rows)
    assert [Path(row["path"]).name for row in rows] == [f"{i:02}.png" for i in range(len(rows))]


@pytest.mark.parametrize(("cost", "pause"), [(0.0, 1), (0.3, 3), (2.0, 20)])
def test_writing_rows_takes_a_tenth_of_the_time_at_most(
    cost: float, pause: float, ask: Ask, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows are written each time: of 14,000 studies as JSON, that takes more than a second."""
    clock, writes, write = [0.0], [], mura.atomic_write
    explain = mura.Ensemble.explain

    def timed_write(path: Path, content: bytes) -> None:
        write(path, content)
        if path.name == "r.json":
            writes.append((clock[0], len(json.loads(content))))
            clock[0] += cost

    def timed_explain(*arguments: Any, **options: Any) -> Any:
        clock[0] += pause / 2
        return explain(*arguments, **options)

    monkeypatch.setattr(mura, "atomic_write", timed_write)
    monkeypatch.setattr(mura.Ensemble, "explain", timed_explain)
    monkeypatch.setattr(mura.time, "monotonic", lambda: clock[0])
    assert ask(many, "--output", "r.json", "--batch-size", 1, "--workers", 1) == 0
    *during, (_, rows) = writes
    assert rows == 60
    pauses = np.diff([began for began, _ in during]) - cost
    assert len(pauses) > 2
    assert pause <= pauses.min() + 1e-6 and pauses.max() <= 1.5 * pause + 1e-6


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_heard_between_figures(
    signum: int, code: int, many: Path, pair: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not after the batch, which has 256 images here; what was predicted is written."""
    monkeypatch.chdir(tmp_path)
    child = Child("--predict", many, "--checkpoint", pair[0], *PLAIN, "--output", "r.json",
                  "--batch-size", 64, "--figure", "f", "--save-cam", "m.npz")
    child.running_until(lambda: Path("f").exists() and os.listdir("f"))
    before = len(list(Path("f").glob("*.png")))
    assert child.end(signum) == code
    after = len(list(Path("f").glob("*.png")))
    assert after <= before + 5
    assert after <= len(read_json("r.json")) <= after + 1
    assert len(np.load("m.npz").files) == len({row["path"] for row in read_json("r.json")})
    log = Path("log").read_text()
    assert "stopping" in log and f"stopped by {signal.Signals(signum).name}" in log
    assert "Traceback" not in log


def test_a_signal_is_heard_while_images_are_read(
    many: Path, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def read_slowly() -> None:
        read = mura.read_radiograph

        def slowly(path: Path) -> Any:
            with Path("read").open("a") as file:
                file.write(".")
            time.sleep(0.5)
            return read(path)

        mura.read_radiograph = slowly

    child = Child("--predict", many, "--checkpoint", pair[0], *PLAIN, "--output", "r.csv",
                  "--batch-size", 64, "--workers", 1, setup=read_slowly)
    child.running_until(Path("read").exists)
    before = Path("read").stat().st_size
    assert child.end(signal.SIGTERM) == 143
    assert Path("read").stat().st_size <= before + 5
    assert not Path("r.csv").exists()


def test_a_signal_is_heard_even_where_python_drops_its_exception(
    many: Path, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does in finalisers and callbacks of the garbage collector, at any time."""
    monkeypatch.chdir(tmp_path)
    child = Child("--predict", many, "--checkpoint", pair[0], *PLAIN, "--output", "r.csv",
                  "--batch-size", 2, setup=lose_an_exception)
    assert os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]) == 143
    assert len(read_rows(Path("r.csv"))) <= 9
    assert "stopped by SIGTERM" in Path("log").read_text()


# ---- the real command ----


def test_the_real_command_answers_as_the_program_within(
    trained_thin: Path, study: Path, bad: dict[str, Path], tmp_path: Path
) -> None:
    """torchvision's own ResNet-50, random; streams and exit code of one input that fails."""
    content = torch.load(trained_thin, weights_only=True)
    with pytest.MonkeyPatch.context() as patch:
        import torchvision

        real = SimpleNamespace(**vars(mura.ARCHITECTURES["resnet50"]))
        real.constructor = torchvision.models.resnet50
        patch.setitem(mura.ARCHITECTURES, "resnet50", real)
        torch.manual_seed(0)
        state = mura.Network("resnet50").state_dict()
        model = write_model(tmp_path / "m.pth", content, state_dict=state)
        views = sorted(study.glob("*.png"))
        probability = pool(list(compute_probabilities(model, views)), 0.6)
    done = run_command("--predict", study, bad["cut.png"], "--checkpoint", model, *PLAIN,
                       "--output", "r.json", cwd=tmp_path)
    assert done.returncode == mura.EXIT_SOME_FAILED, done.stderr
    good, failed = read_json(tmp_path / "r.json")
    assert good["probability"] == pytest.approx(probability, abs=1e-5)
    assert failed["error"]
    assert done.stdout.startswith(f"{study}: {good['prediction']}")
    assert str(bad["cut.png"]) not in done.stdout
    assert "\r" not in done.stderr and "not for diagnosis" in done.stderr
    assert f"{bad['cut.png']}: " in done.stderr and "Traceback" not in done.stderr


# ---- export ----


@pytest.fixture(scope="module")
def exported(pair: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first model, with TTA, as ONNX, and the second, without, as .pt2."""
    folder = tmp_path_factory.mktemp("exported")
    for name, model in (("first.onnx", pair[0]), ("second.pt2", pair[1])):
        flags = ["--threshold", "0.3"] if name == "second.pt2" else []
        assert run_inside("--export", folder / name, "--checkpoint", model, *flags) == 0
    return folder


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", ["first.onnx", "second.pt2"])
def test_an_exported_model_answers_as_the_command(
    name: str, count: int, exported: Path, pair: list[Path], valid: list[Path],
    expected: dict[str, np.ndarray],
) -> None:
    """Run as a stranger would, with nothing of this program, on batches of any size."""
    content = torch.load(pair[name == "second.pt2"], weights_only=True)
    images = np.stack([read_square(content, path) for path in valid[:count]])[:, None]
    if name.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(
            str(exported / name), providers=["CPUExecutionProvider"])
        (output,) = session.run(["probability"], {"images": images})
    else:
        output = torch.export.load(exported / name).module()(torch.from_numpy(images)).numpy()
    assert output.shape == (count,)
    np.testing.assert_allclose(output, expected[name.partition(".")[0]][:count], atol=1e-4)


def test_an_exported_file_says_how_to_use_it(exported: Path) -> None:
    import onnx

    model = onnx.load(exported / "first.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    files = {"about.json": ""}
    torch.export.load(exported / "second.pt2", extra_files=files)
    about = json.loads(files["about.json"])
    text = "grey, float32 (batch, 1, {0}, {0}), 0 black to 1 white, resize: {1}"
    wanted = {"input": (text.format(64, "stretch"), text.format(96, "letterbox")),
              "tta": ("True", "False"), "temperature": ("1.5", "0.8"),
              "study_temperature": ("0.6", "1.4"), "threshold": ("0.45", "0.3"),
              "architecture": ("resnet50",) * 2, "use": (mura.RESEARCH_ONLY,) * 2}
    for key, pair in wanted.items():
        assert (metadata[key], about[key]) == pair
    assert "image" in metadata["normalization"] and "0.25" in about["normalization"]
    assert mura.__version__ in metadata["program"]


@pytest.mark.parametrize("gap", [2e-4, float("nan")])
def test_an_export_that_differs_is_not_written(
    gap: float, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    load = torch.export.load

    def differing(*arguments: Any, **options: Any) -> Any:
        module = load(*arguments, **options).module()
        return SimpleNamespace(module=lambda: lambda images: module(images) + gap)

    monkeypatch.setattr(torch.export, "load", differing)
    assert run_inside("--export", tmp_path / "x.pt2", "--checkpoint", pair[1]) == mura.EXIT_FAILED
    assert "differs by" in error_line(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert run_inside("--export", tmp_path / "x.onnx", "--checkpoint", pair[1]) == mura.EXIT_USAGE
    assert "pip install onnx onnxscript onnxruntime" in error_line(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


def stop(*arguments: Any) -> Any:
    """Stand in for the work, which is not done."""
    raise mura.UserError("it began")


@pytest.mark.parametrize("name", ["first.onnx", "second.pt2"])
def test_an_export_replaces_its_own_files_only(
    name: str, exported: Path, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.setattr(mura, "load_ensemble", stop)
    (tmp_path / name).write_text("somebody's")
    assert run_inside("--export", tmp_path / name, "--checkpoint", pair[1]) == mura.EXIT_USAGE
    assert "not a file of this program" in error_line(capsys.readouterr())
    shutil.copy(exported / name, tmp_path)
    for flags in ([], ["--overwrite"]):
        run_inside("--export", tmp_path / name, "--checkpoint", pair[1], *flags)
        assert "it began" in error_line(capsys.readouterr())


def test_an_export_of_many_layers_is_known_as_own(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """A list of hundreds of tensors stands at the end of such a file."""
    thin = mura.ARCHITECTURES["resnet50"]

    def build() -> torch.nn.Module:
        network = thin.constructor()
        network.layer1 = torch.nn.Sequential(*(torch.nn.BatchNorm2d(4) for _ in range(20)))
        return network

    monkeypatch.setitem(mura.ARCHITECTURES, "resnet50", replace(thin, constructor=build))
    content = torch.load(pair[1], weights_only=True)
    state = mura.Network("resnet50").state_dict()
    model = write_model(tmp_path / "m.pth", content, state_dict=state)
    assert run_inside("--export", tmp_path / "x.pt2", "--checkpoint", model) == 0
    monkeypatch.setattr(mura, "load_ensemble", stop)
    run_inside("--export", tmp_path / "x.pt2", "--checkpoint", model)
    assert "it began" in error_line(capsys.readouterr())


@pytest.mark.parametrize("name", ["threshold", "temperature", "study_temperature"])
def test_a_stored_number_that_is_not_finite_is_refused_at_loading(
    ask: Ask, image: Path, pair: list[Path], tmp_path: Path, capsys: Captured, name: str
) -> None:
    content = torch.load(pair[0], weights_only=True)
    path = write_model(tmp_path / "odd.pth", content, **{name: float("nan")})
    assert ask(image, "--checkpoint", path) == mura.EXIT_USAGE
    printed = capsys.readouterr()
    assert f"{path}: {name} holds numbers that are not finite" in printed.err and not printed.out


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_a_line_of_pixels_has_a_figure(ask: Ask, image: Path, size: tuple[int, int]) -> None:
    """And the inputs behind it have their answers."""
    noise = np.random.default_rng(0).integers(0, 255, size[::-1], np.uint8)
    Image.fromarray(noise).save("line.png")
    assert ask("line.png", image, "--figure", "f", "--output", "o.csv") == 0
    assert len(list(Path("f").iterdir())) == 2 == len(read_rows(Path("o.csv")))
