import dataclasses
import importlib

import pytest
import yaml

from fastrlhf.cli.options import parse
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.settings.training import DPOConfig, RewardConfig, SFTConfig
from fastrlhf.settings.values import dump

GIVEN = {"model": "m", "data": "d.jsonl", "output": "o"}


def length_reward(prompts, responses, **_):
    return [len(response) for response in responses]


@pytest.mark.parametrize("config_class", [SFTConfig, RewardConfig, DPOConfig, PPOConfig])
def test_every_option_has_help_and_none_too_many(config_class):
    fields = dataclasses.fields(config_class)
    assert all(field.metadata["help"] for field in fields)
    assert len([field for field in fields if not field.metadata["rare"]]) <= 48  # --help fits a screen


@pytest.mark.parametrize("name", ["lora", "whole"])
def test_short_names_of_weight_sync_are_written_out(name):
    config = PPOConfig(**GIVEN, reward="r", rollout_url="http://a", weight_sync=name)
    module, _, function = yaml.safe_load(dump(config))["weight_sync"].partition(":")
    assert getattr(importlib.import_module(module), function).__name__ == name


def test_preset_sets_defaults_and_given_values_win():
    assert PPOConfig(**GIVEN, reward="r").epochs == 4
    chat = PPOConfig(**GIVEN, reward="r", preset="chat", lam=0.9, learning_rate=1e-6)
    assert (chat.epochs, chat.kl_coef, chat.value_learning_rate, chat.schedule) == (1, 0.01, 9e-6, "cosine")
    assert (chat.lam, chat.learning_rate) == (0.9, 1e-6)


def test_values_are_converted_to_the_type_of_their_field():
    config = SFTConfig(**GIVEN, learning_rate="3e-6", weight_decay=1, limit="none", resume="true")
    assert (config.learning_rate, config.weight_decay, config.limit, config.resume) == (3e-6, 1.0, None, True)
    assert isinstance(config.weight_decay, float)


def test_a_configuration_survives_yaml():
    config = PPOConfig(**GIVEN, reward="a=0.5,b:c=0.5", kl_target=6)
    assert PPOConfig(**yaml.safe_load(dump(config))) == config


@pytest.mark.parametrize("stop", ["Human:", ["Human:", "\n\n"], ("Human:",), []])
def test_stop_strings_are_one_text_or_a_list_and_survive_yaml(stop):
    config = PPOConfig(**GIVEN, reward="r", stop=stop)
    assert config.stop == ((stop,) if isinstance(stop, str) else tuple(stop))
    assert PPOConfig(**yaml.safe_load(dump(config))) == config


def test_a_reward_function_is_kept_and_dumped_by_name():
    config = PPOConfig(**GIVEN, reward=length_reward)
    assert config.reward is length_reward
    assert yaml.safe_load(dump(config))["reward"] == f"{__name__}:length_reward"


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be a whole number, got 2.5"),
        ({"batch_size": True}, TypeError, "batch_size must be a whole number, got True"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number, got 'fast'"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be finite, got nan"),
        ({"learning_rate": 0}, ValueError, "learning_rate must be above 0, got 0.0"),
        ({"warmup_ratio": 1.5}, ValueError, "warmup_ratio must be between 0 and 1, got 1.5"),
        ({"schedule": "cosin"}, ValueError, "one of constant, linear, cosine, got 'cosin'; did you mean cosine?"),
        ({"seed": 2**31}, ValueError, "seed must be below 2\\*\\*31 = 2147483648, got 2147483648"),
        ({"resume": "maybe"}, TypeError, "resume must be true or false, got 'maybe'"),
        ({"resume": True, "overwrite": True}, ValueError, "resume and overwrite exclude each other"),
        ({"output": None}, TypeError, "output must be text, got None"),
        ({"limit": -1}, ValueError, "limit must be at least 1, got -1"),
        ({"eval_data": "e", "eval_fraction": 0.1}, ValueError, "give eval_data \\(e\\) or eval_fraction \\(0.1\\)"),
    ],
)
def test_wrong_values_are_refused_by_name(values, error, text):
    with pytest.raises(error, match=text):
        SFTConfig(**{**GIVEN, **values})


