"""Block 7: metrics against scikit-learn, intervals against simulation, fits against brute force."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

import mura_anomaly_detection as mura

NO_INTERVAL = {"low": None, "high": None}
WITHOUT_PREVALENCE = {
    "auroc", "average_precision", "kappa", "accuracy", "sensitivity", "specificity", "f1", "ppv",
    "npv", "brier", "ece", "sensitivity_at_specificity_90", "sensitivity_at_specificity_95",
    "specificity_at_sensitivity_90", "specificity_at_sensitivity_95",
}


def predictions(
    label: Any, probability: Any, patient: Any = None, study: Any = None, part: Any = None
) -> mura.Predictions:
    """Make a record of images; unless given, each is a study and a patient of its own."""
    names = np.array([f"p{i:04d}" for i in range(len(label))])
    patient = names if patient is None else np.asarray(patient)
    study = names if study is None else np.asarray(study)
    part = np.full(len(label), "XR_HAND") if part is None else np.asarray(part)
    path = np.array([f"{s}/image{i}.png" for i, s in enumerate(study)])
    return mura.Predictions(
        path, part, patient, study, np.asarray(label), np.asarray(probability, float))


def cohort(
    random: np.random.Generator, patients: int, views: int = 3, spread: float = 1.0
) -> mura.Predictions:
    """Draw patients of one study each, whose views share a label and a shift of the logit."""
    patient = np.repeat(np.arange(patients), random.integers(1, views + 1, patients))
    label = (random.random(patients) < 0.45).astype(int)[patient]
    logit = (label - 0.5) * 2 + random.normal(0, spread, patients)[patient]
    logit += random.normal(0, 0.6, len(patient))
    names = np.array([f"p{i:05d}" for i in patient])
    return predictions(label, 1 / (1 + np.exp(-1.5 * logit)), names, names)


def expected_calibration_error(label: Any, probability: Any, weight: Any, bins: int = 15) -> float:
    """Compute ECE bin by bin, as the definition reads."""
    bin_of = np.array([min(int(p * bins), bins - 1) for p in probability])
    gaps = [
        abs(np.sum((weight * (label - probability))[bin_of == k])) for k in range(bins)
    ]
    return sum(gaps) / weight.sum()


def sklearn_metrics(
    label: Any, probability: Any, threshold: float, weight: Any = None, prevalence: float = 0.2
) -> dict[str, float]:
    """Return what scikit-learn says; NaN where it warns that a metric is undefined."""
    label, probability = np.asarray(label), np.asarray(probability, float)
    weight = np.ones(len(label)) if weight is None else np.asarray(weight, float)
    label, probability, weight = (x[weight > 0] for x in (label, probability, weight))
    predicted, both = (probability > threshold).astype(int), len(set(label.tolist())) == 2
    options: dict[str, Any] = {"sample_weight": weight, "zero_division": np.nan}
    single = len(set(label.tolist()) | set(predicted.tolist())) == 1
    found = {
        "kappa": np.nan if single else sk.cohen_kappa_score(
            label, predicted, labels=[0, 1], sample_weight=weight),
        "accuracy": sk.accuracy_score(label, predicted, sample_weight=weight),
        "sensitivity": sk.recall_score(label, predicted, **options),
        "specificity": sk.recall_score(label, predicted, pos_label=0, **options),
        "f1": sk.f1_score(label, predicted, **options),
        "ppv": sk.precision_score(label, predicted, **options),
        "npv": sk.precision_score(label, predicted, pos_label=0, **options),
        "brier": np.average((probability - label) ** 2, weights=weight),
        "ece": expected_calibration_error(label, probability, weight),
    }
    ranked = ["auroc", "ppv_at_prevalence", "npv_at_prevalence"]
    ranked += [name for name in WITHOUT_PREVALENCE if name[-3:] in ("_90", "_95")]
    found |= dict.fromkeys(ranked, np.nan)
    found["average_precision"] = (
        sk.average_precision_score(label, probability, sample_weight=weight)
        if label.any() else np.nan)
    if both:
        assert found["brier"] == pytest.approx(
            sk.brier_score_loss(label, probability, sample_weight=weight))
        found["auroc"] = sk.roc_auc_score(label, probability, sample_weight=weight)
        fpr, tpr, _ = sk.roc_curve(
            label, probability, sample_weight=weight, drop_intermediate=False)
        for percent in (90, 95):
            least = percent / 100 - 1e-9
            found[f"sensitivity_at_specificity_{percent}"] = tpr[1 - fpr >= least].max()
            found[f"specificity_at_sensitivity_{percent}"] = (1 - fpr)[tpr >= least].max()
        shares = [np.sum(weight[label == k]) for k in (0, 1)]
        mixed = np.where(label == 1, prevalence / shares[1], (1 - prevalence) / shares[0])
        options["sample_weight"] = weight * mixed
        found["ppv_at_prevalence"] = sk.precision_score(label, predicted, **options)
        found["npv_at_prevalence"] = sk.precision_score(label, predicted, pos_label=0, **options)
    return found


def assert_same(label: Any, probability: Any, threshold: float = 0.5) -> None:
    """Check each metric against scikit-learn to 1e-9; NaN must meet NaN."""
    ours = mura.compute_metrics(predictions(label, probability), threshold, prevalence=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = sklearn_metrics(label, probability, threshold)
    assert set(ours) == set(theirs) == set(mura.METRICS)
    for name, value in theirs.items():
        assert ours[name].shape == (1,)
        np.testing.assert_allclose(ours[name][0], value, rtol=0, atol=1e-9, err_msg=name)


# ---- the metrics ----


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decimals", [1, 2, 12])
def test_metrics_equal_scikit_learn(seed: int, decimals: int) -> None:
    random = np.random.default_rng(seed)
    label = random.integers(0, 2, 300)
    probability = np.clip(random.random(300) * 0.6 + label * 0.4 * random.random(300), 0, 1)
    for threshold in (0.5, 0.3, 0.0, 1.0):
        assert_same(label, probability.round(decimals), threshold)


@pytest.mark.parametrize(
    ("label", "probability"),
    [
        pytest.param([1, 1, 1], [0.2, 0.6, 0.9], id="one class, abnormal"),
        pytest.param([0, 0, 0], [0.2, 0.6, 0.9], id="one class, normal"),
        pytest.param([1, 1], [0.9, 0.8], id="one class, all found"),
        pytest.param([0, 0], [0.1, 0.2], id="one class, all predicted normal"),
        pytest.param([0, 1, 0, 1], [0.5] * 4, id="constant, at the threshold"),
        pytest.param([0, 1, 0, 1], [0.7] * 4, id="constant, above"),
        pytest.param([0, 1, 1, 0], [0.0, 1.0, 0.0, 1.0], id="zeros and ones"),
        pytest.param([0, 1], [0.0, 1.0], id="perfect"),
        pytest.param([1, 0], [0.0, 1.0], id="all wrong"),
        pytest.param([1], [0.4], id="one image"),
        pytest.param([0, 0, 1, 1], [0.5, np.nextafter(0.5, 1)] * 2, id="next to the threshold"),
        pytest.param([0, 1, 0, 1, 1], [0.2, 0.2, 0.4, 0.4, 0.4], id="ties"),
    ],
)
def test_metrics_of_degenerate_input_equal_scikit_learn(label: Any, probability: Any) -> None:
    assert_same(label, probability)


CASES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30)), min_size=1, max_size=40)


@settings(max_examples=30, deadline=None)
@given(CASES, st.integers(0, 30))
def test_metrics_equal_scikit_learn_on_any_input(cases: Any, threshold: int) -> None:
    label, probability = zip(*cases, strict=True)
    assert_same(label, np.array(probability) / 30, threshold / 30)


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_those_of_scikit_learn(seed: int) -> None:
    """Rows of weights are resamples: some cases several times, some never, one class absent."""
    random = np.random.default_rng(seed)
    label, probability = random.integers(0, 2, 60), random.random(60).round(1)
    weight = random.integers(0, 4, (6, 60)).astype(float)
    weight[4], weight[5] = label, 1 - label
    together = mura.compute_metrics(predictions(label, probability), 0.4, weight, prevalence=0.2)
    for row, chosen in enumerate(weight):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone = sklearn_metrics(label, probability, 0.4, chosen)
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][row], value, atol=1e-9, err_msg=name)


def test_the_table_has_what_the_report_promises() -> None:
    assert set(mura.METRICS) == WITHOUT_PREVALENCE | {"ppv_at_prevalence", "npv_at_prevalence"}
    found = mura.compute_metrics(predictions([0, 1], [0.1, 0.9]), 0.5)
    assert set(found) == WITHOUT_PREVALENCE


def test_a_probability_at_the_threshold_is_normal() -> None:
    """The paper calls a study abnormal above 0.5."""
    assert mura.compute_metrics(predictions([0], [0.5]), 0.5)["specificity"][0] == 1
    assert mura.compute_metrics(predictions([1], [0.5]), 0.5)["sensitivity"][0] == 0


def test_ece_by_hand() -> None:
    """Bins [0, 1/15), off by 0.5 - 0.03, and [14/15, 1], by 1 - 0.98; two cases and one."""
    found = mura.compute_metrics(predictions([0, 1, 1], [0.02, 0.04, 0.98]), 0.5)["ece"][0]
    assert found == pytest.approx((2 * 0.47 + 1 * 0.02) / 3, abs=1e-12)


def test_operating_points_by_hand() -> None:
    """Ten normal cases at 0.05 to 0.95 and ten abnormal ones, a step of 0.01 above them.

    Specificity 0.90 allows one false alarm, which leaves the threshold above 0.85: the abnormal
    ones at 0.86 and 0.96 are found. 0.95 allows none: only 0.96 is. Sensitivity 0.90 needs those
    from 0.16 on: normal ones at 0.05 and 0.15 are spared.
    """
    normal = np.arange(10) / 10 + 0.05
    cases = predictions(np.repeat([0, 1], 10), np.concatenate([normal, normal + 0.01]))
    found = mura.compute_metrics(cases, 0.5)
    assert found["sensitivity_at_specificity_90"][0] == pytest.approx(0.2)
    assert found["sensitivity_at_specificity_95"][0] == pytest.approx(0.1)
    assert found["specificity_at_sensitivity_90"][0] == pytest.approx(0.2)
    assert found["specificity_at_sensitivity_95"][0] == pytest.approx(0.1)


def test_predictive_values_at_a_prevalence_by_hand() -> None:
    """Sensitivity 0.8, specificity 0.9, one abnormal in ten: 8 hits and 9 false alarms of 100."""
    label = np.repeat([1, 0], [10, 20])
    probability = np.repeat([0.9, 0.1, 0.9, 0.1], [8, 2, 2, 18])
    found = mura.compute_metrics(predictions(label, probability), 0.5, prevalence=0.1)
    assert found["ppv"][0] == pytest.approx(8 / 10)
    assert found["npv"][0] == pytest.approx(18 / 20)
    assert found["ppv_at_prevalence"][0] == pytest.approx(8 / 17)
    assert found["npv_at_prevalence"][0] == pytest.approx(81 / 83)


# ---- probabilities ----


def test_a_probability_of_a_balanced_model_is_corrected_by_the_odds() -> None:
    """0.51 where a quarter is abnormal: odds of 51 to 49, times 1 to 3, that is 51 to 147."""
    found = mura.correct_prevalence(np.array([0.51, 0.0, 1.0]), 0.25)
    np.testing.assert_allclose(found, [51 / (51 + 147), 0, 1], atol=1e-12)
    some = np.linspace(0, 1, 11)
    np.testing.assert_allclose(mura.correct_prevalence(some, 0.5), some, atol=1e-12)


def test_correction_calibrates_where_the_prevalence_differs() -> None:
    """Calibrated among as many normal as abnormal cases, and used where one in ten is abnormal."""
    random = np.random.default_rng(0)
    label = (random.random(200_000) < 0.1).astype(int)
    balanced = mura.sigmoid(2 * random.normal(label * 2 - 1, 1, len(label)))
    before, after = (
        mura.compute_metrics(predictions(label, probability), 0.5)["ece"][0]
        for probability in (balanced, mura.correct_prevalence(balanced, 0.1)))
    assert before > 0.15
    assert after < 0.005


def test_sigmoid_is_that_of_scipy_and_never_overflows() -> None:
    from scipy.special import expit

    logits = np.array([-800.0, -30, -1, 0, 2, 40, 1e300])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(mura.sigmoid(logits / 2.0), expit(logits / 2), atol=1e-15)


# ---- pooling ----


def test_pooling_by_hand() -> None:
    """Patient a has a wrist of one view and an elbow of three, b an elbow of two; mixed."""
    images = predictions(
        label=[0, 1, 0, 1, 1, 0],
        probability=[0.2, 0.9, 0.1, 0.3, 0.6, 0.6],
        patient=["a", "a", "b", "a", "a", "b"],
        study=["wr/a/s1", "el/a/s1", "el/b/s1", "el/a/s1", "el/a/s1", "el/b/s1"],
        part=["WR", "EL", "EL", "EL", "EL", "EL"],
    )
    studies = mura.pool_studies(images)
    assert tuple(studies.path) == tuple(studies.study) == ("wr/a/s1", "el/a/s1", "el/b/s1")
    np.testing.assert_allclose(studies.probability, [0.2, 0.6, 0.35], atol=1e-15)
    assert studies.label.tolist() == [0, 1, 0]
    assert studies.patient.tolist() == ["a", "a", "b"]
    assert studies.body_part.tolist() == ["WR", "EL", "EL"]
    found = mura.Evaluation(0.5, 10).report(images)
    image, study = found["levels"]["image"], found["levels"]["study"]
    assert image["accuracy"]["value"] == pytest.approx(4 / 6)  # wrong: 0.3 of a and 0.6 of b
    assert study["accuracy"]["value"] == 1
    assert [study[key] for key in ("count", "positives", "patients")] == [3, 1, 2]
    assert [image[key] for key in ("count", "positives", "patients")] == [6, 3, 2]


def test_the_study_temperature_by_hand() -> None:
    """T = 0.4: two views are divided by 0.4 + 0.6 / 2 = 0.7, three by 0.6, one not at all."""
    probability = np.array([0.9, 0.7, 0.3, 0.8, 0.8, 0.8])
    names = np.array(["e", "e", "b", "g", "g", "g"])
    found = mura.pool_studies(predictions(np.ones(6, int), probability, names, names), 0.4).probability
    expected = [mura.sigmoid(np.log(4) / 0.7), 0.3, mura.sigmoid(np.log(4) / 0.6)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1)), min_size=1, max_size=12),
    st.floats(0.05, 20),
)
def test_the_study_temperature_moves_no_decision_at_half(cases: Any, temperature: float) -> None:
    study, probability = (np.array(x) for x in zip(*cases, strict=True))
    images = predictions(study, probability, study, study)
    mean, found = (mura.pool_studies(images, t).probability for t in (1.0, temperature))
    clear = abs(mean - 0.5) > 1e-9
    assert ((found > 0.5) == (mean > 0.5))[clear].all()
    assert ((found >= 0) & (found <= 1)).all()
    appeared = list(dict.fromkeys(study.tolist()))
    for place, views in enumerate([probability[study == number] for number in appeared]):
        if len(views) == 1:  # to the bit
            assert mean[place] == found[place] == views[0]
    assert mura.pool_views([0.5] * 4, temperature) == 0.5


# ---- evaluate ----


def test_body_parts_are_evaluated_on_their_own_images() -> None:
    random = np.random.default_rng(4)
    label, probability = random.integers(0, 2, 60), random.random(60)
    part = np.array(["XR_WRIST", "XR_ELBOW"])[random.integers(0, 2, 60)]
    images = predictions(label, probability, part=part)
    found = mura.Evaluation(0.4, 20, prevalence=0.2).report(images)
    assert list(found["body_parts"]) == ["XR_ELBOW", "XR_WRIST"]
    for name, levels in found["body_parts"].items():
        chosen = part == name
        expected = sklearn_metrics(label[chosen], probability[chosen], 0.4)
        assert levels["study"]["count"] == chosen.sum()
        values = {key: levels["study"][key]["value"] for key in expected}
        assert values == pytest.approx(expected, abs=1e-9)


def test_the_study_temperature_is_that_of_the_study_level() -> None:
    images = cohort(np.random.default_rng(0), 60)
    plain = mura.Evaluation(0.5, 10).report(images)
    sharper = mura.Evaluation(0.5, 10).report(images, 0.3)
    assert sharper["levels"]["image"] == plain["levels"]["image"]
    expected = mura.pool_studies(images, 0.3)
    brier = np.mean((expected.probability - expected.label) ** 2)
    for found in (sharper["levels"], sharper["body_parts"]["XR_HAND"]):
        assert found["study"]["brier"]["value"] == pytest.approx(brier, abs=1e-12)
        assert found["study"]["kappa"] == plain["levels"]["study"]["kappa"]


def test_a_new_metric_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    youden = mura.Metric(
        "Youden's J", lambda c: c.tp / (c.tp + c.fn) + c.tn / (c.tn + c.fp) - 1, bounds=(-1.0, 1.0))
    monkeypatch.setitem(mura.METRICS, "youden", youden)
    report = report_of(cohort(np.random.default_rng(0), 100))
    found = report["levels"]["study"]
    expected = found["sensitivity"]["value"] + found["specificity"]["value"] - 1
    assert found["youden"]["value"] == pytest.approx(expected)
    assert found["youden"]["low"] < expected < found["youden"]["high"]
    line = next(x for x in mura.format_report(report).splitlines() if "Youden's J" in x)
    assert f"{expected:.3f} [{found['youden']['low']:.3f}," in line


# ---- intervals ----


def study_level(images: mura.Predictions, resamples: int = 100, seed: int = 0, **more: Any) -> Any:
    """Evaluate at 0.5 and return the study level."""
    return mura.Evaluation(0.5, resamples, seed, **more).report(images)["levels"]["study"]


def test_intervals_repeat_with_the_seed_and_ignore_order_and_names() -> None:
    images = cohort(np.random.default_rng(0), 80)
    shuffled = images.take(np.random.default_rng(1).permutation(len(images.label)))
    renamed = replace(images, patient=np.char.add("q_", images.patient))
    first, again, moved, named = (
        study_level(rows, 200, 7) for rows in (images, images, shuffled, renamed))
    other = study_level(images, 200, 8)
    assert first == again == named
    for name in WITHOUT_PREVALENCE:
        assert moved[name] == pytest.approx(first[name], abs=1e-9)
        assert other[name]["value"] == first[name]["value"]
        assert other[name] != first[name]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = cohort(np.random.default_rng(0), 40)
    whole = study_level(images, 40)
    monkeypatch.setattr(mura, "CHUNK", 1000)
    for name, found in study_level(images, 40).items():
        assert found == pytest.approx(whole[name], abs=1e-9)


def test_every_interval_holds_its_value_and_stays_in_range() -> None:
    seen = 0
    for seed in range(12):
        images = cohort(np.random.default_rng(seed), 20 + 4 * seed)
        found = study_level(images, 60, seed, prevalence=0.1)
        for name, metric in mura.METRICS.items():
            value, low, high = (found[name][key] for key in ("value", "low", "high"))
            if low is not None:
                seen += 1
                assert metric.bounds[0] <= low <= value <= high <= metric.bounds[1], (seed, name)
    assert seen > 100


def test_images_of_one_patient_are_not_independent() -> None:
    """Copies of every study add nothing: the interval stays; it would shrink if rows were drawn."""
    once = cohort(np.random.default_rng(5), 60, views=1)
    copies = once.take(np.repeat(np.arange(60), 9))
    names = np.array([f"{study}/{i % 9}" for i, study in enumerate(copies.study)])
    copies = replace(copies, study=names)
    alone, copied = study_level(once, 300), study_level(copies, 300)
    assert copied["count"] == 540
    for name in WITHOUT_PREVALENCE:
        assert copied[name] == pytest.approx(alone[name], abs=1e-9)


def test_one_patient_has_metrics_without_intervals() -> None:
    random = np.random.default_rng(0)
    found = study_level(predictions([0, 1] * 20, random.random(40), patient=["a"] * 40))
    assert found["auroc"]["value"] is not None
    assert all(found[name]["low"] is found[name]["high"] is None for name in WITHOUT_PREVALENCE)


def test_undefined_metrics_are_null() -> None:
    found = study_level(predictions([1] * 20, [0.9] * 15 + [0.2] * 5), 50)
    assert found["auroc"] == found["specificity"] == {"value": None, **NO_INTERVAL}
    assert found["sensitivity"]["value"] == 0.75
    assert 0.4 < found["sensitivity"]["low"] < 0.75 < found["sensitivity"]["high"] < 1
    assert found["kappa"] == {"value": 0, **NO_INTERVAL}


@pytest.mark.parametrize(("abnormal", "shown"), [(9, False), (10, True)])
def test_few_studies_of_a_class_give_no_interval(abnormal: int, shown: bool) -> None:
    """What rests on one class needs ten studies of that one; accuracy and Brier need ten in all."""
    random = np.random.default_rng(0)
    label = np.repeat([1, 0], [abnormal, 60])
    found = study_level(predictions(label, random.random(len(label)) * 0.5 + label * 0.3))
    for name in ("auroc", "average_precision", "kappa", "f1", "sensitivity"):
        assert found[name]["value"] is not None
        assert (found[name]["low"] is not None) == (found[name]["high"] is not None) == shown, name
    assert all(found[name]["low"] is not None for name in ("specificity", "accuracy", "brier"))


def test_it_is_studies_that_are_counted_not_their_images() -> None:
    """Nine abnormal studies of five views each: no interval at the level of images either."""
    label = np.repeat([1, 0], [45, 60])
    study = [f"a{i // 5}" for i in range(45)] + [f"n{i}" for i in range(60)]
    images = predictions(label, np.random.default_rng(0).random(105), study, study)
    found = mura.Evaluation(0.5, 50).report(images)["levels"]["image"]
    assert found["sensitivity"]["low"] is None
    assert found["specificity"]["low"] is not None


def test_undefined_resamples_are_dropped() -> None:
    """Twelve abnormal studies of one patient of 30: (29/30)^30 = 36 % of resamples lack them."""
    label = np.repeat([1, 0], [12, 29])
    patient = ["p"] * 12 + [f"n{i}" for i in range(29)]
    images = predictions(label, np.random.default_rng(0).random(41), patient)
    found = study_level(images, 200)["auroc"]
    assert found["low"] < found["value"] < found["high"]
    two = replace(images, patient=np.where(label == 1, "p", "q"))
    found = study_level(two, 200)["auroc"]  # with one patient left out, it is undefined
    assert found["value"] is not None
    assert found["low"] is found["high"] is None
    faultless = replace(two, probability=0.1 + 0.8 * label)  # nor is 1 of two patients certain
    assert study_level(faultless, 200)["auroc"] == {"value": 1, **NO_INTERVAL}


def test_a_faultless_result_still_has_room_for_error() -> None:
    """No error in 20 patients: 17 % stay unseen in 2.5 % of cases (0.025 ** (1/20) = 0.832)."""
    label = [0] * 20 + [1] * 30
    perfect = study_level(predictions(label, [0.1] * 20 + [0.9] * 30))
    patients = {
        "sensitivity": 30, "specificity": 20, "auroc": 20, "kappa": 20, "accuracy": 50, "ppv": 30,
        "npv": 20, "f1": 20, "average_precision": 20, "sensitivity_at_specificity_90": 20}
    for name, count in patients.items():
        exact = {"value": 1, "low": pytest.approx(0.025 ** (1 / count)), "high": 1}
        assert perfect[name] == exact, name
    wrong = study_level(predictions(label, [0.9] * 20 + [0.1] * 30))
    unseen = pytest.approx(1 - 0.025 ** (1 / 30))
    assert wrong["sensitivity"] == {"value": 0, "low": 0, "high": unseen}


def test_the_exact_interval_counts_those_who_can_err() -> None:
    """PPV is 1 with 12 of 50 abnormal ones found: it rests on these 12, not on 50."""
    label = np.repeat([0, 1], 50)
    found = study_level(predictions(label, [0.1] * 50 + [0.9] * 12 + [0.2] * 38))
    assert found["ppv"] == {"value": 1, "low": pytest.approx(0.025 ** (1 / 12)), "high": 1}
    few = study_level(predictions(label, [0.1] * 50 + [0.9] * 9 + [0.2] * 41))
    assert few["ppv"] == {"value": 1, **NO_INTERVAL}


def test_a_study_at_the_threshold_does_not_stand_behind_the_ppv() -> None:
    """Nine above 0.5 and three at it, which are normal: nine of the ten that an interval takes."""
    label, rest = np.repeat([1, 0], 50), [0.2] * 38 + [0.1] * 50
    at = study_level(predictions(label, [0.9] * 9 + [0.5] * 3 + rest))
    assert at["ppv"] == {"value": 1, **NO_INTERVAL}
    above = study_level(predictions(label, [0.9] * 9 + [0.51] * 3 + rest))
    assert above["ppv"] == {"value": 1, "low": pytest.approx(0.025 ** (1 / 12)), "high": 1}


def test_the_exact_interval_counts_patients_not_their_studies() -> None:
    """30 abnormal studies of 15 patients, all found: 15 have shown no error."""
    images = predictions(
        [0] * 30 + [1] * 30, [0.1] * 30 + [0.9] * 30, [f"p{i // 2:02d}" for i in range(60)])
    found = study_level(images)["sensitivity"]
    assert found == {"value": 1, "low": pytest.approx(0.025 ** (1 / 15)), "high": 1}


def test_what_never_varies_has_no_interval() -> None:
    """Always 0.9: kappa is 0 and the Brier score the same in each resample; a PPV of 1 at 1 %."""
    constant = study_level(predictions([0, 1] * 20, [0.9] * 40))
    assert constant["kappa"] == {"value": 0, **NO_INTERVAL}
    assert constant["auroc"] == {"value": 0.5, **NO_INTERVAL}
    perfect = study_level(predictions([0, 1] * 20, [0.2, 0.9] * 20), prevalence=0.01)
    assert perfect["ppv_at_prevalence"] == {"value": 1, **NO_INTERVAL}


@pytest.mark.parametrize("statistic", [np.mean, np.var, np.max])
def test_bca_equals_scipy_for_many_patients(statistic: Any) -> None:
    """With very many patients nothing is widened: scipy's interval of the same resamples."""
    sample = np.random.default_rng(0).exponential(size=25)
    options: dict[str, Any] = {"method": "BCa", "n_resamples": 999, "vectorized": True}
    theirs = stats.bootstrap((sample,), statistic, random_state=0, **options)
    left_out = np.array([statistic(np.delete(sample, i)) for i in range(25)])
    found = mura.bca_interval(
        statistic(sample), theirs.bootstrap_distribution, left_out, 10**9)
    if statistic is np.max:  # all resamples lie at or below the value, most of the jackknife at it
        assert found[1] == sample.max()
    else:
        assert tuple(found) == pytest.approx(tuple(theirs.confidence_interval), abs=1e-7)


