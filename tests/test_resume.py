"""Section 13, training runs: a run that is stopped, killed or divided ends as one that was left alone."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, run_inside
from PIL import Image
from tiny_run import PlainNetwork, TinyNetwork

import mura_anomaly_detection as mad

TINY_RUN = Path(__file__).with_name("tiny_run.py")
OPTIONS = [*TINY, "--epochs", "2", "--lr", "0.02", "--rotation", "10"]
TIMED = ("images_per_second", "seconds")  # the columns of the history that differ from run to run


@dataclass(frozen=True)
class Outcome:
    """What a finished run has left, but for how long it took."""

    weights: dict[str, torch.Tensor]
    history: list[dict[str, str]]
    predictions: str

    @staticmethod
    def of(checkpoint: Path) -> Outcome:
        weights = mad.read_tensors(checkpoint, "model")["state_dict"]
        predictions = checkpoint.with_suffix(".valid.csv")
        return Outcome(weights, read_history(checkpoint), predictions.read_text() if predictions.exists() else "")

    def check_equal(self, other: Outcome) -> None:
        """Compare bit for bit."""
        assert all(torch.equal(value, other.weights[name]) for name, value in self.weights.items())
        assert self.history == other.history
        assert self.predictions == other.predictions


def read_history(checkpoint: Path) -> list[dict[str, str]]:
    with checkpoint.with_suffix(".history.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMED} for row in csv.DictReader(file)]


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_a_tiny_network() -> Iterator[None]:
    """Sums are then taken in the same order every time; a run takes a second."""
    threads, handlers = torch.get_num_threads(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mad, "Network", TinyNetwork)
        yield
    torch.set_num_threads(threads)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of two parts, about 40 images of 64 px to train on."""
    return mad.write_phantoms(tmp_path_factory.mktemp("data"), 10, 4, ("XR_FOREARM", "XR_HUMERUS"), seed=2, size=64)


@pytest.fixture(scope="module")
def unscored(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without valid/: a run ends when it has learnt."""
    target = tmp_path_factory.mktemp("unscored") / "MURA-v1.1"
    return Path(shutil.copytree(data, target, ignore=shutil.ignore_patterns("valid", ".mura_cache")))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run that nothing has disturbed."""
    checkpoint = tmp_path_factory.mktemp("whole") / "run.pth"
    assert run_inside("--data-dir", data, "--checkpoint", checkpoint, *OPTIONS) == 0
    return checkpoint


# ----- stopped by a signal, then continued ---------------------------------------------------------------------------


def signal_at(
    patch: pytest.MonkeyPatch, owner: Any, function: str, call: int, signum: int, *, before: bool = False
) -> None:
    """Send this process a signal at the call-th call of a function (from 1), before or after its work."""
    real, calls = getattr(owner, function), iter(range(1, 10_000))

    def disturbed(*arguments: Any, **options: Any) -> Any:
        mine = next(calls) == call
        if mine and before:
            os.kill(os.getpid(), signum)
        result = real(*arguments, **options)
        if mine and not before:
            os.kill(os.getpid(), signum)
        return result

    patch.setattr(owner, function, disturbed)


@pytest.mark.parametrize(("owner", "function", "call", "signum"), [
    (mad.Trainer, "update", 1, signal.SIGINT),  # in the first batch
    (mad.Trainer, "update", 2, signal.SIGTERM),  # amid the first epoch
    (mad.Trainer, "update", 3, signal.SIGINT),  # in the last batch of the first epoch
    (mad.Session, "validate", 1, signal.SIGTERM),  # when validation is done
    (mad.Session, "end_epoch", 1, signal.SIGINT),  # between the epochs
    (mad.Trainer, "update", 5, signal.SIGTERM),  # amid the second epoch
    (mad.Session, "end_epoch", 2, signal.SIGTERM),  # when all is learnt, before the test is scored
    (mad, "predict_logits", 2, signal.SIGINT),  # in the second validation
    (mad, "predict_logits", 3, signal.SIGTERM),  # while the test is scored
])
def test_a_stopped_run_ends_as_one_left_alone(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    owner: Any, function: str, call: int, signum: int,
) -> None:
    """Weights, history and predictions are the same bit for bit, whatever the moment of the stop."""
    command = ["--data-dir", data, "--checkpoint", tmp_path / "run.pth", *OPTIONS, "--resume", "auto"]
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, owner, function, call, signum, before=owner is mad)
        assert run_inside(*command) == 128 + signum
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"stopped by {signal.Signals(signum).name}")
    assert not (tmp_path / "run.valid.csv").exists()
    assert mad.read_tensors(tmp_path / "run.last.pth", "state")
    assert run_inside(*command) == 0
    assert "resumed from" in capsys.readouterr().out
    Outcome.of(tmp_path / "run.pth").check_equal(Outcome.of(whole))


