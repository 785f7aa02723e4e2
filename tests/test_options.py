"""Block 1, options: the flags of the contract and no others; wrong use is one line, at once."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import SCRIPT
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mura_anomaly_detection as mura

MODES = {  # the least that each mode needs
    "T": ["--data-dir", "d"], "E": ["--data-dir", "d", "--evaluate"], "P": ["--predict", "x.png"],
    "X": ["--export", "m.onnx"], "D": ["--demo"],
}


class Flag(NamedTuple):
    """What the contract says of a flag."""

    modes: str  # where it has an effect
    value: str | None  # one that is not its default; None: it takes none
    expected: object  # what that becomes in Config
    maybe: str = ""  # where it may be taken or refused: its effect there is of no use


FLAGS = {
    "--data-dir": Flag("TE", "some/folder", Path("some/folder")),
    "--checkpoint": Flag("TEPXD", "a.pth", [Path("a.pth")]),
    "--cache-dir": Flag("TED", "cache", Path("cache")),
    "--resume": Flag("T", "auto", "auto"),
    "--overwrite": Flag("TEPXD", None, True),
    "--save-every": Flag("TD", "0.5", 0.5),
    "--tasks": Flag("TE", "ELBOW", ["ELBOW"]),
    "--labels": Flag("TE", "t.csv", Path("t.csv")),
    "--val-split": Flag("TD", "0.25", 0.25),
    "--image-size": Flag("TD", "224", 224),
    "--resize": Flag("TD", "letterbox", "letterbox"),
    "--normalization": Flag("TD", "0.2,0.18", "0.2,0.18"),
    "--on-bad-image": Flag("TE", "stop", "stop"),
    "--drop-duplicates": Flag("TE", None, True),
    "--model": Flag("TD", "resnet50", "resnet50"),
    "--recipe": Flag("T", "paper", "paper"),
    "--weights": Flag("TD", "w.pth", "w.pth"),
    "--epochs": Flag("TD", "7", 7),
    "--batch-size": Flag("TEPD", "4", 4),
    "--grad-accum-steps": Flag("TD", "2", 2, maybe="EP"),
    "--lr": Flag("TD", "2e-4", 2e-4),
    "--lr-schedule": Flag("TD", "plateau", "plateau"),
    "--warmup": Flag("TD", "0", 0.0),
    "--weight-decay": Flag("TD", "0", 0.0),
    "--hflip": Flag("TD", "0", 0.0),
    "--rotation": Flag("TD", "15", 15.0),
    "--brightness": Flag("TD", "0", 0.0),
    "--contrast": Flag("TD", "1", 1.0),
    "--mixup": Flag("TD", "0.2", 0.2),
    "--precise-bn": Flag("TD", "0", 0),
    "--select": Flag("TD", "kappa", "kappa"),
    "--patience": Flag("TD", "3", 3),
    "--precision": Flag("TEPD", "fp32", "fp32"),
    "--seed": Flag("TED", "42", 42),
    "--split": Flag("E", "train", "train"),
    "--threshold": Flag("TEPXD", "0.4", 0.4),
    "--tta": Flag("TEPXD", None, True),
    "--bootstrap": Flag("TED", "2000", 2000),
    "--prevalence": Flag("TEPD", "0.1", 0.1),
    "--output": Flag("PE", "r.csv", Path("r.csv")),
    "--figure": Flag("PED", "figures", Path("figures")),
    "--cam": Flag("PED", "gradcam", "gradcam"),
    "--cam-class": Flag("PED", "normal", "normal"),
    "--save-cam": Flag("P", "maps.npz", Path("maps.npz")),
    "--no-show": Flag("PD", None, True),
    "--device": Flag("TEPD", "cuda:1", "cuda:1"),
    "--compile": Flag("TD", None, True),
    "--workers": Flag("TEPD", "3", 3),
    "--debug": Flag("TEPXD", None, True),
}
MODE_FLAGS = {"--evaluate": [], "--predict": ["x.png"], "--export": ["m.onnx"], "--demo": []}
OTHERS = {"-h", "--help", "--version", "--no-tta"}
ABOUT = {"given", "command"}  # what Config keeps of the command line itself
NEEDED = {  # what a flag needs beside it in a mode, or instead of its value above
    ("--cam", "E"): ["--figure", "wrong"], ("--cam-class", "E"): ["--figure", "wrong"],
    ("--figure", "D"): ["--figure", "f.png"],
}


def name_of(flag: str) -> str:
    return flag[2:].replace("-", "_")


def words_of(flag: str) -> list[str]:
    value = FLAGS[flag].value
    return [flag] if value is None else [flag, value]


def settings_of(config: mura.Config) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name not in ABOUT}


def refusal(*arguments: str) -> str:
    """The one line on stderr with which the arguments are refused."""
    out, err = io.StringIO(), io.StringIO()
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          pytest.raises(SystemExit) as ended):
        mura.parse_options(arguments)
    assert (ended.value.code, out.getvalue()) == (2, "")
    line = err.getvalue()
    assert line.startswith("mura_anomaly_detection.py: error: ") and line.endswith("\n")
    assert line.count("\n") == 1, line
    return line.rstrip("\n")


def page(flag: str) -> str:
    """What -h or --help prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        mura.parse_options([flag])
    assert ended.value.code == 0
    return out.getvalue()