@pytest.mark.parametrize("patients", [5, 10, 40])
def test_few_patients_widen_the_interval_as_students_t_does(patients: int) -> None:
    drawn = np.linspace(0, 1, 100_001)  # a quantile of these is its own level
    found = mura.bca_interval(0.5, drawn, np.array([0.4, 0.6]), patients)
    quantile = stats.t.ppf(0.975, patients - 1) * (patients / (patients - 1)) ** 0.5
    level = stats.norm.cdf(quantile)
    assert tuple(found) == pytest.approx((1 - level, level), abs=0.003)


def test_resamples_equal_to_the_value_count_half_in_the_bias() -> None:
    """A third of the resamples give the value itself, as many lie above as below: no bias."""
    half = np.arange(1, 4001) / 4000
    drawn = np.concatenate([-half, np.zeros(4000), half])
    low, high = mura.bca_interval(0, drawn, np.ones(9), 10**9)
    assert low == pytest.approx(-high)
    assert 0.9 < high < 1


def test_bca_of_extreme_bias_and_skew_ends_at_the_top() -> None:
    """All resamples lie below the value and the jackknife has one outlier: skew * z is beyond 1."""
    drawn, left_out = np.linspace(0, 1, 100_001), np.append(np.ones(199), 0)
    assert mura.bca_interval(2, drawn, left_out, 10**9)[1] == 1