SERVER = {"rollout_url": "http://a, http://b/", "weight_sync": "stale"}


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"minibatches": 33}, ValueError, r"minibatches \(33\) must not exceed batch_size \(32\)"),
        ({"preset": "chatt"}, ValueError, "did you mean chat?"),
        ({"steps": 2, "value_warmup_steps": 2}, ValueError, r"value_warmup_steps \(2\) must be less than steps \(2\)"),
        ({"gamma": 1.1}, ValueError, "gamma must be between 0 and 1, got 1.1"),
        ({"clip_range": 1.5}, ValueError, "clip_range must be between 0 and 1, got 1.5"),
        ({"missing_eos": "drop"}, ValueError, "missing_eos: expected none, subtract:V or replace:V"),
        ({"ema_decay": 1}, ValueError, "ema_decay must be below 1"),
        ({"top_p": 0, "truncation": "model"}, ValueError, "top_p must be above 0, got 0.0"),
        ({"top_k": -1, "truncation": "model"}, ValueError, "top_k must be at least 0, got -1"),
        ({"min_p": 2, "truncation": "model"}, ValueError, "min_p must be between 0 and 1, got 2.0"),
        ({"kl_target": 6, "kl_coef": 0}, ValueError, "kl_coef, which must start above 0"),
        ({"kl_coef_end": 1e-3, "kl_coef": 0}, ValueError, "kl_coef, which must start above 0"),
        ({"kl_target": 6, "kl_coef_end": 1e-3}, ValueError, "not both"),
        ({"kl_in": "loss"}, ValueError, "the mean gradient of k1 is 0"),
        ({"estimator": "grpo", "samples_per_prompt": 4, "kl_estimator": "k1"}, ValueError, "kl_in=loss: .* k1 is 0"),
        ({"max_update_kl": 0.1, "truncation": "sampler"}, ValueError, "max_update_kl: with truncation=sampler"),
        (
            {"min_response_tokens": 129, "missing_eos": "replace:0"},
            ValueError,
            r"min_response_tokens \(129\) must not exceed max_new_tokens \(128\)",
        ),
        ({"overlong_tokens": 129}, ValueError, r"overlong_tokens \(129\) must not exceed max_new_tokens \(128\)"),
        ({"batch_size": 9, "samples_per_prompt": 2}, ValueError, r"multiple of samples_per_prompt \(2\)"),
        (
            {"loss_mean": "prompt", "samples_per_prompt": 8, "minibatches": 5},
            ValueError,
            r"minibatches \(5\) must not exceed the 4 prompts of a step",
        ),
        ({"estimator": "grpo"}, ValueError, "samples_per_prompt must be above 1"),
        ({"kl_target": 0}, ValueError, "kl_target must be above 0, got 0.0"),
        (
            {"reward": ["a", "b"]},
            TypeError,
            r"reward must be text, a function or a model .*, got \['a', 'b'\]",
        ),
        ({"limit": length_reward}, TypeError, "limit must be a whole number"),
        ({"min_new_tokens": 2}, ValueError, "min_new_tokens=2: the sampler would draw from another distribution"),
        ({"repeat_ngram": 3}, ValueError, "repeat_times at least 2, or both 0, got 3 and 0"),
        ({"stop": ["a", ""]}, TypeError, r"stop must be text or a list of texts, none empty, got \['a', ''\]"),
        ({"stop": "[a"}, TypeError, r"stop: '\[a' is no list; write \['first', 'second'\]"),
        ({"stop": 3}, TypeError, "stop must be text or a list of texts, none empty, got 3"),
        ({"rollout_url": "http://a"}, ValueError, "rollout_url: give weight_sync=module:function"),
        (SERVER | {"rollout_url": "a:8000"}, ValueError, "rollout_url must be URL,URL,... of http:// or https://"),
        (SERVER | {"top_k": 5, "truncation": "sampler"}, ValueError, "top_k=5, .* before or after these, not both"),
        (SERVER | {"min_new_tokens": 5, "truncation": "model"}, ValueError, "min_new_tokens=5: a server tells"),
        (SERVER | {"temperature": 2.1}, ValueError, "temperature must be from 0.01 to 2 with rollout_url, got 2.1"),
        (SERVER | {"temperature": 0.001}, ValueError, "temperature must be from 0.01 to 2 with rollout_url, got 0.001"),
        (SERVER | {"rollout_timeout": 0}, ValueError, "rollout_timeout must be above 0, got 0"),
        (SERVER | {"rollout_key_file": " "}, ValueError, "rollout_key_file is empty"),
        (SERVER | {"parallel": "fsdp"}, ValueError, "rollout_url: no process has all weights under parallel=fsdp"),
        (SERVER | {"temperature": 0.7}, ValueError, "temperature=0.7: raw_logprobs are those of temperature 1"),
        (
            SERVER | {"temperature": 0.7, "estimator": "remax", "rollout_logprobs": "processed_logprobs"},
            ValueError,
            "remax: a server tells log-probabilities of a greedy response at temperature 1, not 0.7",
        ),
        (
            SERVER
            | {"temperature": 0.7, "eval_greedy": True, "eval_data": "e", "rollout_logprobs": "processed_logprobs"},
            ValueError,
            "eval_greedy: a server tells log-probabilities of a greedy response",
        ),
    ],
)
def test_wrong_ppo_values_are_refused_by_name(values, error, text):
    with pytest.raises(error, match=text):
        PPOConfig(**{**GIVEN, "reward": "r", **values})


