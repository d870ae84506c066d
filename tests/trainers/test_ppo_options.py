"""The options of PPO, each in short runs: estimators, the KL, ends of updates, demonstrations, other backends."""

import pytest
import torch
from hooks import after_forward
from loops import demonstrations, model_folder, write_rows
from ppo_runs import config, make_folder
from transformers import AutoModelForCausalLM

from fastrlhf import PPO
from fastrlhf.generation.engine import Engine
from fastrlhf.models.policy import Policy, RewardModel
from fastrlhf.trainers.ppo.advantages import with_advantages

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "dr_grpo", "reinforce++", "reinforce++_baseline"])
def test_every_estimator_without_a_value_model_learns(folder, estimator):
    changes = {"batch_size": 32, "minibatches": 1, "epochs": 4, "learning_rate": 1e-2, "kl_coef": 0.0, "steps": 12}
    trainer = PPO(config(folder, estimator=estimator, samples_per_prompt=4, schedule="constant", **changes))
    assert trainer.value_model is None
    scores = [metrics["objective/scores"] for metrics in trainer]
    assert scores[0] <= 0.2 and scores[-1] >= 0.6, scores


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "reinforce++_baseline"])
def test_a_reward_that_is_always_the_same_does_not_push_the_policy(folder, estimator):
    """The gradient was as large as that of any reward: the KL's noise over its own deviation."""
    options = {"estimator": estimator, "samples_per_prompt": 4, "reward": lambda prompts, responses, **_: [0.0] * 8}
    metrics = next(PPO(config(folder, **options, kl_coef=0.05)))
    assert metrics["ppo/policy/grad_norm"] < 1e-5 and metrics["objective/frac_reward_zero_std"] == 1.0


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


def gradients(trainer, prompts, samples, minibatch, max_tokens):
    """Of the policy and the value model, and what the step's pack says, without and with the prompts' copies."""
    batch, scores, _ = trainer.score(prompts, samples)
    batch, _ = with_advantages(trainer.config, batch, trainer.shaped_scores(samples, batch, scores), kl_coef=0.1)
    trainer.learner.add_gradients(batch.select(minibatch), True, lambda _: None, max_tokens)
    models = [model for model in (trainer.policy, trainer.value_model) if model is not None]
    grads = [p.grad.clone() for model in models for p in model.parameters() if p.grad is not None]
    for model in models:
        model.zero_grad()
    return batch, scores, grads


@pytest.mark.parametrize("max_tokens", [30, 10_000])
@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2"])
def test_a_prompt_read_once_for_its_responses_gives_the_gradients_of_reading_it_with_each(folder, arch, max_tokens):
    """Also of a minibatch that has some responses to a prompt only, and of micro-batches that part them."""
    model_folder(folder / "model", arch=arch)
    RewardModel.from_pretrained(folder / "model", new_head=True).save_pretrained(folder / "reward")
    trainer = PPO(config(folder, reward=str(folder / "reward"), samples_per_prompt=4, estimator="gae"))
    assert trainer.shares_prompts
    prompts = trainer.next_prompts()
    samples, minibatch = trainer.generate(prompts), [1, 3, 4, 5, 7]
    once, scores, grads = gradients(trainer, prompts, samples, minibatch, max_tokens)
    trainer.shares_prompts = False
    apart, expected_scores, expected = gradients(trainer, prompts, samples, minibatch, max_tokens)
    saved = 3 * sum(len(prompt.tokens) for prompt in prompts[::4])
    assert apart.num_tokens - once.num_tokens == saved and once.num_tokens_unshared == apart.num_tokens
    torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-5)
    for name, values in apart.fields.items():
        torch.testing.assert_close(once[name], values, rtol=1e-4, atol=1e-5, msg=name)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_prompts_are_read_with_each_response_if_asked_for(folder):
    trainer = PPO(config(folder, samples_per_prompt=4, estimator="rloo", share_prompts=False))
    prompts = trainer.next_prompts()
    samples = trainer.generate(prompts)
    assert trainer.pack(samples).num_tokens == sum(len(s.prompt) + len(s.response) for s in samples)