def test_the_interval_of_ece_by_hand() -> None:
    """Resamples of 0.1 to 0.3 around 0.15: ECE rises by 0.05, by noise of 0 to 0.05 / 0.414."""
    ends = np.ones(3), 100
    low, high = mura.ece_interval(0.15, np.linspace(0.1, 0.3, 41), *ends)
    assert high == pytest.approx(0.295 - 0.05)
    assert low == 0  # 0.105 - 0.05 - 0.121 is below
    found = mura.ece_interval(0.4, np.linspace(0.3, 0.5, 41), *ends)
    assert tuple(found) == pytest.approx((0.305, 0.495))
    low = mura.ece_interval(0.39, np.linspace(0.3, 0.5, 41), *ends)[0]
    assert low == pytest.approx(0.305 - 0.01 - 0.01 / (2**0.5 - 1))
    fallen = mura.ece_interval(0.41, np.linspace(0.3, 0.5, 41), *ends)
    assert tuple(fallen) == pytest.approx((0.305, 0.495)), "noise only raises"


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    """A smoke test: 50 repeats of two levels; 300 repeats with 200 patients gave 93 to 96 %."""
    random = np.random.default_rng(2)
    population = cohort(random, 60_000)
    levels = {"image": population, "study": mura.pool_studies(population)}
    truth = {
        level: mura.compute_metrics(rows, 0.5, None, 0.2)
        for level, rows in levels.items()}
    held: dict[str, list[bool]] = {name: [] for name in mura.METRICS}
    for repeat in range(50):
        images = cohort(random, 80)
        found = mura.Evaluation(0.5, 200, repeat, prevalence=0.2).report(images)["levels"]
        for level, values in truth.items():
            for name, value in values.items():
                low, high = (found[level][name][key] for key in ("low", "high"))
                held[name].append(low <= value[0] <= high)
    rates = {name: float(np.mean(hits)) for name, hits in held.items()}
    assert all(rate >= 0.86 for rate in rates.values()), rates
    assert 0.91 <= np.mean(list(rates.values())) <= 0.98, rates