@pytest.mark.parametrize("options", [
    ["--schedule", "plateau", "--accumulate", "2"], ["--normalization", "dataset", "--weight-decay", "0", "--mixup", "0.3"]])
def test_a_run_stopped_after_every_batch_ends_as_one_left_alone(data: Path, tmp_path: Path, options: list[str]) -> None:
    command = ["--data-dir", data, *OPTIONS, *options, "--checkpoint"]
    assert run_inside(*command, tmp_path / "whole.pth") == 0
    codes = []
    while not codes or codes[-1]:
        with pytest.MonkeyPatch.context() as patch:
            signal_at(patch, mad.Trainer, "update", 1, signal.SIGINT)
            codes.append(run_inside(*command, tmp_path / "run.pth", "--resume", "auto"))
    optimizer = mad.read_tensors(tmp_path / "run.last.pth", "state")["trainer"]["optimizer"]
    assert codes == [130] * int(optimizer["state"][0]["step"]) + [0]
    assert len(codes) > 6
    Outcome.of(tmp_path / "run.pth").check_equal(Outcome.of(tmp_path / "whole.pth"))


def test_a_real_network_continues_exactly(unscored: Path, tmp_path: Path) -> None:
    """ResNet-50, for its 53 batch normalisations; the tiny network has one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mad, "Network", TinyNetwork.__base__)
        command = ["--data-dir", unscored, *TINY, "--tasks", "HUMERUS", "--batch-size", "6", "--checkpoint"]
        assert run_inside(*command, tmp_path / "whole.pth") == 0
        with pytest.MonkeyPatch.context() as stopping:
            signal_at(stopping, mad.Trainer, "update", 1, signal.SIGINT)
            assert run_inside(*command, tmp_path / "run.pth") == 130
        assert run_inside(*command, tmp_path / "run.pth", "--resume") == 0
    Outcome.of(tmp_path / "run.pth").check_equal(Outcome.of(tmp_path / "whole.pth"))


def test_a_signal_while_images_are_decoded_leaves_no_half_cache(data: Path, tmp_path: Path) -> None:
    command = ["--data-dir", data, "--cache-dir", tmp_path / "cache", "--checkpoint", tmp_path / "run.pth", *OPTIONS]
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, mad, "decode_square", 3, signal.SIGTERM)
        assert run_inside(*command) == 143
    assert list((tmp_path / "cache").iterdir()) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]


def test_a_second_signal_ends_the_process_the_plain_way() -> None:
    """For the user whose first Ctrl-C seems to do nothing."""
    stop = mad.StopSignals()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.signum == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    with pytest.raises(mad.Stopped, match="stopped by SIGINT"):
        stop.check()


def test_sigterm_may_come_several_times() -> None:
    """A scheduler and torchrun both send it; the second must not kill the process that is saving the state."""
    stop = mad.StopSignals()
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(mad.Stopped, match="stopped by SIGTERM"):
        stop.check()


def test_a_finished_run_is_only_scored_again(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in whole.parent.glob("run.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "run.valid.csv").unlink()
    capsys.readouterr()
    assert run_inside("--data-dir", data, "--checkpoint", tmp_path / "run.pth", *OPTIONS, "--resume") == 0
    assert not any(line.startswith("epoch") for line in capsys.readouterr().out.splitlines())
    assert (tmp_path / "run.pth").read_bytes() == whole.read_bytes()
    Outcome.of(tmp_path / "run.pth").check_equal(Outcome.of(whole))


def test_what_an_earlier_model_has_seen_is_said_and_kept(
    unscored: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As --weights: patients that it learnt from and are now in val, and preprocessing that it did not learn with."""
    capsys.readouterr()
    given = ["--weights", whole, "--seed", "1", "--normalization", "imagenet"]
    assert run_inside("--data-dir", unscored, "--checkpoint", tmp_path / "next.pth", *OPTIONS, *given, "--epochs", "1") == 0
    said = capsys.readouterr().err
    patients = [mad.read_tensors(path, "model")["patients"] for path in (whole, tmp_path / "next.pth")]
    assert f"run.pth: that model has seen {len(patients[1]['val'])} patients of val" in said
    assert "run.pth: that model learnt with --normalization image, this run has imagenet" in said
    assert "--fit" not in said
    assert set(patients[1]["train"]) == {*patients[0]["train"], *patients[0]["val"]}


