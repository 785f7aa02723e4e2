"""Block 5, transforms: batches, augmentation, mixup, normalisation."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, run_inside, thin_networks
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops
from scipy import stats
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as reference

import mura_anomaly_detection as mura

CPU = torch.device("cpu")
NAMES = ("hflip", "rotation", "brightness", "contrast")
NEUTRAL = {"hflip": 1.0}  # the parameter that changes nothing; 0 for the others
NOTHING = mura.Config(hflip=0.0, rotation=0.0, brightness=0.0, contrast=0.0)
STRONG = mura.Config(hflip=0.5, rotation=30.0, brightness=0.1, contrast=0.2)


class Images:
    """Stands in for a MuraDataset: N images in memory, of which the batches are counted."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.asked = pixels, []

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        self.asked.append(np.asarray(indices).tolist())
        return torch.from_numpy(self.pixels[indices])[:, None]


def random_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size), np.uint8)


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.from_numpy(random_images(5, 32))[:, None] / 255


@pytest.fixture(scope="module")
def smooth() -> torch.Tensor:
    """Three images without edges: their interpolations hardly depend on how it is done."""
    coarse = torch.from_numpy(random_images(3, 6, seed=1))[:, None] / 255
    return torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)


def parameters(count: int, **values: Any) -> torch.Tensor:
    """Return augmentation parameters, neutral but for the named ones: a number or one an image."""
    columns = [torch.as_tensor(values.get(name, NEUTRAL.get(name, 0.0))).expand(count)
               for name in mura.AUGMENTATIONS]
    return torch.stack(columns, 1).float()


def drawn(config: Any, count: int = 8, epoch: int = 0, batch: int = 0) -> dict[str, torch.Tensor]:
    """Return the parameters of each augmentation by its name."""
    columns = mura.draw_augmentation(config, count, epoch, batch)
    assert columns.shape == (count, len(mura.AUGMENTATIONS))
    return dict(zip(mura.AUGMENTATIONS, columns.double().unbind(1), strict=True))


# ---- batches ----------------------------------------------------------------------------------
@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 64), st.integers(0, 2**31), st.integers(0, 100))
def test_every_index_comes_once_an_epoch_in_batches_of_like_size(
    count: int, batch_size: int, seed: int, epoch: int
) -> None:
    batches = mura.epoch_batches(count, batch_size, seed, epoch)
    sizes = [len(batch) for batch in batches]
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert len(batches) == math.ceil(count / batch_size)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size


def test_order_follows_from_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(np.concatenate(mura.epoch_batches(100, 8, seed, epoch)).tolist())

    assert order(3, 1) == order(3, 1)
    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders | {tuple(range(100))}) == 10


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_batches_are_loaded_in_order(count: int) -> None:
    dataset: Any = Images(random_images(20, 8))
    batches = mura.epoch_batches(len(dataset), 3, seed=0, epoch=0)[:count]
    brought = list(mura.load_batches(dataset, batches, CPU))
    assert len(brought) == count
    for images, indices in zip(brought, batches, strict=True):
        assert images.dtype == torch.uint8
        assert torch.equal(images, torch.from_numpy(dataset.pixels[indices])[:, None])


def test_a_few_batches_are_loaded_ahead_and_loading_may_be_left_early() -> None:
    dataset: Any = Images(random_images(30, 8))
    batches = [np.array([i]) for i in range(30)]
    stream = mura.load_batches(dataset, batches, CPU)
    assert torch.equal(next(stream)[0, 0], torch.from_numpy(dataset.pixels[0]))
    stream.close()  # type: ignore[attr-defined]
    assert dataset.asked == [[i] for i in range(len(dataset.asked))]
    assert 1 <= len(dataset.asked) <= 5  # a data set larger than memory does not fill it