# ---- two models ----


def pair_of_models(random: np.random.Generator, patients: int, noise: float = 1.0) -> Any:
    """Draw studies, two in each second patient, and two models of which the second is noisier."""
    patient = np.repeat(np.arange(patients), 1 + np.arange(patients) % 2)
    label = (random.random(len(patient)) < 0.5).astype(int)
    logit = 2 * label - 1 + random.normal(0, 0.8, patients)[patient]
    study = [f"s{i}" for i in range(len(patient))]
    names = [f"p{i:04d}" for i in patient]
    first = predictions(label, 1 / (1 + np.exp(-logit)), names, study)
    logit = logit + random.normal(0, noise, len(patient)) if noise else logit
    return first, replace(first, probability=1 / (1 + np.exp(-logit)))


def test_a_model_compared_with_itself_differs_by_nothing() -> None:
    first, _ = pair_of_models(np.random.default_rng(0), 60)
    found = mura.Evaluation(0.5, 50).compare(first, first)
    assert set(found) == {"auroc", "kappa", "sensitivity", "specificity"}
    assert all(entry == {"value": 0, **NO_INTERVAL} for entry in found.values())


def test_differences_are_those_of_the_single_reports() -> None:
    first, second = pair_of_models(np.random.default_rng(0), 60)
    compare = mura.Evaluation(0.4, 100).compare
    found, back = compare(first, second), compare(second, first)
    one, other = (mura.compute_metrics(x, 0.4) for x in (first, second))
    for name, entry in found.items():
        assert entry["value"] == pytest.approx(float(other[name][0] - one[name][0]))
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert back[name]["value"] == pytest.approx(-entry["value"])
        assert back[name]["low"] == pytest.approx(-entry["high"], abs=1e-6)


