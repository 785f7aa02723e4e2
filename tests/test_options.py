"""Section 1, options: every flag is a field of Config, stated once; wrong use costs one line, exit code 2 and no waiting."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import SCRIPT
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mura_anomaly_detection as mad

FIELDS = {item.name: item for item in fields(mad.Config)}
FLAGS = ["--" + name.replace("_", "-") for name in FIELDS]

# a value for each flag that is not its default, and what it becomes
GIVEN: dict[str, tuple[list[str], object]] = {
    "data_dir": (["some/folder"], Path("some/folder")),
    "checkpoint": (["a.pth"], (Path("a.pth"),)),
    "cache_dir": (["cache"], Path("cache")),
    "resume": (["auto"], "auto"),
    "save_every": (["0.5"], 0.5),
    "tasks": (["ELBOW", "XR_WRIST"], ("ELBOW", "XR_WRIST")),
    "val_split": (["0.25"], 0.25),
    "image_size": (["224"], 224),
    "fit": (["letterbox"], "letterbox"),
    "normalization": (["0.2,0.18"], "0.2,0.18"),
    "on_bad_image": (["stop"], "stop"),
    "model": (["resnet50"], "resnet50"),
    "recipe": (["paper"], "paper"),
    "weights": (["weights.pth"], "weights.pth"),
    "epochs": (["7"], 7),
    "batch_size": (["4"], 4),
    "accumulate": (["2"], 2),
    "lr": (["2e-4"], 2e-4),
    "schedule": (["plateau"], "plateau"),
    "warmup": (["0"], 0.0),
    "weight_decay": (["0"], 0.0),
    "flip": (["0"], 0.0),
    "rotation": (["15"], 15.0),
    "brightness": (["0"], 0.0),
    "contrast": (["1"], 1.0),
    "mixup": (["0.2"], 0.2),
    "settle": (["0"], 0),
    "patience": (["3"], 3),
    "precision": (["fp32"], "fp32"),
    "seed": (["42"], 42),
    "evaluate": ([], True),
    "split": (["train"], "train"),
    "threshold": (["0.4"], 0.4),
    "tta": ([], True),
    "bootstrap": (["2000"], 2000),
    "predict": (["a.png", "folder"], (Path("a.png"), Path("folder"))),
    "output": (["results.csv"], Path("results.csv")),
    "figure": (["out.png"], Path("out.png")),
    "cam_class": (["normal"], "normal"),
    "save_cam": (["maps.npz"], Path("maps.npz")),
    "no_show": ([], True),
    "export": (["net.onnx"], Path("net.onnx")),
    "demo": (["folder"], Path("folder")),
    "device": (["cuda:1"], "cuda:1"),
    "compile": ([], True),
    "workers": (["3"], 3),
    "debug": ([], True),
}
MODES = {"evaluate", "predict", "export", "demo"}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr with which the arguments are refused."""
    with pytest.raises(SystemExit) as ended:
        mad.parse_options(arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == mad.EXIT_USAGE == 2
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err


def help_page(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        mad.parse_options(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def help_of_each_flag(page: str) -> dict[str, str]:
    """Flag -> its text in the help page, on one line."""
    page = page[page.index("\noptions:") : page.index("\nexamples:")]
    entries = re.split(r"\n  (?=-)", re.sub(r"\n\n\w+:\n", "\n", page))[1:]
    return {" ".join(entry.split()).split(" ")[0].rstrip(","): " ".join(entry.split()) for entry in entries}


# ---- flags and Config ----


def test_the_table_above_covers_every_option():
    assert set(GIVEN) == set(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_every_flag_reaches_config(name: str):
    values, expected = GIVEN[name]
    mode = [] if name in MODES - {"evaluate"} | {"data_dir"} else ["--data-dir", "d"]
    if name in ("output", "save_cam", "figure"):
        mode = ["--predict", "x.png"]
    if name == "split":
        mode = ["--evaluate", "--data-dir", "d"]
    config = mad.parse_options([*mode, "--" + name.replace("_", "-"), *values])
    assert getattr(config, name) == expected != FIELDS[name].default
    assert type(getattr(config, name)) is type(expected)
    others = {other: getattr(config, other) for other in FIELDS if other not in (name, "data_dir", mode[:1] and mode[0][2:])}
    expected_others = {other: FIELDS[other].default for other in others}
    if name == "demo":  # which brings defaults of its own
        expected_others |= mad.DEMO_DEFAULTS | {"checkpoint": (expected / "demo.pth",)}
    if name == "recipe":
        expected_others |= mad.PAPER_RECIPE
    assert others == expected_others


def test_the_recipe_of_the_paper():
    """arXiv 1712.06957, section 3.1, by hand; what is given beside it counts."""
    config = mad.parse_options(["--data-dir", "d", "--recipe", "paper"])
    assert (config.image_size, config.batch_size, config.lr, config.schedule) == (320, 8, 1e-4, "plateau")
    assert (config.flip, config.rotation, config.brightness, config.contrast, config.weight_decay) == (0.5, 30, 0, 0, 0)
    assert (config.fit, config.normalization, config.tta, config.settle) == ("stretch", "imagenet", False, 0)
    for order in (["--recipe", "paper", "--rotation", "10"], ["--rotation", "10", "--recipe", "paper"]):
        assert mad.parse_options(["--data-dir", "d", *order]) == replace(config, rotation=10)


def test_mirror_images_are_left_to_the_model_unless_a_flag_says_so():
    for flags, expected in (([], None), (["--tta"], True), (["--no-tta"], False), (["--recipe", "paper", "--tta"], True)):
        assert mad.parse_options(["--data-dir", "d", *flags]).tta is expected


def test_flags_given_with_the_demo_count_even_if_they_equal_an_ordinary_default():
    config = mad.parse_options(["--demo", "--epochs", str(FIELDS["epochs"].default), "--fit", "stretch"])
    assert (config.epochs, config.fit) == (FIELDS["epochs"].default, "stretch")
    assert mad.parse_options(["--demo"]).epochs == mad.DEMO_DEFAULTS["epochs"] != FIELDS["epochs"].default


def test_no_flags_but_the_mode_gives_the_defaults_of_config():
    assert mad.parse_options(["--data-dir", "d"]) == mad.Config(data_dir=Path("d"))


def test_the_flags_that_users_type_already_keep_their_meaning():
    typed = "--data-dir MURA --model densenet169 --epochs 3 --batch-size 4 --lr 0.01 --checkpoint e.pth --device cpu"
    config = mad.parse_options([*typed.split(), "--tasks", "ELBOW", "HAND"])
    assert (config.data_dir, config.model, config.epochs, config.batch_size) == (Path("MURA"), "densenet169", 3, 4)
    assert (config.lr, config.checkpoint, config.tasks) == (0.01, (Path("e.pth"),), ("ELBOW", "HAND"))
    assert (config.device, config.val_split) == ("cpu", 0.2)


def test_flags_with_an_optional_value():
    assert mad.parse_options(["--demo"]).demo == Path("mura_demo")
    assert mad.parse_options(["--data-dir", "d", "--resume"]).resume == "required"
    assert mad.parse_options(["--data-dir", "d"]).resume is None


def test_the_files_of_a_run_are_named_after_the_first_checkpoint():
    assert mad.Config(checkpoint=(Path("runs/elbow.v2.pth"), Path("b.pth"))).stem == Path("runs/elbow.v2")


def test_config_cannot_be_changed_and_options_have_no_abbreviations(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(AttributeError):
        mad.Config().epochs = 3  # type: ignore[misc]
    assert "--epoch" in refusal(["--demo", "--epoch", "3"], capsys)


# ---- the help page ----


def test_help_fits_100_columns_and_names_every_flag_once(capsys: pytest.CaptureFixture[str]):
    page = help_page(capsys)
    assert max(len(line) for line in page.splitlines()) <= 100
    assert set(help_of_each_flag(page)) == {*FLAGS, "-h", "--version"}


def test_help_states_each_default_once(capsys: pytest.CaptureFixture[str]):
    entries = help_of_each_flag(help_page(capsys))
    for name, item in FIELDS.items():
        text = entries["--" + name.replace("_", "-")]
        if item.default not in (None, False, ()):
            assert text.count("default:") == 1, text
            shown = item.default[0] if isinstance(item.default, tuple) else item.default
            assert text.endswith(f"(default: {shown})"), text


def test_help_ends_with_examples_that_the_parser_takes(capsys: pytest.CaptureFixture[str]):
    page = help_page(capsys)
    lines = [line for line in page[page.index("\nexamples:") :].splitlines() if "mura_anomaly_detection.py" in line]
    examples = [line.partition("  #")[0].split()[1:] for line in lines]
    assert len(examples) >= 5
    modes = [mad.parse_options(arguments) for arguments in examples]
    assert any(config.demo for config in modes)
    assert any(config.evaluate for config in modes)
    assert any(config.predict for config in modes)
    assert any(not (config.demo or config.evaluate or config.predict) for config in modes)


def test_help_and_errors_do_not_wait_for_the_heavy_imports(tmp_path: Path):
    for package in ("torch", "torchvision", "numpy", "PIL", "tqdm", "matplotlib"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('a heavy import')\n")

    def run(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments], env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True, text=True, timeout=60, check=False,
        )
        return done.returncode, done.stdout, done.stderr

    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert "--data-dir DIR" in out
    assert run("--version") == (0, f"mura_anomaly_detection {mad.__version__}\n", "")
    code, out, err = run("--data-dir", "d", "--epcohs", "3")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "did you mean --epochs?" in err
    assert "a heavy import" in run("--demo")[2]  # the stand-ins are what a run would meet


# ---- wrong use ----


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if len(flag) > 6])
def test_a_mistyped_flag_gets_the_nearest_one(flag: str, capsys: pytest.CaptureFixture[str]):
    swapped = flag[:3] + flag[4] + flag[3] + flag[5:]
    left_out = flag[:-2] + flag[-1]
    for typed in (swapped, left_out):
        if typed not in FLAGS:
            assert f"did you mean {flag}?" in refusal(["--demo", typed], capsys)
            assert f"did you mean {flag}?" in refusal([f"{typed}=3", "--demo"], capsys)


def test_a_flag_like_none_gets_a_pointer_to_help(capsys: pytest.CaptureFixture[str]):
    assert "unrecognized arguments: --xyzzy (see --help)" in refusal(["--demo", "--xyzzy"], capsys)


@pytest.mark.parametrize(("flag", "values"), {
    "--val-split": ["0", "-0.1", "0.95", "1", "nan", "half", ""],
    "--image-size": ["63", "2049", "64.0", "-64"],
    "--epochs": ["0", "-1", "1.5", "many", "1000001", "9" * 400],
    "--batch-size": ["0", "-8", "1e2"],
    "--accumulate": ["0"],
    "--lr": ["0", "-1e-4", "11", "inf", "nan", "-inf", "1e999"],
    "--warmup": ["-0.1", "1"],
    "--weight-decay": ["-1", "inf"],
    "--flip": ["-0.1", "1.1", "nan"],
    "--rotation": ["-1", "181"],
    "--brightness": ["2", "-1"],
    "--contrast": ["1.01"],
    "--mixup": ["-0.1", "10.5", "nan"],
    "--patience": ["-1"],
    "--seed": ["-1", "1.0", str(2**31 + 1)],
    "--save-every": ["-1", "nan"],
    "--bootstrap": ["99", "100001"],
    "--workers": ["-1", "257"],
    "--threshold": ["0", "1", "-0.5", "2", "nan", "automatic"],
    "--normalization": ["mura", "0.5", "0.5,0", "1.2,0.5", "0.5,2", "a,b", "0.1,0.2,0.3", "nan,nan"],
    "--device": ["gpu", "cuda:", "cuda:-1", "cuda:a", "CPU", ""],
    "--model": ["resnet", "resnet18"],
    "--fit": ["crop"],
    "--schedule": ["step"],
    "--precision": ["fp16"],
    "--split": ["test"],
    "--cam-class": ["both"],
    "--on-bad-image": ["ignore"],
    "--resume": ["never"],
}.items())
def test_values_out_of_range_are_refused_by_flag_and_value(
    flag: str, values: list[str], capsys: pytest.CaptureFixture[str]
):
    for value in values:
        message = refusal(["--demo", f"{flag}={value}"], capsys)
        assert f"argument {flag}: " in message
        assert repr(value) in message


@pytest.mark.parametrize(("flag", "values"), {
    "--val-split": ["0.9", "1e-9"], "--image-size": ["64", "2048"], "--lr": ["10", "1e-300"], "--warmup": ["0", "0.9"],
    "--flip": ["0", "1"], "--rotation": ["0", "180"], "--seed": ["0", str(2**31)], "--bootstrap": ["100", "100000"],
    "--workers": ["0", "256"], "--patience": ["0"], "--threshold": ["1e-6", "0.999999", "auto"],
    "--normalization": ["imagenet", "dataset", "image", "0,1"], "--device": ["auto", "cpu", "mps", "cuda", "cuda:12"],
}.items())
def test_the_ends_of_each_range_are_taken(flag: str, values: list[str]):
    for value in values:
        taken = getattr(mad.parse_options(["--demo", flag, value]), flag[2:].replace("-", "_"))
        assert str(taken) == value or float(taken) == float(value)


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--data-dir", "d", "--output", "r.csv"], "--output and --save-cam go with --predict"),
    (["--demo", "--save-cam", "r.npz"], "--output and --save-cam go with --predict"),
    (["--demo", "--figure", "."], "--figure .: name a file, not a folder"),
    (["--data-dir", "d", "--figure", "f.png"], "--figure goes with --predict and --demo"),
    (["--data-dir", "d", "--split", "train"], "--split goes with --evaluate"),
    (["--demo", "--mixup", "0.2", "--batch-size", "1"], "--mixup blends images of a batch: --batch-size 1 has but one"),
    ([], "--data-dir DIR is needed, or --predict, or --demo"),
    (["--evaluate", "--checkpoint", "a.pth"], "--data-dir DIR is needed"),
    (["--data-dir"], "argument --data-dir: expected one argument"),
    (["--predict"], "argument --predict: expected at least one argument"),
    (["--demo", "--data-dir", "d"], "--demo makes its own data: leave --data-dir out"),
    (["--data-dir", "d", "--evaluate", "--predict", "a.png"], "--evaluate and --predict exclude each other"),
    (["--demo", "--export", "f.onnx"], "--export and --demo exclude each other"),
    (["--data-dir", "d", "--checkpoint", "a.pth", "b.pth"], "training writes one --checkpoint"),
    (["--data-dir", "d", "--checkpoint", "model"], "--checkpoint model: the name must end in .pth"),
    (["--data-dir", "d", "--checkpoint", "m.last.pth", "--resume"], "is the name of a saved state; give the model's, STEM.pth"),
    (["--data-dir", "d", "--evaluate", "--threshold", "auto"], "--threshold auto is chosen on val while training"),
    (["--export", "f.onnx", "--checkpoint", "a.pth", "b.pth"], "--export takes one --checkpoint"),
    (["--export", "f.tflite"], "--export f.tflite: use .onnx or .pt2"),
    (["--predict", "a.png", "--output", "o.txt"], "--output o.txt: use .csv or .json"),
    (["--predict", "a.png", "--save-cam", "o.npy"], "--save-cam o.npy: use .npz"),
    (["image.png"], "unrecognized arguments: image.png"),
    (["--demo", "folder", "two\nlines"], "unrecognized arguments: two lines"),
])
def test_flags_that_do_not_go_together_are_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
):
    assert complaint in refusal(arguments, capsys)


