"""PPO: it learns, it starts where it says, it does not depend on micro-batches, and it survives a kill."""

import json
import sys
from pathlib import Path

import pytest
import torch
from loops import assert_resumes_bit_for_bit, demonstrations, model_folder
from ppo_runs import VOCAB, config, make_folder, settings
from tiny import tiny_tokenizer

from fastrlhf import PPO, PPOConfig
from fastrlhf.data import shuffled
from fastrlhf.errors import NonFiniteError
from fastrlhf.models.policy import RewardModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_goes_from_below_20_to_above_80_percent_of_the_optimum(folder, seed):
    # in fewer and larger updates (20, 1e-2) one run in twenty threw its policy out again once nothing was left to learn
    changes = {"batch_size": 32, "epochs": 4, "learning_rate": 5e-3, "value_learning_rate": 5e-3, "kl_coef": 0.0}
    trainer = PPO(config(folder, seed=seed, steps=24, schedule="constant", **changes))
    scores = [metrics["objective/scores"] for metrics in trainer]
    assert scores[0] <= 0.2 and sum(scores[-3:]) / 3 >= 0.8, scores


def test_at_the_first_minibatch_ratios_are_one_and_the_kl_is_zero(folder):
    metrics = next(PPO(config(folder, minibatches=1, epochs=1)))
    assert abs(metrics["objective/kl"]) < 1e-4
    assert metrics["ppo/value/clip_fraction"] == 0
    trainer = PPO(config(folder, output=str(folder / "two"), epochs=1, minibatches=1, value_warmup_steps=0))
    metrics = next(trainer)
    assert abs(metrics["ppo/policy/ratio_max"] - 1) < 1e-4 and abs(metrics["ppo/policy/ratio_min"] - 1) < 1e-4


@pytest.mark.parametrize(("dtype", "change"), [("float32", 0.01), ("bfloat16", 1.0)])
def test_a_sampler_that_disagrees_with_the_trainer_stops_the_run(folder, dtype, change):
    bias = change * torch.randn(VOCAB)
    assert next(PPO(config(folder, dtype=dtype, output=str(folder / "right"))))
    trainer = PPO(config(folder, dtype=dtype))
    # generation calls the head's module, and the trainer reads its weight
    trainer.policy.model.lm_head.register_forward_hook(lambda head, _, logits: logits + bias.to(logits.dtype))
    with pytest.raises(RuntimeError, match="sampler and trainer disagree"):
        next(trainer)


def test_micro_batches_do_not_change_the_metrics(folder):
    runs, rows = [], demonstrations(folder / "demonstrations.jsonl")
    for max_tokens in (16, 10_000):
        output = str(folder / f"out{max_tokens}")
        trainer = PPO(
            config(folder, output=output, max_tokens=max_tokens, steps=2, ptx_data=rows, value_warmup_steps=0)
        )
        runs.append(list(trainer))
    for small, large in zip(*runs, strict=True):
        assert small.keys() == large.keys()
        for name in small:
            assert small[name] == pytest.approx(large[name], rel=1e-3, abs=1e-5), name


def test_values_start_as_scores_of_the_reward_model(folder):
    trainer = PPO(config(folder, reward=str(folder / "reward")))
    body, value_body = trainer.scorer.models[0][0].state_dict(), trainer.value_model.state_dict()
    assert all(torch.equal(body[name], value_body[name]) for name in body)
    assert len(list(trainer)) == 3


def test_a_weighted_sum_of_rewards_adds_up(folder):
    reward = f"{folder / 'reward'}=2,rewards_of_this_test:constant=0.5"
    (folder / "rewards_of_this_test.py").write_text("def constant(prompts, *_, **__):\n    return [3] * len(prompts)\n")
    sys.path.insert(0, str(folder))
    try:
        summed = next(PPO(config(folder, reward=reward, output=str(folder / "sum"))))
        alone = next(PPO(config(folder, reward=str(folder / "reward"), output=str(folder / "alone"))))
    finally:
        sys.path.remove(str(folder))
    assert summed["objective/scores"] == pytest.approx(2 * alone["objective/scores"] + 1.5, rel=1e-5)
    assert (summed["objective/scores/constant"], summed["objective/scores_std/constant"]) == (3, 0)


def test_reward_functions_get_texts_ids_and_the_other_columns(folder):
    seen = {}

    def reward(prompts, responses, *, response_ids, finished, want):
        seen.update(prompts=prompts, responses=responses, ids=response_ids, finished=finished, want=want)
        return torch.zeros(len(prompts))

    next(PPO(config(folder, reward=reward)))
    assert all(
        text == f"Say {text.split()[1]}" and want == int(text.split()[1]) % 3
        for text, want in zip(seen["prompts"], seen["want"], strict=True)
    )
    assert len(seen["responses"]) == len(seen["ids"]) == len(seen["finished"]) == 8