def test_a_difference_of_kappa_may_exceed_one() -> None:
    """Nine of ten right against nine of ten wrong: kappa 0.8 and -0.8, which differ by 1.6."""
    label = np.repeat([0, 1], 20)
    right = np.where(np.arange(40) % 10 == 0, 0.9 - 0.8 * label, 0.1 + 0.8 * label)
    good = predictions(label, right)
    poor = replace(good, probability=1 - right)
    found = mura.Evaluation(0.5, 100).compare(poor, good)["kappa"]
    assert found["value"] == pytest.approx(1.6)
    assert 1 < found["low"] < 1.6 < found["high"] <= 2
    found = mura.Evaluation(0.5, 100).compare(good, poor)["kappa"]
    assert -2 <= found["low"] < -1.6 == pytest.approx(found["value"])


def test_both_models_see_the_same_resamples() -> None:
    """Two models that hardly differ: paired, what their patients have in common cancels."""
    first, second = pair_of_models(np.random.default_rng(0), 100, noise=0.05)
    alone = study_level(first, 200)["auroc"]
    paired = mura.Evaluation(0.5, 200).compare(first, second)["auroc"]
    assert paired["high"] - paired["low"] < 0.2 * (alone["high"] - alone["low"])


def test_no_certainty_where_two_models_never_disagree() -> None:
    """Other probabilities, the same predictions: no difference in 40 studies, not none."""
    label = np.repeat([0, 1], 20)
    first = predictions(label, np.where(label, 0.8, 0.2))
    other = replace(first, probability=np.where(label, 0.9, 0.1))
    found = mura.Evaluation(0.5, 50).compare(first, other)
    assert all(entry == {"value": 0, **NO_INTERVAL} for entry in found.values())
    few = predictions([1] * 9 + [0] * 40, np.random.default_rng(0).random(49))
    other = replace(few, probability=np.random.default_rng(1).random(49))
    found = mura.Evaluation(0.5, 50).compare(few, other)
    assert found["sensitivity"]["low"] is found["auroc"]["low"] is None
    assert found["specificity"]["low"] is not None


