"""Section 17: the real command, as its user types it, in every mode: exit codes, streams and files."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import SCRIPT, TINY, run_command, run_inside
from sklearn.metrics import roc_auc_score

import mura_anomaly_detection as mad

HISTORY = "epoch,train_loss,train_accuracy,val_loss,val_accuracy,val_auroc,val_kappa,lr,images_per_second,seconds"
FIGURES = ("auroc", "kappa", "accuracy", "sensitivity", "specificity", "brier", "ece")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def one_line(text: str) -> str:
    """The single line on stderr, without a traceback."""
    assert "Traceback" not in text
    (line,) = text.strip().splitlines()
    return line


def test_demo_learns_to_tell_patients_it_never_saw(demo: tuple[Path, str]) -> None:
    report = json.loads((demo[0] / "demo.report.json").read_text())
    assert report["levels"]["study"]["count"] >= 60
    assert report["levels"]["study"]["auroc"]["value"] >= 0.85
    seen = {row["patient"] for row in rows_of(demo[0] / "demo.split.csv")}
    assert not seen & {row["patient"] for row in rows_of(demo[0] / "demo.valid.csv")}


def test_demo_saves_the_figure_of_an_abnormal_image(demo: tuple[Path, str]) -> None:
    picture = matplotlib.image.imread(demo[0] / "demo_heatmap.png")
    assert picture.shape[0] > 200 and picture.shape[1] > 600
    assert "study1_positive" in demo[1] or "study2_positive" in demo[1]
    assert any("abnormal, confidence" in line for line in demo[1].splitlines())


def test_temperature_helps_on_patients_it_was_not_fitted_on_or_is_one(demo: tuple[Path, str]) -> None:
    temperature = torch.load(demo[0] / "demo.pth", weights_only=True)["temperature"]
    rows = rows_of(demo[0] / "demo.valid.csv")
    label, calibrated = np.array([int(row["label"]) for row in rows]), np.array([float(row["probability"]) for row in rows])
    calibrated = calibrated.clip(1e-12, 1 - 1e-12)
    logit = np.log(calibrated / (1 - calibrated)) * temperature
    ece = {value: float(mad.score(label, mad.sigmoid(logit, value), 0.5)["ece"][0]) for value in (1.0, temperature)}
    assert temperature == 1 or ece[temperature] < ece[1.0]


def test_demo_prints_a_line_for_each_epoch(demo: tuple[Path, str]) -> None:
    lines = [line for line in demo[1].splitlines() if line.startswith("epoch")]
    history = rows_of(demo[0] / "demo.history.csv")
    assert len(lines) == len(history) >= 2
    for line, row in zip(lines, history, strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auroc", "val_kappa"):
            assert f"{float(row[name]):.4f}" in line


def test_training_leaves_the_files_of_the_contract(trained: Path, phantoms: Path) -> None:
    stem = trained.with_suffix("")
    endings = (".pth", ".last.pth", ".history.csv", ".history.png", ".split.csv", ".valid.csv", ".report.json", ".report.png")
    assert {path.name for path in trained.parent.iterdir()} == {stem.name + ending for ending in endings}
    assert stem.with_name("tiny.history.csv").read_text().splitlines()[0] == HISTORY
    assert {row["split"] for row in rows_of(stem.with_name("tiny.split.csv"))} == {"train", "val"}
    model = torch.load(trained, weights_only=True)
    assert (model["model"], model["image_size"], model["classes"]) == ("resnet50", 64, ["normal", "abnormal"])
    assert {"normalization", "temperature", "threshold", "version", "state_dict"} <= set(model)
    assert len(list(csv.reader((phantoms / "train_image_paths.csv").open()))) > len(model["patients"]["train"])


def test_table_of_valid_has_a_row_for_each_image_and_gives_the_report(trained: Path, phantoms: Path) -> None:
    rows = rows_of(trained.with_name("tiny.valid.csv"))
    assert list(rows[0]) == ["path", "part", "patient", "study", "label", "probability"]
    listed = [line.removeprefix("MURA-v1.1/") for line in (phantoms / "valid_image_paths.csv").read_text().split()]
    assert sorted(row["path"] for row in rows) == sorted(listed)
    report = json.loads(trained.with_name("tiny.report.json").read_text())
    labels, probabilities = ([float(row[name]) for row in rows] for name in ("label", "probability"))
    assert report["levels"]["image"]["auroc"]["value"] == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-9)
    studies: dict[str, list[float]] = {}
    for row, probability in zip(rows, probabilities, strict=True):
        studies.setdefault(row["study"], []).append(probability)
    means = [float(np.mean(values)) for values in studies.values()]
    truth = [study.endswith("positive") for study in studies]
    assert report["levels"]["study"]["auroc"]["value"] == pytest.approx(roc_auc_score(truth, means), abs=1e-9)


def test_report_has_the_keys_of_the_contract(trained: Path) -> None:
    report = json.loads(trained.with_name("tiny.report.json").read_text())
    assert report["split"] == "valid" and report["checkpoints"] == [str(trained)] and report["threshold"] == 0.5
    assert set(report["parts"]) == {"XR_FOREARM", "XR_HUMERUS"}
    for levels in (report["levels"], *report["parts"].values()):
        for level in ("image", "study"):
            assert {"count", "positives", *FIGURES} <= set(levels[level])
            assert all(set(levels[level][figure]) == {"value", "low", "high"} for figure in FIGURES)


def test_report_says_how_sets_were_separated_and_what_valid_is_not(trained: Path) -> None:
    words = " ".join(json.loads(trained.with_name("tiny.report.json").read_text())["notes"])
    assert "hidden test set of 207 studies" in words
    assert "mean of those of the image and of its mirror image" in words
    assert "divided into train and val across body parts" in words and "valid/ took no part in that" in words


def test_evaluate_alone_repeats_the_figures_of_training(trained: Path, phantoms: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pth"
    shutil.copy(trained, copy)
    done = run_command(
        "--data-dir", phantoms, "--evaluate", "--checkpoint", copy, "--bootstrap", "100", "--device", "cpu", "--batch-size", "8"
    )
    assert done.returncode == 0, done.stderr
    assert "AUROC" in done.stdout and max(map(len, done.stdout.splitlines()[:-1])) <= 100
    first, second = (json.loads(path.with_suffix(".report.json").read_text()) for path in (trained, copy))
    assert first["levels"] == second["levels"] and first["parts"] == second["parts"]


def test_ensemble_is_the_mean_of_its_members(trained: Path, phantoms: Path, tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):  # b: the same network with its last layer turned round
        content = torch.load(trained, weights_only=True)
        if name == "b":
            content["state_dict"]["head.weight"] *= -1
        paths.append(tmp_path / f"{name}.pth")
        mad.write_tensors(paths[-1], {key: value for key, value in content.items() if key not in ("format", "version")})
    scores = {}
    for which in (paths[:1], paths[1:], paths):
        assert (
            run_inside("--data-dir", phantoms, "--evaluate", "--checkpoint", *which, "--bootstrap", "100", "--device", "cpu")
            == 0
        )
        scores[len(which), which[0].stem] = np.array(
            [float(row["probability"]) for row in rows_of(which[0].with_suffix(".valid.csv"))]
        )
    assert np.abs(scores[1, "a"] - scores[1, "b"]).max() > 1e-3
    np.testing.assert_allclose(scores[2, "a"], (scores[1, "a"] + scores[1, "b"]) / 2, atol=1e-6)
    report = json.loads(paths[0].with_suffix(".report.json").read_text())
    assert set(report["members"]) == {str(path) for path in paths}


def test_scoring_the_training_patients_is_warned_about(
    trained: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.pth"
    shutil.copy(trained, copy)
    assert run_inside("--data-dir", phantoms, "--evaluate", "--split", "train", "--checkpoint", copy, "--bootstrap", "100") == 0
    assert "were trained on" in capsys.readouterr().err
    report = json.loads(copy.with_suffix(".report.json").read_text())
    assert report["split"] == "train" and any("were trained on" in text for text in report["notes"])
    assert "Patients of train/ took part in that: the figures are too hopeful." in report["notes"][0]
    assert (tmp_path / "copy.train.csv").is_file()


def test_patients_of_another_set_took_no_part(trained: Path, phantom_copy: Path, tmp_path: Path) -> None:
    """--split train of a set whose patients the model never saw is not called too hopeful."""
    content = torch.load(trained, weights_only=True)
    stranger = {key: value for key, value in content.items() if key not in ("format", "version")}
    mad.write_tensors(tmp_path / "m.pth", stranger | {"patients": {"train": ["somebody"], "val": ["else"]}})
    command = ["--data-dir", phantom_copy, "--evaluate", "--split", "train", "--bootstrap", "100", "--device", "cpu"]
    assert run_inside(*command, "--checkpoint", tmp_path / "m.pth") == 0
    notes = json.loads((tmp_path / "m.report.json").read_text())["notes"]
    assert "None of the patients of train/ took part in that." in notes[0]


def test_parts_that_a_model_never_learnt_are_said(
    trained: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(trained, weights_only=True)
    assert content["parts"] == ["XR_FOREARM", "XR_HUMERUS"]
    narrow = {key: value for key, value in content.items() if key not in ("format", "version")} | {"parts": ["XR_HUMERUS"]}
    mad.write_tensors(tmp_path / "m.pth", narrow)
    command = ["--data-dir", phantoms, "--evaluate", "--bootstrap", "100", "--device", "cpu", "--checkpoint"]
    said = f"{tmp_path / 'm.pth'}: learnt from XR_HUMERUS alone, not from XR_FOREARM (--tasks chooses)"
    assert run_inside(*command, tmp_path / "m.pth") == 0
    assert said in capsys.readouterr().err
    assert said in json.loads((tmp_path / "m.report.json").read_text())["notes"]
    assert run_inside(*command, tmp_path / "m.pth", "--tasks", "HUMERUS") == 0
    assert "learnt from" not in capsys.readouterr().err


def test_files_named_in_any_bytes_are_trained_on_and_scored(phantom_copy: Path, tmp_path: Path) -> None:
    """A copy from an old system may have names that are not UTF-8."""
    for split in ("train", "valid"):
        patient = sorted((phantom_copy / split).rglob("patient*"))[0]
        patient.rename(os.fsdecode(bytes(patient.parent) + b"/patient\xe9"))
    for table in phantom_copy.glob("*.csv"):
        table.unlink()
    for command in ([], ["--evaluate"]):
        assert run_inside("--data-dir", phantom_copy, "--checkpoint", tmp_path / "m.pth", *TINY, *command) == 0
    rows = (tmp_path / "m.valid.csv").read_bytes()
    assert b"patient\xe9" in rows or b"patient\\udce9" in rows


@pytest.mark.parametrize("command", [
    ["--data-dir", "{data}", "--checkpoint", "{place}/m.pth"], ["--export", "{place}/m.pt2", "--checkpoint", "{model}"],
    ["--demo", "{tmp}/demo", "--figure", "{place}/f.png"],
    ["--data-dir", "{data}", "--evaluate", "--checkpoint", "{tmp}/file.pth"],  # where its report would be there is a folder
])
def test_a_place_that_cannot_be_written_is_said_before_the_work(
    command: list[str], trained: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("no folder")
    place = tmp_path / "file" / "folder"
    shutil.copy(trained, tmp_path / "file.pth")
    (tmp_path / "file.report.json").mkdir()
    for work in ("open_cache", "write_phantoms", "Deployed"):
        monkeypatch.setattr(mad, work, lambda *arguments, **options: pytest.fail("worked first"))
    filled = [text.format(data=phantoms, place=place, tmp=tmp_path, model=trained) for text in command]
    assert run_inside(*filled, "--device", "cpu", "--no-show") == 1
    error = one_line(capsys.readouterr().err)
    assert str(tmp_path / "file") in error and "cannot be written" in error


def test_memory_that_does_not_suffice_for_scoring_is_one_line_with_a_way_out(
    trained: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(mad, "predict_logits", short)
    assert run_inside("--data-dir", phantoms, "--evaluate", "--checkpoint", trained, "--device", "cpu") == 1
    assert "use a smaller --batch-size" in one_line(capsys.readouterr().err)


def test_predict_prints_class_and_confidence_and_saves_the_panels(trained: Path, phantoms: Path, tmp_path: Path) -> None:
    image = next((phantoms / "valid").rglob("image1.png"))
    done = run_command("--predict", image, "--checkpoint", trained, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert any(word in done.stdout for word in ("normal, confidence", "abnormal, confidence"))
    assert matplotlib.image.imread(tmp_path / "image1_heatmap.png").ndim == 3
    assert "\r" not in done.stderr and "not for diagnosis" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="a shell's redirections")
@pytest.mark.parametrize("redirection", ["| true", ">&-", "2>&-", "2>&1 | true"])
def test_a_run_that_nobody_reads_goes_on_to_its_end(redirection: str, trained: Path, phantoms: Path, tmp_path: Path) -> None:
    study = next((phantoms / "valid").glob("*/*/*/"))
    asked = ["--predict", study, study, "--checkpoint", trained, "--output", "r.csv"]
    command = shlex.join(map(str, [sys.executable, SCRIPT, *asked]))
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} {redirection}"], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    assert len(rows_of(tmp_path / "r.csv")) == 2


def test_an_unknown_mplbackend_is_refused_before_the_work(trained: Path, phantoms: Path, tmp_path: Path) -> None:
    done = run_command("--predict", phantoms, "--checkpoint", trained, cwd=tmp_path, MPLBACKEND="nonsense")
    assert done.returncode == 2 and done.stdout == ""
    assert "MPLBACKEND=nonsense" in one_line(done.stderr)


def test_a_valid_folder_that_cannot_be_scored_is_said_before_training(
    phantom_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(phantom_copy / "valid")
    (phantom_copy / "valid").mkdir()
    assert run_inside("--data-dir", phantom_copy, "--checkpoint", tmp_path / "m.pth", *TINY) == 2
    assert "valid" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "m.pth").exists()


def test_training_needs_no_valid_folder(phantom_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(phantom_copy / "valid")
    assert run_inside("--data-dir", phantom_copy, "--checkpoint", tmp_path / "m.pth", *TINY) == 0
    assert "no valid/" in capsys.readouterr().err
    assert (tmp_path / "m.pth").is_file() and not (tmp_path / "m.report.json").exists()


def test_tasks_limit_the_parts(phantoms: Path, trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pth"
    shutil.copy(trained, copy)
    assert (
        run_inside("--data-dir", phantoms, "--evaluate", "--tasks", "humerus", "--checkpoint", copy, "--bootstrap", "100") == 0
    )
    assert {row["part"] for row in rows_of(tmp_path / "copy.valid.csv")} == {"XR_HUMERUS"}


BAD = {
    "no such folder": (["--data-dir", "{tmp}/nowhere"], 2, "nowhere"),
    "an empty folder": (["--data-dir", "{tmp}"], 2, "train/"),
    "an unknown part": (["--data-dir", "{data}", "--tasks", "HUMERAS"], 2, "HUMERUS"),
    "weights that are not there": (["--data-dir", "{data}", "--weights", "{tmp}/w.pth"], 2, "w.pth"),
    "no checkpoint": (["--data-dir", "{data}", "--evaluate", "--checkpoint", "{tmp}/no.pth"], 2, "no.pth"),
    "a checkpoint of something else": (["--predict", "{image}", "--checkpoint", "{image}"], 2, "not a checkpoint"),
    "another architecture": (["--predict", "{image}", "--checkpoint", "{model}", "--model", "densenet169"], 2, "resnet50"),
    "CUDA where there is none": (["--data-dir", "{data}", "--device", "cuda:99"], 2, "cuda:99"),
    "tf32 on a CPU": (["--data-dir", "{data}", "--device", "cpu", "--precision", "tf32"], 2, "tf32"),
    "an unreadable image": (
        ["--predict", "{data}/train_image_paths.csv", "--checkpoint", "{model}"],
        1,
        "train_image_paths.csv",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_that_names_it(
    case: str, trained: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code, named = BAD[case]
    image = next((phantoms / "valid").rglob("image1.png"))
    filled = [text.format(tmp=tmp_path, data=phantoms, image=image, model=trained) for text in arguments]
    assert run_inside(*filled) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "for research" not in line]
    assert named in one_line("\n".join(lines))


def test_no_images_of_a_class_is_said(phantom_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for study in (phantom_copy / "train").rglob("study*_positive"):
        shutil.rmtree(study)
    for table in phantom_copy.glob("*.csv"):
        table.unlink()
    assert run_inside("--data-dir", phantom_copy, "--checkpoint", tmp_path / "m.pth", *TINY) == 2
    assert "abnormal" in one_line(capsys.readouterr().err)


def test_the_demo_never_draws_over_radiographs(phantom_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (phantom_copy / "phantoms.csv").unlink()  # so that they could be anybody's
    before = {path: path.read_bytes() for path in phantom_copy.rglob("*") if path.is_file()}
    assert run_inside("--demo", phantom_copy.parent) == 2
    assert f"{phantom_copy} is there and no phantoms are in it" in one_line(capsys.readouterr().err)
    assert {path: path.read_bytes() for path in phantom_copy.rglob("*") if path.is_file()} == before


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run_command("--data-dir", tmp_path / "nowhere", "--debug", "--device", "cpu")
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert "nowhere: no such folder" in done.stderr.splitlines()[-1]


def test_wrong_use_answers_without_the_heavy_packages(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = run_command("--epochs", "none", PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert done.returncode == 2 and "--epochs" in one_line(done.stderr)