def test_errors_of_loading_come_at_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset: Any = Images(random_images(6, 8))
    gather = dataset.batch

    def failing(indices: np.ndarray) -> torch.Tensor:
        if indices[0] == 3:
            raise mura.UserError("damaged")
        return gather(indices)

    monkeypatch.setattr(dataset, "batch", failing)
    stream = mura.load_batches(dataset, [np.array([i]) for i in range(6)], CPU)
    assert [int(next(stream)[0, 0, 0, 0]) for _ in range(3)] == dataset.pixels[:3, 0, 0].tolist()
    with pytest.raises(mura.UserError, match="damaged"):
        next(stream)


# ---- parameters -------------------------------------------------------------------------------
def test_each_augmentation_has_the_flag_of_its_name() -> None:
    assert set(mura.AUGMENTATIONS) == set(NAMES)
    assert mura.parse_options(["--data-dir", ".", "--hflip", "0.25"]).hflip == 0.25


def test_parameters_follow_from_seed_epoch_and_batch() -> None:
    keys = ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (3, 2, 1), (1, 2, 3))
    *several, again = [
        mura.draw_augmentation(replace(STRONG, seed=seed), 8, epoch, batch)
        for seed, epoch, batch in keys
    ]
    assert torch.equal(several[0], again)
    assert all(not torch.equal(a, b) for i, a in enumerate(several) for b in several[:i])


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1), st.floats(0, 180), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_parameters_stay_within_their_ranges(
    hflip: float, rotation: float, brightness: float, contrast: float, seed: int
) -> None:
    config = mura.Config(
        hflip=hflip, rotation=rotation, brightness=brightness, contrast=contrast, seed=seed
    )
    values = drawn(config, 50)
    assert set(values["hflip"].tolist()) <= {-1.0, 1.0}
    for name in ("rotation", "brightness", "contrast"):
        assert values[name].abs().max() <= getattr(config, name) * (1 + 1e-6)


def test_parameters_fill_their_ranges_evenly_and_independently() -> None:
    values = drawn(replace(STRONG, hflip=0.3), 20_000)
    assert (values["hflip"] < 0).double().mean() == pytest.approx(0.3, abs=0.015)
    for name in ("rotation", "brightness", "contrast"):
        unit = (values[name] / getattr(STRONG, name)).numpy()
        assert stats.kstest(unit, stats.uniform(-1, 2).cdf).statistic < 0.02  # chance: 0.0096 in 20
    correlations = np.corrcoef(np.stack([values[name].numpy() for name in NAMES])) - np.eye(4)
    assert np.abs(correlations).max() < 0.04


@pytest.mark.parametrize(("probability", "sign"), [(0.0, 1.0), (1.0, -1.0)])
def test_flips_that_are_certain(probability: float, sign: float) -> None:
    assert set(drawn(replace(NOTHING, hflip=probability), 200)["hflip"].tolist()) == {sign}