def test_intervals_of_differences_cover_the_truth() -> None:
    random = np.random.default_rng(3)
    large = pair_of_models(random, 30_000)
    truth = mura.Evaluation(0.5, 1).compare(*large)
    held = dict.fromkeys(truth, 0)
    for repeat in range(50):
        for name, entry in mura.Evaluation(0.5, 150, repeat).compare(*pair_of_models(random, 60)).items():
            held[name] += int(entry["low"] <= truth[name]["value"] <= entry["high"])
    assert all(count >= 43 for count in held.values()), held


# ---- temperature of images ----


def calibrated(random: np.random.Generator, patients: int) -> tuple[Any, Any, Any]:
    """Draw logits that mean what they say, three images a patient, and the labels they lead to."""
    patient = np.repeat([f"p{i:04d}" for i in range(patients)], 3)
    logit = random.normal(0, 2, len(patient))
    return logit, (random.random(len(patient)) < 1 / (1 + np.exp(-logit))).astype(int), patient


@pytest.mark.parametrize("temperature", [0.4, 2.5, 6.0])
def test_a_known_temperature_is_recovered(temperature: float) -> None:
    logit, label, patient = calibrated(np.random.default_rng(0), 700)
    found = mura.fit_temperature(logit * temperature, label, patient)
    assert found == pytest.approx(temperature, rel=0.12)
    before, after = (
        mura.compute_metrics(predictions(label, mura.sigmoid(logit * temperature / t)), 0.5)
        for t in (1.0, found))
    assert after["auroc"] == before["auroc"]
    assert after["ece"] < before["ece"]


def test_the_temperature_minimises_the_log_loss() -> None:
    logit, label, patient = calibrated(np.random.default_rng(1), 300)
    found = mura.fit_temperature(3 * logit, label, patient)
    near = (found * 0.95, found, found * 1.05)
    losses = [sk.log_loss(label, mura.sigmoid(3 * logit / t)) for t in near]
    assert min(losses) == losses[1]


def test_temperature_stays_at_one_where_a_fit_does_not_pay() -> None:
    """On calibrated logits a fit gains nothing but noise, which the standard error mostly stops."""
    fits = [mura.fit_temperature(*calibrated(np.random.default_rng(s), 60)) for s in range(24)]
    assert fits.count(1.0) >= 18


def test_temperature_stays_at_one_where_it_is_undefined() -> None:
    logit, label, patient = calibrated(np.random.default_rng(2), 100)
    assert mura.fit_temperature(4 * logit, label, patient) != 1.0
    assert mura.fit_temperature(4 * logit, np.ones_like(label), patient) == 1.0
    assert mura.fit_temperature(4 * logit, label, np.full_like(patient, "one")) == 1.0
    assert mura.fit_temperature(logit, (logit > 0).astype(int), patient) == 1.0  # no error
    assert mura.fit_temperature(logit, (logit < 0).astype(int), patient) == 1.0  # nothing right


def test_a_temperature_needs_twenty_patients() -> None:
    """Fifty images each, four times too sure: seen with 20 patients, not looked for with 19."""
    random = np.random.default_rng(0)
    logit, patient = random.normal(0, 2, 1000), np.repeat([f"p{i:02d}" for i in range(20)], 50)
    label = (random.random(1000) < 1 / (1 + np.exp(-logit))).astype(int)
    assert mura.fit_temperature(4 * logit, label, patient) == pytest.approx(4, rel=0.2)
    assert mura.fit_temperature(4 * logit[:950], label[:950], patient[:950]) == 1.0


def test_the_temperature_is_judged_on_other_patients() -> None:
    """Images of a patient share label and logit; a fold that splits them sees its own answers."""
    fits = []
    for seed in range(20):
        logit, label, _ = calibrated(np.random.default_rng(seed), 7)
        patient = np.repeat([f"p{i}" for i in range(21)], 20)
        fits.append(mura.fit_temperature(np.repeat(logit, 20), np.repeat(label, 20), patient))
    assert fits.count(1.0) >= 18  # 9 if images were split


# ---- temperature of studies ----


def views_of(
    random: np.random.Generator, studies: int, shared: float, own: float, patients: int = 0
) -> mura.Predictions:
    """Draw studies of 1 to 4 views whose errors are in part shared; the images are calibrated.

    With logits normal around +-m, 2 m / variance times the logit is what it means.
    """
    views = random.integers(1, 5, studies)
    study = np.repeat(np.arange(studies), views)
    label = random.integers(0, 2, studies)
    error = random.normal(0, shared, studies)[study] + random.normal(0, own, len(study))
    logit = 2 * 1.5 / (shared**2 + own**2) * (1.5 * (2 * label[study] - 1) + error)
    names = np.array([f"s{i:05d}" for i in study])
    patient = names if not patients else np.array([f"p{i % patients}" for i in study])
    return predictions(label[study], mura.sigmoid(logit), patient, names)


def log_loss(studies: mura.Predictions, slope: float = 1.0) -> float:
    """Return the log loss with the logit multiplied by a slope."""
    logit = slope * np.log(studies.probability / (1 - studies.probability))
    return float(np.logaddexp(0, np.where(studies.label == 1, -logit, logit)).mean())