WITHOUT_VALUES = {"estimator": "rloo", "samples_per_prompt": 2}


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        (WITHOUT_VALUES, {"value_warmup_steps": 1}),
        (WITHOUT_VALUES, {"value_schedule": "constant"}),
        (WITHOUT_VALUES, {"value_coef": 0.5}),
        (WITHOUT_VALUES, {"clip_range_value": None}),
        (WITHOUT_VALUES, {"gamma": 0.9}),
        (WITHOUT_VALUES, {"whiten_rewards": True}),
        ({"estimator": "remax"}, {"whiten_rewards": True}),
        ({}, {"min_response_tokens": 2}),
        ({}, {"overlong_penalty": 2.0}),
        ({}, {"ptx_coef": 0.5}),
        ({}, {"weight_sync": "stale"}),
        ({}, {"rollout_model": "m"}),
        ({}, {"rollout_key_file": "k"}),
        ({}, {"rollout_timeout": 1.0}),
        (SERVER, {"kv_budget": 1.0}),
        (SERVER, {"cuda_graphs": False}),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(given, unused):
    config = PPOConfig(**GIVEN, reward="r", **given)
    assert PPOConfig(**yaml.safe_load(dump(config))) == config  # with all defaults told, none is refused
    with pytest.raises(ValueError, match=next(iter(unused))):
        PPOConfig(**GIVEN, reward="r", **given, **unused)


def test_cuda_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU"):
        SFTConfig(**GIVEN, device="cuda").resolve_device()


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("gae", ("reward", "k1")), ("rloo", ("reward", "k1")), ("grpo", ("loss", "k3")), ("dr_grpo", ("loss", "k3"))],
)
def test_the_kl_is_where_the_paper_of_an_estimator_has_it(estimator, expected):
    given = {"model": "m", "data": "d", "output": "o", "reward": "r", "estimator": estimator, "samples_per_prompt": 4}
    config = PPOConfig(**given)
    assert (config.kl_in, config.kl_estimator) == expected
    asked = PPOConfig(**given, kl_in="reward")
    assert (asked.kl_in, asked.kl_estimator) == ("reward", "k1")


def test_keywords_of_the_template_are_a_mapping_of_yaml_python_or_a_command_line(tmp_path):
    keywords = {"enable_thinking": False, "effort": {"level": 3}}
    written = (
        "{enable_thinking: false, effort: {level: 3}}",
        '{"enable_thinking": false, "effort": {"level": 3}}',
        keywords,
    )
    for value in written:
        config = SFTConfig(model="m", data="d", output="o", template_kwargs=value)
        assert config.template_kwargs == keywords
        assert SFTConfig(**yaml.safe_load(dump(config))) == config
    assert parse(SFTConfig, ["--model=m", "--data=d", "--output=o", "--template-kwargs", written[0]]) == config
    assert SFTConfig(model="m", data="d", output="o", template_kwargs="none").template_kwargs is None
    for wrong, text in (("fast", "must be a mapping"), ("{a", "is no mapping"), ({1: 2}, "must be a mapping")):
        with pytest.raises(TypeError, match=f"template_kwargs.*{text}"):
            SFTConfig(model="m", data="d", output="o", template_kwargs=wrong)
    with pytest.raises(ValueError, match="template_kwargs are the chat template's, but template is none"):
        SFTConfig(model="m", data="d", output="o", template="none", template_kwargs=keywords)
