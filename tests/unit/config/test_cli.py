from __future__ import annotations

import dataclasses
import math

import pytest
import yaml

from dihal.config import EvalConfig, LeaderboardConfig, ScoreRunConfig, TrainConfig
from dihal.config.cli import config_hash, dump, from_dict, parse, to_dict
from dihal.errors import UsageError

CLASSES = [TrainConfig, EvalConfig, LeaderboardConfig, ScoreRunConfig]


def _train(*argv):
    return parse(TrainConfig, [str(word) for word in argv], prog="dihal train")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes files below a folder, which becomes the working folder's sibling (relative paths must not help)."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def write(**texts):
        for name, text in texts.items():
            path = tmp_path / (name.replace("__", "/") + ".yaml")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path

    return write


# -- which value counts


def test_nothing_given_is_the_defaults():
    for kind in CLASSES:
        assert parse(kind, [], prog="x") == kind()


def test_every_way_to_write_an_option():
    for words in (
        ["--trainer.devices", "2", "--dry_run", "true"],
        ["--trainer.devices=2", "--dry-run"],
        ["trainer.devices=2", "dry_run=true"],
        ["--dry-run", "trainer.devices=2"],
        ["--dry_run", "yes", "--trainer.devices", "2"],
    ):
        config = _train(*words)
        assert (config.trainer.devices, config.dry_run) == (2, True), words
    assert _train("--resume", "false").resume is False


def test_values_are_coerced_by_declared_type(files):
    root = files(a="optim:\n  lr: 3e-4\n  betas: [9e-1, 0.99]\nbudget:\n  tokens: 1e6\nout: '7'\n")
    config = _train("--config", root / "a.yaml", "budget.seconds=30")
    assert (config.optim.lr, config.optim.betas, config.budget.tokens) == (3e-4, (0.9, 0.99), 1_000_000)
    assert type(config.budget.tokens) is int
    assert config.budget.seconds == 30.0
    assert type(config.budget.seconds) is float
    assert config.out == "7"
    assert _train("--out", "7").out == "7"
    assert _train("method.split=3").method.split == 3
    assert _train("method.split=null").method.split is None
    assert _train("trainer.devices=auto").trainer.devices == "auto"
    assert parse(ScoreRunConfig, ["score.norm_factor=inf"], prog="x").score.norm_factor == math.inf


def test_lists_of_values():
    for words in (["a,b"], ["a", "b"], ["[a, b]"], ['["a", "b"]']):
        assert _train("--data.holdout_groups", *words, "seed=3").data.holdout_groups == ("a", "b"), words
    config = parse(EvalConfig, ["--checkpoints", "runs/a", "runs/b", "--steps", "1,4", "8", "tokens=9"], prog="x")
    assert (config.checkpoints, config.steps, config.tokens) == (("runs/a", "runs/b"), (1, 4, 8), 9)


def test_value_may_hold_an_equals_sign_or_a_minus():
    from dihal.config import GenerateConfig

    assert parse(GenerateConfig, ["--prompt", "x = y"], prog="x").prompt == "x = y"
    assert parse(GenerateConfig, ["--prompt=--a=b"], prog="x").prompt == "--a=b"
    assert _train("--method.time.mean", "-1.5").method.time.mean == -1.5


def test_later_files_win_key_by_key_and_words_win_over_files(files):
    root = files(a="seed: 1\noptim: {lr: 0.1, clip: 0.5}\n", b="optim: {lr: 0.2}\n")
    config = _train("--seed", "9", "--config", root / "a.yaml", "--config", root / "b.yaml")
    assert (config.seed, config.optim.lr, config.optim.clip) == (9, 0.2, 0.5)
    config = _train("--config", root / "b.yaml", "--config", root / "a.yaml")
    assert (config.seed, config.optim.lr) == (1, 0.1)


def test_group_files_are_relative_to_the_file_that_names_them(files):
    root = files(
        run__a="method: ../method/b.yaml\nmethod.split: 4\n",
        method__b="process: p.yaml\nobjective: {kl: 0.5}\n",
        method__p="schedule: linear\n",
    )
    method = _train("--config", root / "run" / "a.yaml").method
    assert (method.split, method.objective.kl, method.process.schedule) == (4, 0.5, "linear")
    method = _train("--method", root / "method" / "b.yaml", "--method.process.schedule", "cosine").method
    assert (method.split, method.objective.kl, method.process.schedule) == (None, 0.5, "cosine")