@pytest.mark.parametrize("first", [False, True])
def test_another_augmentation_leaves_the_draws_of_the_others(
    first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = drawn(STRONG)
    entry = {"vflip": mura.AUGMENTATIONS["hflip"]}
    table = entry | mura.AUGMENTATIONS if first else mura.AUGMENTATIONS | entry
    monkeypatch.setattr(mura, "AUGMENTATIONS", table)
    after = drawn(SimpleNamespace(**vars(STRONG), vflip=0.5))
    assert list(after) == list(table)
    for name in NAMES:
        assert torch.equal(after[name], before[name]), name
    assert not torch.equal(after["vflip"], after["hflip"])  # though their rule is the same


@pytest.mark.parametrize("changed", NAMES)
def test_the_strength_of_one_augmentation_leaves_the_draws_of_the_others(changed: str) -> None:
    before, after = drawn(STRONG), drawn(replace(STRONG, **{changed: 0.0}))
    for name in NAMES:
        assert torch.equal(before[name], after[name]) == (name != changed), name


# ---- augmentation -----------------------------------------------------------------------------
def test_without_strength_nothing_changes(noise: torch.Tensor) -> None:
    columns = mura.draw_augmentation(NOTHING, 5, 0, 0)
    torch.testing.assert_close(mura.augment(noise, columns), noise, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [31, 32])
def test_horizontal_flip_is_torchvisions(size: int) -> None:
    images = torch.from_numpy(random_images(3, size))[:, None] / 255
    signs = torch.tensor([-1.0, 1.0, -1.0])
    expected = torch.stack([
        reference.horizontal_flip(image) if sign < 0 else image
        for image, sign in zip(images, signs, strict=True)])
    torch.testing.assert_close(
        mura.augment(images, parameters(3, hflip=signs)), expected, atol=1e-5, rtol=0)


def test_each_image_is_rotated_by_its_own_angle_as_by_torchvision(noise: torch.Tensor) -> None:
    angles = [-30.0, 7.5, 0.0, 90.0, 171.0]
    rotated = mura.augment(noise, parameters(5, rotation=angles))
    expected = [reference.rotate(image, angle, InterpolationMode.BILINEAR)
                for image, angle in zip(noise, angles, strict=True)]
    torch.testing.assert_close(rotated, torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("angle", [-20.0, 10.0])
def test_rotation_is_pillows_about_the_centre_with_black_outside(
    angle: float, smooth: torch.Tensor
) -> None:
    rotated = mura.augment(smooth, parameters(3, rotation=angle))
    inside = np.hypot(*(np.indices((64, 64)) - 31.5)) < 29  # the circle that stays in the picture
    for image, result in zip(smooth, rotated, strict=True):
        picture = Image.fromarray(image[0].numpy(), mode="F")
        expected = np.asarray(picture.rotate(angle, Image.Resampling.BILINEAR))
        assert np.abs(result[0].numpy() - expected)[inside].max() < 0.01
        assert result[0, 0, 0] == result[0, -1, -1] == 0


@pytest.mark.parametrize("size", [31, 32])
def test_quarter_turns_are_exact(size: int) -> None:
    images = torch.from_numpy(random_images(2, size))[:, None] / 255
    for turns in (-1, 1, 2):
        turned = mura.augment(images, parameters(2, rotation=90.0 * turns))
        torch.testing.assert_close(turned, images.rot90(turns, (2, 3)), atol=1e-5, rtol=0)


def test_flip_and_rotation_come_in_the_order_of_the_table(smooth: torch.Tensor) -> None:
    both = mura.augment(smooth, parameters(3, hflip=-1.0, rotation=20.0))
    steps = {"hflip": lambda image: image.flip(-1),
             "rotation": lambda image: reference.rotate(image, 20.0, InterpolationMode.BILINEAR)}
    expected = smooth
    for name in mura.AUGMENTATIONS:
        expected = steps.get(name, lambda image: image)(expected)
    assert (both - expected).abs().max() < 1e-4


def test_contrast_is_torchvisions(noise: torch.Tensor) -> None:
    changes = [-0.9, -0.2, 0.0, 0.3, 0.9]
    expected = [reference.adjust_contrast(image, 1 + change)
                for image, change in zip(noise, changes, strict=True)]
    result = mura.augment(noise, parameters(5, contrast=changes))
    torch.testing.assert_close(result, torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [-60, -1, 0, 25, 255])
def test_brightness_is_pillows(shift: int) -> None:
    """Oracle: ImageChops adds and subtracts constants, and cuts at black and white."""
    pixels = random_images(1, 16)
    picture, constant = Image.fromarray(pixels[0]), Image.new("L", (16, 16), abs(shift))
    expected = (ImageChops.add if shift > 0 else ImageChops.subtract)(picture, constant)
    images = torch.from_numpy(pixels)[:, None] / 255
    result = mura.augment(images, parameters(1, brightness=shift / 255))
    np.testing.assert_allclose(result[0, 0].numpy() * 255, np.asarray(expected), atol=0.01)


def test_brightness_and_contrast_by_hand() -> None:
    image = torch.tensor([[0.2, 0.4], [0.6, 0.8]]).view(1, 1, 2, 2)  # mean 0.5

    def changed(**values: float) -> list[float]:
        return mura.augment(image, parameters(1, **values)).flatten().tolist()

    assert changed(brightness=0.1) == pytest.approx([0.3, 0.5, 0.7, 0.9])
    assert changed(contrast=-0.5) == pytest.approx([0.35, 0.45, 0.55, 0.65])
    assert changed(contrast=1.0) == pytest.approx([0, 0.3, 0.7, 1])
    # only the end result is cut: -0.1 at the first pixel comes back
    assert changed(contrast=1.0, brightness=0.2) == pytest.approx([0.1, 0.5, 0.9, 1])
    assert changed(contrast=-1.0, brightness=0.7) == pytest.approx([1, 1, 1, 1])


def test_contrast_changes_about_the_mean_of_what_the_rotation_left() -> None:
    image = torch.ones(1, 1, 64, 64)
    mean = reference.rotate(image, 45.0, InterpolationMode.BILINEAR).mean().item()  # black corners
    flat = mura.augment(image, parameters(1, rotation=45.0, contrast=-1.0))
    assert mean < 0.9
    torch.testing.assert_close(flat, torch.full_like(flat, mean), atol=1e-4, rtol=0)


def test_an_image_is_augmented_alike_in_any_batch(noise: torch.Tensor) -> None:
    columns = mura.draw_augmentation(replace(STRONG, hflip=0.5), 5, 0, 0)
    together = mura.augment(noise, columns)
    for i in range(5):
        alone = mura.augment(noise[i : i + 1], columns[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)


def test_the_input_is_left_as_it_is_and_the_output_lies_in_0_to_1(noise: torch.Tensor) -> None:
    before = noise.clone()
    config = mura.Config(hflip=1.0, rotation=30.0, brightness=0.5, contrast=0.5)
    result = mura.augment(noise, mura.draw_augmentation(config, 5, 0, 0))
    assert torch.equal(noise, before)
    assert result.shape == noise.shape
    assert 0 <= result.min() <= result.max() <= 1


# ---- mixup ------------------------------------------------------------------------------------
def test_without_mixup_an_image_keeps_all_of_itself() -> None:
    keys = [(epoch, batch) for epoch in range(3) for batch in range(3)]
    assert {mura.draw_mixup(replace(STRONG, mixup=0.0), *key) for key in keys} == {1.0}


def test_lam_follows_from_seed_epoch_and_batch() -> None:
    keys = ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2, 3))
    *several, again = [mura.draw_mixup(replace(STRONG, mixup=0.5, seed=seed), epoch, batch)
                       for seed, epoch, batch in keys]
    assert several[0] == again
    assert len(set(several)) == 4


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_lam_is_the_greater_part_of_a_beta_distribution(alpha: float) -> None:
    """Oracle: SciPy's Beta(alpha, alpha); P(max(lam, 1 - lam) < x) = F(x) - F(1 - x)."""
    config = replace(STRONG, mixup=alpha)
    lams = np.array(
        [mura.draw_mixup(config, epoch, batch) for epoch in range(20) for batch in range(100)]
    )
    assert lams.min() >= 0.5
    assert lams.max() <= 1
    beta = stats.beta(alpha, alpha)
    assert stats.kstest(lams, lambda x: beta.cdf(x) - beta.cdf(1 - x)).statistic < 0.04


# ---- normalisation ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def few() -> Any:
    return Images(random_images(3, 8))


def test_grey_levels_span_0_to_1() -> None:
    levels = mura.to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert levels.tolist() == pytest.approx([0, 0.2, 1])


def test_imagenet_normalisation_is_that_of_torchvisions_weights(
    noise: torch.Tensor, few: Any
) -> None:
    normalized = mura.choose_normalization("imagenet", few)(noise)
    expected = reference.normalize(
        noise.expand(-1, 3, -1, -1), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(normalized, expected)
    assert few.asked == []


def test_given_normalisation_by_hand(few: Any) -> None:
    normalization = mura.choose_normalization("0.25,0.5", few)
    result = normalization(torch.tensor([[0.75, 0.25], [0.0, 1.0]]).view(1, 1, 2, 2))
    assert result.tolist() == [[[[1.0, 0.0], [-0.5, 1.5]]] * 3]
    assert (normalization.mean, normalization.std) == ((0.25,) * 3, (0.5,) * 3)


def test_image_normalisation_by_hand(few: Any) -> None:
    images = torch.tensor([[[[0.0, 0.5], [0.5, 1.0]]], [[[0.4, 0.5], [0.5, 0.6]]]])
    expected = torch.tensor([[-1.0, 0.0], [0.0, 1.0]]) / math.sqrt(
        2 / 3
    )  # standard deviation with n - 1
    result = mura.choose_normalization("image", few)(images)
    torch.testing.assert_close(result, expected.expand(2, 3, 2, 2), atol=1e-4, rtol=0)


def test_image_normalisation_leaves_a_blank_image_finite() -> None:
    assert mura.Normalization("image")(torch.full((1, 1, 8, 8), 0.3)).abs().max() < 1e-4


def test_dataset_normalisation_is_measured_on_all_pixels() -> None:
    dataset: Any = Images(random_images(150, 8) // np.arange(1, 151, dtype=np.uint8)[:, None, None])
    unit = dataset.pixels / 255
    normalization = mura.choose_normalization("dataset", dataset)
    assert normalization.mean == pytest.approx((unit.mean(),) * 3, rel=1e-9)
    assert normalization.std == pytest.approx((unit.std(),) * 3, rel=1e-9)
    assert sorted(i for batch in dataset.asked for i in batch) == list(range(150))


def test_dataset_normalisation_of_a_large_set_is_measured_from_its_first_image_to_its_last() -> (
    None
):
    """Images get brighter along the set, as where body parts follow each other."""
    levels = np.linspace(0, 255, 5000).astype(np.uint8)
    dataset: Any = Images(np.broadcast_to(levels[:, None, None], (5000, 2, 2)).copy())
    normalization = mura.choose_normalization("dataset", dataset)
    assert normalization.mean[0] == pytest.approx(levels.mean() / 255, abs=0.001)
    assert normalization.std[0] == pytest.approx(levels.std() / 255, abs=0.001)
    assert 1000 <= sum(map(len, dataset.asked)) <= 2000


def test_dataset_normalisation_of_blank_images_divides_by_one_grey_level() -> None:
    blank: Any = Images(np.full((3, 4, 4), 51, np.uint8))
    normalization = mura.choose_normalization("dataset", blank)
    assert normalization.mean == pytest.approx((0.2,) * 3)
    assert normalization.std == pytest.approx((1 / 255,) * 3)


def test_a_run_measures_its_training_images_and_not_those_of_val(
    phantom_copy: Path, tmp_path: Path
) -> None:
    """The images of val are made white: one of them among the measured would show."""
    records = mura.scan_split(phantom_copy, "train").records
    train, val = mura.split_by_patient(records, 0.2, 0)
    for record in val:
        Image.new("L", (96, 96), 255).save(record.path)
    shutil.rmtree(phantom_copy / "valid")  # a test would take longer than all else here
    with thin_networks():
        assert run_inside("--data-dir", phantom_copy, "--checkpoint", tmp_path / "model.pth", *TINY,
                          "--normalization", "dataset", "--precise-bn", "0") == 0
    stored = torch.load(tmp_path / "model.pth", weights_only=True)["normalization"]
    unit = [
        mura.resize_square(np.asarray(Image.open(record.path)), 64, "stretch") / 255
        for record in train
    ]
    assert stored["mean"] == pytest.approx((np.mean(unit),) * 3, rel=1e-6)
    assert stored["std"] == pytest.approx((np.std(unit),) * 3, rel=1e-6)
