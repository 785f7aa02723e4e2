"""Block 8, training: what is learnt, against a loop written by hand; then a run that is stopped, killed, locked
out, cut off from its terminal or divided among processes ends as one that was left alone."""

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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SCRIPT, TINY, mura, run_inside
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_run import blank_picture, tiny_architecture
from torch import Tensor, nn
from torch.nn import functional

TINY_RUN = Path(__file__).with_name("tiny_run.py")
OPTIONS = (*TINY, "--epochs", "2", "--lr", "0.02", "--val-split", "0.3")
TIMED = ("images_per_second", "seconds")  # the columns of the history that differ from run to run
FILES = (".pth", ".last.pth", ".history.csv", ".history.png", ".split.csv", ".test.csv", ".report.json",
         ".report.png")
PARTS = ("XR_FOREARM", "XR_HUMERUS")


def beside(checkpoint: Path, ending: str) -> Path:
    """Return a file of a run: STEM and an ending."""
    return checkpoint.with_name(checkpoint.stem + ending)


def read_history(checkpoint: Path) -> list[dict[str, str]]:
    with beside(checkpoint, ".history.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMED} for row in csv.DictReader(file)]


@dataclass(frozen=True)
class Outcome:
    """What a finished run has left, but for how long it took."""

    weights: dict[str, Tensor]
    history: list[dict[str, str]]
    predictions: str

    @staticmethod
    def of(checkpoint: Path) -> Outcome:
        predictions = beside(checkpoint, ".test.csv")
        return Outcome(
            mura.read_checkpoint(checkpoint, "model")["state_dict"], read_history(checkpoint),
            predictions.read_text() if predictions.exists() else "")

    def equals(self, other: Outcome) -> bool:
        """Compare bit for bit."""
        same = all(torch.equal(value, other.weights[name]) for name, value in self.weights.items())
        return same and (self.history, self.predictions) == (other.history, other.predictions)


@pytest.fixture(scope="module", autouse=True)
def tiny_network() -> Iterator[None]:
    """--model resnet50 is a network of a few channels, and plots are blank: a run takes half a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are then taken in the same order every time
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mura.ARCHITECTURES, "resnet50", tiny_architecture())
        for name in [name for name in vars(mura) if name.startswith("plot_")]:
            patch.setattr(mura, name, blank_picture)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny network has no batch normalisation."""
    monkeypatch.setitem(mura.ARCHITECTURES, "resnet50", tiny_architecture(batch_norm=False))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of two body parts, 64 px, about 40 images in train/."""
    return mura.write_phantoms(tmp_path_factory.mktemp("data"), 12, 4, PARTS, seed=2, size=64)


@pytest.fixture(scope="module")
def untested(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without valid/: a run ends when it has learnt."""
    target = tmp_path_factory.mktemp("untested") / "MURA-v1.1"
    return Path(shutil.copytree(data, target, ignore=shutil.ignore_patterns("valid", ".mura_cache")))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More of them, without valid/: half of the patients are 20 or more, as a temperature needs."""
    root = mura.write_phantoms(tmp_path_factory.mktemp("large"), 32, 1, PARTS, seed=3, size=64)
    shutil.rmtree(root / "valid")
    return root


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run that nothing has disturbed."""
    checkpoint = tmp_path_factory.mktemp("whole") / "run.pth"
    assert run_inside("--data-dir", data, "--checkpoint", checkpoint, *OPTIONS) == 0
    return checkpoint


@pytest.fixture(scope="module")
def whole_untested(untested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without the test."""
    checkpoint = tmp_path_factory.mktemp("whole_untested") / "run.pth"
    assert run_inside("--data-dir", untested, "--checkpoint", checkpoint, *OPTIONS) == 0
    return checkpoint


def copy_run(checkpoint: Path, folder: Path) -> Path:
    """Copy all files of a run; returns the copy's model file."""
    for path in checkpoint.parent.glob(f"{checkpoint.stem}.*"):
        shutil.copy(path, folder)
    return folder / checkpoint.name


def listing(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return stderr, which holds one line."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ----- the loss and the schedule ----------------------------------------------------------------------------------


def image(label: int, part: str = "XR_HAND") -> mura.ImageRecord:
    return mura.ImageRecord("1.png", "1.png", part, "patient1", "study1", label)


def test_the_weights_are_twice_those_of_the_paper() -> None:
    """1 abnormal and 3 normal hands: w1 = 2 * 3/4, w0 = 2 * 1/4; elbows go by their own counts."""
    hands = [image(1)] + [image(0)] * 3
    elbows = [image(1, "XR_ELBOW")] * 2 + [image(0, "XR_ELBOW")] * 3
    weights = mura.image_weights([*hands, *elbows], mura.class_weights([*hands, *elbows]))
    assert weights.tolist() == pytest.approx([1.5, 0.5, 0.5, 0.5, 1.2, 1.2, 0.8, 0.8, 0.8])
    assert weights.dtype == np.float32
    assert mura.image_weights([image(1, "XR_KNEE")], {}).tolist() == [1], "of a body part that is only in val"


def test_the_loss_at_chance_is_log_two() -> None:
    """Of as many normal as abnormal images; the two classes of a body part always weigh the same."""
    records = [image(0), image(1), image(1), image(0)]
    weights = torch.from_numpy(mura.image_weights(records, mura.class_weights(records)))
    loss = mura.weighted_loss(torch.zeros(4), torch.tensor([0.0, 1, 1, 0]), weights)
    assert loss.item() / 4 == pytest.approx(0.693147, rel=1e-5)
    uneven = [image(1)] * 2 + [image(0)] * 6
    of_class = mura.image_weights(uneven, mura.class_weights(uneven))
    assert of_class[:2].sum() == of_class[2:].sum()


def test_training_needs_both_classes(capsys: pytest.CaptureFixture[str]) -> None:
    for label, name in ((0, "abnormal"), (1, "normal")):
        with pytest.raises(mura.UserError, match=f"no training image is {name};"):
            mura.class_weights([image(label)] * 3)
    assert mura.class_weights([image(0), image(1), image(1, "XR_ELBOW")])["XR_HAND"] == (1, 1)
    assert re.search("XR_ELBOW.* abnormal.*no weight", one_line(capsys)), "a body part with one class has weight 0"


LOGIT, WEIGHT = st.floats(-60, 60, width=32), st.floats(0, 2, width=32)


@given(st.lists(st.tuples(LOGIT, st.booleans(), WEIGHT), min_size=1, max_size=20))
def test_loss_and_gradient_against_numpy(rows: list[tuple[float, bool, float]]) -> None:
    """-w y log p - w (1 - y) log(1 - p), stable where p rounds to 0 or 1; its derivative is w (p - y)."""
    z, y, w = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    logits = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    loss = mura.weighted_loss(logits, torch.tensor(y).float(), torch.tensor(w).float())
    loss.backward()
    expected = (w * (y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z))).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), w * (1 / (1 + np.exp(-z)) - y), rtol=1e-4, atol=1e-6)


def test_the_loss_is_computed_in_fp32_whatever_comes_in() -> None:
    logits = torch.tensor([0.1234567], dtype=torch.bfloat16)
    assert mura.weighted_loss(logits, torch.ones(1), torch.ones(1)).dtype == torch.float32


@given(st.integers(1, 400), st.floats(0, 0.9))
def test_the_learning_rate_rises_then_falls_to_zero(total: int, warmup: float) -> None:
    """Linear to its peak, then the square of what is left."""
    factors = [mura.poly_factor(step, total, warmup) for step in range(total + 1)]
    rise = round(warmup * total)
    assert factors[:rise] == pytest.approx([(step + 1) / rise for step in range(rise)])
    assert factors[rise:] == pytest.approx([(1 - step / max(1, total - rise)) ** 2 for step in range(total - rise + 1)])
    assert mura.poly_factor(2 * total + 5, total, warmup) == pytest.approx(0, abs=1e-12)


# ----- a whole run by hand ------------------------------------------------------------------------------------------


@dataclass
class Images:
    """One side of the split, decoded."""

    records: list[mura.ImageRecord]
    pixels: Tensor  # (N, 1, 64, 64), 0 to 1
    labels: Tensor
    weights: Tensor