def test_a_group_file_takes_the_place_of_the_earlier_one_but_not_of_single_keys(files):
    root = files(
        run="method: one.yaml\nmethod.split: 4\n",
        one="objective: {kl: 0.5}\nprocess: p.yaml\n",
        p="schedule: linear\n",
        two="sampler: {steps: 3}\n",
    )
    method = _train("--config", root / "run.yaml", "--method", root / "two.yaml").method
    assert (method.split, method.sampler.steps) == (4, 3)
    assert (method.objective.kl, method.process.schedule) == (0.0, "cosine")


def test_optional_groups():
    def read(*words):
        return parse(EvalConfig, words, prog="x").backbone

    assert read() is None
    assert read("backbone.dtype=bfloat16").dtype == "bfloat16"
    assert read("backbone.dtype=bfloat16", "backbone=null") is None
    assert read("backbone=null", "backbone.dtype=bfloat16").dtype == "bfloat16"


def test_empty_file_and_yaml_merge_keys(files):
    root = files(empty="# nothing\n", merge="optim: &a {lr: 0.5}\nmethod:\n  lora: {<<: {rank: 2}, alpha: 3}\n")
    config = _train("--config", root / "empty.yaml", "--config", root / "merge.yaml")
    assert (config.optim.lr, config.method.lora.rank, config.method.lora.alpha) == (0.5, 2, 3.0)


# -- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lrr", "1"], r"unknown key 'optim.lrr' \(command line\). Did you mean 'optim.lr'\?.*optim.betas"),
        (["optim.lrr=1"], r"Did you mean 'optim.lr'\?"),
        (["--lr", "1"], r"Did you mean 'optim.lr'\?"),
        (["--optimm.lr", "1"], r"Did you mean 'optim.lr'\?"),
        (["--sead", "1"], r"Did you mean 'seed'\?"),
        (["--method.denoiser.widht=3"], r"Did you mean 'method.denoiser.width'\?.*Keys of 'method.denoiser'"),
        (["--method.splti=3"], r"Did you mean 'method.split'\?"),
        (["--optim.lr", "fast"], r"optim.lr: expected a number \(float\), found 'fast' \(command line\)"),
        (["seed=1.5"], r"seed: expected a whole number \(int\), found 1.5"),
        (["seed=true"], "seed: expected a whole number"),
        (["trainer.compile=maybe"], "trainer.compile: expected true or false .*'maybe'"),
        (["trainer.devices=two"], "trainer.devices: expected a whole number .* or 'auto', found 'two'"),
        (["method.split=x"], "method.split: expected a whole number .* or null, found 'x'"),
        (["optim.betas=1,2,3"], "optim.betas: expected a list of 2 values"),
        (["optim.betas=[1,2"], "is not a list"),
        (["method.process.schedule=cosin"], "expected one of cosine, linear, log_linear.*Did you mean 'cosine'"),
        (["method.regime=gnerate"], "method.regime: expected one of replace, generate, mask, found 'gnerate'"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--resume"], "--seed needs a value"),
        (["demo.yaml"], "cannot understand 'demo.yaml'"),
        (["--config"], "--config needs a value"),
        (["--config", "none.yaml"], "'none.yaml' .*no such configuration file"),
        (["--method", "none.yaml"], r"'none.yaml' \(--method\): no such configuration file"),
        (["--config", "."], "a folder, not a configuration file"),
        (["--optim", "null"], "no such configuration file"),
    ],
)
def test_bad_words(words, message):
    with pytest.raises(UsageError, match=message):
        _train(*words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\noptim:\n  lrr: 1\n", r"unknown key 'optim.lrr' \(.*a.yaml, line 3\). Did you mean 'optim.lr'\?"),
        ("optim:\n  lr: fast\n", r"optim.lr: expected a number \(float\), found 'fast' \(.*a.yaml, line 2\)"),
        ("optim: 3\n", "optim: expected keys of its own or a YAML file, found 3"),
        ("optim:\n", "optim: expected keys of its own or a YAML file, found None"),
        ("out: 3\n", r"out: expected text \(str\), found 3"),
        ("data:\n  holdout_groups: octave\n", "data.holdout_groups: expected a list, each item text"),
        ("seed: {a: 1}\n", "seed: expected a whole number"),
        ("seed: 1\noptim: [1\nout: x\n", "a.yaml' is not valid YAML, line 3"),
        ("seed: 'x\n", "a.yaml' is not valid YAML, line 2"),
        ("- seed\n", "must hold `key: value` lines, not a list"),
        ("seed\n", "not a single value"),
        ("seed: 1\nseed: 2\n", r"'seed' is given twice in .*a.yaml' \(line 2\)"),
        ("method: none.yaml\n", r"none.yaml' \(.*a.yaml, line 1\): no such configuration file"),
        ("method: b.yml\n", "Did you mean .*b.yaml"),
        ("optim: b.yaml\n", r"unknown key 'optim.split' \(.*b.yaml, line 1\)"),
        ("1: 2\n", "unknown key '1'"),
    ],
)
def test_bad_file(text, message, files):
    root = files(a=text, b="split: 3\n")
    with pytest.raises(UsageError, match=message):
        _train("--config", root / "a.yaml")


