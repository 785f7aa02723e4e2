"""Section 7: every figure against scikit-learn, the intervals against simulation, the fits against brute force."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

import mura_anomaly_detection as mad

FIGURES = ("auroc", "kappa", "accuracy", "sensitivity", "specificity", "brier", "ece")
NO_INTERVAL = {"low": None, "high": None}


def scored(label: Any, probability: Any, patient: Any = None, study: Any = None, part: Any = None) -> mad.Scored:
    """Make a record of images; unless given, each is a study and a patient of its own."""
    names = np.array([f"p{i:04d}" for i in range(len(label))])
    patient = names if patient is None else np.asarray(patient)
    study = names if study is None else np.asarray(study)
    part = np.full(len(label), "XR_HAND") if part is None else np.asarray(part)
    path = tuple(f"{s}/image{i}.png" for i, s in enumerate(study))
    return mad.Scored(path, part, patient, study, np.asarray(label), np.asarray(probability, float))


def cohort(random: np.random.Generator, patients: int, views: int = 6, spread: float = 1.0) -> mad.Scored:
    """Draw patients whose images resemble each other: one label each, a shared shift of the logit, own noise."""
    patient = np.repeat(np.arange(patients), random.integers(1, views + 1, patients))
    label = (random.random(patients) < 0.45).astype(int)[patient]
    logit = (label - 0.5) * 2 + random.normal(0, spread, patients)[patient] + random.normal(0, 0.6, len(patient))
    names = np.array([f"p{i:05d}" for i in patient])
    return scored(label, 1 / (1 + np.exp(-1.5 * logit)), names, names)


def sklearn_figures(label: Any, probability: Any, threshold: float, weight: Any = None) -> dict[str, float]:
    """Return what scikit-learn says; NaN where it warns that a figure is undefined."""
    label, probability = np.asarray(label), np.asarray(probability)
    called, kept = probability > threshold, np.ones(len(label)) if weight is None else np.asarray(weight)
    agree = {"sample_weight": kept}
    both = len(np.unique(label[kept > 0])) == 2
    single = len(np.unique(np.concatenate([label[kept > 0], called[kept > 0]]))) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "auroc": sk.roc_auc_score(label, probability, **agree) if both else np.nan,
            "kappa": np.nan if single else sk.cohen_kappa_score(label, called, labels=[0, 1], **agree),
            "accuracy": sk.accuracy_score(label, called, **agree),
            "sensitivity": sk.recall_score(label, called, zero_division=np.nan, **agree),
            "specificity": sk.recall_score(label, called, pos_label=0, zero_division=np.nan, **agree),
            "brier": np.average((probability - label) ** 2, weights=kept)
            if not both
            else sk.brier_score_loss(label, probability, **agree),
        }


def expected_calibration_error(label: Any, probability: Any, bins: int = 15) -> float:
    """Compute ECE bin by bin, as the definition reads."""
    label, probability, total = np.asarray(label), np.asarray(probability), 0.0
    for k in range(bins):
        inside = [i for i, p in enumerate(probability) if min(int(p * bins), bins - 1) == k]
        if inside:
            total += len(inside) * abs(label[inside].mean() - probability[inside].mean())
    return total / len(label)


def assert_same(label: Any, probability: Any, threshold: float = 0.5) -> None:
    """Check each figure against scikit-learn, and ECE against its definition, to 1e-9; NaN must meet NaN."""
    ours = mad.score(np.asarray(label), np.asarray(probability, float), threshold)
    theirs = sklearn_figures(label, probability, threshold) | {"ece": expected_calibration_error(label, probability)}
    assert set(ours) == set(theirs) == set(FIGURES)
    for figure, value in theirs.items():
        assert ours[figure].shape == (1,)
        np.testing.assert_allclose(ours[figure][0], value, rtol=0, atol=1e-9, err_msg=figure)


# ---- the figures ----


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decimals", [1, 2, 12])
def test_figures_equal_scikit_learn(seed: int, decimals: int) -> None:
    random = np.random.default_rng(seed)
    label = random.integers(0, 2, 300)
    probability = np.clip(random.random(300) * 0.6 + label * 0.4 * random.random(300), 0, 1).round(decimals)
    for threshold in (0.5, 0.3, 0.0, 1.0):
        assert_same(label, probability, threshold)


@pytest.mark.parametrize(
    ("label", "probability"),
    [
        pytest.param([1, 1, 1], [0.2, 0.6, 0.9], id="one class, abnormal"),
        pytest.param([0, 0, 0], [0.2, 0.6, 0.9], id="one class, normal"),
        pytest.param([1, 1], [0.9, 0.8], id="one class, all called so"),
        pytest.param([0, 0], [0.1, 0.2], id="one class, all called normal"),
        pytest.param([0, 1, 0, 1], [0.5] * 4, id="constant, at the threshold"),
        pytest.param([0, 1, 0, 1], [0.7] * 4, id="constant, above"),
        pytest.param([0, 1, 1, 0], [0.0, 1.0, 0.0, 1.0], id="zeros and ones"),
        pytest.param([0, 1], [0.0, 1.0], id="perfect"),
        pytest.param([1, 0], [0.0, 1.0], id="all wrong"),
        pytest.param([1], [0.4], id="one image"),
        pytest.param([0, 0, 1, 1], [0.5, np.nextafter(0.5, 1), 0.5, np.nextafter(0.5, 1)], id="next to the threshold"),
        pytest.param([0, 1, 0, 1, 1], [0.2, 0.2, 0.4, 0.4, 0.4], id="ties"),
    ],
)
def test_figures_of_degenerate_input_equal_scikit_learn(label: list[int], probability: list[float]) -> None:
    assert_same(label, probability)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30)), min_size=1, max_size=40), st.integers(0, 30))
def test_figures_equal_scikit_learn_on_any_input(cases: list[tuple[int, int]], threshold: int) -> None:
    label, probability = zip(*cases, strict=True)
    assert_same(label, np.array(probability) / 30, threshold / 30)


def test_a_probability_at_the_threshold_is_normal() -> None:
    """The paper calls a study abnormal above 0.5."""
    assert mad.score(np.array([0]), np.array([0.5]), 0.5)["specificity"][0] == 1
    assert mad.score(np.array([1]), np.array([0.5]), 0.5)["sensitivity"][0] == 0


def test_ece_by_hand() -> None:
    """Two bins are used: [0, 1/15) is off by 0.5 - 0.03 and [14/15, 1] by 1 - 0.98, two cases and one."""
    found = mad.score(np.array([0, 1, 1]), np.array([0.02, 0.04, 0.98]), 0.5)["ece"][0]
    assert found == pytest.approx((2 * 0.47 + 1 * 0.02) / 3, abs=1e-12)


def test_auroc_without_cases_is_undefined() -> None:
    assert np.isnan(mad.auroc(np.array([], int), np.array([]))).all()


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_as_good_as_repeated_rows(seed: int) -> None:
    """A row of weights stands for a resample, zeros for the cases that it left out."""
    random = np.random.default_rng(seed)
    label, probability = random.integers(0, 2, 40), random.random(40).round(1)
    weight = random.integers(0, 4, (6, 40)).astype(float)
    weight[5] = label  # a resample without normal cases
    together = mad.score(label, probability, 0.4, weight)
    for row, times in enumerate(weight.astype(int)):
        alone = mad.score(np.repeat(label, times), np.repeat(probability, times), 0.4)
        for figure in FIGURES:
            np.testing.assert_allclose(together[figure][row], alone[figure][0], atol=1e-12, err_msg=figure)
    assert np.isnan(together["auroc"][5])
    assert np.isnan(together["specificity"][5])


# ---- pooling ----


def test_pooling_by_hand() -> None:
    """Patient a has a wrist of one view and an elbow of three; b has an elbow of two; views arrive mixed up."""
    images = scored(
        label=[0, 1, 0, 1, 1, 0],
        probability=[0.2, 0.9, 0.1, 0.3, 0.6, 0.6],
        patient=["a", "a", "b", "a", "a", "b"],
        study=["wr/a/s1", "el/a/s1", "el/b/s1", "el/a/s1", "el/a/s1", "el/b/s1"],
        part=["WR", "EL", "EL", "EL", "EL", "EL"],
    )
    studies = mad.pool_studies(images)
    assert studies.path == tuple(studies.study) == ("wr/a/s1", "el/a/s1", "el/b/s1")
    np.testing.assert_allclose(studies.probability, [0.2, 0.6, 0.35], atol=1e-15)
    assert studies.label.tolist() == [0, 1, 0]
    assert studies.patient.tolist() == ["a", "a", "b"]
    assert studies.part.tolist() == ["WR", "EL", "EL"]
    found = mad.evaluate(images, 0.5, resamples=10)
    assert found["levels"]["image"]["accuracy"]["value"] == pytest.approx(4 / 6)  # view 0.3 and view 0.6 of b are wrong
    assert found["levels"]["study"]["accuracy"]["value"] == 1
    assert found["levels"]["study"]["count"] == 3
    assert found["levels"]["study"]["positives"] == 1
    assert found["levels"]["image"]["count"] == 6
    assert found["levels"]["image"]["patients"] == 2


def test_parts_are_scored_on_their_own_images() -> None:
    random = np.random.default_rng(4)
    label, probability = random.integers(0, 2, 60), random.random(60)
    part = np.array(["XR_WRIST", "XR_ELBOW"])[random.integers(0, 2, 60)]
    found = mad.evaluate(scored(label, probability, part=part), 0.5, resamples=20)
    assert list(found["parts"]) == ["XR_ELBOW", "XR_WRIST"]
    for name, levels in found["parts"].items():
        chosen = part == name
        expected = sklearn_figures(label[chosen], probability[chosen], 0.5)
        assert levels["study"]["count"] == chosen.sum()
        assert {k: levels["study"][k]["value"] for k in expected} == pytest.approx(expected, abs=1e-9)


# ---- intervals ----


def test_intervals_repeat_with_the_seed_and_ignore_the_order_of_rows() -> None:
    images = cohort(np.random.default_rng(0), 40)
    shuffled = images.take(np.random.default_rng(1).permutation(len(images.label)))
    first, again, moved = (mad.bootstrap(rows, 0.5, 200, 7) for rows in (images, images, shuffled))
    other = mad.bootstrap(images, 0.5, 200, 8)
    assert first == again
    for figure in FIGURES:
        assert moved[figure] == pytest.approx(first[figure], abs=1e-9)
        assert other[figure]["value"] == first[figure]["value"]
        assert other[figure] != first[figure]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = cohort(np.random.default_rng(0), 20)
    whole = mad.bootstrap(images, 0.5, 40, 0)
    monkeypatch.setattr(mad, "CHUNK", 1)
    for figure, found in mad.bootstrap(images, 0.5, 40, 0).items():
        assert found == pytest.approx(whole[figure], abs=1e-9)


def test_every_interval_holds_its_value_and_stays_in_range() -> None:
    for seed in range(20):
        found = mad.bootstrap(cohort(np.random.default_rng(seed), 3 + seed), 0.5, 100, seed)
        for figure in FIGURES:
            value, low, high = (found[figure][key] for key in ("value", "low", "high"))
            if low is not None:
                assert (-1 if figure == "kappa" else 0) <= low <= value <= high <= 1, (seed, figure)


def test_images_of_one_patient_are_not_independent() -> None:
    """Copies of every image add nothing: the interval stays, and would shrink if images were resampled."""
    once = cohort(np.random.default_rng(5), 50, views=1)
    copies = once.take(np.repeat(np.arange(50), 9))
    alone, copied = mad.bootstrap(once, 0.5, 400, 0), mad.bootstrap(copies, 0.5, 400, 0)
    for figure in FIGURES:
        assert copied[figure] == pytest.approx(alone[figure], abs=1e-9)


def test_one_patient_has_figures_without_intervals() -> None:
    found = mad.bootstrap(scored([0, 1], [0.2, 0.9], patient=["a", "a"]), 0.5, 100, 0)
    assert found["auroc"] == {"value": 1.0, **NO_INTERVAL}
    assert found["brier"] == {"value": pytest.approx(0.025), **NO_INTERVAL}


def test_undefined_figures_are_null() -> None:
    found = mad.evaluate(scored([1, 1, 1, 1], [0.9, 0.8, 0.7, 0.4]), 0.5, resamples=50)["levels"]["image"]
    assert found["auroc"] == found["specificity"] == {"value": None, **NO_INTERVAL}
    assert found["sensitivity"]["value"] == 0.75
    assert found["kappa"]["value"] == 0
    assert found["undefined"] == 50


def test_undefined_resamples_are_dropped_and_counted() -> None:
    """With 2 abnormal patients of 8, (6/8)^8 = 10 % of the resamples have none; the rest give the interval."""
    found = mad.bootstrap(scored([1, 1, 0, 0, 0, 0, 0, 0], np.linspace(0.9, 0.1, 8)), 0.5, 1000, 0)
    assert 60 < found["undefined"] < 150
    assert found["auroc"]["low"] is not None
    rare = mad.bootstrap(scored([1] + [0] * 9, np.linspace(0.9, 0.1, 10)), 0.5, 1000, 0)
    assert 300 < rare["undefined"] < 400  # (9/10)^10 = 35 %
    assert rare["auroc"]["value"] == 1


def test_no_interval_where_most_resamples_are_undefined() -> None:
    drawn, left_out = np.array([np.nan, np.nan, np.nan, 0.5, 0.7]), np.array([0.5, 0.6, 0.7])
    rows = scored([0, 1, 1], [0.1, 0.2, 0.3])
    assert mad.value_and_interval("auroc", 0.6, drawn, left_out, rows) == {"value": 0.6, **NO_INTERVAL}
    assert mad.value_and_interval("auroc", 0.6, drawn[1:], left_out, rows)["low"] is not None
    assert mad.value_and_interval("auroc", 0.6, np.empty(0), np.empty(0), rows) == {"value": 0.6, **NO_INTERVAL}


def test_a_faultless_result_still_has_room_for_error() -> None:
    """No error in 20 patients: a rate of 17 % stays unseen with a chance of 2.5 % (0.025 ** (1 / 20) = 0.832)."""
    label = [0] * 20 + [1] * 30
    perfect = mad.bootstrap(scored(label, [0.1] * 20 + [0.9] * 30), 0.5, 100, 0)
    for figure, patients in {"sensitivity": 30, "specificity": 20, "auroc": 20, "kappa": 20, "accuracy": 50}.items():
        assert perfect[figure] == {"value": 1, "low": pytest.approx(0.025 ** (1 / patients)), "high": 1}
    wrong = mad.bootstrap(scored(label, [0.9] * 20 + [0.1] * 30), 0.5, 100, 0)
    assert wrong["sensitivity"] == {"value": 0, "low": 0, "high": pytest.approx(1 - 0.025 ** (1 / 30))}


def test_a_kappa_of_zero_is_not_taken_for_faultless() -> None:
    """Called abnormal without exception, kappa is 0 in every resample, and that is what is reported."""
    constant = mad.bootstrap(scored([0, 1] * 10, [0.9] * 20), 0.5, 100, 0)
    assert constant["kappa"] == {"value": 0, "low": 0, "high": 0}


@pytest.mark.parametrize("statistic", [np.mean, np.var, np.max])
def test_bca_equals_scipy_for_many_patients(statistic: Any) -> None:
    """With very many patients nothing is widened, and the interval is that of scipy for the same resamples."""
    sample = np.random.default_rng(0).exponential(size=25)
    options = {"method": "BCa", "n_resamples": 999, "vectorized": True}
    theirs = stats.bootstrap((sample,), statistic, random_state=0, **options)
    left_out = np.array([statistic(np.delete(sample, i)) for i in range(25)])
    if statistic is np.max:  # all resamples lie at or below the value, and most of the jackknife equals it
        assert mad.bca_interval(statistic(sample), theirs.bootstrap_distribution, left_out, 10**9)[1] == sample.max()
    else:
        found = mad.bca_interval(statistic(sample), theirs.bootstrap_distribution, left_out, 10**9)
        assert found == pytest.approx(tuple(theirs.confidence_interval), abs=1e-7)


@pytest.mark.parametrize("patients", [5, 10, 40])
def test_few_patients_widen_the_interval_as_students_t_does(patients: int) -> None:
    drawn = np.linspace(0, 1, 100_001)  # a quantile of these is its own level
    low, high = mad.bca_interval(0.5, drawn, np.array([0.4, 0.6]), patients)
    level = stats.norm.cdf(stats.t.ppf(0.975, patients - 1) * (patients / (patients - 1)) ** 0.5)
    assert (low, high) == pytest.approx((1 - level, level), abs=0.003)


def test_resamples_equal_to_the_value_count_half_in_the_bias() -> None:
    """A fifth of the resamples give the value itself and as many lie above as below: no bias, equal reach to both sides."""
    half = np.arange(1, 4001) / 4000
    low, high = mad.bca_interval(0, np.concatenate([-half, np.zeros(2000), half]), np.ones(9), 10**9)
    assert low == pytest.approx(-high) and 0.9 < high < 1


def test_bca_of_extreme_bias_and_skew_ends_at_the_top() -> None:
    """All resamples lie below the value and the jackknife has one outlier: skew * z is beyond 1."""
    drawn, left_out = np.linspace(0, 1, 100_001), np.append(np.ones(199), 0)
    assert mad.bca_interval(2, drawn, left_out, 10**9)[1] == 1


def test_the_interval_of_ece_by_hand() -> None:
    """Resamples from 0.1 to 0.3 around a value of 0.15: resampling raises ECE by 0.05, noise by 0 to 0.05 / 0.414."""
    low, high = mad.ece_interval(0.15, np.linspace(0.1, 0.3, 41))
    assert high == pytest.approx(0.295 - 0.05)
    assert low == 0  # 0.105 - 0.05 - 0.121 is below
    assert mad.ece_interval(0.4, np.linspace(0.3, 0.5, 41)) == pytest.approx((0.305, 0.495))
    assert mad.ece_interval(0.39, np.linspace(0.3, 0.5, 41))[0] == pytest.approx(0.305 - 0.01 - 0.01 / (2**0.5 - 1))


def test_an_interval_never_leaves_its_value_out() -> None:
    rows = scored([0, 1, 1], [0.1, 0.2, 0.9])
    for figure in ("auroc", "ece"):
        found = mad.value_and_interval(figure, 0.2, np.linspace(0.7, 0.9, 50), np.array([0.1, 0.2, 0.3]), rows)
        assert found["low"] <= 0.2 <= found["high"]
        found = mad.value_and_interval(figure, 0.9, np.linspace(0.1, 0.2, 50), np.array([0.8, 0.9, 0.95]), rows)
        assert found["low"] <= 0.9 <= found["high"]


def coverage(
    patients: int, repeats: int, resamples: int, *, by_image: bool = False, seed: int = 1, **kind: Any
) -> dict[str, float]:
    """Return how often the interval holds the figure of the population, over samples of so many patients.

    `by_image` ignores who the images belong to.
    """
    random = np.random.default_rng(seed)
    population = cohort(random, 60_000, **kind)
    truth = mad.score(population.label, population.probability, 0.5)
    held = dict.fromkeys(FIGURES, 0)
    for repeat in range(repeats):
        images = cohort(random, patients, **kind)
        images = replace(images, patient=np.array(images.path)) if by_image else images
        found = mad.bootstrap(images, 0.5, resamples, repeat)
        for figure in FIGURES:
            held[figure] += int(found[figure]["low"] <= truth[figure][0] <= found[figure]["high"])
    return {figure: count / repeats for figure, count in held.items()}


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    """With 120 repeats, 95 % come to 109 to 119 hits. Larger: `coverage(100, 1000, 1000)` gives 93.8 to 95.4 %."""
    found = coverage(patients=60, repeats=120, resamples=300)
    assert all(0.9 <= value <= 0.995 for value in found.values()), found


def test_intervals_from_images_would_cover_too_little() -> None:
    """Taking the images of a patient for independent claims more than is known: this is why patients are drawn."""
    found = coverage(patients=60, repeats=60, resamples=200, by_image=True)
    assert all(found[figure] < 0.85 for figure in ("auroc", "kappa", "accuracy", "brier")), found


# ---- temperature ----


def calibrated(random: np.random.Generator, patients: int) -> tuple[Any, Any, Any]:
    """Draw logits that mean what they say, three images a patient, and the labels they lead to."""
    patient = np.repeat([f"p{i:04d}" for i in range(patients)], 3)
    logit = random.normal(0, 2, len(patient))
    return logit, (random.random(len(patient)) < 1 / (1 + np.exp(-logit))).astype(int), patient


@pytest.mark.parametrize("temperature", [0.4, 2.5, 6.0])
def test_a_known_temperature_is_recovered(temperature: float) -> None:
    logit, label, patient = calibrated(np.random.default_rng(0), 700)
    found = mad.fit_temperature(logit * temperature, label, patient)
    assert found == pytest.approx(temperature, rel=0.12)
    before, after = (1 / (1 + np.exp(-logit * temperature / t)) for t in (1, found))
    assert mad.auroc(label, after) == mad.auroc(label, before)
    assert mad.score(label, after, 0.5)["ece"][0] < mad.score(label, before, 0.5)["ece"][0]


def test_the_temperature_minimises_the_log_loss() -> None:
    logit, label, patient = calibrated(np.random.default_rng(1), 300)
    found = mad.fit_temperature(3 * logit, label, patient)
    losses = [sk.log_loss(label, 1 / (1 + np.exp(-3 * logit / t))) for t in (found * 0.98, found, found * 1.02)]
    assert min(losses) == losses[1]


def test_temperature_stays_at_one_where_a_fit_does_not_pay() -> None:
    """On calibrated logits a fit gains nothing but noise; the one-standard-error rule lets few such fits through."""
    fits = [mad.fit_temperature(*calibrated(np.random.default_rng(seed), 60)) for seed in range(40)]
    assert fits.count(1.0) >= 30


def test_temperature_stays_at_one_where_it_is_undefined() -> None:
    logit, label, patient = calibrated(np.random.default_rng(2), 100)
    assert mad.fit_temperature(4 * logit, np.ones_like(label), patient) == 1.0
    assert mad.fit_temperature(4 * logit, label, np.full_like(patient, "one")) == 1.0
    assert mad.fit_temperature(4 * logit[:30], label[:30], patient[:30]) == 1.0  # ten patients
    assert mad.fit_temperature(logit, (logit > 0).astype(int), patient) == 1.0  # no error bounds it
    assert mad.fit_temperature(logit, (logit < 0).astype(int), patient) == 1.0  # nothing right, either


def test_a_temperature_needs_twenty_patients() -> None:
    """Fifty images each, four times too sure: with 20 patients that is seen, with 19 it is not looked for."""
    random = np.random.default_rng(0)
    logit, patient = random.normal(0, 2, 1000), np.repeat([f"p{i:02d}" for i in range(20)], 50)
    label = (random.random(1000) < 1 / (1 + np.exp(-logit))).astype(int)
    assert mad.fit_temperature(4 * logit, label, patient) == pytest.approx(4, rel=0.2)
    assert mad.fit_temperature(4 * logit[:950], label[:950], patient[:950]) == 1.0


def test_the_temperature_is_judged_on_other_patients() -> None:
    """Images of a patient share label and logit; a fold that splits them would see its own answers."""
    fits = []
    for seed in range(60):
        logit, label, _ = calibrated(np.random.default_rng(seed), 7)
        patient = np.repeat([f"p{i}" for i in range(21)], 20)
        fits.append(mad.fit_temperature(np.repeat(logit, 20), np.repeat(label, 20), patient))
    assert fits.count(1.0) >= 57  # about 52 if images were split


# ---- threshold ----


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 40)), min_size=1, max_size=30))
def test_threshold_is_the_best_by_brute_force(cases: list[tuple[int, int]]) -> None:
    label, probability = np.array([c[0] for c in cases]), np.array([c[1] for c in cases]) / 40
    levels = sorted(set(probability))
    candidates = [0.5] + [(a + b) / 2 for a, b in pairwise(levels)]
    kappas = np.array([mad.score(label, probability, t)["kappa"][0] for t in candidates])
    found = mad.best_threshold(label, probability)
    if len(set(label)) == 1:
        assert found == 0.5
    else:
        best = [t for t, kappa in zip(candidates, kappas, strict=True) if kappa == np.nanmax(kappas)]
        assert abs(found - 0.5) == min(abs(t - 0.5) for t in best)
        assert found in best


def test_threshold_by_hand() -> None:
    assert mad.best_threshold(np.array([0, 0, 1, 1]), np.array([0.05, 0.1, 0.2, 0.8])) == pytest.approx(0.15)
    assert mad.best_threshold(np.array([0, 1]), np.array([0.1, 0.9])) == 0.5
    assert mad.best_threshold(np.array([1, 1]), np.array([0.1, 0.3])) == 0.5
    assert mad.best_threshold(np.array([1, 1, 1]), np.array([0.7, 0.8, 0.9])) == 0.5  # elsewhere kappa is 0, here undefined
    assert mad.best_threshold(np.array([0, 0, 0]), np.array([0.1, 0.2, 0.3])) == 0.5
    assert mad.best_threshold(np.array([0, 1]), np.array([0.3, 0.3])) == 0.5
    assert mad.best_threshold(np.array([], int), np.array([])) == 0.5


def test_threshold_separates_neighbouring_floats() -> None:
    """Midway between neighbours rounds to one of them; only the lower one keeps them apart."""
    for low in (0.7, np.nextafter(0.7, 1)):
        label, probability = np.array([0, 1]), np.array([low, np.nextafter(low, 1)])
        threshold = mad.best_threshold(label, probability)
        assert mad.score(label, probability, threshold)["kappa"][0] == 1


def test_evaluation_is_json_without_nan() -> None:
    found = mad.evaluate(scored([1, 1, 0], [0.9, 0.2, 0.4], part=["XR_A", "XR_A", "XR_B"]), 0.5, resamples=20)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