def entries_of(text: str) -> dict[str, str]:
    """Flag -> its metavar and text, on one line."""
    pieces = re.split(r"\n\s{1,4}(?=-)", text.partition("\nexamples:")[0])[1:]
    pieces = [re.sub(r"\n\n(?s:.*)", "", piece) for piece in pieces]
    return {re.split(r"[ ,\n]", piece)[0]: " ".join(piece.split()) for piece in pieces}


HELP = entries_of(page("--help"))


# ---- the flags ----


def test_the_flags_are_those_of_the_contract_and_no_other_name_for_one() -> None:
    assert {*FLAGS, *MODE_FLAGS, *OTHERS} == set(mura.build_parser()._option_string_actions)
    values = {item.name for item in fields(mura.Config)} - ABOUT
    assert values == {name_of(flag) for flag in (*FLAGS, *MODE_FLAGS)}


@pytest.mark.parametrize("old", [
    "--fit=letterbox", "--accumulate=2", "--schedule=poly", "--flip=0.5", "--settle=256",
    "--data=d", "--epoch=3", "--batch_size=8", "--ckpt=a.pth", "--threads=2",
])
def test_names_of_before_and_abbreviations_are_refused(old: str) -> None:
    assert "unrecognized arguments" in refusal("--data-dir", "d", old)


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_has_its_effect_or_is_refused_in_each_mode(flag: str) -> None:
    about = FLAGS[flag]
    for mode, base in MODES.items():
        needed = NEEDED.get((flag, mode), [])
        words = needed if flag in needed else [*needed, *words_of(flag)]
        if mode in about.modes:
            config = mura.parse_options([*base, *words])
            expected = Path(needed[1]) if flag in needed else about.expected
            value = getattr(config, name_of(flag))
            assert value == expected != getattr(mura.Config(), name_of(flag)), mode
            assert type(value) is type(expected)
        elif mode not in about.maybe:
            line = refusal(*base, *words_of(flag))
            assert f"{flag} does not go with " in line, mode
            assert {"T": "training"}.get(mode, base[-1 if mode in "ED" else 0]) in line


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_changes_nothing_but_its_own_option(flag: str) -> None:
    mode = FLAGS[flag].modes[0]
    base = [*MODES[mode], *NEEDED.get((flag, mode), [])]
    before, after = mura.parse_options(base), mura.parse_options([*base, *words_of(flag)])
    changed = {item.name for item in fields(mura.Config)
               if getattr(before, item.name) != getattr(after, item.name)} - ABOUT
    if flag == "--recipe":
        paper = mura.PAPER_RECIPE.items()
        changed -= {name for name, value in paper if value != getattr(before, name)}
    assert changed == {name_of(flag)}


