"""Section 5, batches and augmentation: every image once an epoch, in an order and with changes that can be repeated."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import mura_anomaly_detection as mad

NOTHING = mad.Config(flip=0, rotation=0, brightness=0, contrast=0)
FULL = mad.Config(flip=0.5, rotation=30, brightness=0.1, contrast=0.2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> mad.MuraDataset:
    config = mad.Config(cache_dir=tmp_path_factory.mktemp("cache"))
    views = mad.index_split(phantoms, "train").views
    return mad.MuraDataset(mad.open_cache(views, 64, config, phantoms, mad.StopSignals()))


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.rand(5, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def settings_of(
    count: int, mirrored: float = 1, degrees: float = 0, shift: float = 0, factor: float = 1
) -> torch.Tensor:
    return torch.tensor([[mirrored, math.radians(degrees), shift, factor]]).repeat(count, 1)


# ---- batches ----


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 64), st.integers(0, 2**31), st.integers(0, 100))
def test_every_index_comes_once_an_epoch_in_batches_of_like_size(count: int, batch_size: int, seed: int, epoch: int):
    batches = mad.epoch_batches(count, batch_size, seed, epoch)
    sizes = [len(batch) for batch in batches]
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert len(batches) == math.ceil(count / batch_size)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size


def test_the_order_follows_from_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(mad.epoch_batches(100, 8, seed, epoch)).tolist()

    assert order(3, 1) == order(3, 1)
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)] + [list(range(100))]
    assert len({tuple(each) for each in orders}) == 10


# ---- feed ----


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("resident", [False, True])
def test_a_feed_brings_the_batches_in_order(dataset: mad.MuraDataset, count: int, resident: bool):
    feed = mad.Feed(dataset, CPU)
    assert feed.resident is None
    if resident:  # as on a card with room for the whole set
        feed.resident = dataset.batch(np.arange(len(dataset)))
    batches = mad.epoch_batches(len(dataset), 3, seed=0, epoch=0)[:count]
    for _ in range(2):
        brought = list(feed(batches))
        assert len(brought) == count
        for images, indices in zip(brought, batches, strict=True):
            assert images.dtype == torch.uint8
            assert torch.equal(images, dataset.batch(indices))


def test_a_feed_may_be_left_early_and_passes_errors_on(dataset: mad.MuraDataset, monkeypatch: pytest.MonkeyPatch):
    feed = mad.Feed(dataset, CPU)
    batches = [np.array([i]) for i in range(6)]
    first = next(iter(feed(batches)))
    assert torch.equal(first, dataset.batch(batches[0]))
    gather = dataset.batch

    def failing(indices: np.ndarray) -> torch.Tensor:
        if indices[0] == 3:
            raise mad.UserError("damaged")
        return gather(indices)

    monkeypatch.setattr(dataset, "batch", failing)
    brought = []
    with pytest.raises(mad.UserError, match="damaged"):
        for images in feed(batches):
            brought.append(images)
    assert len(brought) == 3


# ---- drawing ----


def test_draws_follow_from_the_key():
    keys = ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2, 3))  # seed, epoch, batch
    *drawn, again = [mad.draw_variation(replace(FULL, seed=seed), 8, epoch, batch) for seed, epoch, batch in keys]
    assert torch.equal(drawn[0], again)
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 180), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_draws_stay_within_their_ranges(flip: float, rotation: float, brightness: float, contrast: float, seed: int):
    config = mad.Config(flip=flip, rotation=rotation, brightness=brightness, contrast=contrast, seed=seed)
    drawn = mad.draw_variation(config, 50, 0, 0).double()
    assert drawn.shape == (50, 4)
    assert set(drawn[:, 0].tolist()) <= {-1.0, 1.0}
    assert drawn[:, 1].abs().max() <= math.radians(rotation) * (1 + 1e-6)
    assert drawn[:, 2].abs().max() <= brightness * (1 + 1e-6)
    assert (drawn[:, 3] - 1).abs().max() <= contrast + 1e-6


def test_draws_fill_their_ranges_evenly():
    drawn = mad.draw_variation(replace(FULL, flip=0.3), 20_000, 0, 0).double()
    assert (drawn[:, 0] < 0).double().mean() == pytest.approx(0.3, abs=0.015)
    for column, middle, half in ((1, 0, math.radians(30)), (2, 0, 0.1), (3, 1, 0.2)):
        unit = ((drawn[:, column] - middle) / half).sort().values
        assert (unit - torch.linspace(-1, 1, 20_000)).abs().max() < 0.04  # Kolmogorov-Smirnov, far beyond chance
    correlations = torch.corrcoef(drawn.T) - torch.eye(4)
    assert correlations.abs().max() < 0.04


@pytest.mark.parametrize(("flip", "side"), [(0, 1.0), (1, -1.0)])
def test_certain_flips(flip: float, side: float):
    assert set(mad.draw_variation(replace(NOTHING, flip=flip), 200, 0, 0)[:, 0].tolist()) == {side}


def test_without_mixup_an_image_is_all_itself():
    assert {mad.draw_own_share(replace(FULL, mixup=0.0), epoch, batch) for epoch in range(3) for batch in range(3)} == {1.0}


def test_the_share_of_mixup_follows_from_the_key():
    keys = ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2, 3))  # seed, epoch, batch
    *drawn, again = [mad.draw_own_share(replace(FULL, mixup=0.5, seed=seed), epoch, batch) for seed, epoch, batch in keys]
    assert drawn[0] == again
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_the_share_of_mixup_is_a_folded_beta(alpha: float):
    """Oracle: SciPy's beta distribution; of a pair the greater share is drawn, so P(share < x) = F(x) - F(1 - x)."""
    config = replace(FULL, mixup=alpha)
    drawn = np.array([mad.draw_own_share(config, epoch, batch) for epoch in range(20) for batch in range(200)])
    assert drawn.min() >= 0.5
    assert drawn.max() <= 1
    beta = stats.beta(alpha, alpha)
    assert stats.kstest(drawn, lambda x: beta.cdf(x) - beta.cdf(1 - x)).statistic < 0.04


