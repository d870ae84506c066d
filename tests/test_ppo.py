"""PPO: it learns, it starts where it says, it does not depend on micro-batches, and it survives a kill."""

import json
import sys
from pathlib import Path

import pytest
import torch
from loops import assert_resumes_bit_for_bit, demonstrations, model_folder, write_rows
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastrlhf import PPO, PPOConfig
from fastrlhf.models import Policy, RewardModel
from fastrlhf.optim import NonFiniteError
from fastrlhf.rollout import Engine

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 300


@pytest.fixture
def folder(tmp_path):
    """A folder with a random 2-layer model, its tokenizer, a reward model and a prompt file."""
    model_folder(tmp_path / "model")
    RewardModel.from_pretrained(tmp_path / "model", new_head=True).save_pretrained(tmp_path / "reward")
    tiny_tokenizer(VOCAB).save_pretrained(tmp_path / "reward")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}", "want": n % 3} for n in range(40)])
    return tmp_path


def settings(folder, **changes):
    return {
        "model": str(folder / "model"),
        "data": str(folder / "prompts.jsonl"),
        "output": str(folder / "out"),
        "reward": share_of_low_tokens,
        "steps": 3,
        "batch_size": 8,
        "minibatches": 2,
        "epochs": 2,
        "max_new_tokens": 8,
        "learning_rate": 1e-3,
        "value_learning_rate": 1e-3,
        **changes,
    }


def config(folder, **changes):
    return PPOConfig(**settings(folder, **changes))


def share_of_low_tokens(prompts, responses, *, response_ids, **_):
    """The share of token ids below 30: about 30 / 300 for a random model, 1 at best."""
    return [sum(t < 30 for t in ids) / len(ids) for ids in response_ids]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_goes_from_below_20_to_above_80_percent_of_the_optimum(folder, seed):
    changes = {"batch_size": 32, "epochs": 4, "learning_rate": 1e-2, "value_learning_rate": 1e-2, "kl_coef": 0.0}
    trainer = PPO(config(folder, seed=seed, steps=20, schedule="constant", **changes))
    scores = [metrics["objective/scores"] for metrics in trainer]
    assert scores[0] <= 0.2 and sum(scores[-3:]) / 3 >= 0.8, scores


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "dr_grpo", "reinforce++", "reinforce++_baseline"])
def test_every_estimator_without_a_value_model_learns(folder, estimator):
    changes = {"batch_size": 32, "minibatches": 1, "epochs": 4, "learning_rate": 1e-2, "kl_coef": 0.0, "steps": 12}
    trainer = PPO(config(folder, estimator=estimator, samples_per_prompt=4, schedule="constant", **changes))
    assert trainer.value_model is None
    scores = [metrics["objective/scores"] for metrics in trainer]
    assert scores[0] <= 0.2 and scores[-1] >= 0.6, scores


def test_remax_compares_with_the_score_of_the_likeliest_response(folder):
    trainer = PPO(config(folder, estimator="remax", samples_per_prompt=4, max_new_tokens=1, kl_coef=0.0))
    prompts = trainer.next_prompts()
    baseline = trainer.greedy_scores(prompts)
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    for prompt, score in zip(prompts, baseline.tolist(), strict=True):
        logits = plain(torch.tensor([prompt.tokens])).logits[0, -1]
        assert score == float(logits.argmax() < 30)
    assert "ppo/policy/loss" in next(trainer)