@pytest.mark.parametrize("flag", ["--image-size", "--resize", "--normalization", "--model"])
def test_what_the_checkpoint_fixes_is_refused_with_that_reason(flag: str) -> None:
    for mode in "EPX":
        assert "the checkpoint fixes it" in refusal(*MODES[mode], *words_of(flag))


@pytest.mark.parametrize("flag", [
    "--compile", "--epochs", "--grad-accum-steps", "--patience", "--save-every", "--weights",
    "--overwrite", "--bootstrap", "--workers", "--device", "--on-bad-image", "--drop-duplicates",
])
def test_what_no_model_is_made_with_is_not_fixed_by_its_file(flag: str) -> None:
    """What a run may change from one start to the next, --resume takes from nowhere or at will."""
    for mode in set("EPX") - {*FLAGS[flag].modes, *FLAGS[flag].maybe}:
        assert "it would do nothing" in refusal(*MODES[mode], *words_of(flag))


@pytest.mark.parametrize(("mode", "flag"), [
    (mode, flag) for mode in "TD" for flag, about in FLAGS.items()
    if mode not in about.modes + about.maybe
])
def test_no_checkpoint_fixes_anything_where_one_is_only_written(mode: str, flag: str) -> None:
    assert "checkpoint fixes" not in refusal(*MODES[mode], *words_of(flag))


def test_modes_exclude_each_other() -> None:
    for first, first_values in MODE_FLAGS.items():
        for second, second_values in MODE_FLAGS.items():
            if first < second:
                line = refusal(first, *first_values, second, *second_values, "--data-dir", "d")
                assert "exclude each other" in line and first in line and second in line


def test_the_flags_that_users_type_already() -> None:
    typed = ("--data-dir MURA --model densenet169 --epochs 3 --batch-size 4 --lr 0.01 --device cpu "
             "--checkpoint e.pth --tasks ELBOW HAND")
    config = mura.parse_options(typed.split())
    assert (config.data_dir, config.model, config.epochs) == (Path("MURA"), "densenet169", 3)
    assert (config.batch_size, config.lr, config.device) == (4, 0.01, "cpu")
    assert (config.checkpoint, config.tasks) == ([Path("e.pth")], ["ELBOW", "HAND"])
    assert config.val_split == 0.2


def test_flags_with_an_optional_value() -> None:
    assert mura.parse_options(["--demo"]).demo == Path("mura_demo")
    assert mura.parse_options(["--demo", "here"]).demo == Path("here")
    kinds = [mura.parse_options([*MODES["T"], *words]).resume
             for words in ([], ["--resume", "auto"], ["--resume"])]
    assert len(set(kinds)) == 3 and not kinds[0] and kinds[1] == "auto"


def test_the_help_of_resume_shows_nothing_but_what_may_be_typed() -> None:
    for which in ("-h", "--help"):
        assert entries_of(page(which))["--resume"].startswith("--resume [auto] continue")
    assert re.search(r"choose from '?auto'?\)", refusal(*MODES["T"], "--resume", "required"))


def test_a_flag_given_twice_takes_both() -> None:
    config = mura.parse_options(["--predict", "a", "b", "--checkpoint", "1.pth", "--predict", "c",
                                 "--checkpoint", "2.pth", "3.pth"])
    assert config.predict == [Path("a"), Path("b"), Path("c")]
    assert config.checkpoint == [Path("1.pth"), Path("2.pth"), Path("3.pth")]
    tasks = mura.parse_options([*MODES["T"], "--tasks", "HAND", "--tasks", "ELBOW"]).tasks
    assert tasks == ["HAND", "ELBOW"]


def test_tta_is_the_models_own_unless_a_flag_says_otherwise() -> None:
    for words, expected in (([], None), (["--tta"], True), (["--no-tta"], False)):
        for mode in MODES.values():
            assert mura.parse_options([*mode, *words]).tta is expected


