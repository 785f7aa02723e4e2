"""Section 3, split and class weights: patients never on both sides, and the weights of the paper's loss."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mura_anomaly_detection as mad


def view(part: str, patient: str, label: int, image: int = 1) -> mad.View:
    study = f"{part}/{patient}/study{label}_{('negative', 'positive')[label]}"
    return mad.View(f"train/{study}/image{image}.png", part, patient, study, label)


def patients(views: Sequence[mad.View]) -> set[str]:
    return {row.patient for row in views}


def one_view_each(normal: int, abnormal: int) -> list[mad.View]:
    return [view("XR_HAND", f"n{i}", 0) for i in range(normal)] + [view("XR_HAND", f"a{i}", 1) for i in range(abnormal)]


SETS = st.lists(
    st.builds(
        view, st.sampled_from(["XR_HAND", "XR_KNEE"]), st.integers(1, 30).map("patient{:05}".format),
        st.integers(0, 1), st.integers(1, 3),
    ),
    min_size=4, max_size=60, unique_by=lambda row: row.name,
).filter(lambda views: len({row.patient for row in views}) >= 4)
SHARES = st.floats(0.01, 0.9)
SEEDS = st.integers(0, 2**31)


@settings(deadline=None)
@given(SETS, SHARES, SEEDS)
def test_every_image_is_on_one_side_and_every_patient_too(views: list[mad.View], share: float, seed: int):
    train, val = mad.split_patients(views, share, seed)
    assert sorted(train + val, key=views.index) == views
    assert train == [row for row in views if row in train]  # the order stays
    assert patients(train).isdisjoint(patients(val))
    assert train
    assert val


def test_a_patient_with_two_body_parts_stays_whole():
    views = [view(part, f"patient{i}", 0) for i in range(40) for part in ("XR_HAND", "XR_KNEE", "XR_ELBOW")]
    for seed in range(20):
        train, val = mad.split_patients(views, 0.3, seed)
        assert (len(patients(val)), len(val), len(train)) == (12, 36, 84)


@settings(deadline=None)
@given(SETS, SHARES, SEEDS, st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order_of_the_files(
    views: list[mad.View], share: float, seed: int, shuffler: random.Random
):
    _, val = mad.split_patients(views, share, seed)
    mixed = views[:]
    shuffler.shuffle(mixed)
    assert patients(mad.split_patients(mixed, share, seed)[1]) == patients(val)


@pytest.mark.parametrize(("count", "share", "expected"), [(10, 0.2, 2), (8, 0.2, 2), (7, 0.2, 1), (13, 0.2, 3), (9, 0.5, 4)])
def test_the_share_of_each_kind_is_rounded_to_whole_patients(count: int, share: float, expected: int):
    _, val = mad.split_patients(one_view_each(count, 2 * count), share, 0)
    assert sum(row.label == 0 for row in val) == expected


def test_another_seed_is_another_split():
    views = one_view_each(30, 30)
    drawn = {frozenset(patients(mad.split_patients(views, 0.2, seed)[1])) for seed in range(10)}
    assert len(drawn) == 10
    assert mad.split_patients(views, 0.2, 3) == mad.split_patients(views, 0.2, 3)


def test_every_patient_has_the_same_chance_of_val():
    views = one_view_each(10, 10)
    chosen = [name for seed in range(400) for name in patients(mad.split_patients(views, 0.2, seed)[1])]
    counts = [chosen.count(row.patient) for row in views]
    expected, deviation = 400 * 0.2, math.sqrt(400 * 0.2 * 0.8)
    assert max(abs(count - expected) for count in counts) < 4.5 * deviation


@settings(deadline=None)
@given(SETS, SHARES, SEEDS, st.integers(0, 1), st.sampled_from(["newcomer", "aa", "zz", "0"]))
def test_a_new_patient_moves_at_most_one_other(views: list[mad.View], share: float, seed: int, label: int, name: str):
    before = patients(mad.split_patients(views, share, seed)[1])
    after = patients(mad.split_patients([*views, view("XR_HAND", name, label)], share, seed)[1])
    assert len((before ^ after) - {name}) <= 1


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(2, 300), SHARES, SEEDS)
def test_the_share_is_kept_within_each_kind_of_patient(normal: int, abnormal: int, share: float, seed: int):
    train, val = mad.split_patients(one_view_each(normal, abnormal), share, seed)
    for label, count in enumerate((normal, abnormal)):
        in_val = sum(row.label == label for row in val)
        assert 1 <= in_val <= count - 1  # both sides have both
        assert abs(in_val - share * count) < 1
        assert in_val + sum(row.label == label for row in train) == count


def test_the_split_by_numbers():
    train, val = mad.split_patients(one_view_each(50, 20), 0.2, 0)
    assert [sum(row.label == label for row in val) for label in (0, 1)] == [10, 4]
    assert [sum(row.label == label for row in train) for label in (0, 1)] == [40, 16]


def test_a_single_patient_of_a_kind_goes_to_train():
    for seed in range(10):
        train, _ = mad.split_patients(one_view_each(5, 1), 0.5, seed)
        assert "a0" in patients(train)


@pytest.mark.parametrize("views", [[], one_view_each(1, 0), one_view_each(0, 1), one_view_each(1, 1)])
def test_a_split_with_an_empty_side_is_refused(views: list[mad.View]):
    with pytest.raises(mad.UserError, match=rf"^--val-split 0\.2: {len(patients(views))} patients cannot be split"):
        mad.split_patients(views, 0.2, 0)


# ---- class weights ----


def test_weights_by_hand():
    # 3 abnormal and 1 normal elbow, 1 abnormal and 4 normal hands: w0 = |A| / (|A| + |N|), w1 = |N| / (|A| + |N|)
    views = [view("XR_ELBOW", f"p{i}", 1) for i in range(3)] + [view("XR_ELBOW", "p3", 0)]
    views += [view("XR_HAND", "p4", 1)] + [view("XR_HAND", "p5", 0, image) for image in (1, 2, 3, 4)]
    assert mad.class_weights(views) == {"XR_ELBOW": (3 / 4, 1 / 4), "XR_HAND": (1 / 5, 4 / 5)}


@settings(deadline=None)
@given(SETS.filter(lambda views: len({row.label for row in views}) == 2))
def test_both_classes_of_a_part_weigh_the_same_in_the_loss(views: list[mad.View]):
    weights = mad.class_weights(views)
    assert set(weights) == {row.part for row in views}
    for part, (normal, abnormal) in weights.items():
        counts = [sum(row.part == part and row.label == label for row in views) for label in (0, 1)]
        assert normal + abnormal == pytest.approx(1)
        assert normal * counts[0] == pytest.approx(abnormal * counts[1])
    each = mad.loss_weights(views, weights)
    assert each.tolist() == pytest.approx([weights[row.part][row.label] for row in views])


@pytest.mark.parametrize(("label", "missing"), [(0, "abnormal"), (1, "normal")])
def test_one_class_alone_is_refused(label: int, missing: str):
    with pytest.raises(mad.UserError, match=rf"none that is {missing}; training needs both classes"):
        mad.class_weights([view("XR_HAND", "p1", label), view("XR_KNEE", "p2", label)])


def test_a_part_with_one_class_only_teaches_nothing_about_it():
    views = [view("XR_HAND", "p1", 0), view("XR_HAND", "p2", 1), view("XR_KNEE", "p3", 1)]
    assert mad.class_weights(views) == {"XR_HAND": (0.5, 0.5), "XR_KNEE": (1.0, 0.0)}
