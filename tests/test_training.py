"""Block 8, training: what is learnt, against a loop written by hand; and a run that is stopped,
killed, locked out, cut off from its terminal or divided ends as one that was left alone."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import TINY, mura, run_inside
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_run import blank_picture, tiny_architecture
from torch import Tensor, nn
from torch.nn import functional

TINY_RUN = Path(__file__).with_name("tiny_run.py")
COMMON = (*TINY, "--val-split", "0.3")
OPTIONS = (*COMMON, "--epochs", "2", "--lr", "0.02")
TIMED = ("images_per_second", "seconds")  # columns of the history that differ from run to run
FILES = {f"run{ending}" for ending in (
    ".pth", ".last.pth", ".history.csv", ".history.png", ".split.csv", ".test.csv", ".report.json",
    ".report.png")}
PARTS = ("XR_FOREARM", "XR_HUMERUS")
Command = tuple[object, ...]


def summed_loss(*columns: Tensor) -> Tensor:
    """The loss of logits, labels and weights; it needs nothing of a trainer."""
    return mura.Trainer.loss(cast("Any", None), *columns)


def training(data: Path, checkpoint: Path, *flags: object) -> Command:
    """Return the command that trains the model which these tests compare with."""
    return ("--data-dir", data, "--checkpoint", checkpoint, *OPTIONS, *flags)


def beside(checkpoint: Path, ending: str) -> Path:
    """Return a file of a run: STEM and an ending."""
    return checkpoint.with_name(checkpoint.stem + ending)


def read_model(checkpoint: Path) -> dict[str, Any]:
    return dict(mura.read_checkpoint(checkpoint, "model"))


def read_state(checkpoint: Path) -> dict[str, Any]:
    return dict(mura.read_checkpoint(beside(checkpoint, ".last.pth"), "state"))


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def read_history(checkpoint: Path) -> list[dict[str, str]]:
    """Return the history without times."""
    rows = read_rows(beside(checkpoint, ".history.csv"))
    return [{name: cell for name, cell in row.items() if name not in TIMED} for row in rows]


@dataclass(frozen=True)
class Outcome:
    """What a finished run has left, but for how long it took."""

    weights: dict[str, Tensor]
    history: list[dict[str, str]]
    predictions: str

    @staticmethod
    def of(checkpoint: Path) -> Outcome:
        test = beside(checkpoint, ".test.csv")
        predictions = test.read_text() if test.exists() else ""
        return Outcome(read_model(checkpoint)["state_dict"], read_history(checkpoint), predictions)

    def equals(self, other: Outcome) -> bool:
        """Compare bit for bit."""
        same = all(torch.equal(value, other.weights[key]) for key, value in self.weights.items())
        return same and (self.history, self.predictions) == (other.history, other.predictions)


def same(left: Path, right: Path) -> bool:
    """Return whether two runs have left the same, bit for bit."""
    return Outcome.of(left).equals(Outcome.of(right))


@pytest.fixture(scope="module", autouse=True)
def tiny_network() -> Iterator[None]:
    """--model resnet50 has a few channels, and plots are blank: a run takes half a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are then taken in the same order every time
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mura.ARCHITECTURES, "resnet50", tiny_architecture())
        for name in [name for name in vars(mura) if name.startswith("plot_")]:
            patch.setattr(mura, name, blank_picture)
        yield
    torch.set_num_threads(threads)


def use_plain_network(patch: pytest.MonkeyPatch) -> None:
    """Without batch normalisation how a batch is divided makes no difference."""
    patch.setitem(mura.ARCHITECTURES, "resnet50", tiny_architecture(batch_norm=False))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of two body parts, 64 px, about 40 images in train/."""
    return mura.write_phantoms(tmp_path_factory.mktemp("data"), 12, 4, PARTS, seed=2, size=64)


@pytest.fixture(scope="module")
def untested(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without valid/: a run ends when it has learnt."""
    target = tmp_path_factory.mktemp("untested") / "MURA-v1.1"
    ignored = shutil.ignore_patterns("valid", ".mura_cache")
    return Path(shutil.copytree(data, target, ignore=ignored))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More of them: half of the patients are 20 or more, as a temperature needs."""
    root = mura.write_phantoms(tmp_path_factory.mktemp("large"), 32, 1, PARTS, seed=3, size=64)
    shutil.rmtree(root / "valid")
    return root


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run that nothing has disturbed."""
    checkpoint = tmp_path_factory.mktemp("whole") / "run.pth"
    assert run_inside(*training(data, checkpoint)) == 0
    return checkpoint