def test_several_checkpoints_are_an_ensemble_where_models_are_used():
    for mode in (["--data-dir", "d", "--evaluate"], ["--predict", "a.png"]):
        assert mad.parse_options([*mode, "--checkpoint", "a.pth", "b.pth"]).checkpoint == (Path("a.pth"), Path("b.pth"))


# ---- any arguments at all ----

WORDS = st.one_of(
    st.sampled_from([*FLAGS, "-h", "--version", "--", "-", "--=", "-1", "auto", "0.5", "8", "a.pth", "r.csv", "1e400"]),
    st.builds("{}={}".format, st.sampled_from(FLAGS), st.text(max_size=8)),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)


@settings(deadline=None)
@given(st.lists(WORDS, max_size=8))
@example(["--seed", "1" + "0" * 399])
@example(["--epochs=" + "9" * 5000])
@example(["--demo", "%s %(prog)s"])
def test_any_arguments_give_options_or_one_line(arguments: list[str]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            config = mad.parse_options(arguments)
        except SystemExit as ended:
            code = ended.code
        else:
            assert isinstance(config, mad.Config)
            assert mad.usage_problem(config) is None
            return
    assert code in (0, 2)
    if code == 2:
        assert out.getvalue() == ""
        assert err.getvalue().startswith("mura_anomaly_detection.py: error: ")
        assert err.getvalue().count("\n") == 1
    else:
        assert err.getvalue() == ""
        assert out.getvalue()