def log_loss_and_slope(studies: mura.Predictions) -> tuple[float, float]:
    """Return the log loss, and by how much the logit would have to be multiplied to be right."""
    slopes = np.geomspace(0.3, 3, 100)
    return log_loss(studies), float(slopes[np.argmin([log_loss(studies, x) for x in slopes])])


@pytest.mark.parametrize("own", [0.7, 1.0])
def test_the_study_temperature_calibrates_studies_of_other_patients(own: float) -> None:
    """Errors of the views' own make the mean too modest: its logit means 1.3 to 2 times more."""
    random = np.random.default_rng(0)
    val, test = views_of(random, 3000, 1.0, own), views_of(random, 20_000, 1.0, own)
    temperature = mura.fit_study_temperature(val)
    plain, found = mura.pool_studies(test), mura.pool_studies(test, temperature)
    (loss_before, slope_before), (loss, slope) = map(log_loss_and_slope, (plain, found))
    assert slope_before > 1.2
    assert slope == pytest.approx(1, abs=0.08)
    assert loss < loss_before - 0.005
    views = np.unique(test.study, return_counts=True)[1]
    for count in (1, 2, 4):  # right for each number of views, and one view is left alone
        part = found.take(views == count)
        assert log_loss_and_slope(part)[1] == pytest.approx(1, abs=0.12)
        if count == 1:
            assert (part.probability == plain.probability[views == 1]).all()


def test_views_that_err_alike_need_no_study_temperature() -> None:
    random = np.random.default_rng(0)
    fits = [mura.fit_study_temperature(views_of(random, 200, 1.4, 1e-3)) for _ in range(12)]
    assert fits.count(1.0) >= 9
    single = cohort(random, 300, views=1)
    assert mura.fit_study_temperature(single) == 1.0


def test_the_study_temperature_is_fitted_to_the_number_of_views() -> None:
    """It has the least log loss of the studies that `pool_studies` makes with it."""
    images = views_of(np.random.default_rng(3), 800, 1.0, 1.0)
    images = images.take(np.random.default_rng(0).permutation(len(images.label)))
    found = mura.fit_study_temperature(images)
    losses = [log_loss(mura.pool_studies(images, found * x)) for x in (0.95, 1, 1.05)]
    assert min(losses) == losses[1]


# ---- threshold ----


def rates(studies: mura.Predictions, threshold: float) -> dict[str, float]:
    """Return kappa, sensitivity and specificity at a threshold."""
    found = mura.compute_metrics(studies, threshold)
    return {name: float(found[name][0]) for name in ("kappa", "sensitivity", "specificity")}


def all_divisions(studies: mura.Predictions) -> list[float]:
    """Return a threshold for every way to divide the studies, 0.5 among them."""
    return [0.5, *np.unique(studies.probability), *(np.unique(studies.probability) - 1e-6)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 40)), min_size=2, max_size=30))
def test_the_automatic_threshold_is_the_best_by_brute_force(cases: Any) -> None:
    label, probability = (np.array(x) for x in zip(*cases, strict=True))
    studies = predictions(label, probability / 40)
    found = mura.choose_threshold("auto", studies)
    if len(set(label.tolist())) == 1:
        assert found == 0.5
        return
    best = max(rates(studies, t)["kappa"] for t in all_divisions(studies))
    assert rates(studies, found)["kappa"] == pytest.approx(best)
    if rates(studies, 0.5)["kappa"] == pytest.approx(best):
        assert found == 0.5


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, 40)), min_size=2, max_size=30),
    st.sampled_from([0.5, 0.8, 0.9, 0.95, 1.0]), st.booleans(),
)
def test_a_kept_rate_costs_as_little_as_possible(cases: Any, wanted: float, sens: bool) -> None:
    label, probability = (np.array(x) for x in zip(*cases, strict=True))
    studies = predictions(label, probability / 40)
    found = mura.choose_threshold(f"{'sens' if sens else 'spec'}={wanted}", studies)
    if len(set(label.tolist())) == 1:
        assert found == 0.5
        return
    kept, free = ("sensitivity", "specificity") if sens else ("specificity", "sensitivity")
    options = [rates(studies, t) for t in all_divisions(studies)]
    allowed = [x for x in options if x[kept] >= wanted]
    chosen = rates(studies, found)
    assert chosen[kept] >= wanted
    assert chosen[free] == max(x[free] for x in allowed)
    assert chosen[kept] == max(x[kept] for x in allowed if x[free] == chosen[free])


def choose(rule: str, label: Any, probability: Any) -> float:
    """Choose a threshold for studies that are given by their values."""
    return mura.choose_threshold(rule, predictions(label, probability))


def test_thresholds_by_hand() -> None:
    assert choose("auto", [0, 0, 1, 1], [0.05, 0.1, 0.2, 0.8]) == pytest.approx(0.15)
    assert choose("auto", [0, 1], [0.1, 0.9]) == 0.5
    assert choose("auto", [1, 1, 1], [0.7, 0.8, 0.9]) == 0.5
    assert choose("sens=0.95", [0, 0, 0], [0.1, 0.2, 0.3]) == 0.5
    assert choose("auto", [0, 1], [0.3, 0.3]) == 0.5
    # kappa 0.625 with one of two found, 0.438 with both and three false alarms (Youden: 0.5, 0.7)
    label, probability = [0] * 10 + [1] * 2, [0.1] * 7 + [0.6] * 3 + [0.55, 0.9]
    assert choose("auto", label, probability) == pytest.approx(0.75)
    label, probability = [0, 0, 1, 0, 1, 1], [0.1, 0.2, 0.3, 0.6, 0.7, 0.9]
    assert choose("sens=1", label, probability) == pytest.approx(0.25)
    assert choose("sens=0.6", label, probability) == pytest.approx(0.65)
    assert choose("spec=1", label, probability) == pytest.approx(0.65)
    assert choose("spec=0.6", label, probability) == pytest.approx(0.25)


def test_a_rate_of_one_is_reached_at_the_ends_too() -> None:
    """The least probable study is abnormal, the most probable normal: all or none is abnormal."""
    label, probability = [1, 0, 1, 0], [0.2, 0.4, 0.6, 0.8]
    assert 0 <= choose("sens=1", label, probability) < 0.2
    assert 0.8 <= choose("spec=1", label, probability) <= 1
    assert choose("spec=1", [1, 0], [0.5, 1.0]) == 1.0


def test_the_threshold_separates_neighbouring_floats() -> None:
    """Midway between neighbours rounds to one of them; only the lower one keeps them apart."""
    for low in (0.7, np.nextafter(0.7, 1)):
        studies = predictions([0, 1], [low, np.nextafter(low, 1)])
        assert rates(studies, mura.choose_threshold("auto", studies))["kappa"] == 1


