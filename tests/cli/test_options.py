import dataclasses

import pytest

from fastrlhf.cli.options import help_text, parse
from fastrlhf.settings.best_of_n import BestOfNConfig, OveroptimizeConfig, SweepConfig
from fastrlhf.settings.data import DataConvertConfig
from fastrlhf.settings.feedback import IterateConfig, LabelConfig, ReviseConfig
from fastrlhf.settings.other_names import OPTION, OTHERS
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.settings.run import RunConfig
from fastrlhf.settings.training import DPOConfig, KTOConfig, RewardConfig, SFTConfig
from fastrlhf.settings.values import dump
from fastrlhf.settings.yaml_file import UsageError

GIVEN = ["--model", "m", "--data", "d.jsonl", "--output", "o"]


def test_spaces_equals_dashes_and_underscores_are_alike():
    config = parse(
        SFTConfig, [*GIVEN, "--batch-size", "8", "--max_tokens=64", "--save_every", "5", "--eval-data=a_b=c"]
    )
    assert (config.batch_size, config.max_tokens, config.save_every, config.eval_data) == (8, 64, 5, "a_b=c")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], True),
        (["--whiten"], True),
        (["--no-whiten"], False),
        (["--whiten", "false"], False),
        (["--whiten=True"], True),
        (["--whiten", "--resume"], True),
    ],
)
def test_flags_take_every_usual_form(arguments, expected):
    assert parse(PPOConfig, [*GIVEN, "--reward", "r", *arguments]).whiten is expected


def test_a_negative_number_is_a_value():
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        parse(SFTConfig, [*GIVEN, "--seed", "-1"])


@pytest.mark.parametrize(
    ("text", "stop"),
    [("Human:", ("Human:",)), (r'["\n\nHuman:", "[END]"]', ("\n\nHuman:", "[END]")), (", ", (", ",)), ("[]", ())],
)
def test_stop_strings_on_a_command_line_are_one_text_or_a_list(text, stop):
    assert parse(PPOConfig, [*GIVEN, "--reward", "r", "--stop", text]).stop == stop