@pytest.mark.parametrize(("loss_mean", "together"), [("prompt", True), ("sequence", False)])
def test_minibatches_keep_the_responses_to_a_prompt_together_where_the_loss_is_a_mean_over_them(
    folder, loss_mean, together
):
    changes = {"loss_mean": loss_mean, "estimator": "rloo", "batch_size": 20, "samples_per_prompt": 4, "minibatches": 3}
    ppo, seen = PPO(config(folder, **changes)), []

    def note(policy, inputs, output):
        if torch.is_grad_enabled():  # a minibatch is one micro-batch here
            seen.append(inputs[0])

    with after_forward(Policy, note):
        next(ppo)
    assert len(seen) == 2 * 3
    for epoch in (seen[:3], seen[3:]):
        prompts = [set(minibatch["prompt_ids"].tolist()) for minibatch in epoch]
        assert set().union(*prompts) == set(range(5)) and sum(m.num_sequences for m in epoch) == 20
        assert (sum(map(len, prompts)) == 5) == together
        if together:
            assert [m.num_sequences for m in epoch] == [4, 8, 8]


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


def test_a_reference_that_cannot_become_the_policy_is_refused(folder):
    other = model_folder(folder / "other", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"reference_every: the reference .*other cannot become a policy"):
        PPO(config(folder, reference=other, reference_every=2))


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
    with pytest.raises(ValueError, match=r"resume: ptx_data: .*demonstrations.jsonl has changed since the run began"):
        PPO(config(folder, ptx_data=rows, save_every=1, resume=True))


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


def test_another_reference_is_said(folder, capsys):
    other = model_folder(folder / "other", num_hidden_layers=1)
    next(PPO(config(folder, reference=other)))
    assert "the reference is another model: KL before the first update is" in capsys.readouterr().out


def test_a_run_may_be_resumed_with_a_smaller_cache(folder):
    next(PPO(config(folder, save_every=1)))
    resumed = PPO(config(folder, save_every=1, resume=True, kv_budget=1e-3, max_slots=2, samples_every=1))
    assert resumed.num_steps_done == 1 and len(list(resumed)) == 2


def test_samples_of_an_earlier_run_do_not_survive_overwrite(folder):
    list(PPO(config(folder)))
    next(PPO(config(folder, overwrite=True, samples_every=0)))
    assert not (folder / "out/samples.jsonl").exists()


def test_stop_strings_and_repetition_end_responses_and_eos_waits(folder):
    letters = [chr(c) for c in range(ord("a"), ord("z"))]
    changes = {"stop": letters, "max_new_tokens": 20, "min_new_tokens": 3, "truncation": "model"}
    ppo = PPO(config(folder, **changes, output=str(folder / "stop")))
    samples = ppo.generate(ppo.next_prompts())
    last = ppo.tokenizer.batch_decode([sample.response[-1:] for sample in samples])
    assert all(len(sample.response) >= 3 and 1 not in sample.response[:3] for sample in samples)
    stopped = [any(letter in text for letter in letters) for text in last]
    assert any(stopped)
    for sample, stops in zip(samples, stopped, strict=True):
        assert sample.finished == (stops or sample.response[-1] == 1)
        assert sample.finished or len(sample.response) == 20
    ppo = PPO(config(folder, repeat_ngram=20, repeat_times=2, max_new_tokens=60, output=str(folder / "repeat")))
    with torch.no_grad():
        ppo.policy.model.lm_head.weight.zero_()
        ppo.policy.model.lm_head.weight[7] = 1e4 * ppo.policy.model.model.norm.weight.sign()
    samples = [sample for sample in ppo.generate(ppo.next_prompts(), greedy=True)]
    assert all(not sample.finished and len(sample.response) < 60 for sample in samples)