# ----- what --resume refuses -----------------------------------------------------------------------------------------


@pytest.fixture
def stopped(data: Path, tmp_path: Path) -> Path:
    """The model file (not written yet) of a run that was stopped after a batch."""
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, mad.Trainer, "update", 1, signal.SIGTERM)
        assert run_inside("--data-dir", data, "--checkpoint", tmp_path / "run.pth", *OPTIONS) == 143
    return tmp_path / "run.pth"


def test_other_flags_are_refused_by_name(data: Path, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = stopped.with_suffix(".last.pth").read_bytes()
    for flags, differences in [
        (["--lr", "0.01"], ["lr was 0.02, is 0.01"]),
        (["--epochs", "3", "--batch-size", "4"], ["epochs was 2, is 3", "batch-size was 8, is 4"]),
        (["--model", "densenet169"], ["model was resnet50, is densenet169"]),
        (["--seed", "1"], ["seed was 0, is 1", "data was"]),
        (["--image-size", "96"], ["image-size was 64, is 96"]),
        (["--tasks", "HUMERUS"], ["tasks was [], is ['HUMERUS']", "data was"]),
        (["--fit", "letterbox"], ["fit was stretch, is letterbox"]),
        (["--threshold", "auto"], ["threshold was None, is auto"]),  # it is stored with the model of each best epoch
        (["--no-tta"], ["tta was True, is False"]),
    ]:
        capsys.readouterr()
        assert run_inside("--data-dir", data, "--checkpoint", stopped, *OPTIONS, *flags, "--resume", "auto") == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "run.last.pth" in error
        assert all(difference in error for difference in differences)
        assert stopped.with_suffix(".last.pth").read_bytes() == state


def test_other_flags_may_differ(data: Path, stopped: Path, whole: Path, tmp_path: Path) -> None:
    """Those that do not change what is learnt."""
    flags = ["--save-every", "0", "--workers", "1", "--bootstrap", "120", "--cache-dir", tmp_path / "cache"]
    assert run_inside("--data-dir", data, "--checkpoint", stopped, *OPTIONS, *flags, "--resume") == 0
    Outcome.of(stopped).check_equal(Outcome.of(whole))


def test_a_recipe_is_no_more_than_its_flags(data: Path, stopped: Path, whole: Path) -> None:
    """The paper's with all its flags overruled is the run that was begun without it."""
    given = {name: getattr(mad.Config(), name) for name in mad.PAPER_RECIPE if name not in ("image_size", "tta")}
    defaults = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    command = ["--data-dir", data, "--checkpoint", stopped, "--recipe", "paper", "--tta", *defaults, *OPTIONS, "--resume"]
    assert run_inside(*command) == 0
    Outcome.of(stopped).check_equal(Outcome.of(whole))


def test_a_state_from_before_a_flag_was_there_goes_on(data: Path, stopped: Path, whole: Path) -> None:
    """The default of a new flag is what was done without it."""
    file = stopped.with_suffix(".last.pth")
    state = mad.read_tensors(file, "state")
    assert state["settings"].pop("mixup") == 0
    mad.write_tensors(file, {name: value for name, value in state.items() if name not in ("format", "version")})
    assert run_inside("--data-dir", data, "--checkpoint", stopped, *OPTIONS, "--resume") == 0
    Outcome.of(stopped).check_equal(Outcome.of(whole))


def test_a_state_from_before_mirror_images_were_the_default_goes_on_without(
    data: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stopped.with_suffix(".last.pth")
    state = mad.read_tensors(file, "state")
    del state["settings"]["tta"]
    mad.write_tensors(file, {name: value for name, value in state.items() if name not in ("format", "version")})
    command = ["--data-dir", data, "--checkpoint", stopped, *OPTIONS, "--resume"]
    capsys.readouterr()
    assert run_inside(*command) == 2
    assert "tta was False, is True" in capsys.readouterr().err
    assert run_inside(*command, "--no-tta") == 0
    assert mad.read_tensors(stopped, "model")["tta"] is False


def test_short_of_memory_a_run_may_go_on_in_more_parts(data: Path, stopped: Path) -> None:
    """What the message about memory advises; the parts of the state are a floor, since the program may have found them."""
    command = ["--data-dir", data, "--checkpoint", stopped, *OPTIONS, "--resume"]
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, mad.Trainer, "update", 1, signal.SIGTERM)
        assert run_inside(*command, "--accumulate", "4") == 143
    assert mad.read_tensors(stopped.with_suffix(".last.pth"), "state")["trainer"]["accumulate"] == 4
    assert run_inside(*command, "--accumulate", "2") == 0
    assert mad.read_tensors(stopped.with_suffix(".last.pth"), "state")["trainer"]["accumulate"] == 4


def test_the_best_model_must_be_beside_the_state(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said at once, and not when the run has ended without a better one."""
    (tmp_path / "run.last.pth").write_bytes(whole.with_suffix(".last.pth").read_bytes())
    capsys.readouterr()
    assert run_inside("--data-dir", data, "--checkpoint", tmp_path / "run.pth", *OPTIONS, "--resume") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'run.pth'}, the best model so far, is missing" in error


def test_other_data_are_refused(data: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One image fewer."""
    copy = Path(shutil.copytree(data, tmp_path / "copy" / "MURA-v1.1"))
    image = next((copy / "train").rglob("*.png"))
    listing = copy / "train_image_paths.csv"
    gone = image.relative_to(copy).as_posix()
    listing.write_text("".join(f"{line}\n" for line in listing.read_text().splitlines() if not line.endswith(gone)))
    image.unlink()
    assert run_inside("--data-dir", copy, "--checkpoint", stopped, *OPTIONS, "--resume") == 2
    assert re.search(r"run\.last\.pth: data was [\w/]+, is [\w/]+; give the same", capsys.readouterr().err)


def test_resume_without_a_state(data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error that says what to do; `auto` starts afresh instead."""
    command = ["--data-dir", data, "--checkpoint", tmp_path / "run.pth", *OPTIONS, "--resume"]
    assert run_inside(*command) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "run.last.pth" in error
    assert "--resume auto" in error
    assert list(tmp_path.iterdir()) == []
    assert run_inside(*command, "auto") == 0
    Outcome.of(tmp_path / "run.pth").check_equal(Outcome.of(whole))


@pytest.mark.parametrize("content", [
    {}, {"settings": {}}, {"settings": None, "trainer": {}}, {"settings": "the same", "trainer": {}},
    {"settings": "the same", "trainer": {"network": {}}}, {"settings": "the same", "trainer": None},
])
def test_a_state_of_another_version_is_one_line(
    data: Path, stopped: Path, capsys: pytest.CaptureFixture[str], content: dict[str, Any]
) -> None:
    state = stopped.with_suffix(".last.pth")
    settings = mad.read_tensors(state, "state")["settings"]
    mad.write_tensors(state, {
        "kind": "state", **content, **({"settings": settings} if content.get("settings") == "the same" else {})})
    capsys.readouterr()
    assert run_inside("--data-dir", data, "--checkpoint", stopped, *OPTIONS, "--resume") in (1, 2)
    (error,) = capsys.readouterr().err.splitlines()
    assert "run.last.pth" in error


def test_a_damaged_state_is_named(data: Path, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = stopped.with_suffix(".last.pth")
    whole = state.read_bytes()
    state.write_bytes(whole[:1000] + bytes([whole[1000] ^ 4]) + whole[1001:])
    capsys.readouterr()
    assert run_inside("--data-dir", data, "--checkpoint", stopped, *OPTIONS, "--resume", "auto") == 2
    assert "run.last.pth: damaged" in capsys.readouterr().err


# ----- which epoch is kept -------------------------------------------------------------------------------------------


def pretend(patch: pytest.MonkeyPatch, figures: list[tuple[float, float]]) -> None:
    """Let the epochs have these validation accuracies and losses."""
    real, upcoming = mad.Session.history_row, iter(figures)

    def row(*arguments: Any) -> dict[str, float | None]:
        accuracy, loss = next(upcoming)
        return {**real(*arguments), "val_accuracy": accuracy, "val_loss": loss}

    patch.setattr(mad.Session, "history_row", row)


@pytest.mark.parametrize(("figures", "patience", "kept", "run"), [
    ([(0.5, 1.0), (0.8, 0.9), (0.7, 0.1)], 0, 2, 3),  # accuracy decides, not the loss
    ([(0.6, 0.9), (0.6, 0.8), (0.6, 0.85)], 0, 2, 3),  # a tie goes by the loss
    ([(0.6, 0.5), (0.6, 0.5), (0.6, 0.5)], 0, 1, 3),  # the same again is no better
    ([(0.0, 3.0), (0.0, 4.0), (0.0, 5.0)], 0, 1, 3),  # the first is kept, however bad
    ([(0.6, 0.5), (0.5, 0.5), (0.5, 0.4), (0.9, 0.1)], 2, 1, 3),  # patience ends before the best
    ([(0.6, 0.5), (0.5, 0.5), (0.7, 0.4), (0.6, 0.1)], 2, 3, 4),  # it starts anew at each better one
    ([(0.9, 0.5), (0.8, 0.5)], 1, 1, 2),
])
def test_the_best_epoch_is_kept(
    unscored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    figures: list[tuple[float, float]], patience: int, kept: int, run: int,
) -> None:
    """By validation accuracy, ties by validation loss."""
    pretend(monkeypatch, figures)
    trained: list[dict[str, torch.Tensor]] = []
    end_epoch = mad.Session.end_epoch

    def noted(session: mad.Session, *arguments: Any) -> None:
        trained.append({name: value.clone() for name, value in session.trainer.network.state_dict().items()})
        end_epoch(session, *arguments)

    monkeypatch.setattr(mad.Session, "end_epoch", noted)
    checkpoint = tmp_path / "run.pth"
    flags = ["--epochs", len(figures), "--patience", patience, "--tasks", "HUMERUS"]
    assert run_inside("--data-dir", unscored, "--checkpoint", checkpoint, *OPTIONS, *flags) == 0
    content = mad.read_tensors(checkpoint, "model")
    assert content["epoch"] == kept
    assert all(torch.equal(value, trained[kept - 1][name]) for name, value in content["state_dict"].items())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == len(read_history(checkpoint)) == run
    assert [number for number, line in enumerate(lines, 1) if line.endswith("best so far")][-1] == kept


def mean_by_study(views: list[mad.View], probability: np.ndarray) -> np.ndarray:
    """Pool images to studies, in the order of their names."""
    places = [[i for i, view in enumerate(views) if view.study == study] for study in sorted({v.study for v in views})]
    return np.array([probability[rows].mean() for rows in places])


def test_the_history_can_be_computed_by_hand(data: Path, whole: Path) -> None:
    """Loss, accuracy, AUROC and kappa of val, from the stored weights of the epoch that was kept."""
    from sklearn.metrics import cohen_kappa_score, roc_auc_score

    content = mad.read_tensors(whole, "model")
    network = TinyNetwork("resnet50")
    network.load_state_dict(content["state_dict"])
    views = [view for view in mad.index_split(data, "train").views if view.patient in content["patients"]["val"]]
    train = [view for view in mad.index_split(data, "train").views if view.patient in content["patients"]["train"]]
    pixels = np.stack([mad.decode_square(view.path, 64, "stretch") for view in views])
    with torch.no_grad():
        x = torch.from_numpy(pixels)[:, None].double() / 255
        x = (x - x.mean((2, 3), keepdim=True)) / x.flatten(1).std(1).view(-1, 1, 1, 1)
        sides = [network.double().eval()(side.expand(-1, 3, -1, -1)).numpy() for side in (x, x.flip(-1))]
    assert np.abs(sides[0] - sides[1]).max() > 1e-3
    logits = np.mean(sides, axis=0)
    labels = np.array([view.label for view in views])
    losses = []
    for view, z in zip(views, logits, strict=True):
        abnormal = np.mean([other.label for other in train if other.part == view.part])
        losses.append((1 - abnormal) * np.logaddexp(0, -z) if view.label else abnormal * np.logaddexp(0, z))
    studies = sorted({view.study for view in views})
    probability = 1 / (1 + np.exp(-logits))
    pooled = mean_by_study(views, probability)
    truth = [study.endswith("positive") for study in studies]
    row = read_history(whole)[content["epoch"] - 1]
    assert float(row["val_loss"]) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(row["val_accuracy"]) == pytest.approx(((logits > 0) == labels).mean())
    assert float(row["val_auroc"]) == pytest.approx(roc_auc_score(truth, pooled))
    assert float(row["val_kappa"]) == pytest.approx(cohen_kappa_score(truth, pooled > 0.5))


@pytest.mark.parametrize(("flags", "kept"), [
    ([], True), (["--no-tta"], False), (["--flip", "0"], False), (["--flip", "0", "--tta"], True),  # none learnt from
])
def test_the_model_keeps_whether_mirror_images_count(unscored: Path, tmp_path: Path, flags: list[str], kept: bool) -> None:
    checkpoint = tmp_path / "run.pth"
    command = ["--data-dir", unscored, "--checkpoint", checkpoint, *OPTIONS, "--epochs", "1", "--tasks", "HUMERUS", *flags]
    assert run_inside(*command) == 0
    assert mad.read_tensors(checkpoint, "model")["tta"] is kept


def test_the_automatic_threshold_is_stored(data: Path, tmp_path: Path) -> None:
    """It has the best kappa of all on val, and --evaluate uses it unless told otherwise."""
    from sklearn.metrics import cohen_kappa_score

    checkpoint = tmp_path / "run.pth"
    kept: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:
        real = mad.Session.save_model
        patch.setattr(mad.Session, "save_model", lambda session, logits: kept.append(logits) or real(session, logits))
        flags = ["--threshold", "auto"]
        assert run_inside("--data-dir", data, "--checkpoint", checkpoint, *OPTIONS, *flags) == 0
    content = mad.read_tensors(checkpoint, "model")
    assert content["threshold_source"] == "val"
    views = [view for view in mad.index_split(data, "train").views if view.patient in content["patients"]["val"]]
    probability = mad.sigmoid(kept[-1], content["temperature"])
    studies = sorted({view.study for view in views})
    pooled = mean_by_study(views, probability)
    truth = [study.endswith("positive") for study in studies]
    found = cohen_kappa_score(truth, pooled > content["threshold"])
    assert found == pytest.approx(max(cohen_kappa_score(truth, pooled > cut) for cut in [0, *pooled[:-1]]), abs=1e-9)
    assert json.loads(checkpoint.with_suffix(".report.json").read_text())["threshold"] == content["threshold"]


def test_a_loss_that_is_not_finite_keeps_the_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1 with one line; what earlier epochs have left loads and is not changed."""
    loss, calls = mad.weighted_loss, iter(range(10_000))
    before: dict[str, bytes] = {}

    def poisoned(*arguments: torch.Tensor) -> torch.Tensor:
        value = loss(*arguments)
        if next(calls) < 6:  # the batches and the validation of the first epoch, two batches of the second
            return value
        before.update({path.name: path.read_bytes() for path in tmp_path.glob("run.*pth")})
        return value * float("nan")

    monkeypatch.setattr(mad, "weighted_loss", poisoned)
    assert run_inside("--data-dir", data, "--checkpoint", tmp_path / "run.pth", *OPTIONS) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "the loss is not finite in epoch 2" in error
    assert error.count(".png") >= 5
    assert before.keys() == {"run.pth", "run.last.pth"}
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert mad.read_tensors(tmp_path / "run.pth", "model")["epoch"] == 1


def test_short_memory_in_a_run_is_as_asking_for_parts(
    unscored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run that found out by itself has learnt the same, bit for bit, as the one told with --accumulate."""
    command = ["--data-dir", unscored, *OPTIONS, "--checkpoint"]
    assert run_inside(*command, tmp_path / "told.pth", "--accumulate", "4") == 0
    forward = TinyNetwork.forward

    def limited(network: TinyNetwork, images: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(network, images)

    monkeypatch.setattr(TinyNetwork, "forward", limited)
    capsys.readouterr()
    assert run_inside(*command, tmp_path / "found.pth") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert [line.partition("computed in ")[2][:7] for line in lines] == ["2 parts", "4 parts"]
    Outcome.of(tmp_path / "found.pth").check_equal(Outcome.of(tmp_path / "told.pth"))


# ----- killed --------------------------------------------------------------------------------------------------------


class Trials:
    """A process that has imported everything once, and forks one that trains for each trial."""

    def __init__(self, log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(TINY_RUN)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def run(self, *arguments: object, delay: float | None = None, operation: int | None = None) -> tuple[int, float]:
        """Run a command, killed after a delay in seconds or before its N-th fsync or rename: exit code and seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        task = {"arguments": list(map(str, arguments)), "log": str(self.log), "delay": delay, "operation": operation}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        code, seconds = json.loads(self.process.stdout.readline())
        return code, seconds

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *reason: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with Trials(tmp_path_factory.mktemp("trials") / "log") as started:
        yield started


def check_whole(place: Path, name: str) -> None:
    """Every file that a run has left under its name is whole: it loads, and is what the undisturbed run wrote."""
    folder, cache, reference, reference_cache = (place / f for f in (name, f"{name}-cache", "whole", "whole-cache"))
    wanted = Outcome.of(reference / "run.pth")
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if "run.pth" in present:
        assert torch.load(folder / "run.pth", weights_only=True)["kind"] == "model"
        mad.load_member(folder / "run.pth", mad.Arithmetic(torch.device("cpu"), bf16=False, channels_last=False))
    if "run.last.pth" in present:
        assert mad.read_tensors(folder / "run.last.pth", "state")["trainer"]["progress"]["epoch"] <= 2
    if "run.history.csv" in present:
        rows = read_history(folder / "run.pth")
        assert rows == wanted.history[: len(rows)]
        assert rows
    for name in ("run.split.csv", "run.valid.csv", "run.report.json"):
        if name in present and name.endswith(".csv"):
            assert (folder / name).read_bytes() == (reference / name).read_bytes()
        elif name in present:
            assert json.loads((folder / name).read_text())["levels"]
    for name in present:
        if name.endswith(".png"):
            with Image.open(folder / name) as image:
                image.load()
    for path in cache.iterdir() if cache.exists() else []:
        if not path.name.startswith("."):
            assert path.read_bytes() == (reference_cache / path.name).read_bytes()


def test_killed_at_any_moment_nothing_is_lost(
    data: Path, trials: Trials, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at 50 random moments (200 with --many) between the first decoded image and the report.

    Half of the trials begin afresh, the others go on from where the one before was killed. After each kill, all files
    are whole; at the end --resume auto completes the run, bit for bit as if nothing had happened.
    """
    random = np.random.default_rng(7)
    wanted, kills, delays = (200 if request.config.getoption("--many") else 50), 0, []
    options = ["--data-dir", data, *OPTIONS, "--batch-size", "12", "--save-every", "0", "--resume", "auto"]

    def command(name: str) -> list[object]:
        return [*options, "--checkpoint", tmp_path / name / "run.pth", "--cache-dir", tmp_path / f"{name}-cache"]

    code, seconds = trials.run(*command("whole"))
    assert code == 0, trials.log.read_text()
    trial, name = 0, ""
    while kills < wanted and trial < 3 * wanted:
        name = f"trial{trial // 2}"  # every other one goes on from its predecessor
        (tmp_path / name).mkdir(exist_ok=True)
        delays.append((trial * 0.618 + random.uniform(0, 0.02)) % 1 * 0.9 * seconds)
        code, _ = trials.run(*command(name), delay=delays[-1])
        assert code in (-signal.SIGKILL, 0), trials.log.read_text()
        kills += code == -signal.SIGKILL
        trial += 1
        check_whole(tmp_path, name)
    assert kills >= wanted
    for number in {0, trial // 4, (trial - 1) // 2}:
        name = f"trial{number}"
        assert trials.run(*command(name))[0] == 0, trials.log.read_text()
        Outcome.of(tmp_path / name / "run.pth").check_equal(Outcome.of(tmp_path / "whole" / "run.pth"))
    with capsys.disabled():
        print(f" [{kills} kills in {trial} trials of a run of {seconds:.1f} s] ", end="")


def test_killed_before_any_write_nothing_is_lost(data: Path, trials: Trials, tmp_path: Path) -> None:
    """Before the first fsync or rename of a run, before the second of the next, and so on: a file is half there."""

    def command(name: str) -> list[object]:
        files = ["--cache-dir", tmp_path / f"{name}-cache", "--checkpoint", tmp_path / name / "run.pth"]
        short = ["--epochs", "1", "--batch-size", "16", "--tasks", "HUMERUS", "--save-every", "0"]
        return ["--data-dir", data, *OPTIONS, *short, "--resume", "auto", *files]

    assert trials.run(*command("whole"))[0] == 0
    (tmp_path / "run").mkdir()
    codes = []
    while not codes or codes[-1]:
        codes.append(trials.run(*command("run"), operation=len(codes))[0])
        assert codes[-1] in (-signal.SIGKILL, 0), trials.log.read_text()
        check_whole(tmp_path, "run")
        assert len(codes) < 60
    assert len(codes) > 10
    Outcome.of(tmp_path / "run" / "run.pth").check_equal(Outcome.of(tmp_path / "whole" / "run.pth"))


# ----- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--data-dir", "{data}", "--batch-size", "3"], "--batch-size 3: is of all processes together; 2 need 4 or more"),
    (["--predict", "{data}"], "leave it out"),
    (["--demo"], "leave it out"),
    (["--export", "model.onnx"], "leave it out"),
])
def test_what_several_processes_cannot_do_is_said_before_they_meet(
    arguments: list[str], complaint: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert run_inside(*(text.format(data=data) for text in arguments), "--device", "cpu") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert complaint in error


def test_one_of_several_processes_leaves_without_waiting_for_the_others(tmp_path: Path) -> None:
    """With the code of its error, and with what it has said; nothing that would run at its end is waited for."""
    program = f"""
import atexit, sys
import torch.distributed as dist
sys.path.insert(0, {str(Path(mad.__file__).parent)!r})
import mura_anomaly_detection as mad
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
atexit.register(print, "waited")
print("said", end="")
mad.leave(5)
print("stayed")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (5, "said"), done.stderr


def test_no_process_leaves_before_the_state_is_saved(
    unscored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends all when it sees one go: those that have nothing to write wait for the first, which saves."""
    order: list[str] = []
    monkeypatch.setattr(mad.Session, "save_state", lambda session: order.append("saved"))
    monkeypatch.setattr(mad.Processes, "wait", lambda processes: order.append("together"))
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, mad.Trainer, "update", 1, signal.SIGTERM)
        assert run_inside("--data-dir", unscored, "--checkpoint", tmp_path / "run.pth", *OPTIONS) == 143
    assert order[-2:] == ["saved", "together"]


def torchrun(program: Path, *arguments: object, options: tuple[str, ...] = (), **environment: str) -> str:
    """Run a program in two processes on this machine; returns stdout."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    done = subprocess.run(
        [*launcher, str(program), *map(str, arguments)], env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_probabilities(path: Path) -> dict[str, float]:
    with path.open(newline="") as file:
        rows = [(row["path"], float(row["probability"])) for row in csv.DictReader(file)]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def test_two_processes_train_and_score_as_one_would(data: Path, tmp_path: Path) -> None:
    """ResNet-50 under torchrun: one voice, one set of files, each image scored once, as in one process."""
    checkpoint = tmp_path / "run.pth"
    command = ["--data-dir", data, *TINY, "--tasks", "HUMERUS"]
    script = Path(mad.__file__)
    out = torchrun(script, *command, "--checkpoint", checkpoint, "--cache-dir", tmp_path / "cache")
    assert out.count("device: cpu") == out.count("epoch   1/1") == 1
    assert "2 processes" in out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mad, "Network", TinyNetwork.__base__)
        again = tmp_path / "again.pth"
        again.write_bytes(checkpoint.read_bytes())
        evaluation = ["--evaluate", "--data-dir", data, "--tasks", "HUMERUS", "--bootstrap", "100", "--device", "cpu"]
        assert run_inside(*evaluation, "--checkpoint", again) == 0
    together, alone = (read_probabilities(path.with_suffix(".valid.csv")) for path in (checkpoint, again))
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(together) == len(list((data / "valid" / "XR_HUMERUS").rglob("*.png")))
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, mad, "write_split", 1, signal.SIGTERM)  # all that is wanted of this run is its split
        assert run_inside(*command, "--checkpoint", tmp_path / "one.pth") == 143
    assert (tmp_path / "one.split.csv").read_bytes() == checkpoint.with_suffix(".split.csv").read_bytes()


def test_a_killed_process_is_started_again_and_learns_what_one_process_would(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without batch normalisation, dividing a batch changes nothing but the order of sums.

    Two processes, of which the second is killed in the third batch, restarted by torchrun, have the losses, the weights
    and the predictions of one undisturbed process.
    """
    monkeypatch.setattr(mad, "Network", PlainNetwork)
    command = ["--data-dir", data, *OPTIONS, "--epochs", "3", "--save-every", "0", "--lr", "0.005"]
    assert run_inside(*command, "--checkpoint", tmp_path / "one.pth") == 0
    marker = tmp_path / "killed"
    out = torchrun(
        TINY_RUN, *command, "--resume", "auto", "--checkpoint", tmp_path / "two.pth", options=("--max-restarts=1",),
        DIE_ONCE=f"1:2:{marker}")
    assert marker.exists()
    assert "resumed from" in out
    one, two = (Outcome.of(tmp_path / name) for name in ("one.pth", "two.pth"))
    for expected, found in zip(one.history, two.history, strict=True):
        assert {name: float(value) for name, value in found.items() if value} == pytest.approx(
            {name: float(value) for name, value in expected.items() if value}, rel=1e-4, abs=1e-5)
    assert all(torch.allclose(value, two.weights[name], atol=1e-4) for name, value in one.weights.items())
    expected, found = (read_probabilities(tmp_path / name) for name in ("one.valid.csv", "two.valid.csv"))
    assert found == pytest.approx(expected, abs=1e-4)