def test_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        mura.Config().epochs = 3  # type: ignore[misc]


# ---- recipes and defaults ----


def test_the_recipe_of_the_paper() -> None:
    """arXiv 1712.06957, section 3.1, by hand; what is given beside it counts, in any order."""
    config = mura.parse_options([*MODES["T"], "--recipe", "paper"])
    assert (config.model, config.weights, config.image_size) == ("densenet169", "imagenet", 320)
    assert (config.batch_size, config.lr, config.lr_schedule) == (8, 1e-4, "plateau")
    assert (config.hflip, config.rotation) == (0.5, 30)
    assert (config.brightness, config.contrast, config.mixup) == (0, 0, 0)
    assert (config.weight_decay, config.precise_bn, config.tta) == (0, 0, False)
    assert (config.resize, config.normalization) == ("stretch", "imagenet")
    recipe, rotation = ["--recipe", "paper"], ["--rotation", "10"]
    for words in (recipe + rotation, rotation + recipe):
        given = mura.parse_options([*MODES["T"], *words])
        assert settings_of(given) == settings_of(config) | {"rotation": 10.0}
    assert mura.parse_options([*MODES["T"], "--recipe", "paper", "--tta"]).tta is True


def test_without_flags_the_options_are_those_of_config_and_of_the_default_recipe() -> None:
    plain = settings_of(mura.parse_options(MODES["T"]))
    assert plain == settings_of(mura.Config(data_dir=Path("d")))
    assert plain == settings_of(mura.parse_options([*MODES["T"], "--recipe", "default"]))


def test_the_demo_has_defaults_of_its_own_which_flags_overrule() -> None:
    ordinary, demo = mura.Config(), mura.parse_options(["--demo", "here"])
    assert demo.checkpoint == (Path("here/demo.pth"),)
    assert demo.weights == "none"  # it needs no network
    assert demo.lr != ordinary.lr and demo.resize != ordinary.resize
    words = ["--demo", "--lr", str(ordinary.lr), "--resize", ordinary.resize]
    config = mura.parse_options(words)
    assert (config.lr, config.resize) == (ordinary.lr, ordinary.resize)
    assert mura.parse_options(["--demo", "--checkpoint", "a.pth"]).checkpoint == [Path("a.pth")]


# ---- the help pages ----


def test_h_is_one_screen_with_the_modes_the_users_flags_and_five_examples() -> None:
    text = page("-h")
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    shown = entries_of(text)
    assert {"--data-dir", "--model", "--epochs", "--batch-size", "--lr", "--checkpoint",
            "--val-split", "--tasks", "--device", "--predict", "--evaluate", "--demo",
            "--help"} <= set(shown)
    assert len(shown) < len(HELP) / 2
    assert sum("mura_anomaly_detection.py --" in line for line in lines) >= 5


def test_help_has_every_flag_in_100_columns() -> None:
    assert max(map(len, page("--help").splitlines())) <= 100
    assert set(HELP) == {*FLAGS, *MODE_FLAGS, *OTHERS} - {"--no-tta"}
    assert "--no-tta" in HELP["--tta"]


@pytest.mark.parametrize("flag", FLAGS)
def test_help_states_each_default_once(flag: str) -> None:
    default = getattr(mura.Config(), name_of(flag))
    if not (default is None or default is False or default == ()):
        shown = default[0] if isinstance(default, tuple) else default
        assert HELP[flag].count("default:") == 1
        assert HELP[flag].endswith(f"(default: {shown})"), HELP[flag]
    elif flag in ("--cache-dir", "--image-size", "--on-bad-image", "--threshold", "--tta",
                  "--figure"):
        assert "default: " in HELP[flag]  # in words: it depends