# ---- the terminal text ----

PARTS = ("XR_ELBOW", "XR_FINGER", "XR_FOREARM", "XR_HAND", "XR_HUMERUS", "XR_SHOULDER", "XR_WRIST")


def report_of(images: mura.Predictions, threshold: float = 0.5, **more: Any) -> dict[str, Any]:
    """Evaluate with few resamples and add what a run knows."""
    return {
        "split": "valid", "checkpoints": ["a.pth"], "threshold": threshold,
        "threshold_source": "auto on val", "notes": ["a long note of the report file. " * 9],
        **mura.Evaluation(threshold, 50, prevalence=more.get("prevalence")).report(images), **more,
    }


def two_views(studies: int = 140, parts: tuple[str, ...] = PARTS) -> mura.Predictions:
    """Draw studies of two views, spread over body parts."""
    random, index = np.random.default_rng(0), np.repeat(np.arange(studies), 2)
    label = random.integers(0, 2, studies)[index]
    probability = mura.sigmoid(2.5 * (label - 0.5) + random.normal(0, 1, len(index)))
    names = np.array([f"study{i:04d}" for i in index])
    return predictions(label, probability, names, names, np.array(parts)[index % len(parts)])


DEGENERATE: dict[str, Any] = {
    "one study": lambda: two_views(1),
    "only abnormal": lambda: two_views().take(two_views().label == 1),
    "only normal": lambda: two_views().take(two_views().label == 0),
    "long names": lambda: two_views(140, tuple(f"XR_A_PART_OF_LONG_NAME_{i}" for i in "abcdefgh")),
    "constant": lambda: replace(two_views(), probability=np.full(280, 0.5)),
    "all wrong": lambda: replace(two_views(), probability=1.0 - two_views().label),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_report_is_json_and_its_text_fits_100_columns(name: str) -> None:
    images = DEGENERATE[name]()
    report = report_of(images, prevalence=0.1)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    studies = mura.pool_studies(images)
    worse = mura.Evaluation(0.5, 50).compare(
        studies, replace(studies, probability=1 - studies.probability))
    models = {f"runs/densenet169_seed{i}_of_a_long_name.pth": report["levels"] for i in range(3)}
    differences = dict.fromkeys(models, worse)
    text = mura.format_report(report | {"models": models, "differences": differences})
    assert max(map(len, text.splitlines())) <= 100
    assert "nan" not in text
    assert "None" not in text


def test_the_text_begins_with_what_one_wants_to_know() -> None:
    report = report_of(two_views())
    lines, study = mura.format_report(report).splitlines(), report["levels"]["study"]
    assert lines[0] == f"valid: 140 studies ({study['positives']} abnormal) of 140 patients"
    wanted = ("auroc", "kappa", "sensitivity", "specificity")
    assert lines[1] == "abnormal above 0.5 (auto on val)"
    for line, name in zip(lines[2:6], wanted, strict=True):
        value, low, high = (study[name][key] for key in ("value", "low", "high"))
        assert line.startswith(mura.METRICS[name].heading)
        assert f"{value:.3f} [{low:.3f},{high:.3f}]" in line


def test_the_text_has_every_metric_of_studies_and_the_headlines_of_images() -> None:
    report = report_of(two_views(), prevalence=0.1)
    lines = mura.format_report(report).splitlines()
    for name, metric in mura.METRICS.items():
        line = next(x for x in lines if x.startswith(metric.heading))
        shown = line.replace(metric.heading, "").split()[0]
        assert float(shown) == pytest.approx(report["levels"]["study"][name]["value"], abs=0.0006)
    image = next(x for x in lines if x.startswith("images")).split()[1::2]
    for shown, name in zip(image, ("auroc", "kappa", "sensitivity", "specificity"), strict=True):
        assert float(shown) == pytest.approx(report["levels"]["image"][name]["value"], abs=0.006)
    assert "note" not in mura.format_report(report)


def test_every_value_of_the_text_stands_below_its_heading() -> None:
    """Beside the longest name of a metric, and of a body part, there is still room."""
    images = two_views(140, ("XR_A_PART_OF_LONG_NAME_A", "XR_HAND"))
    lines = mura.format_report(report_of(images, prevalence=0.1)).splitlines()
    table = next(i for i, line in enumerate(lines) if line.startswith(" "))
    columns = [(34, range(2, table))]
    columns += [(lines[table].index(mura.METRICS[name].heading), range(table + 1, table + 4))
                for name in ("auroc", "kappa", "sensitivity")]
    for place, rows in columns:
        assert rows
        for line in (lines[i] for i in rows):
            assert line[place - 1] == " " and line[place] in "-0123456789"


def test_the_text_leaves_out_what_repeats() -> None:
    """One body part is the whole; images are studies where each study has one view."""
    several = mura.format_report(report_of(two_views()))
    assert all(part in several for part in PARTS)
    assert "images" in several
    one = mura.format_report(report_of(two_views(60, ("XR_KNEE",))))
    assert "XR_KNEE" not in one
    single = mura.format_report(report_of(two_views().take(np.arange(0, 280, 2))))
    assert "images" not in single
    both = mura.format_report(report_of(two_views(60, ("XR_KNEE",)).take(np.arange(0, 120, 2))))
    headings = [[line for line in text.splitlines() if line.startswith(" ")]
                for text in (several, one, single, both)]
    assert list(map(len, headings)) == [1, 1, 1, 0], "no heading without a row"


def test_the_text_shows_undefined_as_a_dash() -> None:
    text = mura.format_report(report_of(two_views().take(two_views().label == 1)))
    auroc = next(line.split() for line in text.splitlines() if line.startswith("AUROC"))
    assert auroc == ["AUROC", "-"]


def test_models_and_their_differences_stand_in_the_text() -> None:
    images = two_views()
    report = report_of(images)
    second = replace(images, probability=images.probability**2)
    pair = [mura.pool_studies(x) for x in (images, second)]
    models = {"one.pth": report["levels"], "two.pth": report_of(second)["levels"]}
    differences = {"two.pth": mura.Evaluation(0.5, 50).compare(*pair)}
    text = mura.format_report(report | {"models": models, "differences": differences})
    starts = ("one.pth ", "two.pth ", "diff two.pth ")
    lines = [line.removeprefix("diff ").split() for line in text.splitlines()
             if line.startswith(starts)]
    entries = [models["one.pth"]["study"], models["two.pth"]["study"], differences["two.pth"]]
    for line, entry in zip(lines, entries, strict=True):
        assert float(line[3]) == pytest.approx(entry["kappa"]["value"], abs=0.006)