# ---- augmentation ----


def test_no_settings_change_nothing(noise: torch.Tensor):
    drawn = mad.draw_variation(NOTHING, 5, 0, 0)
    torch.testing.assert_close(mad.augment(noise, drawn), noise, atol=1e-6, rtol=0)


def test_a_flip_is_an_exact_mirror_image(noise: torch.Tensor):
    torch.testing.assert_close(mad.augment(noise, settings_of(5, mirrored=-1)), noise.flip(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [31, 32])
def test_quarter_turns_are_exact(size: int):
    images = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(1))
    quarter = mad.augment(images, settings_of(2, degrees=90))
    direction = 1 if torch.allclose(quarter, images.rot90(1, (2, 3)), atol=1e-5) else -1
    for turns in (-1, 1, 2):
        turned = mad.augment(images, settings_of(2, degrees=90 * turns))
        torch.testing.assert_close(turned, images.rot90(direction * turns, (2, 3)), atol=1e-5, rtol=0)
    both = mad.augment(images, settings_of(2, mirrored=-1, degrees=90))
    torch.testing.assert_close(both, quarter.flip(-1), atol=1e-5, rtol=0)


def test_a_slight_rotation_is_about_the_centre_with_black_outside():
    images = torch.ones(1, 1, 65, 65)
    turned = mad.augment(images, settings_of(1, degrees=30))
    assert turned[0, 0, 32, 32] == pytest.approx(1)
    assert max(turned[0, 0, row, column] for row in (0, 64) for column in (0, 64)) == 0
    torch.testing.assert_close(turned, turned.rot90(1, (2, 3)), atol=1e-5, rtol=0)  # a square keeps its symmetry
    overlap = 2 / (1 + math.sin(math.pi / 6) + math.cos(math.pi / 6))  # of a unit square with itself turned
    assert turned.mean() == pytest.approx(overlap, abs=0.005)