def test_command_line_wins_over_yaml_and_yaml_over_the_preset(tmp_path):
    file = tmp_path / "ppo.yaml"
    file.write_text("model: m\ndata: d\nreward: r\npreset: chat\nkl-coef: 0.02\nlam: 0.9\nlearning_rate: 3e-6\n")
    config = parse(PPOConfig, ["--config", str(file), "--output=o", "--lam", "0.5"])
    assert (config.epochs, config.kl_coef, config.lam, config.learning_rate) == (1, 0.02, 0.5, 3e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--lerning-rate", "1"], "unknown option --lerning-rate; did you mean --learning-rate?"),
        (["--qwertz", "1"], "unknown option --qwertz$"),
        (["--lr", "1e-4"], "unknown option --lr; here it is --learning-rate$"),
        (["--num-train-epochs=3"], "unknown option --num-train-epochs; here it is --epochs$"),
        (["--learning-rate-scheduler", "cosine"], "here it is --schedule$"),
        (["--lr_scheduler_type", "cosine"], "here it is --schedule$"),
        (["--per-device-train-batch-size", "4"], "; --batch-size is that of a whole step, which --max-tokens cuts"),
        (["--max-steps", "9"], "; the length of a run is --epochs, or fewer rows: --limit$"),
        (["--output_dir", "o"], "unknown option --output_dir; here it is --output$"),
        (["--actor_rollout_ref.actor.optim.lr=1"], "here it is --learning-rate$"),
        (["trainer.total_epochs=3"], "expected an option --key, got 'trainer.total_epochs=3'; here it is --epochs$"),
        (["--beta", "0.1"], "unknown option --beta$"),
        (["--batch-size"], "option --batch-size needs a value"),
        (["--batch-size", "--resume"], "option --batch-size needs a value"),
        (["--seed", "1", "--seed", "2"], "option --seed is given twice"),
        (["stray"], "expected an option --key, got 'stray'"),
        (["--config", "nowhere.yaml"], "config: no file 'nowhere.yaml'"),
        (["--no-seed"], "unknown option --no-seed"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, text):
    with pytest.raises(UsageError, match=text):
        parse(SFTConfig, [*GIVEN, *arguments])


def test_the_hint_is_at_an_option_that_the_command_has():
    for option, text in (
        ("--beta=0.1", "here it is --kl-coef"),
        ("--max-steps=9", "here it is --steps"),
        ("--num-train-epochs=3", "the length of a run is --steps"),
        ("--max-length=9", "lengths are --max-prompt-tokens and --max-new-tokens"),
    ):
        with pytest.raises(UsageError, match=rf"unknown option {option.partition('=')[0]}; {text}$"):
            parse(PPOConfig, [*GIVEN, "--reward", "r", option])
    known = {
        field.name for kind in (SFTConfig, RewardConfig, DPOConfig, PPOConfig) for field in dataclasses.fields(kind)
    }
    for names, *texts in OTHERS:
        for option in OPTION.findall(" ".join(texts)):
            assert option.replace("-", "_") in known, f"{names}: there is no --{option}"


def test_values_without_a_key_fill_the_positional_fields_in_order():
    given = ("--format", "oasst")
    for arguments in (
        ["in.jsonl", "out.jsonl", *given],
        ["in.jsonl", *given, "out.jsonl"],
        [*given, "--out=out.jsonl", "--file", "in.jsonl"],
    ):
        config = parse(DataConvertConfig, arguments)
        assert (config.file, config.out, config.format) == ("in.jsonl", "out.jsonl", "oasst")
    with pytest.raises(UsageError, match="missing OUT, --format"):
        parse(DataConvertConfig, ["in.jsonl"])
    with pytest.raises(UsageError, match="expected an option --key, got 'third'"):
        parse(DataConvertConfig, ["in.jsonl", "out.jsonl", "third"])
    with pytest.raises(UsageError, match="--file is given twice"):
        parse(DataConvertConfig, ["in.jsonl", "--file", "other.jsonl"])


def test_help_shows_positional_fields_in_the_usage_and_first():
    lines = help_text("fastrlhf data convert", DataConvertConfig).splitlines()
    assert lines[0].startswith("fastrlhf data convert FILE OUT [--config FILE.yaml] [--option VALUE ...]: ")
    assert [line.split()[0] for line in lines[1:4]] == ["FILE", "OUT", "--format"]


def test_missing_options_are_named():
    with pytest.raises(UsageError, match="missing --data, --output"):
        parse(SFTConfig, ["--model", "m"])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("lerning_rate: 1", "unknown key lerning_rate; did you mean learning_rate?"),
        ("lr: 1", "unknown key lr; here it is learning_rate$"),
        ("per_device_train_batch_size: 4", "; batch_size is that of a whole step, which max_tokens cuts"),
        ("- a\n- b", "must hold lines `key: value`, got list"),
        ("a: [", "is not YAML"),
        ("seed: 1\nepochs: 2\nseed: 2", "seed is given twice"),
        ("max-tokens: 1\nmax_tokens: 2", "max_tokens is given twice"),
    ],
)
def test_a_wrong_yaml_file_is_refused(tmp_path, text, error):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=error):
        parse(SFTConfig, [*GIVEN, "--config", str(file)])


@pytest.mark.parametrize(
    "config_class",
    [
        SFTConfig,
        RewardConfig,
        DPOConfig,
        KTOConfig,
        PPOConfig,
        RunConfig,
        DataConvertConfig,
        BestOfNConfig,
        SweepConfig,
        OveroptimizeConfig,
        LabelConfig,
        ReviseConfig,
        IterateConfig,
    ],
)
def test_help_fits_a_screen(config_class):
    lines = help_text("fastrlhf reward", config_class).splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 115


def test_help_all_has_every_option_and_help_says_how_many_it_leaves_out():
    every, usual = (help_text("fastrlhf ppo", PPOConfig, everything=e).splitlines() for e in (True, False))
    assert len(every) == 1 + len(dataclasses.fields(PPOConfig))
    assert usual[-1].split(maxsplit=1) == ["--help-all", f"{len(every) - len(usual) + 1} more options"]
    assert max(map(len, every)) <= 115


def test_a_resumed_run_keeps_its_plan_unless_another_is_given(tmp_path):
    given = ["--model", "m", "--data", "d", "--output", str(tmp_path), "--reward", "r"]
    begun = parse(PPOConfig, [*given, "--steps=150", "--learning-rate=3e-5", "--batch-size=8"])
    (tmp_path / "config.yaml").write_text(dump(begun))
    resumed = parse(PPOConfig, [*given, "--resume", "--learning-rate=1e-6"])
    assert (resumed.steps, resumed.learning_rate) == (150, 1e-6)
    assert resumed.batch_size == PPOConfig.batch_size, "which a resumed run is refused for, by its name"
    assert parse(PPOConfig, given).steps == PPOConfig.steps