def read_sides(data: Path, checkpoint: Path) -> tuple[Images, Images]:
    """Return train and val by STEM.split.csv, with the weights of the paper, times two."""
    with beside(checkpoint, ".split.csv").open(newline="") as file:
        side = {row["patient"]: row["split"] for row in csv.DictReader(file)}
    everything = mura.scan_split(data, "train").records
    assert set(side) == {record.patient for record in everything}
    assert set(side.values()) == {"train", "val"}
    chosen = {name: [r for r in everything if side[r.patient] == name] for name in ("train", "val")}
    share = {part: np.mean([r.label for r in chosen["train"] if r.body_part == part]) for part in PARTS}
    found = []
    for records in chosen.values():
        weights = [2 * (1 - share[r.body_part]) if r.label else 2 * share[r.body_part] for r in records]
        pixels = np.stack([mura.resize_square(mura.read_radiograph(Path(r.path)).pixels, 64, "stretch") for r in records])
        found.append(Images(
            records, torch.from_numpy(pixels)[:, None].float() / 255,
            torch.tensor([float(r.label) for r in records]), torch.tensor(weights).float()))
    return found[0], found[1]


def plain_network(config: mura.Config) -> nn.Sequential:
    """Return the tiny network as PyTorch's own layers in a row, with the weights of --weights or --seed."""
    torch.manual_seed(config.seed)
    source = mura.Network("resnet50").state_dict()
    if config.weights != "none":
        source = mura.read_checkpoint(Path(config.weights), "model")["state_dict"]
    has_norm = len(source) > 6
    network = nn.Sequential(
        nn.Conv2d(3, 4, 8, 8, bias=not has_norm), nn.BatchNorm2d(4) if has_norm else nn.Identity(), nn.ReLU(),
        nn.Conv2d(4, 6, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1))
    network.load_state_dict(dict(zip(network.state_dict(), source.values(), strict=True)))
    return network


class ByHand:
    """The same run as an ordinary PyTorch loop; only order and random draws are the program's.

    Attributes:
        weights: of the network after each epoch.
        rows: the history.
        logits: of val after each epoch.
    """

    def __init__(self, data: Path, checkpoint: Path, arguments: Sequence[object]) -> None:
        flags = list(map(str, arguments))
        self.config = config = mura.parse_options(flags)
        self.normalization = flags[len(flags) - flags[::-1].index("--normalization")]
        self.train, self.val = read_sides(data, checkpoint)
        self.network = plain_network(config)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay)
        self.half = config.precision == "fp16"
        self.scaler = torch.amp.GradScaler("cpu", enabled=self.half)
        self.weights: list[list[Tensor]] = []
        self.rows: list[dict[str, float]] = []
        self.logits: list[np.ndarray] = []
        self.rate, self.step, self.lowest = config.lr, 0, math.inf
        for epoch in range(config.epochs):
            row = {"epoch": epoch + 1, **self.learn(epoch), "lr": self.used_rate, **self.validate()}
            self.rows.append(row)
            self.weights.append([value.clone() for value in self.network.state_dict().values()])
            if config.lr_schedule == "plateau":  # a tenth where the val loss is not below its lowest
                self.rate = self.rate if row["val_loss"] < self.lowest * (1 - 1e-4) else self.rate / 10
                self.lowest = min(self.lowest, row["val_loss"])

    def normalize(self, x: Tensor) -> Tensor:
        if self.normalization == "image":
            spread = x.flatten(1).std(1).view(-1, 1, 1, 1)
            return ((x - x.mean((1, 2, 3), keepdim=True)) / spread).expand(-1, 3, -1, -1)
        mean, std = self.train.pixels.mean(), self.train.pixels.std(correction=0)
        if self.normalization != "dataset":
            mean, std = map(float, self.normalization.split(","))
        return ((x - mean) / std).expand(-1, 3, -1, -1)

    def call(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=self.half):
            features = self.network[:-1](self.normalize(x))
        return self.network[-1](features.float())[:, 0]  # the linear unit is in fp32 always

    def learn(self, epoch: int) -> dict[str, float]:
        """Train for an epoch; returns the loss and accuracy of its images as they were met."""
        config, train, (losses, right) = self.config, self.train, (0.0, 0)
        self.network.train()
        batches = mura.epoch_batches(len(train.records), config.batch_size, config.seed, epoch)
        total = len(batches) * config.epochs
        rise = round(config.warmup * total)
        for number, batch in enumerate(batches):
            x = mura.augment(train.pixels[batch], mura.draw_augmentation(config, len(batch), epoch, number))
            labels, weights, lam = train.labels[batch], train.weights[batch], mura.draw_mixup(config, epoch, number)
            order = torch.arange(1, len(batch) + 1) % len(batch)  # the next image
            logits = self.call(lam * x + (1 - lam) * x[order])
            loss = torch.zeros(())
            for part, y, w in ((lam, labels, weights), (1 - lam, labels[order], weights[order])):
                loss = loss - part * (w * (y * functional.logsigmoid(logits) + (1 - y) * functional.logsigmoid(-logits))).sum()
            if config.lr_schedule == "poly":
                left = 1 - (self.step - rise) / (total - rise)
                self.rate = config.lr * ((self.step + 1) / rise if self.step < rise else left**2)
            self.used_rate = self.optimizer.param_groups[0]["lr"] = self.rate
            self.optimizer.zero_grad()
            self.scaler.scale(loss / len(batch)).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.step += 1
            losses += loss.item()
            right += int(((logits > 0) == (labels > 0.5)).sum())
        return {"train_loss": losses / len(train.records), "train_accuracy": right / len(train.records)}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the metrics of val: loss and accuracy of images, AUROC and kappa of studies."""
        norm = self.network[1]
        if self.config.precise_bn and isinstance(norm, nn.BatchNorm2d):  # from all of train as one batch
            maps = self.network[0](self.normalize(self.train.pixels))
            norm.running_mean.copy_(maps.mean((0, 2, 3)))
            norm.running_var.copy_(maps.var((0, 2, 3)))
        self.network.eval()
        val = self.val
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
                "val_auroc": ((gaps > 0) + (gaps == 0) / 2).mean(), "val_kappa": (agreed - chance) / (1 - chance)}


COMMON = (*TINY, "--val-split", "0.3")
RUNS = {  # each ingredient is in one of them at least
    "default": ("--epochs", "3", "--lr", "0.02", "--precise-bn", "0", "--warmup", "0.25", "--weight-decay", "0.5"),
    "paper": ("--epochs", "5", "--lr", "0.05", "--lr-schedule", "plateau", "--weight-decay", "0",
              "--mixup", "0.4", "--grad-accum-steps", "3", "--seed", "1", "--select", "loss"),
    "precise": ("--epochs", "4", "--lr", "0.03", "--precise-bn", "1000", "--batch-size", "64", "--no-tta",
                "--normalization", "dataset", "--hflip", "0.3", "--rotation", "30", "--brightness", "0.3"),
    "fp16": ("--epochs", "2", "--lr", "0.02", "--precision", "fp16", "--normalization", "0.5,0.003"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_equals_a_loop_written_by_hand(
    name: str, untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Weights and history; without batch normalisation micro-batches are as the whole batch."""
    if name in ("paper", "fp16"):
        monkeypatch.setitem(mura.ARCHITECTURES, "resnet50", tiny_architecture(batch_norm=False))
    checkpoint = tmp_path / "run.pth"
    arguments = ("--data-dir", untested, "--checkpoint", checkpoint, *COMMON, *RUNS[name])
    assert run_inside(*arguments) == 0
    assert "Warning" not in capfd.readouterr().err
    hand, content = ByHand(untested, checkpoint, arguments), mura.read_checkpoint(checkpoint, "model")
    with beside(checkpoint, ".history.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auroc", "val_kappa",
                      "lr", "images_per_second", "seconds"]
    assert len(rows) == len(hand.rows) == hand.config.epochs
    for row, expected in zip(rows, hand.rows, strict=True):
        found = {key: float(cell or "nan") for key, cell in zip(header, row, strict=True) if key not in TIMED}
        assert found == pytest.approx(expected, rel=2e-2 if name == "fp16" else 2e-4, abs=1e-5, nan_ok=True)
    for found, expected in zip(content["state_dict"].values(), hand.weights[content["epoch"] - 1], strict=True):
        if found.is_floating_point() and name != "fp16":
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    if name == "fp16":  # the scaler has met an overflow
        scaler = mura.read_checkpoint(beside(checkpoint, ".last.pth"), "state")["scaler"]
        assert scaler["scale"] == hand.scaler.get_scale() < 65536
    if name == "paper":  # the losses of train and val would lower the rate at different times
        rates = [row["lr"] for row in hand.rows]
        falls = [row["train_loss"] for row in hand.rows]
        assert len(set(rates)) > 1
        assert rates != by_plateau(falls, rates[0])


def by_plateau(losses: Sequence[float], rate: float) -> list[float]:
    """Return the learning rates of epochs with these losses."""
    rates, lowest = [], math.inf
    for loss in losses:
        rates.append(rate)
        rate = rate if loss < lowest * (1 - 1e-4) else rate / 10
        lowest = min(lowest, loss)
    return rates