def test_rotation_moves_a_point_along_its_circle():
    images = torch.zeros(1, 1, 65, 65)
    images[0, 0, 32, 52] = 1  # 20 px right of the centre
    turned = mad.augment(images, settings_of(1, degrees=30))[0, 0]
    row, column = divmod(int(turned.argmax()), 65)
    assert math.hypot(row - 32, column - 32) == pytest.approx(20, abs=1)
    assert math.degrees(math.atan2(abs(row - 32), column - 32)) == pytest.approx(30, abs=2)


def test_each_image_of_a_batch_has_its_own_settings(noise: torch.Tensor):
    drawn = mad.draw_variation(FULL, 5, 0, 0)
    together = mad.augment(noise, drawn)
    for i in range(5):
        alone = mad.augment(noise[i : i + 1], drawn[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)


def test_brightness_and_contrast_by_arithmetic():
    image = torch.tensor([[0.2, 0.4], [0.6, 0.8]]).view(1, 1, 2, 2)  # mean 0.5

    def changed(**how: float) -> list[float]:
        return mad.augment(image, settings_of(1, **how)).flatten().tolist()

    assert changed(shift=0.1) == pytest.approx([0.3, 0.5, 0.7, 0.9])
    assert changed(factor=0.5) == pytest.approx([0.35, 0.45, 0.55, 0.65])
    assert changed(factor=1.5, shift=-0.1) == pytest.approx([0, 0.25, 0.55, 0.85])  # -0.05 is cut at 0
    assert changed(factor=0, shift=0.7) == pytest.approx([1, 1, 1, 1])


def test_the_input_is_left_alone(noise: torch.Tensor):
    before = noise.clone()
    mad.augment(noise, mad.draw_variation(mad.Config(flip=1, rotation=30, brightness=0.5, contrast=0.5), 5, 0, 0))
    assert torch.equal(noise, before)


# ---- normalisation ----


def test_to_unit_spans_0_to_1():
    assert mad.to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])


def test_imagenet_normalisation_by_arithmetic(noise: torch.Tensor, dataset: mad.MuraDataset):
    normalized = mad.choose_normalization("imagenet", dataset)(noise)
    assert normalized.shape == (5, 3, 32, 32)
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        torch.testing.assert_close(normalized[:, channel], (noise[:, 0] - mean) / std)


def test_a_given_normalisation_by_arithmetic(dataset: mad.MuraDataset):
    normalization = mad.choose_normalization("0.25,0.5", dataset)
    assert normalization == mad.Normalization("given", (0.25,) * 3, (0.5,) * 3)
    assert normalization(torch.full((1, 1, 2, 2), 0.75)).tolist() == torch.ones(1, 3, 2, 2).tolist()


def test_normalisation_of_each_image_by_itself(noise: torch.Tensor, dataset: mad.MuraDataset):
    normalized = mad.choose_normalization("image", dataset)(torch.cat([noise, noise * 0.1 + 0.5]))
    assert normalized.shape == (10, 3, 32, 32)
    assert normalized.mean((1, 2, 3)).abs().max() < 1e-4
    assert normalized[:, 0].std((1, 2)).tolist() == pytest.approx([1] * 10, rel=1e-3)
    torch.testing.assert_close(normalized[:5], normalized[5:], atol=1e-3, rtol=0)  # brightness and contrast are gone
    assert torch.equal(normalized[:, 0], normalized[:, 2])


def test_a_blank_image_stays_finite():
    assert mad.Normalization("image")(torch.full((1, 1, 8, 8), 0.3)).abs().max() < 1e-4


def test_statistics_of_the_data_set_are_those_of_all_its_pixels(dataset: mad.MuraDataset):
    pixels = np.concatenate([dataset[i][0].numpy().ravel() for i in range(len(dataset))]).astype(np.float64) / 255
    normalization = mad.choose_normalization("dataset", dataset)
    assert normalization.kind == "dataset"
    assert normalization.mean == pytest.approx((pixels.mean(),) * 3, rel=1e-9)
    assert normalization.std == pytest.approx((pixels.std(),) * 3, rel=1e-9)
