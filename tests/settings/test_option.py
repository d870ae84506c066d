"""Each option's own rules, in every command's settings."""

import dataclasses
import math

import pytest
from compare import filled

from fastrlhf.cli.commands import COMMANDS
from fastrlhf.settings.option import REQUIRED, option
from fastrlhf.settings.training import TrainerConfig
from fastrlhf.settings.values import field_types, options_where

CONFIGS = list(dict.fromkeys(command.config for command in COMMANDS.values()))
# wherever an option of this name is a number, the least and the most that it takes; () around what is just outside
ABOVE_0, ABOVE_1, SHARE = ((0.0,), None), ((1.0,), None), (0, 1)
BOUNDS = {
    **dict.fromkeys(("batch_size", "max_new_tokens", "max_prompt_tokens", "max_tokens", "steps"), (1, None)),
    **dict.fromkeys(("epochs", "minibatches", "limit", "samples_per_prompt", "keep_checkpoints"), (1, None)),
    **dict.fromkeys(("lora_rank", "save_every", "top_k", "overlong_tokens", "reference_every"), (0, None)),
    **dict.fromkeys(("kl_coef", "entropy_coef", "weight_decay", "center_coef", "sft_coef", "ptx_coef"), (0, None)),
    **dict.fromkeys(("learning_rate", "value_learning_rate", "temperature", "adam_eps", "max_grad_norm"), ABOVE_0),
    **dict.fromkeys(("beta", "lora_alpha", "judge_timeout", "rollout_timeout", "kv_budget", "score_clip"), ABOVE_0),
    **dict.fromkeys(("gamma", "lam", "min_p", "warmup_ratio", "max_rejected", "min_mass"), SHARE),
    **dict.fromkeys(("clip_range", "top_p"), ((0.0,), 1)),
    **dict.fromkeys(("label_smoothing", "flip", "tie_margin"), (0, 0.5)),
    **dict.fromkeys(("max_length", "n", "best_of", "num_bins"), (2, None)),
    "dual_clip": ABOVE_1,
    "ema_decay": (0, (1.0,)),
    "eval_fraction": (0, 0.9),
    "rounds": (1, 64),
    "reward_timeout": ((0.0,), 1e9),
    "seed": (0, 2**31 - 1),
}
# what a resumed run may change: its plan, and how it runs; all else decides what it computes
PLAN = {
    "sft": {"epochs", "learning_rate", "schedule", "warmup_ratio"},
    "ppo": {"steps", "learning_rate", "schedule", "warmup_ratio", "value_learning_rate", "value_schedule"},
    "iterate": set(),
}
DECIDES = {"seed", "batch_size", "max_new_tokens", "limit", "model", "data", "dtype", "template", "lora_rank", "reward"}


def made(config, **values):
    given = {field.name: "x" for field in dataclasses.fields(config) if field.default is REQUIRED}
    given |= {"format": "gsm8k", "out": "o.jsonl"} if "format" in given else {}
    given |= {"gold": "g"} if "gold" in field_types(config) else {}
    return config(**{**given, **values})


def outside(bound, sign):
    """The bound, which is in or out, and the next value beyond it that must be out."""
    inside = not isinstance(bound, tuple)
    (edge,) = (bound,) if inside else bound
    step = sign if isinstance(edge, int) else sign * max(1e-9, abs(edge) * 1e-9)
    return edge if inside else None, edge + step if inside else edge


def of_option(config, name, value):
    """The error that a value of the option is refused for by a rule of its own; None if it passes those."""
    try:
        made(config, **{name: value})
    except ValueError as error:
        return str(error) if str(error).startswith(f"{name} must be") else None
    return None


@pytest.mark.parametrize("config", CONFIGS)
def test_a_number_is_taken_up_to_its_bound_and_refused_by_name_beyond_it(config):
    tried = 0
    for name, kind in field_types(config).items():
        for bound, sign in zip(BOUNDS.get(name, ()), (-1, 1), strict=False):
            if bound is None or ("int" not in str(kind) and "float" not in str(kind)):
                continue
            within, beyond = outside(bound, sign)
            beyond = math.floor(beyond) if "int" in str(kind) and sign < 0 else beyond
            assert of_option(config, name, beyond), f"{config.__name__}.{name}={beyond} passes"
            assert within is None or of_option(config, name, within) is None, f"{name}={within}"
            tried += 1
    assert tried or not any(name in BOUNDS for name in field_types(config))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_number_has_a_bound_that_a_negative_one_breaks(config):
    free = {"length_penalty", "repeat_ngram", "repeat_times"}  # of either sign; the others are a rule of both
    kinds = {name: str(kind) for name, kind in field_types(config).items()}
    numbers = [name for name, kind in kinds.items() if name not in free and ("int" in kind or "float" in kind)]
    assert bool(numbers) == (config.__name__ not in ("InfoConfig", "CheckConfig"))
    for name in numbers:
        assert of_option(config, name, -1), f"{config.__name__}.{name}=-1 passes"


@pytest.mark.parametrize("config", CONFIGS)
def test_a_word_that_is_none_of_the_choices_is_refused_with_all_of_them(config):
    fields = [field for field in dataclasses.fields(config) if field.metadata["choices"]]
    assert bool(fields) == (config.__name__ != "CheckConfig")
    for field in fields:
        choices = field.metadata["choices"]
        assert field.default in (*choices, None, REQUIRED), field.name
        text = of_option(config, field.name, f"{choices[-1]}x")
        assert text and ("one of" not in text or all(choice in text for choice in choices)), field.name


@pytest.mark.parametrize("config", CONFIGS)
def test_help_of_an_option_is_a_line_without_holes(config):
    for field in filled(dataclasses.fields(config)):
        help = field.metadata["help"]
        assert 0 < len(help) <= 100 and "\n" not in help and "{}" not in help, field.name


@pytest.mark.parametrize("command", PLAN)
def test_a_resumed_run_changes_its_plan_and_how_it_runs_and_nothing_that_decides_its_results(command):
    config = COMMANDS[command].config
    assert options_where(config, resume="plan") == PLAN[command]
    free = options_where(config, resume="free")
    assert {"output", "resume", "overwrite", "device", "max_tokens"} <= free
    assert not free & DECIDES and not free & options_where(config, path="input")


def test_options_that_loops_share_have_the_same_rules_in_each_of_them():
    for config in filled(config for config in CONFIGS if issubclass(config, TrainerConfig)):
        for field in filled(dataclasses.fields(TrainerConfig)):
            own = config.__dataclass_fields__[field.name].metadata
            rules = [name for name in own if name not in ("help", "rare")]
            assert {name: own[name] for name in rules} == {name: field.metadata[name] for name in rules}, field.name


def test_choices_are_told_in_the_help_where_it_asks_for_them():
    field = option("a", "{}: which", choices="a b c")
    assert field.metadata["help"] == "a, b or c: which" and field.metadata["choices"] == ("a", "b", "c")