def test_precise_statistics_are_of_some_training_images(
    untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--precise-bn 5: the same five of train, as they are, in each epoch; not the first five."""
    met: list[np.ndarray] = []
    batch = mura.MuraDataset.batch

    def seen(dataset: mura.MuraDataset, indices: np.ndarray) -> Tensor:
        met.append(np.array([dataset.records[i].name for i in indices]))
        return batch(dataset, indices)

    monkeypatch.setattr(mura.MuraDataset, "batch", seen)
    checkpoint = tmp_path / "run.pth"
    command = ("--data-dir", untested, "--checkpoint", checkpoint, *OPTIONS, "--batch-size", "64", "--precise-bn", "5")
    assert run_inside(*command) == 0
    train, _ = read_sides(untested, checkpoint)
    names = [record.name for record in train.records]
    assert [len(found) for found in met] == [len(names), 5, len(met[2])] * 2
    places = [names.index(name) for name in met[1]]
    assert len(set(places)) == 5
    assert max(places) >= 5
    assert met[1].tolist() == met[4].tolist()


@pytest.fixture(scope="module")
def overconfident(untested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose logits are far too large."""
    checkpoint = tmp_path_factory.mktemp("overconfident") / "run.pth"
    assert run_inside("--data-dir", untested, "--checkpoint", checkpoint, *OPTIONS, "--epochs", "1") == 0
    content = mura.read_checkpoint(checkpoint, "model")
    content["state_dict"]["head.weight"] *= 60
    mura.write_checkpoint(checkpoint, content)
    return checkpoint


@pytest.mark.parametrize("rule", ["auto", "sens=0.8", None, "0.3"])
def test_temperatures_and_threshold_are_of_val(
    rule: str | None, large: Path, overconfident: Path, tmp_path: Path
) -> None:
    """Of the patients of val, calibrated before; the threshold is of its studies."""
    checkpoint = tmp_path / "run.pth"
    arguments = ("--data-dir", large, "--checkpoint", checkpoint, *TINY, "--lr", "1e-6", "--batch-size", "64",
                 "--val-split", "0.5", *(("--threshold", rule) if rule else ()), "--precise-bn", "1000",
                 "--weights", overconfident)
    assert run_inside(*arguments) == 0
    hand, content = ByHand(large, checkpoint, arguments), mura.read_checkpoint(checkpoint, "model")
    logits, records = hand.logits[0], hand.val.records
    columns = {name: np.array([getattr(r, name) for r in records])
               for name in ("body_part", "patient", "study", "label")}
    temperature = mura.fit_temperature(logits, columns["label"], columns["patient"])
    names = tuple(record.name for record in records)
    images = mura.Predictions(names, **columns, probability=mura.sigmoid(logits, temperature))
    assert temperature > 1.5
    assert content["temperature"] == pytest.approx(temperature, rel=0.02)  # one step of its grid
    assert content["study_temperature"] == pytest.approx(mura.fit_study_temperature(images), rel=0.02)
    studies = mura.pool_studies(images, content["study_temperature"])
    expected = float(rule or 0.5) if rule is None or rule[0].isdigit() else mura.choose_threshold(rule, studies)
    assert content["threshold"] == pytest.approx(expected, abs=2e-3)
    assert content["threshold_source"] == {None: "default", "0.3": "given"}.get(rule, f"{rule} on val")
    assert content["patients"]["val"] == sorted({record.patient for record in hand.val.records})
    assert set(content["patients"]["train"]) >= {record.patient for record in hand.train.records}


# ----- which epoch is kept ------------------------------------------------------------------------------------------


HISTORY = [  # accuracy, AUROC, kappa, loss
    (0.7, 0.6, 0.1, 0.9), (0.7, 0.5, 0.0, 0.8), (0.6, 0.8, 0.2, 0.85), (0.7, 0.8, 0.1, 0.75), (0.8, None, None, 0.75)]


@pytest.mark.parametrize(("select", "best"), [
    ("accuracy", [1, 2, 4, 5]), ("auroc", [1, 3, 4]), ("kappa", [1, 3]), ("loss", [1, 2, 4])])
def test_the_best_epoch(select: str, best: list[int]) -> None:
    """Of equal ones the lower loss is, and where that is equal too the first."""
    names = ("val_accuracy", "val_auroc", "val_kappa", "val_loss")
    rows = [dict(zip(names, values, strict=True)) for values in HISTORY]
    assert [number for number in range(1, len(rows) + 1) if mura.is_best(rows[:number], select)] == best
    assert set(mura.SELECTION) == {"accuracy", "auroc", "kappa", "loss"}


def test_an_undefined_metric_is_the_worst() -> None:
    """A study kappa of -0.2 is better than none; the first epoch is kept, however bad."""
    rows = [{"val_kappa": value, "val_loss": loss} for value, loss in ((None, 0.5), (-0.2, 0.9), (None, 0.1))]
    assert [mura.is_best(rows[:number], "kappa") for number in (1, 2, 3)] == [True, True, False]


@pytest.fixture(scope="module")
def curve(untested: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[object, ...], list[dict[str, float]]]:
    """A command and its history, whose metrics are best in different epochs."""
    checkpoint = tmp_path_factory.mktemp("curve") / "run.pth"
    command = ("--data-dir", untested, *COMMON, "--epochs", "7", "--lr", "0.02", "--seed", "3",
               "--batch-size", "16", "--checkpoint")
    assert run_inside(*command, checkpoint) == 0
    rows = [{name: float(cell) for name, cell in row.items()} for row in read_history(checkpoint)]
    return command, rows


def best_row(rows: list[dict[str, float]], select: str) -> int:
    """Return the number of the best row, from 1."""
    sign = -1 if select == "loss" else 1
    return 1 + max(range(len(rows)), key=lambda i: (sign * rows[i][f"val_{select}"], -rows[i]["val_loss"]))


@pytest.mark.parametrize("select", ["accuracy", "auroc", "kappa", "loss"])
def test_select_chooses_the_epoch_that_is_kept(
    select: str, curve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plot is drawn after each epoch, and marks the one that is kept."""
    command, rows = curve
    drawn: list[tuple[int, int]] = []
    monkeypatch.setattr(mura, "plot_history", lambda history, best: drawn.append((len(history), best)) or blank_picture())
    assert run_inside(*command, tmp_path / "run.pth", "--select", select) == 0
    content = mura.read_checkpoint(tmp_path / "run.pth", "model")
    assert content["epoch"] == best_row(rows, select)
    assert drawn == [(number, best_row(rows[:number], select)) for number in range(1, len(rows) + 1)]
    lines = capsys.readouterr().out.splitlines()
    ends = [line.endswith("best so far") for line in lines if "kappa" in line and "images/s" in line]
    assert ends == [best == number for number, best in drawn]
    assert f"(epoch {content['epoch']} of {len(rows)}, by val {select})" in lines[-2]


def test_the_metrics_are_best_in_different_epochs(curve: Any) -> None:
    """Else the test above could not tell them apart; accuracy, at its best late, has been so before."""
    assert len({best_row(curve[1], select) for select in ("accuracy", "auroc", "kappa", "loss")}) >= 3


@pytest.mark.parametrize(("select", "patience"), [("kappa", 1), ("auroc", 3)])
def test_patience_ends_the_run(select: str, patience: int, curve: Any, tmp_path: Path) -> None:
    """After so many epochs without a better one; a larger patience then goes on."""
    command, rows = curve
    best = [best_row(rows[:number], select) for number in range(1, len(rows) + 1)]
    last = next((n for n in range(1, len(rows)) if n - best[n - 1] == patience), len(rows))
    flags = (*command, tmp_path / "run.pth", "--select", select)
    assert run_inside(*flags, "--patience", patience) == 0
    assert [row["epoch"] for row in read_history(tmp_path / "run.pth")] == [str(n) for n in range(1, last + 1)]
    assert last < len(rows)
    assert run_inside(*flags, "--patience", "0", "--resume") == 0
    assert len(read_history(tmp_path / "run.pth")) == len(rows)


# ----- what is printed ----------------------------------------------------------------------------------------------


def test_the_lines_of_an_epoch(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is per image and what per study, as in the history; the end names the model and the next command."""
    checkpoint = tmp_path / "my runs" / "run.pth"
    assert run_inside("--data-dir", data, "--checkpoint", checkpoint, *OPTIONS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 2
    for number, row in enumerate(read_history(checkpoint), 1):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"epoch {number}/2 "))
        cells = {name: f"{float(value):.4f}" for name, value in row.items()}
        assert lines[at].split("  ")[1] == (
            f"images: train loss {cells['train_loss']} accuracy {cells['train_accuracy']}, "
            f"val loss {cells['val_loss']} accuracy {cells['val_accuracy']}")
        assert lines[at + 1].strip().startswith(f"studies: val AUROC {cells['val_auroc']} kappa {cells['val_kappa']} ")
        assert max(map(len, lines[at : at + 2])) <= 100
    *_, model, following = lines
    assert str(checkpoint) in model
    assert shlex.split(following.partition("next: ")[2])[2:] == ["--predict", "IMAGE", "--checkpoint", str(checkpoint)]


class Clock:
    """Stands in for the module `time` of the program: its clocks stand still but for what is added."""

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
    monkeypatch.setattr(mura, "draw_augmentation", slow_draw)
    monkeypatch.setattr(mura.Ensemble, "predict_dataset", slow_predict)
    return found


def test_off_a_terminal_a_line_a_minute(
    untested: Path, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Running loss and accuracy, learning rate, and the time left of the whole run."""
    checkpoint = tmp_path / "run.pth"
    assert run_inside("--data-dir", untested, "--checkpoint", checkpoint, *OPTIONS, "--batch-size", "2") == 0
    with beside(checkpoint, ".history.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    train, _ = read_sides(untested, checkpoint)
    batches = -(-len(train.records) // 2)
    assert batches >= 13
    assert float(second["seconds"]) == pytest.approx(10 * batches + 30)
    assert float(second["images_per_second"]) == pytest.approx(len(train.records) / (10 * batches))
    lines = [line for line in capsys.readouterr().err.splitlines() if " epoch " in line]
    expected = [  # more than 60 s after the last: at the seventh batch, then again
        (epoch, batch, 10 * (batches * (3 - epoch) - batch) + 30 * (epoch - 1))
        for epoch in (1, 2) for batch in range(7, batches + 1, 7)]
    for line, (epoch, batch, left) in zip(lines, expected, strict=True):
        found = re.search(r"epoch (\d)/2: (\d+)/(\d+) batches, loss (\S+) accuracy (\S+) lr (\S+), run (\S+) left", line)
        assert found, line
        assert tuple(map(int, found.group(1, 2, 3))) == (epoch, batch, batches)
        assert 0.1 < float(found[4]) < 3
        assert 0 < float(found[5]) <= 1
        assert 0 < float(found[6]) <= 0.02
        hours, minutes, seconds = map(int, found[7].split(":"))
        assert 3600 * hours + 60 * minutes + seconds == left


@pytest.mark.parametrize(("minutes", "saved"), [("0", None), ("1", 1), ("1000", 0)])
def test_the_state_is_saved_every_few_minutes(
    minutes: str, saved: int | None, untested: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within an epoch by --save-every, and at the end of each."""
    kinds: list[str] = []
    write = mura.write_checkpoint
    monkeypatch.setattr(mura, "write_checkpoint", lambda path, content: kinds.append(content["kind"]) or write(path, content))
    flags = ("--epochs", "1", "--batch-size", "2", "--save-every", minutes)
    assert run_inside("--data-dir", untested, "--checkpoint", tmp_path / "run.pth", *OPTIONS, *flags) == 0
    train, _ = read_sides(untested, tmp_path / "run.pth")
    batches = -(-len(train.records) // 2)
    before = kinds[: kinds.index("model")].count("state")
    within = batches if saved is None else saved * (batches // 7)
    assert within <= before <= within + 3  # one may also be saved at the start, and in validation
    assert kinds[-1] == "state"


def test_on_a_terminal_a_bar(untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the same."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, np.array([50, 200, 0, 0], np.uint16).tobytes())
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the end of a terminal
            while chunk := os.read(master, 4096):
                shown.extend(chunk)

    reader = threading.Thread(target=read, daemon=True)
    draw = mura.draw_augmentation
    monkeypatch.setattr(mura, "draw_augmentation", lambda *arguments: time.sleep(0.12) or draw(*arguments))
    monkeypatch.setattr(sys, "stderr", open(slave, "w"))
    reader.start()
    flags = ("--epochs", "1", "--batch-size", "12")
    assert run_inside("--data-dir", untested, "--checkpoint", tmp_path / "run.pth", *OPTIONS, *flags) == 0
    sys.stderr.close()
    reader.join(10)
    assert re.search(rb"epoch 1/1.*loss \d\.\d+ accuracy \d\.\d+ lr \d\S+, run 0:00:\d\d left", bytes(shown))


# ----- stopped by a signal, then continued ----------------------------------------------------------------------------


def signal_at(
    patch: pytest.MonkeyPatch, owner: Any, function: str, call: int, signum: int, *, before: bool = False,
    acknowledged: Callable[[], None] = lambda: None,
) -> None:
    """Send this process a signal at the call-th call of a function (from 1), before or after its work."""
    real, calls = getattr(owner, function), itertools.count(1)

    def disturbed(*arguments: Any, **options: Any) -> Any:
        mine = next(calls) == call
        if mine and before:
            os.kill(os.getpid(), signum)
            acknowledged()
        result = real(*arguments, **options)
        if mine and not before:
            os.kill(os.getpid(), signum)
            acknowledged()
        return result

    patch.setattr(owner, function, disturbed)


def stop_in_batch(number: int, signum: int, *command: object) -> None:
    """Run a command that is stopped in its number-th batch (from 1)."""
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, mura, "draw_augmentation", number, signum)
        assert run_inside(*command) == 128 + signum


def printed_command(line: str) -> list[str]:
    """Return the flags of the command that a stopped run has printed."""
    program, script, *flags = shlex.split(line.partition("to go on: ")[2])
    assert (program, script) == ("python", "mura_anomaly_detection.py")
    return flags


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
    checkpoint, answers = tmp_path / "my runs" / "run.pth", []
    command = ["--data-dir", data, "--checkpoint", checkpoint, *OPTIONS]
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, owner, function, call, signum, before=before,
                  acknowledged=lambda: answers.append(capfd.readouterr().err))
        assert run_inside(*command) == 128 + signum
    last = (answers[0] + capfd.readouterr().err).splitlines()[-1] if answers else capfd.readouterr().err.splitlines()[-1]
    if function == "draw_augmentation":
        assert "stopping after this batch" in answers[0]
        assert "Ctrl-C" in answers[0]
    state = beside(checkpoint, ".last.pth")
    assert f"stopped by {signal.Signals(signum).name}; the state is in {state}" in last
    assert not beside(checkpoint, ".test.csv").exists()
    assert mura.read_checkpoint(state, "state")
    assert run_inside(*printed_command(last)) == 0
    assert "resumed from" in capfd.readouterr().out
    assert Outcome.of(checkpoint).equals(Outcome.of(whole))


EVERYTHING = [  # with which a run is stopped after every batch
    ("--lr-schedule", "plateau", "--grad-accum-steps", "2", "--select", "loss"),
    ("--normalization", "dataset", "--weight-decay", "0", "--mixup", "0.3", "--precise-bn", "0"),
    ("--precision", "fp16", "--normalization", "0.5,0.003"),  # the scaler meets overflows
]


@pytest.mark.parametrize("flags", EVERYTHING)
def test_a_run_stopped_after_every_batch_ends_as_one_left_alone(
    untested: Path, tmp_path: Path, flags: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "fp16" in flags:
        monkeypatch.setitem(mura.ARCHITECTURES, "resnet50", tiny_architecture(batch_norm=False))
    command = ["--data-dir", untested, *OPTIONS, *flags, "--checkpoint"]
    assert run_inside(*command, tmp_path / "whole.pth") == 0
    codes, scale = [], 65536.0
    while not codes or codes[-1]:
        with pytest.MonkeyPatch.context() as patch:
            signal_at(patch, mura, "draw_augmentation", 1, signal.SIGINT)
            codes.append(run_inside(*command, tmp_path / "run.pth", "--resume", "auto"))
        scale = mura.read_checkpoint(tmp_path / "run.last.pth", "state")["scaler"].get("scale", scale)
    train, _ = read_sides(untested, tmp_path / "run.pth")
    assert codes == [130] * (2 * -(-len(train.records) // 8)) + [0]
    assert (scale < 65536) == ("fp16" in flags)
    assert Outcome.of(tmp_path / "run.pth").equals(Outcome.of(tmp_path / "whole.pth"))


def test_a_signal_while_images_are_decoded_leaves_nothing(data: Path, tmp_path: Path) -> None:
    command = ("--data-dir", data, "--cache-dir", tmp_path / "cache", "--checkpoint", tmp_path / "run.pth", *OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, mura, "read_radiograph", 3, signal.SIGTERM)
        assert run_inside(*command) == 143
    assert listing(tmp_path) == {}


# ----- what --resume takes from the state, and what it refuses --------------------------------------------------------


@pytest.fixture
def stopped(untested: Path, tmp_path: Path) -> Path:
    """The model file (not written yet) of a run that was stopped in its second batch."""
    checkpoint = tmp_path / "stopped" / "run.pth"
    stop_in_batch(2, signal.SIGTERM, "--data-dir", untested, "--checkpoint", checkpoint, *OPTIONS)
    assert not checkpoint.exists()
    return checkpoint


def test_the_settings_are_those_of_the_state(untested: Path, stopped: Path, whole_untested: Path) -> None:
    """All of them, the number of epochs too."""
    command = ("--data-dir", untested, "--checkpoint", stopped, "--device", "cpu", "--resume")
    assert run_inside(*command) == 0
    assert Outcome.of(stopped).equals(Outcome.of(whole_untested))


def test_settings_that_may_change_stay_where_they_are_not_given(
    untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--grad-accum-steps, --patience and --recipe too."""
    checkpoint = tmp_path / "run.pth"
    command = ("--data-dir", untested, "--device", "cpu", "--checkpoint")
    flags = (*TINY, "--epochs", "6", "--recipe", "paper", "--val-split", "0.3", "--lr", "0.1", "--patience", "1",
             "--grad-accum-steps", "2")
    assert run_inside(*command, tmp_path / "whole.pth", *flags) == 0
    assert len(read_history(tmp_path / "whole.pth")) < 6
    stop_in_batch(2, signal.SIGTERM, *command, checkpoint, *flags)
    assert run_inside(*command, checkpoint, "--resume") == 0
    assert Outcome.of(checkpoint).equals(Outcome.of(tmp_path / "whole.pth"))


@pytest.mark.parametrize(("flags", "refused"), [
    (("--lr", "0.01"), "--lr was 0.02"), (("--batch-size", "4"), "--batch-size was 8"),
    (("--model", "densenet169"), "--model was resnet50"), (("--seed", "1"), "--seed was 0"),
    (("--image-size", "96"), "--image-size was 64"), (("--tasks", "HUMERUS"), "--tasks was all"),
    (("--resize", "letterbox"), "--resize was stretch"), (("--threshold", "auto"), "--threshold was "),
    (("--no-tta",), "--tta was True"), (("--val-split", "0.4"), "--val-split was 0.3"),
    (("--normalization", "imagenet"), "--normalization was image"), (("--select", "auroc"), "--select was accuracy"),
    (("--lr-schedule", "plateau"), "--lr-schedule was poly"), (("--warmup", "0.2"), "--warmup was 0.1"),
    (("--weight-decay", "0"), "--weight-decay was 0.01"), (("--mixup", "0.1"), "--mixup was 0"),
    (("--hflip", "0"), "--hflip was 0.5"), (("--rotation", "0"), "--rotation was 10"),
    (("--brightness", "0"), "--brightness was 0.1"), (("--contrast", "0"), "--contrast was 0.2"),
    (("--precise-bn", "0"), "--precise-bn was 16"), (("--precision", "bf16"), "--precision was auto"),
    (("--recipe", "paper"), "--recipe was default"),
])
def test_flags_that_change_what_is_learnt_are_refused_by_name(
    flags: Sequence[str], refused: str, untested: Path, whole_untested: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = copy_run(whole_untested, tmp_path)
    before = listing(tmp_path)
    for resume in (("--resume",), ("--resume", "auto")):
        assert run_inside("--data-dir", untested, "--checkpoint", checkpoint, *OPTIONS, *flags, *resume) == 2
        assert refused in one_line(capsys)
    assert listing(tmp_path) == before


def test_other_flags_may_change(data: Path, untested: Path, stopped: Path, whole: Path, tmp_path: Path) -> None:
    """Those that do not change what is learnt; the folder may have moved, and --overwrite is not asked for."""
    flags = ("--save-every", "0", "--workers", "2", "--bootstrap", "120", "--cache-dir", tmp_path / "cache",
             "--patience", "7", "--on-bad-image", "skip", "--debug", "--drop-duplicates")
    assert run_inside("--data-dir", data, "--checkpoint", stopped, "--epochs", "2", "--device", "cpu", *flags, "--resume") == 0
    assert Outcome.of(stopped).equals(Outcome.of(whole))


def test_more_epochs_stretch_the_schedule(
    untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run and a stopped one go on with a larger --epochs; plateau has nothing to stretch."""
    checkpoint = tmp_path / "run.pth"
    command = ("--data-dir", untested, "--checkpoint", checkpoint, *OPTIONS)
    assert run_inside(*command) == 0
    before = read_history(checkpoint)
    capsys.readouterr()
    stop_in_batch(2, signal.SIGINT, *command, "--epochs", "4", "--resume")
    assert re.search(r"--epochs 2 -> 4: the schedule is stretched; .*\d", capsys.readouterr().out)
    assert run_inside(*command, "--epochs", "4", "--resume") == 0
    assert "stretched" not in capsys.readouterr().out
    rows, (train, _) = read_history(checkpoint), read_sides(untested, checkpoint)
    assert rows[:2] == before
    batches = -(-len(train.records) // 8)
    expected = [0.02 * mura.poly_factor(epoch * batches - 1, 4 * batches, 0.1) for epoch in (3, 4)]
    assert [float(row["lr"]) for row in rows[2:]] == pytest.approx(expected)
    other = ("--data-dir", untested, "--checkpoint", tmp_path / "other.pth", *OPTIONS, "--lr-schedule", "plateau")
    assert run_inside(*other, "--epochs", "1") == run_inside(*other, "--epochs", "2", "--resume") == 0
    assert "stretched" not in capsys.readouterr().out
    assert run_inside(*other[:3], tmp_path / "whole.pth", *other[4:], "--epochs", "2") == 0
    assert Outcome.of(tmp_path / "other.pth").equals(Outcome.of(tmp_path / "whole.pth"))


def test_a_finished_run_is_only_tested_again(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = copy_run(whole, tmp_path)
    beside(checkpoint, ".test.csv").unlink()
    assert run_inside("--data-dir", data, "--checkpoint", checkpoint, *OPTIONS, "--resume") == 0
    assert not any(line.startswith("epoch") for line in capsys.readouterr().out.splitlines())
    assert checkpoint.read_bytes() == whole.read_bytes()
    assert Outcome.of(checkpoint).equals(Outcome.of(whole))


def test_weights_are_not_needed_any_more(
    untested: Path, whole_untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--weights FILE: what its model has seen is told and kept; --resume does without the file."""
    first = copy_run(whole_untested, tmp_path)
    checkpoint = tmp_path / "next.pth"
    command = ("--data-dir", untested, "--checkpoint", checkpoint, *OPTIONS, "--weights", first, "--seed", "1",
               "--normalization", "imagenet")
    without_model = [flag for flag in command if flag not in ("--model", "resnet50")]
    stop_in_batch(2, signal.SIGTERM, *without_model)
    told = capsys.readouterr().err
    earlier = mura.read_checkpoint(first, "model")["patients"]
    first.unlink()
    assert run_inside(*without_model, "--resume") == 0
    patients = mura.read_checkpoint(checkpoint, "model")["patients"]
    seen = {*earlier["train"], *earlier["val"]} & set(patients["val"])
    assert re.search(rf"run\.pth: has seen {len(set(earlier['train']) & set(patients['val']))} patients of val", told) or \
        re.search(rf"run\.pth: has seen {len(seen)} patients of val", told)
    assert "--normalization image, this run has imagenet" in told
    assert "--resize" not in told
    assert set(earlier["train"]) <= set(patients["train"])


def test_state_and_model_of_different_runs_are_refused(
    untested: Path, whole_untested: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that differs in nothing but its weights; and a state without its model."""
    command = ("--data-dir", untested, *OPTIONS)
    other = tmp_path / "other" / "run.pth"
    assert run_inside(*command, "--checkpoint", other, "--epochs", "1", "--seed", "1") == 0
    checkpoint = copy_run(whole_untested, tmp_path)
    right = checkpoint.read_bytes()
    content = mura.read_checkpoint(checkpoint, "model")
    content["state_dict"] = {name: value + 1 for name, value in content["state_dict"].items()}
    mura.write_checkpoint(tmp_path / "changed.pth", content)
    resumed = (*command, "--checkpoint", checkpoint, "--resume")
    for wrong in (other.read_bytes(), (tmp_path / "changed.pth").read_bytes()):
        checkpoint.write_bytes(wrong)
        before = listing(tmp_path)
        capsys.readouterr()
        assert run_inside(*resumed) == 2
        assert re.search(r"run\.pth is of another run", one_line(capsys))
        assert listing(tmp_path) == before
    checkpoint.unlink()
    assert run_inside(*resumed) == 2
    assert f"{checkpoint}, the best model so far, is missing" in one_line(capsys)
    checkpoint.write_bytes(right)
    assert run_inside(*resumed) == 0
    stopped.write_bytes(right)  # a model beside a state that has none yet
    capsys.readouterr()
    assert run_inside(*command, "--checkpoint", stopped, "--resume", "--epochs", "1") in (0, 2)
    if stopped.read_bytes() == right:
        assert "another run" in one_line(capsys)


def test_other_data_are_refused(untested: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another label, another pixel."""
    command = ("--checkpoint", stopped, *OPTIONS, "--resume", "--data-dir")
    relabelled, repainted = (
        Path(shutil.copytree(untested, tmp_path / name / "MURA-v1.1", ignore=shutil.ignore_patterns(".mura_cache")))
        for name in ("relabelled", "repainted"))
    first = min((repainted / "train").rglob("image*.png"))
    with Image.open(first) as found:
        found.point(lambda value: 255 - value).save(first)
    study = min((relabelled / "train").rglob("*_negative"))
    (relabelled / "train_labeled_studies.csv").write_text(
        (relabelled / "train_labeled_studies.csv").read_text().replace("_negative/,0", "_negative/,1", 1))
    assert study.exists()
    for folder in (relabelled, repainted):
        capsys.readouterr()
        assert run_inside(*command, folder) == 2
        assert re.search(r"run\.last\.pth: .*(images|labels).* changed", capsys.readouterr().err.splitlines()[-1])


def test_resume_without_a_state(
    untested: Path, whole_untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that says what to do; `auto` starts a new run instead."""
    command = ("--data-dir", untested, "--checkpoint", tmp_path / "run.pth", *OPTIONS, "--resume")
    assert run_inside(*command) == 2
    error = one_line(capsys)
    assert "run.last.pth" in error
    assert "--resume auto" in error
    assert listing(tmp_path) == {}
    assert run_inside(*command, "auto") == 0
    assert Outcome.of(tmp_path / "run.pth").equals(Outcome.of(whole_untested))


def test_a_state_that_is_not_usable_is_one_line(
    untested: Path, whole_untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged, of another kind, of another version; nothing is changed."""
    checkpoint = copy_run(whole_untested, tmp_path)
    state = beside(checkpoint, ".last.pth")
    content, sound = mura.read_checkpoint(state, "state"), state.read_bytes()
    damaged = bytearray(sound)
    damaged[1000] ^= 4
    mura.write_checkpoint(state, {**content, "settings": {}})
    for wrong in (bytes(damaged), sound[:2000], b"", checkpoint.read_bytes(), state.read_bytes()):
        state.write_bytes(wrong)
        before = listing(tmp_path)
        capsys.readouterr()
        assert run_inside("--data-dir", untested, "--checkpoint", checkpoint, *OPTIONS, "--resume", "auto") == 2
        assert "run.last.pth" in one_line(capsys)
        assert listing(tmp_path) == before


# ----- nothing is replaced by accident --------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", FILES)
def test_existing_files_are_refused_before_any_work(
    ending: str, untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether of a run or not."""
    (tmp_path / f"run{ending}").write_bytes(b"mine")
    command = ("--data-dir", untested, "--checkpoint", tmp_path / "run.pth", *OPTIONS, "--cache-dir", tmp_path / "cache")
    assert run_inside(*command) == 2
    error = one_line(capsys)
    assert f"run{ending}: " in error
    assert "--overwrite" in error
    assert listing(tmp_path) == {f"run{ending}": b"mine"}
    assert not (tmp_path / "cache").exists()


def test_overwrite_replaces_a_run(data: Path, whole: Path, tmp_path: Path) -> None:
    command = ("--data-dir", data, "--checkpoint", tmp_path / "run.pth", *OPTIONS)
    assert run_inside(*command, "--seed", "1") == 0
    assert run_inside(*command, "--overwrite") == 0
    assert Outcome.of(tmp_path / "run.pth").equals(Outcome.of(whole))
    assert {path.name for path in tmp_path.iterdir()} == {f"run{ending}" for ending in FILES}


@pytest.mark.parametrize(("flags", "code"), [
    (("--data-dir", "{folder}"), 2), (("--tasks", "NOSE"), 2), (("--weights", "{folder}/none.pth"), 2),
    (("--val-split", "0.0001", "--tasks", "FOREARM", "--device", "cuda:99"), 2),
])
def test_overwrite_that_cannot_begin_leaves_what_was_there(
    flags: Sequence[str], code: int, untested: Path, whole_untested: Path, tmp_path: Path
) -> None:
    checkpoint = copy_run(whole_untested, tmp_path)
    before = listing(tmp_path)
    (tmp_path / "empty").mkdir()
    given = (flag.format(folder=tmp_path / "empty") for flag in flags)
    assert run_inside("--data-dir", untested, "--checkpoint", checkpoint, *OPTIONS, "--overwrite", *given) == code
    assert listing(tmp_path) == before


# ----- what goes wrong while it learns --------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_keeps_the_model(
    untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1 with one line that names the images; what earlier epochs have left loads and is not changed."""
    loss, calls = mura.weighted_loss, itertools.count()
    before: dict[str, bytes] = {}

    def poisoned(logits: Tensor, *arguments: Tensor) -> Tensor:
        value = loss(logits, *arguments)
        if not logits.requires_grad or next(calls) < 6:  # the batches of an epoch, and two of the next
            return value
        before.update(listing(tmp_path))
        return value * float("nan")

    monkeypatch.setattr(mura, "weighted_loss", poisoned)
    assert run_inside("--data-dir", untested, "--checkpoint", tmp_path / "run.pth", *OPTIONS) == 1
    error = one_line(capsys)
    train, _ = read_sides(untested, tmp_path / "run.pth")
    batches = mura.epoch_batches(len(train.records), 8, 0, 1)
    assert "the loss is not finite in epoch 2" in error
    assert all((record.name in error) == (i in batches[2]) for i, record in enumerate(train.records))
    before.pop("run.lock", None)
    assert listing(tmp_path) == before
    assert mura.read_checkpoint(tmp_path / "run.pth", "model")["epoch"] == 1


def test_input_that_overflows_is_one_line(untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loss that is not finite from the first batch on; no model is left."""
    flags = ("--normalization", "0,1e-38", "--precise-bn", "0")
    assert run_inside("--data-dir", untested, "--checkpoint", tmp_path / "run.pth", *OPTIONS, *flags) == 1
    assert "the loss is not finite in epoch 1" in one_line(capsys)
    assert not (tmp_path / "run.pth").exists()


class FailsInEvaluation(nn.ReLU):
    """Returns NaN when the network does not learn."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x * float("nan")


def test_an_output_that_is_not_finite_is_never_the_best_model(
    untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture = tiny_architecture()

    def build() -> nn.Module:
        network = architecture.constructor()
        network.relu1 = FailsInEvaluation()
        return network

    broken = mura.Architecture(build, architecture.trunk, architecture.head, architecture.stages)
    monkeypatch.setitem(mura.ARCHITECTURES, "resnet50", broken)
    assert run_inside("--data-dir", untested, "--checkpoint", tmp_path / "run.pth", *OPTIONS) == 1
    assert "not finite after epoch 1" in one_line(capsys)
    assert not (tmp_path / "run.pth").exists()


def closed() -> None:
    """What Python has in the place of a stream whose descriptor was closed by the shell."""


def full_disk() -> io.TextIOWrapper:
    return open("/dev/full", "w")


def full_pipe() -> io.TextIOWrapper:
    """A pipe that nobody reads, and that does not wait."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, bytes(4096)):
            pass
    stream = open(writing, "w")
    stream.keep = open(reading, "rb")  # type: ignore[attr-defined]
    return stream


def lost_terminal() -> io.TextIOWrapper:
    """A terminal whose other side has gone: EIO."""
    master, slave = pytest.importorskip("pty").openpty()
    os.close(master)
    return open(slave, "w")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("lose", [closed, full_disk, full_pipe, lost_terminal])
def test_output_that_is_lost_does_not_end_training(
    name: str, lose: Callable[[], Any], untested: Path, whole_untested: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All files are written; the exit code says that something could not be told."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, name, lose())
    command = ("--data-dir", untested, "--checkpoint", tmp_path / "run.pth", *OPTIONS)
    assert mura.run_as_script(mura.parse_options(list(map(str, command)))) == 1
    assert Outcome.of(tmp_path / "run.pth").equals(Outcome.of(whole_untested))


# ----- killed ---------------------------------------------------------------------------------------------------------


class Trials:
    """A process that has imported everything once, and forks one that trains for each trial."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(TINY_RUN)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})

    def ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(json.loads(self.process.stdout.readline()))

    def start(self, *arguments: object, **task: Any) -> int:
        """Start a command, see tiny_run.py; returns the ID of its process."""
        return self.ask({"arguments": list(map(str, arguments)), "log": str(self.log), **task})

    def wait(self, process: int) -> int:
        """Return the exit code of a process, or minus the signal that ended or stopped it."""
        return self.ask({"wait": process})

    def run(self, *arguments: object, **task: Any) -> int:
        """Run a command; returns as `wait`."""
        return self.wait(self.start(*arguments, **task))

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *reason: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with Trials(tmp_path_factory.mktemp("trials") / "log") as started:
        assert started.run("--version") == 0  # all is imported now
        yield started


def check_whole(place: Path, name: str) -> None:
    """Every file that a run has left under its name is whole: it loads, and is what the undisturbed run wrote."""
    folder, cache, reference, reference_cache = (place / f for f in (name, f"{name}-cache", "whole", "whole-cache"))
    wanted = Outcome.of(reference / "run.pth")
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert present <= {"run.lock", *(f"run{ending}" for ending in FILES)}
    if "run.pth" in present:
        mura.load_model(folder / "run.pth", mura.choose_precision(torch.device("cpu"), "fp32"))
    if "run.last.pth" in present:
        assert mura.read_checkpoint(folder / "run.last.pth", "state")
    if "run.history.csv" in present:
        rows = read_history(folder / "run.pth")
        assert rows == wanted.history[: len(rows)]
        assert rows
    for file in ("run.split.csv", "run.test.csv"):
        if file in present:
            assert (folder / file).read_bytes() == (reference / file).read_bytes()
    if "run.report.json" in present:
        assert json.loads((folder / "run.report.json").read_text())["levels"]
    for file in present:
        if file.endswith(".png"):
            with Image.open(folder / file) as picture:
                picture.load()
    for path in cache.iterdir() if cache.exists() else []:
        if not path.name.startswith("."):
            assert path.read_bytes() == (reference_cache / path.name).read_bytes()


def test_killed_at_any_moment_nothing_is_lost(
    data: Path, trials: Trials, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at random moments (200 with --many) between the first decoded image and the report.

    Half of the trials begin anew, the others go on from where the one before was killed. After each
    kill all files are whole; at the end --resume auto completes the run, bit for bit as if nothing
    had happened.
    """
    random = np.random.default_rng(7)
    wanted, kills, trial = (200 if request.config.getoption("--many") else 30), 0, 0

    def command(name: str) -> list[object]:
        (tmp_path / name).mkdir(exist_ok=True)
        return ["--data-dir", data, *OPTIONS, "--batch-size", "12", "--save-every", "0", "--resume", "auto",
                "--checkpoint", tmp_path / name / "run.pth", "--cache-dir", tmp_path / f"{name}-cache"]

    began = time.monotonic()
    assert trials.run(*command("whole")) == 0, trials.log.read_text()
    seconds = time.monotonic() - began
    while kills < wanted and trial < 3 * wanted:
        name = f"trial{trial // 2}"  # every other one goes on from its predecessor
        process = trials.start(*command(name))
        time.sleep((trial * 0.618 + random.uniform(0, 0.02)) % 1 * 0.9 * seconds)
        os.kill(process, signal.SIGKILL)  # a process that has ended is still there to be waited for
        code = trials.wait(process)
        assert code in (-signal.SIGKILL, 0), trials.log.read_text()
        kills += code == -signal.SIGKILL
        trial += 1
        check_whole(tmp_path, name)
    assert kills >= wanted
    for number in {0, trial // 4, (trial - 1) // 2}:
        name = f"trial{number}"
        assert trials.run(*command(name)) == 0, trials.log.read_text()
        assert Outcome.of(tmp_path / name / "run.pth").equals(Outcome.of(tmp_path / "whole" / "run.pth"))
    with capsys.disabled():
        print(f" [{kills} kills in {trial} trials of a run of {seconds:.1f} s] ", end="")


def test_killed_before_any_write_nothing_is_lost(data: Path, trials: Trials, tmp_path: Path) -> None:
    """Before the first rename or removal in a run, before the second in the next, and so on."""

    def command(name: str) -> list[object]:
        (tmp_path / name).mkdir(exist_ok=True)
        return ["--data-dir", data, *OPTIONS, "--epochs", "1", "--batch-size", "16", "--tasks", "HUMERUS",
                "--resume", "auto", "--cache-dir", tmp_path / f"{name}-cache",
                "--checkpoint", tmp_path / name / "run.pth"]

    assert trials.run(*command("whole")) == 0
    codes: list[int] = []
    while not codes or codes[-1]:
        codes.append(trials.run(*command("run"), operation=len(codes), signal=signal.SIGKILL))
        assert codes[-1] in (-signal.SIGKILL, 0), trials.log.read_text()
        check_whole(tmp_path, "run")
        assert len(codes) < 100
    assert len(codes) > 5
    assert Outcome.of(tmp_path / "run" / "run.pth").equals(Outcome.of(tmp_path / "whole" / "run.pth"))


def test_a_replacing_run_that_is_killed_cannot_mix(
    untested: Path, whole_untested: Path, trials: Trials, tmp_path: Path
) -> None:
    """Killed before any write of it, --resume goes on with one of the two runs or refuses: never with both."""
    checkpoint, second = tmp_path / "run.pth", tmp_path / "second" / "run.pth"
    flags = ("--epochs", "1", "--seed", "1", "--save-every", "0")
    command = ("--data-dir", untested, *OPTIONS, *flags, "--checkpoint")
    assert trials.run(*command, second) == 0
    outcomes = {"first": Outcome.of(whole_untested), "second": Outcome.of(second)}
    ends: list[str] = []
    for operation in itertools.count():
        copy_run(whole_untested, tmp_path)
        code = trials.run(*command, checkpoint, "--overwrite", operation=operation, signal=signal.SIGKILL)
        assert code in (0, -signal.SIGKILL), trials.log.read_text()
        if code == 0:
            break
        resumed = trials.run("--data-dir", untested, "--checkpoint", checkpoint, "--device", "cpu", "--resume")
        found = [name for name, outcome in outcomes.items() if outcome.equals(Outcome.of(checkpoint))]
        assert found or resumed == 2, (operation, trials.log.read_text()[-2000:])
        ends.append(found[0] if resumed == 0 else "refused")
        if resumed == 2 and "refused" not in ends[:-1]:  # there is a way on
            assert trials.run(*command, checkpoint, "--overwrite") == 0
            assert outcomes["second"].equals(Outcome.of(checkpoint))
        for path in tmp_path.glob("run.*"):
            path.unlink()
    assert ends[0] == "first"
    assert ends[-1] == "second"
    assert len(ends) > 4


# ----- two at once ----------------------------------------------------------------------------------------------------


def test_two_runs_with_one_checkpoint_cannot_mix(
    untested: Path, whole_untested: Path, trials: Trials, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second stops in one line before any work; the lock dies with the first, however it ends."""
    command = ("--data-dir", untested, "--checkpoint", tmp_path / "run.pth", *OPTIONS, "--save-every", "0")
    first = trials.start(*command, batch=2, signal=signal.SIGSTOP)
    assert trials.wait(first) == -signal.SIGSTOP
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
    assert Outcome.of(tmp_path / "run.pth").equals(Outcome.of(whole_untested))
    assert {path.name for path in tmp_path.iterdir()} <= {"run.lock", *(f"run{ending}" for ending in FILES)}
    assert run_inside(*command, "--resume") == 0, "an ended run holds no lock"


# ----- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "complaint"), [
    (("--data-dir", "{data}", "--batch-size", "3", "--device", "cpu"), "--batch-size 3: .* 2 need 4 or more"),
    (("--predict", "{data}", "--device", "cpu"), "leave it out"), (("--demo",), "leave it out"),
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


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return what torchrun sets for one of the processes of a machine."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_processes(trials: Trials, ranks: Sequence[Sequence[object]], **tasks: Any) -> list[int]:
    """Start a command in a process for each rank; returns their IDs.

    `tasks` are keys of tiny_run.py: for all ranks, or as rank1={...} for one.
    """
    port = free_port()
    shared = {name: value for name, value in tasks.items() if not name.startswith("rank")}
    return [
        trials.start(*arguments, environment=environment(rank, len(ranks), port), **shared, **tasks.get(f"rank{rank}", {}))
        for rank, arguments in enumerate(ranks)]


def run_processes(trials: Trials, ranks: Sequence[Sequence[object]], **tasks: Any) -> list[int]:
    """The same; returns the exit codes."""
    return [trials.wait(process) for process in start_processes(trials, ranks, **tasks)]


def read_probabilities(checkpoint: Path) -> dict[str, float]:
    with beside(checkpoint, ".test.csv").open(newline="") as file:
        rows = [(row["path"], float(row["probability"])) for row in csv.DictReader(file)]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def check_alike(found: Path, expected: Path) -> None:
    """Compare two finished runs up to the order of sums."""
    one, two = Outcome.of(expected), Outcome.of(found)
    assert len(one.history) == len(two.history)
    for row, other in zip(one.history, two.history, strict=True):
        numbers = [{name: float(cell) for name, cell in cells.items() if cell} for cells in (row, other)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4, abs=1e-5)
    assert all(torch.allclose(value, two.weights[name], atol=1e-4) for name, value in one.weights.items())
    assert beside(found, ".split.csv").read_bytes() == beside(expected, ".split.csv").read_bytes()
    if one.predictions:
        assert read_probabilities(found) == pytest.approx(read_probabilities(expected), abs=1e-4)


SHARED = (*OPTIONS, "--lr", "0.005", "--rotation", "30", "--save-every", "0")  # augmented, so that each image counts


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of one process, without batch normalisation."""
    checkpoint = tmp_path_factory.mktemp("alone") / "run.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mura.ARCHITECTURES, "resnet50", tiny_architecture(batch_norm=False))
        assert run_inside("--data-dir", data, "--checkpoint", checkpoint, *SHARED) == 0
    return checkpoint


@pytest.mark.parametrize(("world_size", "flags"), [(2, ("--grad-accum-steps", "2")), (3, ())])
def test_several_processes_learn_and_test_as_one(
    world_size: int, flags: Sequence[str], data: Path, alone: Path, trials: Trials, tmp_path: Path
) -> None:
    """Without batch normalisation dividing a batch changes but the order of sums; one of them speaks."""
    command = ("--data-dir", data, "--checkpoint", tmp_path / "run.pth", *SHARED, *flags)
    size = trials.log.stat().st_size if trials.log.exists() else 0
    codes = run_processes(trials, [command] * world_size, batch_norm=False, save_network=str(tmp_path / "net"))
    printed = trials.log.read_text()[size:]
    assert codes == [0] * world_size, printed
    check_alike(tmp_path / "run.pth", alone)
    assert printed.count("device: cpu") == printed.count("epoch 1/2 ") == 1
    assert f"{world_size} processes" in printed
    assert all(path.name.startswith(("run.", "net.")) for path in tmp_path.iterdir())


@pytest.mark.parametrize("precise_bn", ["0", "5"])
def test_all_processes_evaluate_the_network_that_is_saved(
    precise_bn: str, untested: Path, trials: Trials, tmp_path: Path
) -> None:
    """Their batch normalisation has the same statistics, though each has met its own images."""
    command = ("--data-dir", untested, "--checkpoint", tmp_path / "run.pth", *OPTIONS, "--epochs", "1",
               "--precise-bn", precise_bn)
    assert run_processes(trials, [command] * 2, save_network=str(tmp_path / "net")) == [0, 0], trials.log.read_text()
    networks = [torch.load(tmp_path / f"net.{rank}", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())
    (row,) = read_history(tmp_path / "run.pth")
    hand = ByHand(untested, tmp_path / "run.pth", [*command, "--epochs", "1"])
    content = mura.read_checkpoint(tmp_path / "run.pth", "model")
    weights = dict(zip(hand.network.state_dict(), content["state_dict"].values(), strict=True))
    hand.network.load_state_dict(weights)
    hand.config = mura.parse_options(["--data-dir", str(untested), "--precise-bn", "0"])
    expected = hand.validate()
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_signal_to_one_process_stops_all(data: Path, alone: Path, trials: Trials, tmp_path: Path) -> None:
    """After the same batch, with the state saved; one process alone can go on from it."""
    command = ("--data-dir", data, "--checkpoint", tmp_path / "run.pth", *SHARED)
    tasks = {"batch_norm": False, "rank1": {"batch": 2, "signal": signal.SIGTERM}}
    assert run_processes(trials, [command] * 2, **tasks) == [143, 143], trials.log.read_text()
    assert "--resume" in trials.log.read_text().splitlines()[-1]
    assert trials.run(*command, "--resume", batch_norm=False) == 0, trials.log.read_text()
    check_alike(tmp_path / "run.pth", alone)


def test_no_process_leaves_before_the_state_is_saved(untested: Path, trials: Trials, tmp_path: Path) -> None:
    """torchrun ends all as soon as it sees one go, and would end the one that is writing."""
    command = ("--data-dir", untested, "--checkpoint", tmp_path / "run.pth", *SHARED)
    first, second = start_processes(
        trials, [command] * 2, rank0={"stop_at_states": True}, rank1={"batch": 2, "signal": signal.SIGTERM})
    stops = 0
    while (code := trials.wait(first)) == -signal.SIGSTOP:
        stops += 1
        time.sleep(0.2)
        assert trials.ask({"poll": second}) == 1000, "it has left"
        os.kill(first, signal.SIGCONT)
    assert (code, trials.wait(second)) == (143, 143)
    assert stops >= 3


def test_a_dead_process_ends_the_others(data: Path, alone: Path, trials: Trials, tmp_path: Path) -> None:
    """And both together go on from the last state that was saved."""
    command = ("--data-dir", data, "--checkpoint", tmp_path / "run.pth", *SHARED)
    tasks = {"batch_norm": False, "rank1": {"batch": 3, "signal": signal.SIGKILL}}
    assert run_processes(trials, [command] * 2, **tasks) == [1, -signal.SIGKILL]
    assert run_processes(trials, [(*command, "--resume")] * 2, batch_norm=False) == [0, 0], trials.log.read_text()
    check_alike(tmp_path / "run.pth", alone)


def test_a_folder_that_is_not_shared_is_refused(untested: Path, trials: Trials, tmp_path: Path) -> None:
    """Before the first epoch; seen from rank 1, the folder of --checkpoint is another one."""
    commands = [("--data-dir", untested, "--checkpoint", tmp_path / name / "run.pth", *OPTIONS) for name in "ab"]
    (tmp_path / "b").mkdir()
    size = trials.log.stat().st_size if trials.log.exists() else 0
    assert run_processes(trials, commands) == [1, 1]
    assert "is not shared by all machines" in trials.log.read_text()[size:]
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("stray", [
    {"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
    {"RANK": "3"}, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"},
])
def test_what_a_scheduler_leaves_in_the_environment_changes_nothing(
    stray: dict[str, str], untested: Path, whole_untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A single process is neither silent nor does it wait for others."""
    for name, value in stray.items():
        monkeypatch.setenv(name, value)
    assert run_inside("--data-dir", untested, "--checkpoint", tmp_path / "run.pth", *OPTIONS) == 0
    assert "epoch 2/2 " in capsys.readouterr().out
    assert Outcome.of(tmp_path / "run.pth").equals(Outcome.of(whole_untested))


def torchrun(*arguments: object, options: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    """Start tiny_run.py under torchrun."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, str(TINY_RUN), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MURA_SCRIPT": str(SCRIPT), **variables},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_torchrun_starts_a_killed_process_again(data: Path, alone: Path, tmp_path: Path) -> None:
    """Two processes, of which the second is killed once in its third batch, end as one that was left alone."""
    marker = tmp_path / "killed"
    run = torchrun(
        "--data-dir", data, *SHARED, "--resume", "auto", "--checkpoint", tmp_path / "run.pth",
        options=("--standalone", "--nproc-per-node=2", "--max-restarts=1"), DIE_ONCE=f"1:2:{marker}")
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert marker.exists()
    assert "resumed from" in out
    check_alike(tmp_path / "run.pth", alone)


def test_two_nodes_start_a_killed_process_again(
    data: Path, alone: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The same with two machines of a process each, on loopback."""
    if not request.config.getoption("--many"):
        pytest.skip("needs --many")
    marker, port = tmp_path / "killed", free_port()
    nodes = [
        torchrun(
            "--data-dir", data, *SHARED, "--resume", "auto", "--checkpoint", tmp_path / "run.pth",
            options=("--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d",
                     f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1", f"--rdzv-conf=is_host={int(not node)}"),
            DIE_ONCE=f"1:2:{marker}", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        for node in (0, 1)]
    ended = [node.communicate(timeout=500) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ended
    assert marker.exists()
    assert any("resumed from" in out for out, _ in ended)
    check_alike(tmp_path / "run.pth", alone)