def test_the_responses_to_a_prompt_are_neighbours_and_differ(folder):
    trainer = PPO(config(folder, estimator="rloo", samples_per_prompt=4))
    prompts = trainer.next_prompts()
    assert [prompt.text for prompt in prompts] == [prompts[n // 4 * 4].text for n in range(8)]
    assert len({tuple(sample.response) for sample in trainer.generate(prompts)}) == 8


def test_the_policys_updates_of_a_step_end_at_the_kl_limit_and_the_value_models_go_on(folder):
    changes = {"steps": 3, "minibatches": 2, "epochs": 3, "value_warmup_steps": 0, "schedule": "linear"}
    trainer = PPO(config(folder, max_update_kl=1e-6, learning_rate=1e-2, **changes))
    updates = []
    for _ in trainer:
        updates.append(
            (trainer.learner.policy_optimizer.num_steps_done, trainer.learner.value_optimizer.num_steps_done)
        )
    # one update a step: the first has KL 0, the second is not made; the schedule goes on as planned
    assert updates == [(1, 6), (7, 12), (13, 18)]


def test_the_kl_in_the_loss_holds_the_policy_at_the_reference(folder):
    def run(kl_coef):
        changes = {"steps": 8, "batch_size": 32, "learning_rate": 1e-2, "schedule": "constant"}
        changes |= {"kl_in": "loss", "kl_estimator": "k2", "kl_coef": kl_coef, "output": str(folder / str(kl_coef))}
        return [metrics["objective/kl"] for metrics in PPO(config(folder, **changes, value_warmup_steps=0))]

    held, free = run(1.0), run(0.0)
    assert held[0] == free[0] and 0 < held[-1] < 0.5 * free[-1], (held, free)


def test_the_reference_becomes_the_policy_when_that_is_due(folder):
    changes = {"reference_every": 2, "steps": 3, "learning_rate": 1e-2, "value_warmup_steps": 0}
    kl = [metrics["objective/kl"] for metrics in PPO(config(folder, **changes))]
    assert abs(kl[0]) < 1e-4 < 1e-2 < abs(kl[1]) and abs(kl[2]) < 1e-4, kl


def test_the_final_model_is_the_moving_average(folder):
    trainer = PPO(config(folder, ema_decay=0.75, value_warmup_steps=0))
    expected = [p.detach().clone() for p in trainer.policy.parameters()]
    for _ in trainer:
        for average, now in zip(expected, trainer.policy.parameters(), strict=True):
            average.mul_(0.75).add_(now.detach(), alpha=0.25)
    saved = Policy.from_pretrained(folder / "out/model").parameters()
    for found, average in zip(saved, expected, strict=True):
        torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-6)


def test_demonstrations_beside_ppo_keep_their_likelihood(folder):
    rows = demonstrations(folder / "demonstrations.jsonl")

    def run(coef, output):
        changes = {"ptx_data": rows, "ptx_coef": coef, "steps": 8, "learning_rate": 3e-3, "schedule": "constant"}
        return [m["ppo/policy/ptx_loss"] for m in PPO(config(folder, **changes, value_warmup_steps=0, output=output))]

    with_them, without = run(1.0, str(folder / "a")), run(0.0, str(folder / "b"))
    assert with_them[-1] < 0.8 * with_them[0] and with_them[-1] < 0.8 * without[-1]


def test_demonstrations_longer_than_the_context_are_refused(folder):
    rows = write_rows(folder / "long.jsonl", [{"prompt": "a b", "completion": "c" * 300}])
    with pytest.raises(ValueError, match=r"longest_demonstration \(\d+\) must not exceed the model's context of 256"):
        PPO(config(folder, ptx_data=rows))


def test_a_run_is_resumed_with_its_own_demonstrations_only(folder):
    rows = demonstrations(folder / "demonstrations.jsonl")
    next(PPO(config(folder, ptx_data=rows, save_every=1)))
    demonstrations(folder / "demonstrations.jsonl", seed=1)
    with pytest.raises(ValueError, match=r"resume: the tokens of .*demonstrations.jsonl are no longer those"):
        PPO(config(folder, ptx_data=rows, save_every=1, resume=True))


def test_at_the_first_minibatch_ratios_are_one_and_the_kl_is_zero(folder):
    metrics = next(PPO(config(folder, minibatches=1, epochs=1)))
    assert abs(metrics["objective/kl"]) < 1e-4
    assert metrics["ppo/value/clip_fraction"] == 0
    trainer = PPO(config(folder, output=str(folder / "two"), epochs=1, minibatches=1, value_warmup_steps=0))
    metrics = next(trainer)
    assert abs(metrics["ppo/policy/ratio_max"] - 1) < 1e-4 and abs(metrics["ppo/policy/ratio_min"] - 1) < 1e-4


@pytest.mark.parametrize(("dtype", "change"), [("float32", 0.01), ("bfloat16", 1.0)])
def test_a_sampler_that_disagrees_with_the_trainer_stops_the_run(folder, monkeypatch, dtype, change):
    assert next(PPO(config(folder, dtype=dtype, output=str(folder / "right"))))
    trainer = PPO(config(folder, dtype=dtype))
    generate = trainer.engine.generate

    def wrong(*args, **kwargs):
        samples = generate(*args, **kwargs)
        for sample in samples:
            sample.logprobs[:] = [x - change for x in sample.logprobs]
        return samples

    monkeypatch.setattr(trainer.engine, "generate", wrong)
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
    (folder / "rewards_of_this_test.py").write_text(
        "def constant(prompts, responses, **_):\n    return [3] * len(prompts)\n"
    )
    sys.path.insert(0, str(folder))
    try:
        summed = next(PPO(config(folder, reward=reward, output=str(folder / "sum"))))
        alone = next(PPO(config(folder, reward=str(folder / "reward"), output=str(folder / "alone"))))
    finally:
        sys.path.remove(str(folder))
    assert summed["objective/scores"] == pytest.approx(2 * alone["objective/scores"] + 1.5, rel=1e-5)


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
        (lambda prompts, responses, **_: [1.0], r"must return 8 scores, got \(1,\)"),
        (lambda prompts, responses, **_: [float("nan")] * len(prompts), "gave nan for response 0"),
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
        (lambda prompts, responses, *, answer: [0.0], "missing a required argument: 'answer'"),
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
    (folder / "rewards_that_import.py").write_text("import rewards\n")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(ModuleNotFoundError, match="No module named 'rewards'"):
        PPO(config(folder, reward="rewards_that_import:f"))


def test_nan_weights_stop_the_run_and_name_step_and_checkpoint(folder):
    trainer = PPO(config(folder, save_every=1, value_warmup_steps=0))
    steps = iter(trainer)
    next(steps)
    update = trainer.learner.update

    def poisoned(minibatch, *rest):
        return update(minibatch.with_fields(advantages=minibatch["advantages"] * float("nan")), *rest)

    trainer.learner.update = poisoned
    with pytest.raises(NonFiniteError, match=r"policy's update, step 2, minibatch 1 .*step-000001"):
        next(steps)


def test_another_backend_draws_and_the_ratios_are_to_the_policys_own_logprobs(folder):
    class Rounding:
        """What a server in half precision does to log-probabilities."""

        def __init__(self, policy):
            self.engine = Engine(policy.model, eos_token_ids=[1])

        def generate(self, *args, **options):
            samples = self.engine.generate(*args, **options)
            for sample in samples:
                sample.logprobs[:] = [logprob + 0.01 * (-1) ** n for n, logprob in enumerate(sample.logprobs)]
            return samples

    settings = config(folder, minibatches=1, epochs=1, value_warmup_steps=0)
    metrics = next(PPO(settings, backend=Rounding))
    assert abs(metrics["ppo/policy/ratio_max"] - 1) < 1e-4 and abs(metrics["objective/kl"]) < 1e-4


def test_a_cache_budget_that_holds_no_sequence_is_refused(folder):
    with pytest.raises(ValueError, match=r"kv_budget is .* but one sequence needs"):
        next(PPO(config(folder, kv_budget=1e-6)))
    assert next(PPO(config(folder, kv_budget=1e-3, output=str(folder / "small"))))


def test_top_p_needs_to_be_told_which_logprobs_the_ratio_is_to(folder):
    with pytest.raises(ValueError, match="set truncation to model"):
        config(folder, top_p=0.5)
    changes = {"top_p": 0.5, "minibatches": 1, "epochs": 1, "value_warmup_steps": 0}
    by_model = next(PPO(config(folder, output=str(folder / "m"), truncation="model", **changes)))
    by_sampler = next(PPO(config(folder, output=str(folder / "s"), truncation="sampler", **changes)))
    assert by_model["ppo/policy/ratio"] == pytest.approx(1, abs=1e-4)
    assert by_sampler["ppo/policy/ratio"] == pytest.approx(0.5, abs=0.05)  # the sampler's tokens are twice as likely
    assert abs(by_sampler["objective/kl"]) < 1e-4  # the KL is the policy's own in both


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
        ({"reward": ""}, ValueError, "give a reward model folder"),
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
    other = Path(model_folder(folder / "other"))
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"a": ', '"renamed": ', 1))  # as many tokens, one of them another
    with pytest.raises(ValueError, match=rf"{role} .*other: its vocabulary \(300 tokens\).* 1 of them differ"):
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


def test_another_reference_is_said(folder, capsys):
    other = model_folder(folder / "other", num_hidden_layers=1)
    next(PPO(config(folder, reference=other)))
    assert "the reference is another model: KL before the first update is" in capsys.readouterr().out


def test_a_reference_that_cannot_become_the_policy_is_refused(folder):
    other = model_folder(folder / "other", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"reference_every: the reference .*other cannot become a policy"):
        PPO(config(folder, reference=other, reference_every=2))


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
    changes = {"reward": "test_ppo:share_of_low_tokens", "steps": 8, "save_every": 2, "kl_target": 1.0}
    assert_resumes_bit_for_bit(PPO, PPOConfig, settings(folder, **changes), folder, killed_after=5)


def test_a_killed_run_with_every_memory_resumes_bit_for_bit(folder):
    """The average, the moved reference, the moments of the scores, the plan of the KL and of the demonstrations."""
    changes = {
        "reward": "test_ppo:share_of_low_tokens",
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