@pytest.mark.parametrize(
    ("reward", "text"),
    [
        (lambda prompts, responses, **_: [1.0], r"must return 8 scores, got 1$"),
        (lambda prompts, responses, **_: [float("nan")] * len(prompts), "gave nan for response 0"),
        (lambda prompts, responses, **_: [10**5000] * len(prompts), "returned a number that is too large for a float"),
        (lambda prompts, responses, **_: None, "must return 8 numbers, got None"),
        (lambda prompts, responses, **_: ["good"] * len(prompts), r"must return 8 numbers, got \['good', 'good'"),
    ],
)
def test_a_reward_function_that_returns_nonsense_is_named(folder, reward, text):
    with pytest.raises((ValueError, TypeError), match=text):
        next(PPO(config(folder, reward=reward)))


def test_a_reward_function_gets_only_the_keywords_that_it_names(folder):
    def reward(prompts, responses, want):
        return [float(number) for number in want]

    metrics = next(PPO(config(folder, reward=reward)))
    assert 0 <= metrics["objective/scores"] <= 2


@pytest.mark.parametrize(
    ("reward", "text"),
    [
        (lambda prompts, responses, *, answer: [0.0], "(missing a required .*)?argument: 'answer'"),
        (lambda prompts: [0.0], "too many positional arguments"),
    ],
)
def test_a_reward_function_that_needs_something_else_is_refused_at_the_start(folder, reward, text):
    with pytest.raises(TypeError, match=rf"reward: .* here with finished, response_ids, want: {text}"):
        PPO(config(folder, reward=reward))


def test_a_model_without_a_score_head_is_no_reward_model(folder):
    with pytest.raises(ValueError, match="has no trained score head; `fastrlhf reward` trains one"):
        PPO(config(folder, reward=str(folder / "model")))


def test_a_reward_model_that_scores_nan_is_named(folder):
    trainer = PPO(config(folder, reward=str(folder / "reward")))
    trainer.scorer.models[0][0].bias = float("nan")
    with pytest.raises(ValueError, match=rf"the reward model {folder / 'reward'} gave nan for response 0"):
        next(trainer)


def test_an_import_that_fails_inside_the_rewards_module_is_told_as_it_is(folder, monkeypatch):
    (folder / "rewards_that_import.py").write_text("import no_such_rules\n")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_rules'"):
        PPO(config(folder, reward="rewards_that_import:f"))


def test_nan_gradients_stop_the_run_and_name_step_and_checkpoint(folder):
    trainer = PPO(config(folder, save_every=1, value_warmup_steps=0))
    steps = iter(trainer)
    next(steps)
    next(trainer.policy.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match=r"policy's update, step 2, minibatch 1 .*step-000001"):
        next(steps)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"reward": "no_such_module:f"}, ValueError, "no module named 'no_such_module'"),
        ({"reward": "json:no_such_function"}, ValueError, "has no function 'no_such_function'"),
        ({"reward": "no/such/reward/model"}, FileNotFoundError, "no/such/reward/model"),
        ({"reward": "my_rewards"}, FileNotFoundError, "a function is given as module:function"),
        ({"reward": ":f"}, ValueError, "':f' names no module"),
        ({"reward": "json:dumps=much"}, ValueError, "the weight in 'json:dumps=much' is no number"),
        ({"reward": "json:dumps=nan"}, ValueError, "the weight in 'json:dumps=nan' is no number"),
        ({"reward": ""}, ValueError, "^reward is empty; give a path"),
        ({"reward": "math:hypot", "max_new_tokens": 400}, ValueError, "context of 256"),
        ({"reward": "math:hypot", "missing_eos": "drop"}, ValueError, "missing_eos: expected none, subtract:V"),
        ({"reward": "math:hypot", "data": "missing.jsonl"}, ValueError, "no file 'missing.jsonl'"),
        ({"reward": "math:hypot", "max_prompt_tokens": 3}, ValueError, "more than max_prompt_tokens = 3"),
    ],
)
def test_bad_settings_are_named_before_any_work(folder, changes, error, text):
    with pytest.raises(error, match=text):
        next(PPO(config(folder, **changes)))


@pytest.mark.parametrize("role", ["reward", "reference"])
def test_a_model_with_another_vocabulary_is_refused(folder, role):
    other = folder / "reward" if role == "reward" else Path(model_folder(folder / "other"))
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"a": ', '"renamed": ', 1))  # as many tokens, one of them another
    with pytest.raises(ValueError, match=rf"{role} .*{other.name}: its vocabulary \(300 tokens\).* 1 of them differ"):
        PPO(config(folder, **{role: str(other)}))