def test_file_that_is_not_text(files):
    root = files(a="")
    (root / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not valid YAML"):
        _train("--config", root / "a.yaml")


def test_wrong_type_inside_an_optional_group():
    with pytest.raises(UsageError, match=r"backbone.dtype: expected one of float32.*Did you mean 'bfloat16'"):
        parse(EvalConfig, ["backbone.dtype=bfloat"], prog="x")
    with pytest.raises(UsageError, match=r"unknown key 'backbone.dtyp'.*Did you mean 'backbone.dtype'"):
        parse(EvalConfig, ["backbone.dtyp=bfloat16"], prog="x")


# -- help, dump, round trips


@pytest.mark.parametrize("kind", CLASSES)
def test_help_shows_every_key_with_docstring_and_default(kind, capsys):
    from dihal.config.layers import fields_of

    with pytest.raises(SystemExit) as stop:
        parse(kind, ["--help"], prog="dihal thing", description="What it does.")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: dihal thing [--config FILE.yaml ...]")
    assert "What it does." in text
    for key, field in fields_of(kind).items():
        if not (field.is_group and field.optional):
            assert f"--{key} " in text, key


def test_help_carries_the_docstrings_and_defaults(capsys):
    with pytest.raises(SystemExit):
        _train("-h")
    text = " ".join(capsys.readouterr().out.split())
    assert "Peak learning rate. (type: float, default: 0.001)" in text
    assert "Attention heads; must divide `width`. (type: int, default: 6)" in text


def test_print_config_is_read_back(files, capsys):
    root = files(a="optim: {lr: 1e-5}\nscore: {norm_factor: .inf, coordinates: [raw, rms]}\n")
    for kind, words in (
        (TrainConfig, ["optim.lr=1e-5", "data.holdout_groups=ü,b", "out=on"]),
        (EvalConfig, ["checkpoints=a,b", "backbone.dtype=bfloat16"]),
        (ScoreRunConfig, ["score.norm_factor=inf", "score.coordinates=rms"]),
    ):
        with pytest.raises(SystemExit) as stop:
            parse(kind, [*words, "--print_config"], prog="x")
        assert stop.value.code == 0
        (root / "b.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
        assert parse(kind, ["--config", str(root / "b.yaml")], prog="x") == parse(kind, words, prog="x")


def test_dictionaries_round_trip_strictly():
    config = _train("optim.lr=1e-5", "data.holdout_groups=a,b", "method.split=3", "budget.seconds=5")
    data = to_dict(config)
    assert from_dict(TrainConfig, data) == config
    assert from_dict(TrainConfig, yaml.safe_load(dump(config))) == config
    evaluation = parse(EvalConfig, ["backbone.id=x"], prog="x")
    assert from_dict(EvalConfig, to_dict(evaluation)) == evaluation
    data["optim"]["lrr"] = 1
    with pytest.raises(UsageError, match=r"lrr.*Did you mean 'lr'"):
        from_dict(TrainConfig, data)


def test_hash_sees_every_field():
    base = _train()
    assert config_hash(base) == config_hash(_train())
    changed = [_train("seed=1"), _train("optim.betas=0.9,0.99"), _train("method.process.schedule=linear")]
    assert len({config_hash(config) for config in [base, *changed]}) == 4
    assert config_hash(dataclasses.replace(base, out="x")) != config_hash(base)