@pytest.mark.parametrize(("flag", "metavar"), {
    "--checkpoint": "FILE.pth", "--labels": "FILE.csv", "--output": "FILE.csv",
    "--save-cam": "FILE.npz", "--export": "FILE.onnx",
}.items())
def test_a_metavar_shows_the_suffix_that_is_wanted(flag: str, metavar: str) -> None:
    assert HELP[flag].startswith(f"{flag} {metavar}")


@pytest.mark.parametrize("which", ["-h", "--help"])
def test_help_ends_with_examples_that_the_parser_takes(which: str) -> None:
    lines = page(which).partition("\nexamples:\n")[2].splitlines()
    examples = [re.split(r"\s{2,}", line.strip())[0].split() for line in lines if line.strip()]
    assert len(examples) >= 5
    assert {example[0] for example in examples} == {"mura_anomaly_detection.py"}
    configs = [mura.parse_options(example[1:]) for example in examples]
    assert any(config.demo for config in configs) and any(config.predict for config in configs)
    assert any(len(config.checkpoint) > 1 and config.evaluate for config in configs)
    assert any(config.data_dir and not config.evaluate for config in configs)


def test_help_and_errors_do_not_wait_for_the_heavy_imports(tmp_path: Path) -> None:
    for package in ("torch", "torchvision", "numpy", "PIL", "tqdm", "matplotlib"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('a heavy import')\n")

    def run(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False,
            timeout=60, env={**os.environ, "PYTHONPATH": str(tmp_path)})
        return done.returncode, done.stdout, done.stderr

    assert run("--help") == (0, page("--help"), "")
    assert run("--version") == (0, f"mura_anomaly_detection {mura.__version__}\n", "")
    for words, said in (
        (["--evaluate", "--image-size", "512"], "--image-size does not go with --evaluate"),
        (["--train"], "training is what happens without"),
        (["--epcohs", "3"], "did you mean --epochs?"),
    ):
        code, out, err = run("--data-dir", "d", *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
    assert "a heavy import" in run("--demo")[2]  # the stand-ins are what a run would meet


def test_ctrl_c_during_the_imports_ends_the_program_the_plain_way(tmp_path: Path) -> None:
    """By the signal itself, which a shell's loop heeds, and without a traceback."""
    (tmp_path / "numpy.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise RuntimeError('went on')\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *MODES["T"]], capture_output=True, text=True, check=False,
        timeout=60, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


# ---- wrong use ----


@pytest.mark.parametrize("flag", [flag for flag in (*FLAGS, *MODE_FLAGS) if len(flag) > 6])
def test_a_mistyped_flag_gets_the_nearest_one(flag: str) -> None:
    swapped = flag[:3] + flag[4] + flag[3] + flag[5:]
    left_out = flag[:-2] + flag[-1]
    for typed in (swapped, left_out):
        if typed not in {*FLAGS, *MODE_FLAGS}:
            assert f"did you mean {flag}?" in refusal("--demo", typed)
            assert f"did you mean {flag}?" in refusal(f"{typed}=3", "--demo")


@pytest.mark.parametrize("typed", ["--xyzzy", "--verbose", "--optimizer", "--momentum", "--quiet"])
def test_a_flag_like_none_gets_no_suggestion(typed: str) -> None:
    line = refusal("--demo", typed)
    assert f"unrecognized arguments: {typed} (see --help)" in line and "did you mean" not in line


@pytest.mark.parametrize(("typed", "said"), [
    (["--train"], "training is what happens without"), (["--test"], "--evaluate"),
    (["--gpu", "0"], "--device cuda:"),
])
def test_flags_that_people_try_get_an_answer(typed: list[str], said: str) -> None:
    line = refusal("--data-dir", "d", *typed)
    assert f"unrecognized arguments: {' '.join(typed)} (" in line and said in line


@pytest.mark.parametrize(("flag", "choices"), [
    ("--model", list(mura.ARCHITECTURES)), ("--cam", list(mura.CAM_METHODS)),
    ("--select", list(mura.SELECTION)), ("--resize", ["stretch", "letterbox"]),
    ("--lr-schedule", ["poly", "plateau"]), ("--recipe", ["default", "paper"]),
    ("--precision", ["auto", "bf16", "fp16", "tf32", "fp32"]), ("--split", ["train", "valid"]),
    ("--cam-class", ["abnormal", "normal", "predicted"]), ("--on-bad-image", ["skip", "stop"]),
])
def test_choices_are_those_of_the_tables(flag: str, choices: list[str]) -> None:
    """A line in ARCHITECTURES without its line here would be one that nobody can choose."""
    mode = MODES[FLAGS[flag].modes[0]]
    line = refusal(*mode, flag, "what")
    named = re.search(r"choose from (.*?)\)", line)
    assert named and sorted(re.findall(r"\w+", named[1])) == sorted(choices)
    assert set(re.findall(r"\w+", HELP[flag].partition("{")[2].partition("}")[0])) == set(choices)
    for choice in choices:
        assert getattr(mura.parse_options([*mode, flag, choice]), name_of(flag)) == choice


WRONG_VALUES: dict[str, list[str]] = {
    "--val-split": ["0", "-0.1", "1", "nan", "half", ""],
    "--image-size": ["63", "2049", "64.0", "-64"],
    "--epochs": ["0", "-1", "1.5", "many", "1000001", "9" * 400],
    "--batch-size": ["0", "-8", "1e2"],
    "--grad-accum-steps": ["0"],
    "--lr": ["0", "-1e-4", "11", "inf", "nan", "-inf", "1e999"],
    "--warmup": ["-0.1", "1.1"],
    "--weight-decay": ["-1", "inf"],
    "--hflip": ["-0.1", "1.1", "nan"],
    "--rotation": ["-1", "181"],
    "--brightness": ["2", "-1"],
    "--contrast": ["1.01"],
    "--mixup": ["-0.1", "10.5", "nan"],
    "--precise-bn": ["-1", "0.5"],
    "--patience": ["-1"],
    "--seed": ["-1", "1.0", str(2**31 + 1)],
    "--save-every": ["-1", "nan"],
    "--bootstrap": ["99", "100001"],
    "--prevalence": ["0", "1", "-0.1", "nan", "ten"],
    "--workers": ["-1"],
    "--threshold": ["0", "1", "-0.5", "2", "nan", "automatic", "sens", "sens=", "sens=0", "sens=1",
                    "spec=nan", "acc=0.9", "=0.5", "auto=0.5", "Sens=0.9", "sens=0.9=1"],
    "--normalization": ["mura", "0.5", "0.5,0", "1.2,0.5", "0.5,2", "a,b", "0.1,0.2,0.3",
                        "nan,nan"],
    "--device": ["gpu", "cuda:", "cuda:-1", "cuda:a", "CPU", "cuda:1\n", ""],
    "--resume": ["never"],
}


@pytest.mark.parametrize("flag", WRONG_VALUES)
def test_a_wrong_value_is_refused_by_flag_and_value(flag: str) -> None:
    for value in WRONG_VALUES[flag]:
        line = refusal("--data-dir", "d", f"{flag}={value}")
        assert f"argument {flag}: " in line
        shown = repr(value), repr(value.partition("=")[2])
        assert any(text in line for text in shown), line


@pytest.mark.parametrize(("flag", "values"), {
    "--val-split": ["0.95", "1e-6"], "--image-size": ["64", "2048"], "--lr": ["10", "1e-12"],
    "--epochs": ["1"], "--batch-size": ["1"], "--grad-accum-steps": ["1"],
    "--warmup": ["0", "1"], "--hflip": ["0", "1"], "--rotation": ["0", "180"],
    "--brightness": ["0", "1"], "--contrast": ["0", "1"], "--weight-decay": ["0", "10"],
    "--mixup": ["0", "10"], "--precise-bn": ["0"], "--save-every": ["0"],
    "--seed": ["0", str(2**31)], "--bootstrap": ["100", "100000"], "--workers": ["0"],
    "--patience": ["0"], "--prevalence": ["1e-6", "0.999999"],
    "--threshold": [".000001", "0.999999", "auto", "sens=0.95", "spec=0.95"],
    "--normalization": ["imagenet", "dataset", "image", "0,1"],
    "--device": ["auto", "cpu", "mps", "cuda", "cuda:12"],
}.items())
def test_the_ends_of_each_range_are_taken(flag: str, values: list[str]) -> None:
    for value in values:
        taken = getattr(mura.parse_options([*MODES["T"], flag, value]), name_of(flag))
        assert str(taken) == value or float(taken) == float(value)


@pytest.mark.parametrize("words", [
    ["--predict", ""], ["--predict", "a.png", ""], ["--predict", "a.png", "--figure", ""],
    ["--data-dir", ""], ["--data-dir", "d", "--checkpoint", ""], ["--demo", ""],
], ids=" ".join)
def test_an_empty_name_is_refused(words: list[str]) -> None:
    """As of a shell variable without a value; it would be the current folder."""
    assert "the name is empty" in refusal(*words)


def test_a_rule_for_the_threshold_is_found_on_val_or_where_one_evaluates() -> None:
    for rule in ("auto", "sens=0.95", "spec=0.9"):
        for mode in "TED":
            assert mura.parse_options([*MODES[mode], "--threshold", rule]).threshold == rule
        for mode in "PX":
            line = refusal(*MODES[mode], "--threshold", rule)
            assert f"--threshold {rule}: is found while training or by --evaluate" in line
    line = refusal(*MODES["T"], "--threshold", "automatic")
    assert all(rule in line for rule in ("auto", "sens=", "spec="))  # what may be given


@pytest.mark.parametrize(("line", "complaint"), [
    ("", "--data-dir DIR or --labels FILE.csv is needed (or --predict, or --demo)"),
    ("--evaluate --checkpoint a.pth", "--data-dir DIR or --labels FILE.csv is needed"),
    ("--data-dir", "argument --data-dir: expected one argument"),
    ("--predict", "argument --predict: expected at least one argument"),
    ("--demo --figure .", "--figure .: the name must end in .png"),
    ("--demo --mixup 0.2 --batch-size 1", "--mixup mixes the images of a batch: --batch-size 1"),
    ("--data-dir d --warmup 0.2 --lr-schedule plateau", "--warmup goes with --lr-schedule poly"),
    ("--data-dir d --warmup 0.2 --recipe paper", "--warmup goes with --lr-schedule poly"),
    ("--data-dir d --checkpoint a.pth b.pth", "training takes one --checkpoint"),
    ("--demo --checkpoint a.pth --checkpoint b.pth", "--demo takes one --checkpoint"),
    ("--data-dir d --checkpoint model", "--checkpoint model: the name must end in .pth"),
    ("--data-dir d --checkpoint .pth", "--checkpoint .pth: the name must end in .pth"),
    ("--demo --checkpoint model", "--checkpoint model: the name must end in .pth"),
    ("--demo --checkpoint m.last.pth", "not in .last.pth, a saved state's"),
    ("--data-dir d --checkpoint m.last.pth --resume", "not in .last.pth, a saved state's"),
    ("--data-dir d --resume --overwrite", "--resume and --overwrite exclude each other"),
    ("--labels t.csv --evaluate --split train", "--split is for MURA's folders, not for --labels"),
    ("--data-dir d --evaluate --cam gradcam", "draws its heatmaps into the folder of --figure"),
    ("--data-dir d --evaluate --cam-class normal", "draws its heatmaps into the folder of"),
    ("--data-dir d --evaluate --figure f.png", "name a folder"),
    ("--export f.onnx --checkpoint a.pth b.pth", "--export takes one --checkpoint"),
    ("--data-dir d --evaluate --checkpoint a.pth b.pth a.pth", "names a model twice"),
    ("--predict a.png --checkpoint a.pth --checkpoint a.pth", "names a model twice"),
    ("--export f.tflite", "--export f.tflite: the name must end in .onnx or .pt2"),
    ("--predict a.png --output o.txt", "--output o.txt: the name must end in .csv or .json"),
    ("--predict a.png --save-cam o.npy", "--save-cam o.npy: the name must end in .npz"),
    ("image.png", "unrecognized arguments: image.png"),
])
def test_flags_that_do_not_go_together_are_refused(line: str, complaint: str) -> None:
    assert complaint in refusal(*line.split())


@pytest.mark.parametrize("name", ["run.v1.pth", "run.v2.pth", "2026.01.pth", "run.pth"])
def test_the_files_of_a_run_keep_the_dots_of_its_name(name: str) -> None:
    """Of run.v1 and run.v2 neither writes over the other."""
    folder, stem = Path("runs.old"), name.removesuffix(".pth")
    training = mura.parse_options([*MODES["T"], "--checkpoint", str(folder / name)])
    evaluate = [*MODES["E"], "--checkpoint", "m.pth", "--output"]
    tests = [mura.parse_options([*evaluate, str(folder / f"{stem}{suffix}")])
             for suffix in (".csv", ".json", "")]
    for ending in (".last.pth", ".report.json", ".history.csv"):
        found = {config.file(ending) for config in (training, *tests)}
        assert found == {folder / f"{stem}{ending}"}


@pytest.mark.parametrize(("size", "steps", "images"), [(8, 1, 32), (8, 4, 8), (1, 100, 1)])
def test_accumulation_saves_memory_without_gradients_too(
    size: int, steps: int, images: int
) -> None:
    flags = ["--demo", "--batch-size", f"{size}", "--grad-accum-steps", f"{steps}"]
    assert mura.parse_options(flags).eval_batch_size == images


@pytest.mark.parametrize("line", [
    "--labels t.csv", "--labels t.csv --evaluate --data-dir d",
    "--data-dir d --evaluate --cam gradcam --figure f",
    "--data-dir d --evaluate --checkpoint a.pth b.last", "--predict a.png --figure folder.v2",
    "--predict a.png --output a.json", "--export m.pt2", "--data-dir d --resume --epochs 9",
    "--demo --figure f.PNG", "--data-dir d --mixup 0.2 --batch-size 2",
    "--data-dir d --recipe paper --warmup 0.2 --lr-schedule poly",
])
def test_flags_that_do_go_together_are_taken(line: str) -> None:
    mura.parse_options(line.split())


def test_an_argument_with_a_newline_is_refused_in_one_line() -> None:
    assert "unrecognized arguments: two lines" in refusal("--demo", "folder", "two\nlines")


# ---- any arguments at all ----

WORDS = st.one_of(
    st.sampled_from([*FLAGS, *MODE_FLAGS, "-h", "--version", "--", "-", "--=", "-1", "auto", "0.5",
                     "8", "a.pth", "r.csv", "1e400"]),
    st.builds("{}={}".format, st.sampled_from(list(FLAGS)), st.text(max_size=8)),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)


@settings(deadline=None)
@given(st.lists(WORDS, max_size=8))
@example(["--seed", "1" + "0" * 399])
@example(["--epochs=" + "9" * 5000])
@example(["--demo", "%s %(prog)s"])
@example(["--predict", "a", "--threshold", "sens=0.9"])
@example(["--demo", "\x1b[2J\x9b"])
@example(["--demo", "--\u2028x"])
def test_any_arguments_give_options_or_one_line(arguments: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            assert isinstance(mura.parse_options(arguments), mura.Config)
        except SystemExit as ended:
            code = ended.code
    if code == 2:
        assert out.getvalue() == ""
        assert err.getvalue().startswith("mura_anomaly_detection.py: error: ")
        assert err.getvalue().count("\n") == 1
    else:
        assert code in (0, None) and err.getvalue() == ""
        assert bool(out.getvalue()) == (code == 0)