@pytest.fixture(scope="module")
def whole_untested(untested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without the test."""
    checkpoint = tmp_path_factory.mktemp("whole_untested") / "run.pth"
    assert run_inside(*training(untested, checkpoint)) == 0
    return checkpoint


def copy_run(checkpoint: Path, folder: Path) -> Path:
    """Copy all files of a run; returns the copy's model file."""
    for path in checkpoint.parent.glob(f"{checkpoint.stem}.*"):
        shutil.copy(path, folder)
    return folder / checkpoint.name


def listing(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return stderr, which holds one line."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ----- the loss and the schedule ----------------------------------------------------------------


def image(label: int, part: str = "XR_HAND") -> mura.ImageRecord:
    return mura.ImageRecord("1.png", "1.png", part, "patient1", "study1", label)


def test_the_weights_are_twice_those_of_the_paper() -> None:
    """1 abnormal and 3 normal hands: w1 = 2 * 3/4, w0 = 2 * 1/4; elbows by their own counts."""
    hands = [image(1)] + [image(0)] * 3
    elbows = [image(1, "XR_ELBOW")] * 2 + [image(0, "XR_ELBOW")] * 3
    both = [*hands, *elbows]
    labels, weights = mura.loss_targets(both, mura.class_weights(both))
    assert labels.tolist() == [record.label for record in both]
    assert weights.tolist() == pytest.approx([1.5, 0.5, 0.5, 0.5, 1.2, 1.2, 0.8, 0.8, 0.8])
    assert weights.dtype == torch.float32
    assert mura.loss_targets([image(1, "XR_KNEE")], {}).tolist() == [[1], [1]], "not in train"


def test_the_loss_at_chance_is_log_two() -> None:
    """Of as many normal as abnormal images; both classes of a body part always weigh the same."""
    records = [image(0), image(1), image(1), image(0)]
    loss = summed_loss(
        torch.zeros(4), *mura.loss_targets(records, mura.class_weights(records)))
    assert loss.item() / 4 == pytest.approx(0.693147, rel=1e-5)
    uneven = [image(1)] * 2 + [image(0)] * 6
    _, of_class = mura.loss_targets(uneven, mura.class_weights(uneven))
    assert of_class[:2].sum() == of_class[2:].sum()


def without(untested: Path, folder: Path, pattern: str) -> Path:
    """Copy the data without the studies of that pattern."""
    ignored = shutil.ignore_patterns(".mura_cache", "*.csv")
    root = Path(shutil.copytree(untested, folder / "MURA-v1.1", ignore=ignored))
    for study in root.glob(f"train/{pattern}"):
        shutil.rmtree(study)
    return root


@pytest.mark.parametrize(("kept", "name"), [("negative", "abnormal"), ("positive", "normal")])
def test_training_needs_both_classes(
    kept: str, name: str, untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is seen before anything is decoded."""
    gone = {"negative": "positive", "positive": "negative"}[kept]
    data = without(untested, tmp_path, f"*/*/*_{gone}")
    assert run_inside(*training(data, tmp_path / "run.pth")) == mura.EXIT_USAGE
    assert f"no training image is {name}; training needs both classes" in one_line(capsys)
    assert not (data / ".mura_cache").exists()


def test_a_body_part_of_one_class_is_told_once(
    untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = next(untested.glob("train/XR_*")).name
    data = without(untested, tmp_path, f"{part}/*/*_positive")
    assert run_inside(*training(data, tmp_path / "run.pth", "--epochs", "1")) == 0
    assert capsys.readouterr().err.count(f"{part}: all training images are normal") == 1


def test_a_body_part_of_one_class_has_no_weight(capsys: pytest.CaptureFixture[str]) -> None:
    weights = mura.class_weights([image(0), image(1), image(1, "XR_ELBOW")])
    assert weights["XR_HAND", 0] == weights["XR_HAND", 1] == 1
    assert re.search("XR_ELBOW.* abnormal.*no weight", one_line(capsys))
    mura.class_weights([image(0), image(1), image(0, "XR_WRIST")])
    assert re.search("XR_WRIST.* normal.*no weight", one_line(capsys))


LOGIT, WEIGHT = st.floats(-60, 60, width=32), st.floats(0, 2, width=32)


@given(st.lists(st.tuples(LOGIT, st.booleans(), WEIGHT), min_size=1, max_size=20))
def test_loss_and_gradient_against_numpy(rows: list[tuple[float, bool, float]]) -> None:
    """-w y log p - w (1 - y) log(1 - p), also where p rounds to 0 or 1; gradient is w (p - y)."""
    z, y, w = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    logits = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    loss = summed_loss(logits, torch.tensor(y).float(), torch.tensor(w).float())
    loss.backward()
    expected = (w * (y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z))).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert logits.grad is not None
    gradient = w * (1 / (1 + np.exp(-z)) - y)
    np.testing.assert_allclose(logits.grad.numpy(), gradient, rtol=1e-4, atol=1e-6)


def test_the_loss_is_computed_in_fp32_whatever_comes_in() -> None:
    logits = torch.tensor([0.1234567], dtype=torch.bfloat16)
    assert summed_loss(logits, torch.ones(1), torch.ones(1)).dtype == torch.float32


@given(st.integers(1, 400), st.floats(0, 0.9))
def test_the_learning_rate_rises_then_falls_to_zero(total: int, warmup: float) -> None:
    """Linear to its peak, then the square of what is left."""
    factors = [mura.poly_factor(step, total, warmup) for step in range(total + 1)]
    rise = round(warmup * total)
    fall, steps = max(1, total - rise), range(total - rise + 1)
    assert factors[:rise] == pytest.approx([(step + 1) / rise for step in range(rise)])
    assert factors[rise:] == pytest.approx([(1 - step / fall) ** 2 for step in steps])
    assert mura.poly_factor(2 * total + 5, total, warmup) == pytest.approx(0, abs=1e-12)


# ----- a whole run by hand ----------------------------------------------------------------------


@dataclass
class Images:
    """One side of the split, decoded."""

    records: list[mura.ImageRecord]
    pixels: Tensor  # (N, 1, 64, 64), 0 to 1
    labels: Tensor
    weights: Tensor

    @staticmethod
    def read(records: list[mura.ImageRecord], share: dict[str, float]) -> Images:
        """Decode images; `share` is the abnormal fraction of each body part in train."""
        files = [mura.read_radiograph(Path(record.path)) for record in records]
        pixels = np.stack([mura.resize_square(file.pixels, 64, "stretch") for file in files])
        weights = [2 * (1 - share[r.body_part] if r.label else share[r.body_part]) for r in records]
        labels = torch.tensor([float(record.label) for record in records])
        scaled = torch.from_numpy(pixels)[:, None].float() / 255
        return Images(records, scaled, labels, torch.tensor(weights).float())


def read_sides(data: Path, checkpoint: Path) -> tuple[Images, Images]:
    """Return train and val as STEM.split.csv has them."""
    rows = read_rows(beside(checkpoint, ".split.csv"))
    side = {row["patient"]: row["split"] for row in rows}
    everything = mura.scan_split(data, "train").records
    assert len(rows) == len(side)
    assert set(side) == {record.patient for record in everything}
    assert set(side.values()) == {"train", "val"}
    train, val = ([r for r in everything if side[r.patient] == name] for name in ("train", "val"))
    labels = {part: [r.label for r in train if r.body_part == part] for part in PARTS}
    share = {part: float(np.mean(found)) for part, found in labels.items()}
    return Images.read(train, share), Images.read(val, share)


def batches_of(data: Path, checkpoint: Path, batch_size: int = 8) -> int:
    """Return the number of batches in an epoch of a run."""
    return -(-len(read_sides(data, checkpoint)[0].records) // batch_size)


def plain_network(config: mura.Config) -> nn.Sequential:
    """Return the tiny network as PyTorch's own layers, with the weights of --weights or --seed."""
    torch.manual_seed(config.seed)
    source = mura.Network("resnet50").state_dict()
    if config.weights != "none":
        source = read_model(Path(config.weights))["state_dict"]
    has_norm = len(source) > 6
    network = nn.Sequential(
        nn.Conv2d(3, 4, 8, 8, bias=not has_norm), nn.BatchNorm2d(4) if has_norm else nn.Identity(),
        nn.ReLU(), nn.Conv2d(4, 6, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 1))
    network.load_state_dict(dict(zip(network.state_dict(), source.values(), strict=True)))
    return network


class ByHand:
    """The same run as an ordinary PyTorch loop; only order and random draws are the program's.

    Attributes:
        weights: of the network after each epoch.
        rows: the history.
        logits: of val after each epoch.
    """

    def __init__(self, data: Path, checkpoint: Path, command: Command) -> None:
        flags = list(map(str, command))
        self.config = mura.parse_options(flags)
        self.normalization = flags[len(flags) - flags[::-1].index("--normalization")]
        self.train, self.val = read_sides(data, checkpoint)
        self.network = plain_network(self.config)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), betas=(0.9, 0.999), eps=1e-8,
            weight_decay=self.config.weight_decay)
        self.half = self.config.precision == "fp16"
        self.scaler = torch.amp.GradScaler("cpu", enabled=self.half)
        self.weights: list[list[Tensor]] = []
        self.rows: list[dict[str, float]] = []
        self.logits: list[np.ndarray] = []
        self.step = 0

    def run(self) -> ByHand:
        """Train and validate."""
        for epoch in range(self.config.epochs):
            learnt = self.learn(epoch)
            row = {"epoch": epoch + 1, **learnt, **self.validate()}
            self.rows.append(row)
            self.weights.append([value.clone() for value in self.network.state_dict().values()])
        return self

    def normalize(self, x: Tensor) -> Tensor:
        if self.normalization == "image":
            mean, std = x.mean((1, 2, 3), keepdim=True), x.flatten(1).std(1).view(-1, 1, 1, 1)
        elif self.normalization == "dataset":
            mean, std = self.train.pixels.mean(), self.train.pixels.std(correction=0)
        else:
            mean, std = (torch.tensor(float(part)) for part in self.normalization.split(","))
        return ((x - mean) / std).expand(-1, 3, -1, -1)

    def call(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=self.half):
            features = self.network[:-1](self.normalize(x))
        return self.network[-1](features.float())[:, 0]  # the linear unit is in fp32 always

    def rate(self, total: int) -> float:
        """Return the learning rate of a step."""
        config = self.config
        if config.lr_schedule == "plateau":
            return by_plateau([row["val_loss"] for row in self.rows], config.lr)
        rise = round(config.warmup * total)
        if self.step < rise:
            return float(config.lr * (self.step + 1) / rise)
        return float(config.lr * (1 - (self.step - rise) / (total - rise)) ** 2)

    def learn(self, epoch: int) -> dict[str, float]:
        """Train for an epoch; returns loss and accuracy of its images as they were met."""
        config, train, losses, right = self.config, self.train, 0.0, 0
        self.network.train()
        batches = mura.epoch_batches(len(train.records), config.batch_size, config.seed, epoch)
        for number, batch in enumerate(batches):
            drawn = mura.draw_augmentation(config, len(batch), epoch, number)
            x = mura.augment(train.pixels[batch], drawn)
            lam = mura.draw_mixup(config, epoch, number)
            following = torch.arange(1, len(batch) + 1) % len(batch)
            logits = self.call(lam * x + (1 - lam) * x[following])
            loss = torch.zeros(())
            for part, images in ((lam, batch), (1 - lam, batch[following])):
                y, w = train.labels[images], train.weights[images]
                right_log, wrong_log = functional.logsigmoid(logits), functional.logsigmoid(-logits)
                loss = loss - part * (w * (y * right_log + (1 - y) * wrong_log)).sum()
            rate = self.optimizer.param_groups[0]["lr"] = self.rate(len(batches) * config.epochs)
            self.optimizer.zero_grad()
            self.scaler.scale(loss / len(batch)).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.step += 1
            losses += loss.item()
            right += int(((logits > 0) == (train.labels[batch] > 0.5)).sum())
        count = len(train.records)
        return {"train_loss": losses / count, "train_accuracy": right / count, "lr": rate}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the metrics of val: loss and accuracy of images, AUROC and kappa of studies."""
        norm, val = self.network[1], self.val
        if self.config.precise_bn and isinstance(norm, nn.BatchNorm2d):  # train as one batch
            maps = self.network[0](self.normalize(self.train.pixels))
            norm.running_mean.copy_(maps.mean((0, 2, 3)))
            norm.running_var.copy_(maps.var((0, 2, 3)))
        self.network.eval()
        logits = self.call(val.pixels)
        if self.config.tta is not False:
            logits = (logits + self.call(val.pixels.flip(3))) / 2
        z, y = logits.double().numpy(), val.labels.numpy()
        self.logits.append(z)
        losses = val.weights.numpy() * np.where(y == 1, np.logaddexp(0, -z), np.logaddexp(0, z))
        study, probability = np.array([r.study for r in val.records]), 1 / (1 + np.exp(-z))
        names = sorted(set(study))
        pooled = np.array([probability[study == name].mean() for name in names])
        truth = np.array([name.endswith("positive") for name in names])
        gaps = pooled[truth][:, None] - pooled[~truth]
        agreed, called = (truth == (pooled > 0.5)).mean(), (pooled > 0.5).mean()
        chance = truth.mean() * called + (1 - truth.mean()) * (1 - called)
        return {"val_loss": losses.mean(), "val_accuracy": ((z > 0) == y).mean(),
                "val_auroc": ((gaps > 0) + (gaps == 0) / 2).mean(),
                "val_kappa": (agreed - chance) / (1 - chance)}


def by_plateau(losses: Sequence[float], rate: float) -> float:
    """Return the learning rate after epochs with these losses: a tenth where one does not fall."""
    lowest = math.inf
    for loss in losses:
        rate = rate if loss < lowest * (1 - 1e-4) else rate / 10
        lowest = min(lowest, loss)
    return rate


RUNS: dict[str, Command] = {  # each ingredient is in one of them at least
    "default": ("--epochs", "3", "--lr", "0.02", "--precise-bn", "0", "--warmup", "0.25",
                "--weight-decay", "0.5"),
    "paper": ("--epochs", "5", "--lr", "0.05", "--lr-schedule", "plateau", "--weight-decay", "0",
              "--mixup", "0.4", "--grad-accum-steps", "3", "--seed", "1", "--select", "loss"),
    "precise": ("--epochs", "4", "--lr", "0.03", "--precise-bn", "1000", "--batch-size", "64",
                "--no-tta", "--normalization", "dataset", "--hflip", "0.3", "--rotation", "30",
                "--brightness", "0.3"),
    "fp16": ("--epochs", "2", "--lr", "0.02", "--precision", "fp16",
             "--normalization", "0.5,0.003"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_equals_a_loop_written_by_hand(
    name: str, untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Weights and history; without batch normalisation micro-batches are as the whole batch."""
    if name in ("paper", "fp16"):
        use_plain_network(monkeypatch)
    checkpoint = tmp_path / "run.pth"
    command = ("--data-dir", untested, "--checkpoint", checkpoint, *COMMON, *RUNS[name])
    assert run_inside(*command) == 0
    assert "Warning" not in capfd.readouterr().err
    hand, content = ByHand(untested, checkpoint, command).run(), read_model(checkpoint)
    rows = read_rows(beside(checkpoint, ".history.csv"))
    assert list(rows[0]) == [
        "epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auroc",
        "val_kappa", "lr", "images_per_second", "seconds"]
    close = 2e-2 if name == "fp16" else 2e-4
    for row, expected in zip(read_history(checkpoint), hand.rows, strict=True):
        found = {key: float(cell) for key, cell in row.items()}
        assert found == pytest.approx(expected, rel=close, abs=1e-5)
    learnt = zip(content["state_dict"].values(), hand.weights[content["epoch"] - 1], strict=True)
    for found, expected in learnt:
        if found.is_floating_point() and name != "fp16":
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    if name == "fp16":  # the scaler has met an overflow
        assert read_state(checkpoint)["scaler"]["scale"] == hand.scaler.get_scale() < 65536
    if name == "paper":  # the losses of train would lower the rate at other times
        losses, rates = ([row[key] for row in hand.rows] for key in ("train_loss", "lr"))
        by_train = [by_plateau(losses[:epoch], rates[0]) for epoch in range(len(losses))]
        assert len(set(rates)) > 1
        assert rates != by_train


def test_precise_statistics_are_of_some_training_images(
    untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--precise-bn 5: the same five of train after each epoch; not the first five."""
    met: list[list[str]] = []
    batch = mura.MuraDataset.batch

    def seen(dataset: mura.MuraDataset, indices: np.ndarray) -> Tensor:
        met.append([dataset.records[i].name for i in indices])
        return batch(dataset, indices)

    monkeypatch.setattr(mura.MuraDataset, "batch", seen)
    checkpoint = tmp_path / "run.pth"
    flags = ("--batch-size", "64", "--precise-bn", "5")
    assert run_inside(*training(untested, checkpoint, *flags)) == 0
    train, val = read_sides(untested, checkpoint)
    names = [record.name for record in train.records]
    assert [len(found) for found in met] == [len(names), 5, len(val.records)] * 2
    assert len(set(met[1]) & set(names)) == 5
    assert max(names.index(name) for name in met[1]) >= 5
    assert met[1] == met[4]


@pytest.fixture(scope="module")
def overconfident(untested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose logits are far too large."""
    checkpoint = tmp_path_factory.mktemp("overconfident") / "run.pth"
    assert run_inside(*training(untested, checkpoint, "--epochs", "1")) == 0
    content = read_model(checkpoint)
    content["state_dict"]["head.weight"] *= 60
    mura.write_checkpoint(checkpoint, content)
    return checkpoint


def train_overconfident(
    large: Path, model: Path, checkpoint: Path, val_split: str, *flags: str
) -> ByHand:
    """Train on from a model for an epoch that changes little; returns the same by hand."""
    command = (
        "--data-dir", large, "--checkpoint", checkpoint, *TINY, "--weights", model, "--lr", "1e-6",
        "--batch-size", "64", "--val-split", val_split, "--precise-bn", "1000", *flags)
    assert run_inside(*command) == 0
    return ByHand(large, checkpoint, command).run()


def column(images: Images, name: str) -> np.ndarray:
    return np.array([getattr(record, name) for record in images.records])


@pytest.mark.parametrize("rule", ["auto", "sens=0.8", None, "0.3"])
def test_temperatures_and_threshold_are_of_val(
    rule: str | None, large: Path, overconfident: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of its patients; the threshold is of its studies, calibrated before."""
    calibrated: list[mura.Predictions] = []

    def of_studies(images: mura.Predictions) -> float:
        calibrated.append(images)
        return 0.3

    monkeypatch.setattr(mura, "fit_study_temperature", of_studies)
    flags = ("--threshold", rule) if rule else ()
    hand = train_overconfident(large, overconfident, tmp_path / "run.pth", "0.5", *flags)
    content, val, logits = read_model(tmp_path / "run.pth"), hand.val, hand.logits[0]
    temperature = mura.fit_temperature(logits, column(val, "label"), column(val, "patient"))
    assert temperature > 1.5
    assert content["temperature"] == pytest.approx(temperature, rel=0.02)  # one step of its grid
    assert content["study_temperature"] == 0.3
    probability = mura.sigmoid(logits / content["temperature"])
    np.testing.assert_allclose(calibrated[0].probability, probability, atol=1e-4)
    expected = {None: 0.5, "0.3": 0.3}.get(rule)
    if expected is None:
        pooled = [mura.pool_studies(calibrated[0], temperature) for temperature in (0.3, 1)]
        expected, other = (mura.choose_threshold(rule, studies) for studies in pooled)
        assert abs(expected - other) > 1e-3
    assert content["threshold"] == pytest.approx(expected)
    source = {None: "default", "0.3": "given"}.get(rule, f"{rule} on val")
    assert content["threshold_source"] == source
    patients = content["patients"]
    assert patients["val"] == sorted(set(column(val, "patient")))
    assert set(patients["train"]) >= set(column(hand.train, "patient"))


def test_a_temperature_takes_many_patients(
    large: Path, overconfident: Path, tmp_path: Path
) -> None:
    """20 of them, whatever the number of studies: those of a patient are not independent."""
    val = train_overconfident(large, overconfident, tmp_path / "run.pth", "0.44").val
    assert len(set(column(val, "patient"))) < 20 <= len(set(column(val, "study")))
    assert read_model(tmp_path / "run.pth")["temperature"] == 1


def test_a_body_part_of_val_alone_is_not_one_that_was_trained_on(
    untested: Path, whole_untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--val-split draws patients, whatever their body parts: the model warns of this one later."""
    data, checkpoint = tmp_path / "MURA-v1.1", tmp_path / "run.pth"
    shutil.copytree(untested, data, ignore=shutil.ignore_patterns(".mura_cache", "*.csv"))
    patient = read_model(whole_untested)["patients"]["val"][0]
    (data / "train" / "XR_WRIST").mkdir()
    next(data.glob(f"train/*/{patient}")).rename(data / "train" / "XR_WRIST" / patient)
    assert run_inside(*training(data, checkpoint, "--epochs", "1")) == 0
    content = read_model(checkpoint)
    assert patient in content["patients"]["val"] and tuple(content["body_parts"]) == PARTS
    capsys.readouterr()
    command = ("--evaluate", "--data-dir", data, "--split", "train", "--checkpoint", checkpoint)
    assert run_inside(*command, "--device", "cpu", "--bootstrap", "100") == 0
    assert "(XR_WRIST) that the model was not trained on" in capsys.readouterr().err


# ----- which epoch is kept ----------------------------------------------------------------------


HISTORY = [  # accuracy, AUROC, kappa, loss
    (0.7, 0.6, 0.1, 0.9), (0.7, 0.5, 0.0, 0.8), (0.6, 0.8, 0.2, 0.85), (0.7, 0.8, 0.1, 0.75),
    (0.8, math.nan, math.nan, 0.75)]


@pytest.mark.parametrize(("select", "best"), [
    ("accuracy", [1, 2, 2, 4, 5]), ("auroc", [1, 1, 3, 4, 4]), ("kappa", [1, 1, 3, 3, 3]),
    ("loss", [1, 2, 2, 4, 4])])
def test_the_best_epoch(select: str, best: list[int]) -> None:
    """Of equal ones the lower loss is, and where that is equal too the first."""
    names = ("val_accuracy", "val_auroc", "val_kappa", "val_loss")
    rows = [dict(zip(names, values, strict=True)) for values in HISTORY]
    assert [mura.choose_epoch(rows[: number + 1], select) for number in range(len(rows))] == best
    assert set(mura.SELECTION) == {"accuracy", "auroc", "kappa", "loss"}


def test_an_undefined_metric_is_the_worst() -> None:
    """A study kappa of -0.2 is better than none; the first epoch is kept, however bad."""
    values = ((math.nan, 0.5), (-0.2, 0.9), (math.nan, 0.1))
    rows = [{"val_kappa": kappa, "val_loss": loss} for kappa, loss in values]
    assert [mura.choose_epoch(rows[:number], "kappa") for number in (1, 2, 3)] == [1, 2, 2]


@pytest.mark.parametrize("system", ["glibc", "musl", "macOS"])
def test_freed_memory_is_kept_by_glibc_and_other_systems_do_without(
    system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mallopt(3): M_MMAP_MAX of 0 maps no block by itself, M_TRIM_THRESHOLD of -1 returns none."""
    asked: dict[int, int] = {}

    def load_library(name: str) -> Any:
        if system == "macOS":
            raise OSError(f"{name}: cannot open shared object file")
        return SimpleNamespace(mallopt=asked.__setitem__) if system == "glibc" else object()

    monkeypatch.setattr(mura.ctypes, "CDLL", load_library)
    mura.keep_freed_memory()
    assert (asked.get(-4), asked.get(-1)) == ((0, -1) if system == "glibc" else (None, None))


Rows = list[dict[str, float]]


@pytest.fixture(scope="module")
def curve(untested: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Command, Rows]:
    """The flags of a run and its history, whose metrics are best in different epochs."""
    checkpoint = tmp_path_factory.mktemp("curve") / "run.pth"
    flags = ("--epochs", "7", "--seed", "3", "--batch-size", "16")
    assert run_inside(*training(untested, checkpoint, *flags)) == 0
    rows = read_history(checkpoint)
    return flags, [{name: float(cell) for name, cell in row.items()} for row in rows]


def best_row(rows: Rows, select: str) -> int:
    """Return the number of the best row, from 1."""
    sign = -1 if select == "loss" else 1
    ranks = [(sign * row[f"val_{select}"], -row["val_loss"]) for row in rows]
    return 1 + ranks.index(max(ranks))


@pytest.mark.parametrize("select", ["accuracy", "auroc", "kappa", "loss"])
def test_select_chooses_the_epoch_that_is_kept(
    select: str, curve: tuple[Command, Rows], untested: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    """The plot is drawn after each epoch, and marks the one that is kept."""
    flags, rows = curve
    command = training(untested, tmp_path / "run.pth", *flags, "--select", select)
    drawn: list[tuple[int, int]] = []

    def draw(history: Sequence[object], best: int) -> bytes:
        drawn.append((len(history), best))
        return blank_picture()

    monkeypatch.setattr(mura, "plot_history", draw)
    assert run_inside(*command) == 0
    content = read_model(tmp_path / "run.pth")
    assert content["epoch"] == best_row(rows, select)
    numbers = range(1, len(rows) + 1)
    assert drawn == [(number, best_row(rows[:number], select)) for number in numbers]
    lines = capsys.readouterr().out.splitlines()
    ends = [line.endswith("best so far") for line in lines if "studies: val" in line]
    assert ends == [best == number for number, best in drawn]
    assert f"(epoch {content['epoch']} of {len(rows)}, by val {select})" in lines[-2]


def test_the_metrics_are_best_in_different_epochs(curve: tuple[Command, Rows]) -> None:
    """Else the test above could not tell them apart."""
    names = ("accuracy", "auroc", "kappa", "loss")
    assert len({best_row(curve[1], select) for select in names}) >= 3


@pytest.mark.parametrize(("select", "patience"), [("kappa", 1), ("auroc", 3)])
def test_patience_ends_the_run(
    select: str, patience: int, curve: tuple[Command, Rows], untested: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After so many epochs without a better one; a larger patience then goes on."""
    flags, rows = curve
    command = training(untested, tmp_path / "run.pth", *flags, "--select", select)
    numbers = range(1, len(rows))
    last = next(n for n in numbers if n - best_row(rows[:n], select) == patience)
    assert run_inside(*command, "--patience", patience) == 0
    epochs = [row["epoch"] for row in read_history(tmp_path / "run.pth")]
    assert epochs == [str(n) for n in range(1, last + 1)]
    best = best_row(rows[:last], select)
    assert (f"no better val {select} since epoch {best}: ended by --patience {patience}; "
            "--resume --patience 0 goes on") in capsys.readouterr().out
    assert run_inside(*command, "--patience", "0", "--resume") == 0
    assert "--patience" not in capsys.readouterr().out
    assert len(read_history(tmp_path / "run.pth")) == len(rows) > last


# ----- what is printed --------------------------------------------------------------------------


def test_the_lines_of_an_epoch(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is per image and what per study; the end names the model and the next command."""
    checkpoint = tmp_path / "my runs" / "run.pth"
    assert run_inside(*training(data, checkpoint)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 2
    for number, row in enumerate(read_history(checkpoint), 1):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"epoch {number}/2 "))
        cell = {name: f"{float(value):.4f}" for name, value in row.items()}
        assert lines[at].split("  ")[1] == (
            f"images: train loss {cell['train_loss']} accuracy {cell['train_accuracy']}, "
            f"val loss {cell['val_loss']} accuracy {cell['val_accuracy']}")
        second = f"studies: val AUROC {cell['val_auroc']} kappa {cell['val_kappa']} "
        assert lines[at + 1].strip().startswith(second)
        assert max(map(len, lines[at : at + 2])) <= 100
    *_, model, following = lines
    assert str(checkpoint) in model
    words = shlex.split(following.partition("next: ")[2])
    assert words[2:] == ["--predict", "IMAGE", "--checkpoint", str(checkpoint)]


class Clock:
    """Stands in for the module `time` of the program: it stands still but for what is added."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A batch takes 10 s, the images of val 30 s."""
    found, draw, predict = Clock(), mura.draw_augmentation, mura.Ensemble.predict_dataset

    def slow_draw(*arguments: Any) -> Tensor:
        found.now += 10
        return draw(*arguments)

    def slow_predict(*arguments: Any) -> np.ndarray:
        found.now += 30
        return predict(*arguments)

    monkeypatch.setattr(mura, "time", found)
    monkeypatch.setattr("tqdm.std.time", found.monotonic)
    monkeypatch.setattr(mura, "draw_augmentation", slow_draw)
    monkeypatch.setattr(mura.Ensemble, "predict_dataset", slow_predict)
    return found


PROGRESS = re.compile(
    r"epoch (\d)/2: .* (\d+)/(\d+) \[.* batches.*, loss (\S+) accuracy (\S+) lr (\S+), "
    r"run (\d+):(\d\d):(\d\d) left")


def test_off_a_terminal_a_line_a_minute(
    untested: Path, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Running loss and accuracy, learning rate, and the time left of the whole run."""
    checkpoint = tmp_path / "run.pth"
    assert run_inside(*training(untested, checkpoint, "--batch-size", "2")) == 0
    batches = batches_of(untested, checkpoint, 2)
    assert batches >= 13
    row = read_rows(beside(checkpoint, ".history.csv"))[1]
    images = len(read_sides(untested, checkpoint)[0].records)
    assert float(row["seconds"]) == pytest.approx(10 * batches + 30)
    assert float(row["images_per_second"]) == pytest.approx(images / (10 * batches))
    lines = [line for line in capsys.readouterr().err.splitlines() if " epoch " in line]
    expected = [  # 60 s after the last: at the sixth batch, then again
        (epoch, batch, 10 * (batches * (3 - epoch) - batch) + 30 * (epoch - 1))
        for epoch in (1, 2) for batch in range(6, batches + 1, 6)]
    for line, (epoch, batch, left) in zip(lines, expected, strict=True):
        found = PROGRESS.search(line)
        assert found, line
        assert tuple(map(int, found.group(1, 2, 3))) == (epoch, batch, batches)
        loss, accuracy, rate = map(float, found.group(4, 5, 6))
        assert 0.1 < loss < 3
        assert 0 < accuracy <= 1
        assert 0 < rate <= 0.02
        hours, minutes, seconds = map(int, found.group(7, 8, 9))
        assert 3600 * hours + 60 * minutes + seconds == left


def test_the_time_of_an_epoch_counts_what_was_done_before_a_stop(
    untested: Path, tmp_path: Path, clock: Clock
) -> None:
    command = training(untested, tmp_path / "run.pth")
    stop_in_batch(3, signal.SIGTERM, command)
    clock.now += 10_000  # from one day to the next
    assert run_inside(*command, "--resume") == 0
    batches = batches_of(untested, tmp_path / "run.pth")
    for row in read_rows(tmp_path / "run.history.csv"):
        assert float(row["seconds"]) == pytest.approx(10 * batches + 30)


@pytest.mark.parametrize(("minutes", "every"), [("0", 1), ("1", 7), ("1000", 1000)])
def test_the_state_is_saved_every_few_minutes(
    minutes: str, every: int, untested: Path, tmp_path: Path, clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within an epoch by --save-every, and at the end of each."""
    kinds: list[str] = []
    write = mura.write_checkpoint

    def noted(path: Path, content: dict[str, Any]) -> str:
        kinds.append(content["kind"])
        return str(write(path, content))

    monkeypatch.setattr(mura, "write_checkpoint", noted)
    flags = ("--epochs", "1", "--batch-size", "2", "--save-every", minutes)
    assert run_inside(*training(untested, tmp_path / "run.pth", *flags)) == 0
    before = kinds[: kinds.index("model")].count("state")
    within = batches_of(untested, tmp_path / "run.pth", 2) // every
    assert within <= before <= within + 3  # one may be saved at the start too, and in validation
    assert kinds[-1] == "state"


def test_on_a_terminal_a_bar(
    untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows the same."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, np.array([50, 200, 0, 0], np.uint16).tobytes())
    shown, draw = bytearray(), mura.draw_augmentation

    def read() -> None:
        with contextlib.suppress(OSError):  # the end of a terminal
            while chunk := os.read(master, 4096):
                shown.extend(chunk)

    def slow_draw(*arguments: Any) -> Tensor:
        time.sleep(0.12)  # bars are drawn ten times a second at most
        return draw(*arguments)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    monkeypatch.setattr(mura, "draw_augmentation", slow_draw)
    flags = ("--epochs", "1", "--batch-size", "12")
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert run_inside(*training(untested, tmp_path / "run.pth", *flags)) == 0
    reader.join(10)
    bar = rb"epoch 1/1.*loss \d\.\d+ accuracy \d\.\d+ lr \d\S+, run 0:00:\d\d left"
    assert re.search(bar, bytes(shown))


# ----- stopped by a signal, then continued ------------------------------------------------------


def signal_at(
    patch: pytest.MonkeyPatch, owner: Any, function: str, call: int, signum: int, *,
    before: bool = False, then: Callable[[], object] = lambda: None,
) -> None:
    """Send this process a signal at the call-th call of a function (from 1), before or after it.

    `then` is called at once.
    """
    real, calls = getattr(owner, function), itertools.count(1)

    def disturbed(*arguments: Any, **options: Any) -> Any:
        mine = next(calls) == call
        result = None if mine and before else real(*arguments, **options)
        if mine:
            os.kill(os.getpid(), signum)
            then()
        return real(*arguments, **options) if mine and before else result

    patch.setattr(owner, function, disturbed)


def stop_in_batch(number: int, signum: int, command: Command) -> None:
    """Run a command that is stopped in its number-th batch (from 1)."""
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, mura, "draw_augmentation", number, signum)
        assert run_inside(*command) == 128 + signum


@pytest.mark.parametrize(("owner", "function", "call", "signum", "before"), [
    (mura, "draw_augmentation", 1, signal.SIGINT, False),  # in the first batch
    (mura, "draw_augmentation", 2, signal.SIGTERM, False),  # amid the first epoch
    (mura, "draw_augmentation", 4, signal.SIGINT, False),  # in the last batch of the first epoch
    (mura.Ensemble, "predict_dataset", 1, signal.SIGTERM, True),  # in validation
    (mura.Trainer, "validate", 1, signal.SIGINT, False),  # after it
    (mura.Trainer, "end_epoch", 1, signal.SIGTERM, False),  # between the epochs
    (mura, "draw_augmentation", 6, signal.SIGINT, False),  # amid the second epoch
    (mura.Trainer, "end_epoch", 2, signal.SIGTERM, False),  # when all is learnt, before the test
    (mura.Ensemble, "predict_dataset", 3, signal.SIGINT, True),  # in the test
])
def test_a_stopped_run_ends_as_one_left_alone(
    data: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    owner: Any, function: str, call: int, signum: int, before: bool,
) -> None:
    """Weights, history and predictions are the same bit for bit, whatever the moment of the stop.

    The signal is acknowledged at once, and the command that is printed at the end goes on.
    """
    checkpoint, told = tmp_path / "my runs" / "run.pth", [""]
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, owner, function, call, signum, before=before,
                  then=lambda: told.append(capfd.readouterr().err))
        assert run_inside(*training(data, checkpoint)) == 128 + signum
    if function == "draw_augmentation":
        assert "stopping after this batch" in told[1]
        assert "Ctrl-C again" in told[1]
    last = ("".join(told) + capfd.readouterr().err).splitlines()[-1]
    state = beside(checkpoint, ".last.pth")
    assert f"stopped by {signal.Signals(signum).name}; the state is in {state}; " in last
    assert not beside(checkpoint, ".test.csv").exists()
    program, script, *flags = shlex.split(last.partition("to go on: ")[2])
    assert script == sys.argv[0] and shutil.which(program) == sys.executable
    assert run_inside(*flags) == 0
    assert f"resumed from {state}" in capfd.readouterr().out
    assert same(checkpoint, whole)


EVERYTHING: list[Command] = [  # with which a run is stopped in every batch
    ("--lr-schedule", "plateau", "--grad-accum-steps", "2", "--select", "loss"),
    ("--normalization", "dataset", "--weight-decay", "0", "--mixup", "0.3", "--precise-bn", "0"),
    ("--precision", "fp16", "--normalization", "0.5,0.003"),  # the scaler meets overflows
]


@pytest.mark.parametrize("flags", EVERYTHING)
def test_a_run_stopped_in_every_batch_ends_as_one_left_alone(
    untested: Path, tmp_path: Path, flags: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "fp16" in flags:
        use_plain_network(monkeypatch)
    checkpoint = tmp_path / "run.pth"
    assert run_inside(*training(untested, tmp_path / "whole.pth", *flags)) == 0
    codes, scale = [], 65536.0
    while not codes or codes[-1]:
        with pytest.MonkeyPatch.context() as patch:
            signal_at(patch, mura, "draw_augmentation", 1, signal.SIGINT)
            codes.append(run_inside(*training(untested, checkpoint, *flags, "--resume", "auto")))
        scale = read_state(checkpoint)["scaler"].get("scale", scale)
    assert codes == [130] * (2 * batches_of(untested, checkpoint)) + [0]
    assert (scale < 65536) == ("fp16" in flags)
    assert same(checkpoint, tmp_path / "whole.pth")


def test_a_network_with_dropout_goes_on_as_one_left_alone(
    untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its random numbers follow from seed and batch, as all others do."""
    tiny = tiny_architecture()

    def with_dropout() -> Any:
        network = tiny.constructor()
        network.relu1 = nn.Sequential(nn.ReLU(), nn.Dropout())
        return network

    monkeypatch.setitem(mura.ARCHITECTURES, "resnet50", replace(tiny, constructor=with_dropout))
    checkpoint, whole = tmp_path / "run.pth", tmp_path / "whole.pth"
    assert run_inside(*training(untested, whole)) == 0
    for batch in (2, batches_of(untested, whole)):  # the last: what follows is the validation
        stop_in_batch(batch, signal.SIGTERM, training(untested, checkpoint, "--overwrite"))
        assert run_inside(*resuming(untested, checkpoint)) == 0
        assert same(checkpoint, whole)


def test_a_signal_while_images_are_decoded_leaves_nothing(data: Path, tmp_path: Path) -> None:
    command = training(data, tmp_path / "run.pth", "--cache-dir", tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, mura, "read_radiograph", 3, signal.SIGTERM)
        assert run_inside(*command) == 143
    assert listing(tmp_path) == {}


# ----- what --resume takes from the state, and what it refuses ----------------------------------


@pytest.fixture
def stopped(untested: Path, tmp_path: Path) -> Path:
    """The model file (not written yet) of a run that was stopped in its second batch."""
    checkpoint = tmp_path / "stopped" / "run.pth"
    stop_in_batch(2, signal.SIGTERM, training(untested, checkpoint))
    assert not checkpoint.exists()
    return checkpoint


def resuming(data: Path, checkpoint: Path, *flags: object) -> Command:
    """Return the command that goes on, with as few flags as it takes."""
    return ("--data-dir", data, "--checkpoint", checkpoint, "--device", "cpu", "--resume", *flags)


def test_the_settings_are_those_of_the_state(
    untested: Path, stopped: Path, whole_untested: Path
) -> None:
    """All of them, the number of epochs too."""
    assert run_inside(*resuming(untested, stopped)) == 0
    assert same(stopped, whole_untested)


def test_what_may_change_stays_where_it_is_not_given(untested: Path, tmp_path: Path) -> None:
    """--grad-accum-steps, --patience and --recipe too."""
    flags = (*COMMON, "--epochs", "6", "--recipe", "paper", "--lr", "0.1", "--patience", "1",
             "--grad-accum-steps", "2")
    models = [tmp_path / "whole.pth", tmp_path / "run.pth"]
    commands = [("--data-dir", untested, "--checkpoint", model, *flags) for model in models]
    assert run_inside(*commands[0]) == 0
    assert len(read_history(models[0])) < 6
    stop_in_batch(2, signal.SIGTERM, commands[1])
    assert run_inside(*resuming(untested, models[1])) == 0
    assert same(*models)


@pytest.mark.parametrize(("flag", "now", "before"), [
    ("--lr", "0.01", "0.02"), ("--batch-size", "4", "8"), ("--model", "densenet169", "resnet50"),
    ("--seed", "1", "0"), ("--image-size", "96", "64"), ("--tasks", "HUMERUS", "all"),
    ("--resize", "letterbox", "stretch"), ("--threshold", "auto", "not given"),
    ("--no-tta", None, "True"),
    ("--val-split", "0.4", "0.3"), ("--normalization", "imagenet", "image"),
    ("--select", "auroc", "accuracy"), ("--lr-schedule", "plateau", "poly"),
    ("--warmup", "0.2", "0.1"), ("--weight-decay", "0", "0.01"), ("--mixup", "0.1", "0"),
    ("--hflip", "0", "0.5"), ("--rotation", "0", "10"), ("--brightness", "0", "0.1"),
    ("--contrast", "0", "0.2"), ("--precise-bn", "0", "16"), ("--precision", "bf16", "fp32"),
    ("--recipe", "paper", "default"), ("--weights", "other.pth", "none"),
])
def test_flags_that_change_what_is_learnt_are_refused_by_name(
    flag: str, now: str | None, before: str, untested: Path, whole_untested: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = copy_run(whole_untested, tmp_path)
    files, given = listing(tmp_path), (flag, now) if now else (flag,)
    for resume in (("--resume",), ("--resume", "auto")):
        assert run_inside(*training(untested, checkpoint, *given, *resume)) == 2
        assert f"{flag.replace('--no-', '--')} was {before}" in one_line(capsys)
    assert listing(tmp_path) == files


def test_all_refused_flags_are_named_at_once(
    untested: Path, whole_untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = copy_run(whole_untested, tmp_path)
    flags = ("--seed", "4", "--mixup", "0.3", "--resume")
    assert run_inside(*training(untested, checkpoint, *flags)) == 2
    line = one_line(capsys)
    assert "--mixup was 0.0" in line and "--seed was 0" in line


def test_other_flags_may_change(data: Path, stopped: Path, whole: Path, tmp_path: Path) -> None:
    """Those that do not change what is learnt; the data may have moved."""
    flags = ("--save-every", "0", "--workers", "2", "--bootstrap", "120", "--patience", "7",
             "--cache-dir", tmp_path / "cache", "--on-bad-image", "skip", "--debug",
             "--drop-duplicates", "--epochs", "2")
    assert run_inside(*resuming(data, stopped, *flags)) == 0
    assert same(stopped, whole)


def test_more_epochs_stretch_the_schedule(
    untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run and a stopped one go on with a larger --epochs."""
    checkpoint = tmp_path / "run.pth"
    assert run_inside(*training(untested, checkpoint)) == 0
    before = read_history(checkpoint)
    capsys.readouterr()
    longer = training(untested, checkpoint, "--epochs", "4", "--resume")
    stop_in_batch(2, signal.SIGINT, longer)
    stretched = r"--epochs 2 -> 4: the schedule is fitted to it; .* (\S+)"
    told = re.search(stretched, capsys.readouterr().out)
    assert told
    assert run_inside(*longer) == 0
    assert "schedule" not in capsys.readouterr().out
    rows, batches = read_history(checkpoint), batches_of(untested, checkpoint)
    next_rate = 0.02 * mura.poly_factor(2 * batches, 4 * batches, 0.1)
    assert float(told[1]) == pytest.approx(next_rate, rel=0.01)
    assert rows[:2] == before
    steps = [epoch * batches - 1 for epoch in (3, 4)]
    expected = [0.02 * mura.poly_factor(step, 4 * batches, 0.1) for step in steps]
    assert [float(row["lr"]) for row in rows[2:]] == pytest.approx(expected)


def test_plateau_has_nothing_to_stretch(
    untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, straight = tmp_path / "run.pth", tmp_path / "straight.pth"
    flags = ("--lr-schedule", "plateau")
    assert run_inside(*training(untested, checkpoint, *flags, "--epochs", "1")) == 0
    assert run_inside(*resuming(untested, checkpoint, "--epochs", "2")) == 0
    assert "schedule" not in capsys.readouterr().out
    assert run_inside(*training(untested, straight, *flags)) == 0
    assert same(checkpoint, straight)


@pytest.mark.parametrize(("fall", "rate"), [(0.5e-4, 0.002), (2e-4, 0.02)])
def test_plateau_takes_less_than_a_ten_thousandth_for_no_fall(
    fall: float, rate: float, untested: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.pth"
    assert run_inside(*training(untested, checkpoint, "--lr-schedule", "plateau")) == 0
    content = read_state(checkpoint)
    for row, loss in zip(content["state"]["history"], (1, 1 - fall), strict=True):
        row["val_loss"] = loss
    mura.write_checkpoint(beside(checkpoint, ".last.pth"), content)
    assert run_inside(*resuming(untested, checkpoint, "--epochs", "3")) == 0
    assert float(read_history(checkpoint)[2]["lr"]) == pytest.approx(rate)


def test_a_finished_run_is_only_tested_again(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = copy_run(whole, tmp_path)
    beside(checkpoint, ".test.csv").unlink()
    assert run_inside(*training(data, checkpoint, "--resume")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("epoch") for line in lines)
    assert checkpoint.read_bytes() == whole.read_bytes()
    assert same(checkpoint, whole)


@pytest.mark.parametrize("epochs", ["1", "2"])
def test_a_run_with_no_epoch_left_says_how_to_go_on(
    epochs: str, untested: Path, whole_untested: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It has two; as many or fewer leave it as it is."""
    checkpoint = copy_run(whole_untested, tmp_path)
    assert run_inside(*resuming(untested, checkpoint, "--epochs", epochs)) == 0
    told = capsys.readouterr().out
    assert f"--epochs {epochs}: 2 are done, so none is left; a larger number goes on" in told
    assert "schedule" not in told
    assert same(checkpoint, whole_untested)


def test_weights_are_not_needed_to_resume(
    untested: Path, whole_untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the model of --weights FILE has seen is told, and kept, also without the file."""
    first, checkpoint = copy_run(whole_untested, tmp_path), tmp_path / "next.pth"
    content = read_model(first)
    earlier = content["patients"]
    earlier["val"].append("of another set")  # its epoch was chosen on this one
    mura.write_checkpoint(first, content)
    command = training(untested, checkpoint, "--weights", first, "--seed", "1")
    stop_in_batch(2, signal.SIGTERM, command)
    told = capsys.readouterr().err
    first.unlink()
    assert run_inside(*command, "--resume") == 0
    patients = read_model(checkpoint)["patients"]
    seen = {*earlier["train"], *earlier["val"]} & set(patients["val"])
    assert re.search(rf"run\.pth: has seen {len(seen)} patients of val", told)
    assert set(patients["train"]) >= {*earlier["train"], *earlier["val"]}


def test_state_and_model_of_different_runs_are_refused(
    untested: Path, whole_untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that differs in its weights or settings only; and a state without its model."""
    checkpoint, other = copy_run(whole_untested, tmp_path), tmp_path / "other" / "run.pth"
    assert run_inside(*training(untested, other, "--epochs", "1", "--seed", "1")) == 0
    right, content = checkpoint.read_bytes(), read_model(checkpoint)
    content["state_dict"] = {key: value + 1 for key, value in content["state_dict"].items()}
    mura.write_checkpoint(tmp_path / "changed.pth", content)
    mura.write_checkpoint(tmp_path / "later.pth", read_model(other) | {"epoch": 3})
    for wrong in (other, tmp_path / "changed.pth", tmp_path / "later.pth"):
        shutil.copy(wrong, checkpoint)
        before = listing(tmp_path)
        capsys.readouterr()
        assert run_inside(*resuming(untested, checkpoint)) == 2
        assert f"{checkpoint}, the best model so far, is missing or of another run" in one_line(capsys)
        assert listing(tmp_path) == before
    checkpoint.unlink()
    assert run_inside(*resuming(untested, checkpoint)) == 2
    assert f"{checkpoint}, the best model so far, is missing or of another run" in one_line(capsys)
    checkpoint.write_bytes(right)
    assert run_inside(*resuming(untested, checkpoint)) == 0


def test_other_data_are_refused(
    untested: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another label, another pixel."""
    ignored = shutil.ignore_patterns(".mura_cache")
    relabelled, repainted = (
        Path(shutil.copytree(untested, tmp_path / name / "MURA-v1.1", ignore=ignored))
        for name in ("relabelled", "repainted"))
    first = min((repainted / "train").rglob("image*.png"))
    with Image.open(first) as found:
        found.point(lambda value: 255 - value).save(first)
    study = min((relabelled / "train").rglob("study*_negative")).relative_to(tmp_path / "relabelled")
    (relabelled / "train_labeled_studies.csv").write_text(f"{study}/,1\n")
    for folder in (relabelled, repainted):
        capsys.readouterr()
        assert run_inside(*resuming(folder, stopped)) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"run\.last\.pth: .*(images|labels).* changed", last)


def test_resume_without_a_state(
    untested: Path, whole_untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that says what to do; `auto` starts a new run instead."""
    command = training(untested, tmp_path / "run.pth", "--resume")
    assert run_inside(*command) == 2
    error = one_line(capsys)
    assert "run.last.pth" in error
    assert "--resume auto" in error
    assert listing(tmp_path) == {}
    assert run_inside(*command, "auto") == 0
    assert same(tmp_path / "run.pth", whole_untested)


def test_a_state_that_is_not_usable_is_one_line(
    untested: Path, whole_untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged, of another kind, of another version; nothing is changed."""
    checkpoint = copy_run(whole_untested, tmp_path)
    state, content = beside(checkpoint, ".last.pth"), read_state(checkpoint)
    sound = state.read_bytes()
    flipped = sound[:1000] + bytes([sound[1000] ^ 4]) + sound[1001:]
    earlier = {key: value for key, value in content["settings"].items() if key != "mixup"}  # added since
    mura.write_checkpoint(state, {**content, "version": "1.9", "settings": earlier})
    for wrong in (flipped, sound[:2000], b"", checkpoint.read_bytes(), state.read_bytes()):
        state.write_bytes(wrong)
        before = listing(tmp_path)
        capsys.readouterr()
        assert run_inside(*training(untested, checkpoint, "--resume", "auto")) == 2
        assert "run.last.pth" in one_line(capsys)
        assert listing(tmp_path) == before


# ----- nothing is replaced by accident ----------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FILES))
def test_existing_files_are_refused_before_any_work(
    name: str, untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether of a run or not."""
    (tmp_path / name).write_bytes(b"mine")
    command = training(untested, tmp_path / "run.pth", "--cache-dir", tmp_path / "cache")
    assert run_inside(*command) == 2
    error = one_line(capsys)
    assert f"{tmp_path / name}: " in error
    assert "--overwrite" in error
    assert listing(tmp_path) == {name: b"mine"}
    assert not (tmp_path / "cache").exists()


def test_a_link_to_nowhere_is_refused_as_a_file_is(
    untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "run.history.csv"
    link.symlink_to("later.csv")
    assert run_inside(*training(untested, tmp_path / "run.pth")) == 2
    assert f"{link}: is there already" in one_line(capsys)


def test_overwrite_replaces_a_run(data: Path, whole: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.pth"
    assert run_inside(*training(data, checkpoint, "--seed", "1")) == 0
    assert run_inside(*training(data, checkpoint, "--overwrite")) == 0
    assert same(checkpoint, whole)
    assert {path.name for path in tmp_path.iterdir()} == FILES


@pytest.mark.parametrize("flags", [
    ("--data-dir", "{empty}"), ("--tasks", "NOSE"), ("--weights", "{empty}/none.pth"),
    ("--device", "cuda:99")])
def test_overwrite_that_cannot_begin_leaves_what_was_there(
    flags: Sequence[str], untested: Path, whole_untested: Path, tmp_path: Path
) -> None:
    checkpoint, empty = copy_run(whole_untested, tmp_path), tmp_path / "empty"
    empty.mkdir()
    before = listing(tmp_path)
    given = [flag.format(empty=empty) for flag in flags]
    assert run_inside(*training(untested, checkpoint, "--overwrite", *given)) == 2
    assert listing(tmp_path) == before


# ----- what goes wrong while it learns ----------------------------------------------------------


def test_a_loss_that_is_not_finite_keeps_the_model(
    untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that names the images; what earlier epochs have left is not changed."""
    loss, calls, checkpoint = mura.Trainer.loss, itertools.count(), tmp_path / "run.pth"
    before: dict[str, bytes] = {}

    def poisoned(trainer: Any, logits: Tensor, *arguments: Tensor) -> Tensor:
        value = loss(trainer, logits, *arguments)
        if not logits.requires_grad or next(calls) < 12:  # two a batch: an epoch and two batches
            return value
        before.update(listing(tmp_path))
        return value * float("nan")

    monkeypatch.setattr(mura.Trainer, "loss", poisoned)
    assert run_inside(*training(untested, checkpoint)) == 1
    error = one_line(capsys)
    names = [record.name for record in read_sides(untested, checkpoint)[0].records]
    batch = mura.epoch_batches(len(names), 8, 0, 1)[2]
    assert "the loss is not finite in epoch 2" in error
    assert [i for i, name in enumerate(names) if name in error] == sorted(batch)
    before.pop("run.lock", None)
    assert listing(tmp_path) == before
    assert read_model(checkpoint)["epoch"] == 1


def test_input_that_overflows_is_one_line(
    untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is not finite from the first batch on; no model is left."""
    flags = ("--normalization", f"0,{1e-38:.38f}", "--precise-bn", "0")
    assert run_inside(*training(untested, tmp_path / "run.pth", *flags)) == 1
    assert "the loss is not finite in epoch 1" in one_line(capsys)
    assert not (tmp_path / "run.pth").exists()


class FailsInEvaluation(nn.ReLU):
    """Returns NaN when the network does not learn."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x * float("nan")


class NotesPrecision(nn.ReLU):
    """Notes whether the network learns, whether gradients are kept, and the type of its input."""

    def __init__(self, noted: set[tuple[bool, bool, torch.dtype]]) -> None:
        super().__init__()
        self.noted = noted

    def forward(self, x: Tensor) -> Tensor:
        self.noted.add((self.training, torch.is_grad_enabled(), x.dtype))
        return super().forward(x)


def test_everything_is_computed_in_the_precision_of_choice(
    untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, BatchNorm statistics and validation: in half of fp32's memory, and of one network."""
    sound, noted = tiny_architecture(), set[tuple[bool, bool, torch.dtype]]()

    def build() -> nn.Module:
        network = sound.constructor()
        network.relu1 = NotesPrecision(noted)
        return network

    noting = mura.Architecture(build, sound.trunk, sound.head, sound.stages)
    monkeypatch.setitem(mura.ARCHITECTURES, "resnet50", noting)
    flags = ("--epochs", "1", "--precision", "bf16")
    assert run_inside(*training(untested, tmp_path / "run.pth", *flags)) == 0
    phases = ((True, True), (True, False), (False, False))
    assert noted == {(*phase, torch.bfloat16) for phase in phases}


def test_an_output_that_is_not_finite_is_never_the_best_model(
    untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sound = tiny_architecture()

    def build() -> nn.Module:
        network = sound.constructor()
        network.relu1 = FailsInEvaluation()
        return network

    broken = mura.Architecture(build, sound.trunk, sound.head, sound.stages)
    monkeypatch.setitem(mura.ARCHITECTURES, "resnet50", broken)
    assert run_inside(*training(untested, tmp_path / "run.pth")) == 1
    assert "not finite after epoch 1" in one_line(capsys)
    assert not (tmp_path / "run.pth").exists()


def closed() -> None:
    """What Python has in the place of a stream whose descriptor the shell has closed."""


def full_disk() -> Any:
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


def full_pipe() -> Any:
    """A pipe that nobody reads, and that does not wait."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, bytes(4096)):
            pass
    stream = os.fdopen(writing, "w")
    stream.reader = os.fdopen(reading)  # type: ignore[attr-defined]  # closed with it
    return stream


def lost_terminal() -> Any:
    """A terminal whose other side has gone: EIO."""
    master, slave = pytest.importorskip("pty").openpty()
    os.close(master)
    return os.fdopen(slave, "w")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("lose", [closed, full_disk, full_pipe, lost_terminal])
def test_output_that_is_lost_does_not_end_training(
    name: str, lose: Callable[[], Any], untested: Path, whole_untested: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All files are written; the exit code says that something could not be told."""
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, name, lose())
    flags = [str(word) for word in training(untested, tmp_path / "run.pth")]
    assert mura.run_as_script(mura.parse_options(flags)) == 1
    assert same(tmp_path / "run.pth", whole_untested)


# ----- killed -----------------------------------------------------------------------------------


class Trials:
    """A process that has imported everything once, and forks one that trains for each trial."""

    def __init__(self, log: Path) -> None:
        variables = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(TINY_RUN)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, **variables})

    def ask(self, request: dict[str, Any]) -> int:
        """Return the answer to a request, see tiny_run.py."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(json.loads(self.process.stdout.readline()))

    def start(self, command: Command, **task: Any) -> int:
        """Start a command; returns the ID of its process."""
        words = [str(word) for word in command]
        return self.ask({"arguments": words, "log": str(self.log), **task})

    def wait(self, process: int) -> int:
        """Return a process's exit code, or minus the signal that ended or stopped it."""
        return self.ask({"wait": process})

    def run(self, command: Command, **task: Any) -> int:
        """Run a command; returns as `wait`."""
        return self.wait(self.start(command, **task))

    def start_ranks(self, commands: Sequence[Command], **tasks: Any) -> list[int]:
        """Start a command for each of several processes of a job; returns their IDs.

        `tasks` are keys of tiny_run.py: for all of them, or as rank1={...} for one.
        """
        port, started = free_port(), []
        common = {name: value for name, value in tasks.items() if not name.startswith("rank")}
        for rank, command in enumerate(commands):
            task = {**common, **tasks.get(f"rank{rank}", {})}
            variables = environment(rank, len(commands), port)
            started.append(self.start(command, environment=variables, **task))
        return started

    def run_ranks(self, commands: Sequence[Command], **tasks: Any) -> list[int]:
        """The same; returns the exit codes."""
        return [self.wait(process) for process in self.start_ranks(commands, **tasks)]

    def tail(self) -> str:
        """Return the end of what the processes have printed."""
        return self.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    found = Trials(tmp_path_factory.mktemp("trials") / "log")
    assert found.run(("--version",)) == 0  # all is imported now
    yield found
    found.process.kill()
    found.process.communicate()


def check_whole(folder: Path, cache: Path, reference: Path, reference_cache: Path) -> None:
    """Every file under its own name is whole: what the undisturbed run wrote, or a part of it."""
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    wanted = read_history(reference / "run.pth")
    assert present <= {"run.lock", *FILES}
    if "run.pth" in present:
        hardware = mura.choose_precision(torch.device("cpu"), "fp32")
        mura.load_model(folder / "run.pth", hardware)
    if "run.last.pth" in present:
        assert read_state(folder / "run.pth")
    if "run.history.csv" in present:
        rows = read_history(folder / "run.pth")
        assert rows == wanted[: len(rows)]
        assert rows
    for name in present & {"run.split.csv", "run.test.csv"}:
        assert (folder / name).read_bytes() == (reference / name).read_bytes()
    for name in present & {"run.report.json"}:
        assert json.loads((folder / name).read_text())["levels"]
    for name in present & {"run.history.png", "run.report.png"}:
        with Image.open(folder / name) as picture:
            picture.load()
    for path in cache.iterdir() if cache.exists() else ():
        if not path.name.startswith("."):
            assert path.read_bytes() == (reference_cache / path.name).read_bytes()


def test_killed_at_any_moment_nothing_is_lost(
    data: Path, trials: Trials, tmp_path: Path, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGKILL at random moments (200 with --many) between the first decoded image and the report.

    Half of the trials begin anew, the others go on from where the one before was killed. After each
    kill all files are whole; at the end --resume auto completes the run, bit for bit as if nothing
    had happened.
    """
    random = np.random.default_rng(7)
    wanted, kills, trial = (200 if request.config.getoption("many") else 24), 0, 0

    def places(name: str) -> tuple[Path, Path]:
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name, tmp_path / f"{name}-cache"

    def command(folder: Path, cache: Path) -> Command:
        flags = ("--batch-size", "12", "--save-every", "0", "--resume", "auto")
        return training(data, folder / "run.pth", *flags, "--cache-dir", cache)

    began, whole = time.monotonic(), places("whole")
    assert trials.run(command(*whole)) == 0, trials.tail()
    seconds = time.monotonic() - began
    while kills < wanted and trial < 3 * wanted:
        here = places(f"trial{trial // 2}")  # every other one goes on from its predecessor
        process = trials.start(command(*here))
        time.sleep((trial * 0.618 + random.uniform(0, 0.02)) % 1 * 0.9 * seconds)
        os.kill(process, signal.SIGKILL)  # one that has ended is still there to be waited for
        code = trials.wait(process)
        assert code in (-signal.SIGKILL, 0), trials.tail()
        kills += code == -signal.SIGKILL
        trial += 1
        check_whole(*here, *whole)
    assert kills >= wanted
    for number in {0, trial // 4, (trial - 1) // 2}:
        here = places(f"trial{number}")
        assert trials.run(command(*here)) == 0, trials.tail()
        assert same(here[0] / "run.pth", whole[0] / "run.pth")
    with capsys.disabled():
        print(f" [{kills} kills in {trial} trials of a run of {seconds:.1f} s] ", end="")


def test_killed_before_any_change_nothing_is_lost(
    data: Path, trials: Trials, tmp_path: Path
) -> None:
    """Before the first rename or removal in a run, before the second in the next, and so on."""
    run, whole = ((tmp_path / name, tmp_path / f"{name}-cache") for name in ("run", "whole"))

    def command(folder: Path, cache: Path) -> Command:
        flags = ("--epochs", "1", "--batch-size", "16", "--tasks", "HUMERUS", "--resume", "auto")
        return training(data, folder / "run.pth", *flags, "--cache-dir", cache)

    run[0].mkdir()
    assert trials.run(command(*whole)) == 0, trials.tail()
    codes: list[int] = []
    while not codes or codes[-1]:
        killed = {"operation": len(codes), "signal": signal.SIGKILL}
        codes.append(trials.run(command(*run), **killed))
        assert codes[-1] in (-signal.SIGKILL, 0), trials.tail()
        check_whole(*run, *whole)
        assert len(codes) < 100
    assert len(codes) > 5
    assert same(run[0] / "run.pth", whole[0] / "run.pth")


def test_a_replacing_run_that_is_killed_cannot_mix(
    untested: Path, whole_untested: Path, trials: Trials, tmp_path: Path
) -> None:
    """Killed before any change, --resume goes on with one of the two runs or refuses."""
    checkpoint, second = tmp_path / "run.pth", tmp_path / "second" / "run.pth"
    flags = ("--epochs", "1", "--seed", "1", "--save-every", "0")
    replacing = training(untested, checkpoint, *flags, "--overwrite")
    assert trials.run(training(untested, second, *flags)) == 0, trials.tail()
    outcomes = {"first": Outcome.of(whole_untested), "second": Outcome.of(second)}
    ends: list[str] = []
    for operation in itertools.count():
        copy_run(whole_untested, tmp_path)
        code = trials.run(replacing, operation=operation, signal=signal.SIGKILL)
        assert code in (0, -signal.SIGKILL), trials.tail()
        if code == 0:
            break
        code = trials.run(resuming(untested, checkpoint))
        now = Outcome.of(checkpoint)
        found = [name for name, outcome in outcomes.items() if outcome.equals(now)]
        assert found or code == 2, (operation, trials.tail())
        ends += ["refused"] if code == 2 else found
        for path in tmp_path.glob("run.*"):
            path.unlink()
    assert ends[0] == "first"
    assert ends[-1] == "second"
    assert len(ends) > 4


# ----- two at once ------------------------------------------------------------------------------


def test_two_runs_with_one_checkpoint_cannot_mix(
    untested: Path, whole_untested: Path, trials: Trials, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second stops in one line before any work; the lock dies with the first."""
    command = training(untested, tmp_path / "run.pth", "--save-every", "0")
    first = trials.start(command, batch=2, signal=signal.SIGSTOP)
    assert trials.wait(first) == -signal.SIGSTOP, trials.tail()
    before = listing(tmp_path)
    for flags in ((), ("--overwrite",), ("--resume",), ("--resume", "auto")):
        assert run_inside(*command, *flags) == 1
        error = one_line(capsys)
        assert "--checkpoint" in error
        assert "another" in error
        assert listing(tmp_path) == before
    os.kill(first, signal.SIGKILL)
    assert trials.wait(first) == -signal.SIGKILL
    assert run_inside(*command, "--resume") == 0
    assert same(tmp_path / "run.pth", whole_untested)
    assert {path.name for path in tmp_path.iterdir()} <= {"run.lock", *FILES}
    assert run_inside(*command, "--resume") == 0, "a run that has ended holds no lock"


# ----- several processes ------------------------------------------------------------------------


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return what torchrun sets for one of the processes of a machine."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize(("arguments", "complaint"), [
    (("--data-dir", "{data}", "--batch-size", "3", "--device", "cpu"),
     "--batch-size 3: .* 2 need 4 or more"),
    (("--predict", "{data}"), "leave it out"), (("--demo",), "leave it out"),
    (("--export", "model.onnx"), "leave it out"),
])
def test_what_several_processes_cannot_do_is_said_before_they_meet(
    arguments: Sequence[str], complaint: str, data: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    assert run_inside(*(text.format(data=data) for text in arguments)) == 2
    assert re.search(complaint, one_line(capsys))


def read_probabilities(checkpoint: Path) -> dict[str, float]:
    rows = read_rows(beside(checkpoint, ".test.csv"))
    found = {row["path"]: float(row["probability"]) for row in rows}
    assert len(found) == len(rows)
    return found


def check_alike(left: Path, right: Path) -> None:
    """Compare two finished runs up to the order of sums."""
    one, two = Outcome.of(left), Outcome.of(right)
    for row, other in zip(one.history, two.history, strict=True):
        numbers = [{name: float(cell) for name, cell in cells.items()} for cells in (row, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-5)
    for name, value in one.weights.items():
        assert torch.allclose(value, two.weights[name], atol=1e-4)
    assert beside(left, ".split.csv").read_bytes() == beside(right, ".split.csv").read_bytes()
    assert read_probabilities(left) == pytest.approx(read_probabilities(right), abs=1e-4)


SHARED = ("--lr", "0.005", "--rotation", "30", "--save-every", "0")  # each image has its own angle


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of one process, without batch normalisation."""
    checkpoint = tmp_path_factory.mktemp("alone") / "run.pth"
    with pytest.MonkeyPatch.context() as patch:
        use_plain_network(patch)
        assert run_inside(*training(data, checkpoint, *SHARED)) == 0
    return checkpoint


@pytest.mark.parametrize(("world_size", "flags"), [(2, ("--grad-accum-steps", "2")), (3, ())])
def test_several_processes_learn_and_test_as_one(
    world_size: int, flags: Command, data: Path, alone: Path, trials: Trials, tmp_path: Path
) -> None:
    """Dividing a batch changes but the order of sums; one of them speaks and writes."""
    command = training(data, tmp_path / "run.pth", *SHARED, *flags)
    before = len(trials.log.read_text())
    assert trials.run_ranks([command] * world_size, batch_norm=False) == [0] * world_size
    printed = trials.log.read_text()[before:]
    check_alike(tmp_path / "run.pth", alone)
    assert printed.count("device: cpu") == printed.count("epoch 1/2 ") == 1
    assert f"{world_size} processes" in printed
    assert {path.name for path in tmp_path.iterdir()} <= FILES


def test_several_processes_evaluate_as_one(
    data: Path, alone: Path, trials: Trials, tmp_path: Path
) -> None:
    command = ("--evaluate", "--data-dir", data, "--checkpoint", alone, "--output",
               tmp_path / "run.csv", "--device", "cpu", "--precision", "fp32", "--bootstrap", "100")
    assert trials.run_ranks([command] * 2, batch_norm=False) == [0, 0], trials.tail()
    found = read_probabilities(tmp_path / "run.pth")
    assert found == pytest.approx(read_probabilities(alone), abs=1e-4)
    assert {path.name for path in tmp_path.iterdir()} <= FILES


@pytest.mark.parametrize("precise_bn", ["0", "5"])
def test_all_processes_evaluate_the_network_that_is_saved(
    precise_bn: str, untested: Path, trials: Trials, tmp_path: Path
) -> None:
    """Their batch normalisation has the same statistics, though each has met its own images."""
    checkpoint, weights = tmp_path / "run.pth", tmp_path / "weights"
    command = training(untested, checkpoint, "--epochs", "1", "--precise-bn", precise_bn)
    assert trials.run_ranks([command] * 2, save_network=str(weights)) == [0, 0], trials.tail()
    one, two = (torch.load(f"{weights}.{rank}", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    hand = ByHand(untested, checkpoint, (*command, "--precise-bn", "0"))
    saved = read_model(checkpoint)["state_dict"].values()
    hand.network.load_state_dict(dict(zip(hand.network.state_dict(), saved, strict=True)))
    (row,), expected = read_history(checkpoint), hand.validate()
    found = {name: float(row[name]) for name in expected}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_signal_to_one_process_stops_all(
    data: Path, alone: Path, trials: Trials, tmp_path: Path
) -> None:
    """After the same batch, with the state saved; one process alone can go on from it."""
    command = training(data, tmp_path / "run.pth", *SHARED)
    stop = {"batch": 2, "signal": signal.SIGTERM}
    assert trials.run_ranks([command] * 2, batch_norm=False, rank1=stop) == [143, 143]
    assert "to go on: " in trials.tail().splitlines()[-1]
    assert trials.run((*command, "--resume"), batch_norm=False) == 0, trials.tail()
    check_alike(tmp_path / "run.pth", alone)


def test_no_process_leaves_before_the_state_is_saved(
    untested: Path, trials: Trials, tmp_path: Path
) -> None:
    """torchrun ends all as soon as it sees one go, and would end the one that is writing."""
    command = training(untested, tmp_path / "run.pth", *SHARED)
    stop = {"batch": 2, "signal": signal.SIGTERM}
    ranks = {"rank0": {"stop_at_states": True}, "rank1": stop}
    first, second = trials.start_ranks([command] * 2, **ranks)
    saved = 0
    while (code := trials.wait(first)) == -signal.SIGSTOP:
        time.sleep(0.2)
        assert trials.ask({"poll": second}) == 1000, "it has left"
        saved += 1
        os.kill(first, signal.SIGCONT)
    assert (code, trials.wait(second)) == (143, 143)
    assert saved >= 3


def test_a_dead_process_ends_the_others(
    data: Path, alone: Path, trials: Trials, tmp_path: Path
) -> None:
    """And both together go on from the last state that was saved."""
    command = training(data, tmp_path / "run.pth", *SHARED)
    death = {"batch": 3, "signal": signal.SIGKILL}
    assert trials.run_ranks([command] * 2, batch_norm=False, rank1=death) == [1, -signal.SIGKILL]
    resumed = trials.run_ranks([(*command, "--resume")] * 2, batch_norm=False)
    assert resumed == [0, 0], trials.tail()
    check_alike(tmp_path / "run.pth", alone)


def test_a_folder_that_is_not_shared_is_refused(
    untested: Path, trials: Trials, tmp_path: Path
) -> None:
    """Before the first epoch; seen from rank 1 the folder of --checkpoint is another one."""
    commands = [training(untested, tmp_path / name / "run.pth") for name in "ab"]
    (tmp_path / "b").mkdir()
    before = len(trials.log.read_text())
    assert trials.run_ranks(commands) == [1, 1]
    assert "is not shared by all machines" in trials.log.read_text()[before:]
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("stray", [
    {"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "3"}, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"},
    {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
])
def test_what_a_scheduler_leaves_in_the_environment_changes_nothing(
    stray: dict[str, str], untested: Path, whole_untested: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    """A single process is not silent, and does not wait for others."""
    for name, value in stray.items():
        monkeypatch.setenv(name, value)
    assert run_inside(*training(untested, tmp_path / "run.pth")) == 0
    assert "epoch 2/2 " in capsys.readouterr().out
    assert same(tmp_path / "run.pth", whole_untested)


def torchrun(command: Command, *options: str, **variables: str) -> subprocess.Popen[str]:
    """Start tiny_run.py under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, str(TINY_RUN)]
    return subprocess.Popen(
        [*launcher, *map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_torchrun_starts_a_killed_process_again(data: Path, alone: Path, tmp_path: Path) -> None:
    """Two processes, of which one is killed once in its third batch, end as one left alone."""
    command = training(data, tmp_path / "run.pth", *SHARED, "--resume", "auto")
    marker = tmp_path / "killed"
    options = ("--standalone", "--nproc-per-node=2", "--max-restarts=1")
    variables = {"DIE_ONCE": f"1:2:{marker}", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = torchrun(command, *options, **variables)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert marker.exists()
    assert "resumed from" in out
    check_alike(tmp_path / "run.pth", alone)


def test_two_nodes_start_a_killed_process_again(
    data: Path, alone: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The same with two machines of a process each, on loopback."""
    if not request.config.getoption("many"):
        pytest.skip("needs --many")
    command = training(data, tmp_path / "run.pth", *SHARED, "--resume", "auto")
    marker = tmp_path / "killed"
    options = ("--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d",
               f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=1")
    variables = {"DIE_ONCE": f"1:2:{marker}", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    hosts = ("--rdzv-conf=is_host=1", "--rdzv-conf=is_host=0")
    nodes = [torchrun(command, *options, host, **variables) for host in hosts]
    ended = [node.communicate(timeout=500) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ended
    assert marker.exists()
    assert any("resumed from" in out for out, _ in ended)
    check_alike(tmp_path / "run.pth", alone)