def test_a_reward_model_with_a_shorter_context_is_refused(folder):
    """Rotary models would score positions that they have never seen without a word."""
    short = folder / "short"
    RewardModel.from_pretrained(model_folder(short, max_position_embeddings=16), new_head=True).save_pretrained(short)
    longest = max(len(prompt.tokens) for prompt in PPO(config(folder)).prompts)
    reward = {"reward": f"{short}=1,{folder / 'reward'}=1", "output": str(folder / "b")}
    assert next(PPO(config(folder, **reward, max_new_tokens=16 - longest)))
    reward["output"] = str(folder / "c")
    with pytest.raises(ValueError, match=rf"longest_prompt \({longest}\) .* context of 16 tokens \(.*short\)"):
        PPO(config(folder, **reward, max_new_tokens=17 - longest))


def test_a_pad_that_is_the_eos_changes_nothing(folder):
    """SmolLM2's pad is its eos: responses end with it, are scored at it, and it is trained."""
    changes = {"reward": str(folder / "reward"), "batch_size": 16, "max_new_tokens": 32}
    same = list(PPO(config(folder, output=str(folder / "a"), **changes)))
    for name in ("model", "reward"):
        tiny_tokenizer(VOCAB, pad_is_eos=True).save_pretrained(folder / name)
        settings_file = folder / name / "config.json"
        settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "pad_token_id": 1}))
    assert list(PPO(config(folder, output=str(folder / "b"), **changes))) == same
    assert any(metrics["response/eos_rate"] > 0 for metrics in same)


def test_a_killed_run_resumes_bit_for_bit(folder):
    changes = {"reward": "ppo_runs:share_of_low_tokens", "steps": 8, "save_every": 2, "kl_target": 1.0}
    assert_resumes_bit_for_bit(PPO, PPOConfig, settings(folder, **changes), folder, killed_after=5)


def test_a_killed_run_with_every_memory_resumes_bit_for_bit(folder):
    """The average, the moved reference, the moments of the scores, the plan of the KL and of the demonstrations."""
    changes = {
        "reward": "ppo_runs:share_of_low_tokens",
        "ptx_data": demonstrations(folder / "demonstrations.jsonl"),
        "score_norm": "whiten",
        "kl_coef_end": 0.001,
        "reference_every": 3,
        "ema_decay": 0.9,
        "max_update_kl": 0.05,
        "estimator": "reinforce++_baseline",
        "samples_per_prompt": 2,
    }
    run = settings(folder, **changes, steps=8, save_every=2)
    assert_resumes_bit_for_bit(PPO, PPOConfig, run, folder, killed_after=5)


def test_a_step_makes_the_minibatches_asked_for_and_both_schedules_end_at_zero(folder):
    trainer = PPO(config(folder, steps=4, batch_size=9, minibatches=4, epochs=2, schedule="linear"))
    metrics = list(trainer)
    assert trainer.learner.value_optimizer.num_steps_done == 4 * 2 * 4
    assert trainer.learner.policy_optimizer.num_steps_done == 2 * 2 * 4  # after two steps for the value model alone
    assert trainer.learner.policy_optimizer.learning_rate == trainer.learner.value_optimizer.learning_rate == 0
    rates = [step.get("ppo/policy/learning_rate") for step in metrics]
    assert rates[:2] == [None, None]
    assert rates[2:] == pytest.approx([1e-3 * (1 - 3.5 / 16), 1e-3 * (1 - 11.5 / 16)])  # means over the updates


def test_the_policy_is_trained_even_in_a_run_of_one_step(folder):
    assert "ppo/policy/loss" in next(PPO(config(folder, steps=1)))


def test_a_checkpoint_of_a_version_without_purposes_goes_on_with_the_draws_it_began_with(folder):
    """There the minibatches of update n and the prompts of epoch n came in one order."""
    options = {"batch_size": 8, "minibatches": 1, "epochs": 2, "steps": 2, "save_every": 1}
    with PPO(config(folder, **options)) as trainer:
        next(trainer)
        state = trainer.state_dict()
        new = {name: shuffled(8, trainer.config.seed, 2, purpose=n) for name, n in trainer.learner.orders.items()}
        trainer.load_state_dict(state)
        assert trainer.learner.orders == state["orders"]
        del state["orders"]
        trainer.load_state_dict(state)
    before = shuffled(8, trainer.config.seed, 2)
    old = {name: shuffled(8, trainer.config.seed, 2, purpose=n) for name, n in trainer.learner.orders.items()}
    assert old == {"minibatches": before, "ptx": before} and len({tuple(x) for x in (*new.values(), before)}) == 3
    assert trainer.state_dict()["orders"] == trainer.learner.orders  # also after another resume
