"""Held-out prompts during PPO: answered when due, judged by another reward, the best model kept, resumed exactly."""

import json
import math
import shutil

import pytest
import torch
from loops import assert_resumes_bit_for_bit, write_rows
from ppo_runs import config, make_folder, settings, share_of_low_tokens
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastrlhf import PPO, PPOConfig
from fastrlhf.cli.main import main
from fastrlhf.generation.engine import Engine, Sampling
from fastrlhf.runtime.saved_models import write_model
from fastrlhf.trainers.ppo.diagnostics import HealthChecks
from fastrlhf.trainers.ppo.held_out import HeldOut

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    folder = make_folder(tmp_path)
    write_rows(folder / "held_out.jsonl", [{"prompt": f"Say it {n}", "want": n} for n in range(7)])
    return folder


def changes(folder, **more):
    return {"eval_data": str(folder / "held_out.jsonl"), "eval_every": 2, "steps": 5, "value_warmup_steps": 0, **more}


def high_tokens(prompts, responses, *, response_ids, want, **_):
    """Low where the trained reward is high; and the prompts must be the held-out ones, with their columns."""
    assert [f"Say it {n}" for n in want] == list(prompts)
    return [1 - score for score in share_of_low_tokens(prompts, responses, response_ids=response_ids)]


def names(metrics):
    return {name for name in metrics if name.startswith("eval/")}


def test_held_out_prompts_are_answered_every_k_steps_and_at_the_end(folder):
    steps = list(PPO(config(folder, **changes(folder))))
    assert [bool(names(metrics)) for metrics in steps] == [False, True, False, True, True]
    best = max((m for m in steps if names(m)), key=lambda m: m["eval/score"])
    assert steps[-1]["eval/best_score"] == best["eval/score"] == steps[steps[-1]["eval/best_step"] - 1]["eval/score"]


REWARDS = """
from ppo_runs import share_of_low_tokens as low


def high(prompts, responses, **columns):
    return [1 - score for score in low(prompts, responses, **columns)]
"""


@pytest.mark.parametrize("is_best", [True, False])
def test_the_start_is_scored_and_counts_for_the_best_model(folder, capsys, is_best):
    """Against a reward that falls by training it stays the best; the last line of the command names the best one."""
    (folder / "rewards_of_held_out.py").write_text(REWARDS)
    options = {"batch_size": 32, "epochs": 4, "learning_rate": 1e-2, "kl_coef": 0.0, "schedule": "constant"}
    given = settings(folder, **changes(folder, eval_every=4, steps=4), **options)
    given |= {"reward": "rewards_of_held_out:low", "eval_reward": f"rewards_of_held_out:{'high' if is_best else 'low'}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        assert main(["ppo", *(f"--{name}={value}" for name, value in given.items())]) == 0
    first, *_, last = map(json.loads, (folder / "out/metrics.jsonl").read_text().splitlines())
    assert first["step"] == first["eval/best_step"] == 0 and names(first) == names(last)
    assert (last["eval/score"] < first["eval/score"]) == is_best
    best = max(first, last, key=lambda metrics: metrics["eval/score"])
    model = {"of the start": "model", "after step 4": "out/model"}
    which = "of the start" if is_best else "after step 4"
    told = f"best: {folder / 'out/best'} ({which}, held-out score {best['eval/score']:.4g})"
    assert capsys.readouterr().out.splitlines()[-1] == told
    weights = [load_file(folder / name / "model.safetensors") for name in ("out/best", model[which])]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_the_best_of_what_is_done_again_with_another_learning_rate_is_forgotten(folder, capsys):
    """It would be of a step that this run never made."""
    options = {**changes(folder, steps=4), "save_every": 1, "keep_checkpoints": 9, "learning_rate": 1e-2}
    with PPO(config(folder, **options)) as trainer:
        for _ in trainer:
            pass
    write_model(trainer.output, "best", trainer.num_steps_done, trainer.save)  # as if the last step had been the best
    for step in (3, 4):
        shutil.rmtree(folder / f"out/checkpoints/step-{step:06d}")
    resumed = PPO(config(folder, **{**options, "learning_rate": 1e-6}, resume=True))
    assert "best is of a later step, and is replaced" in capsys.readouterr().out
    assert not (folder / "out/best").exists() and resumed.best == {}
    *_, last = resumed
    assert last["eval/best_step"] == 4 and (folder / "out/best/model.safetensors").exists()


def test_asking_changes_nothing_of_the_training(folder):
    with_them = list(PPO(config(folder, **changes(folder))))
    without = list(PPO(config(folder, steps=5, value_warmup_steps=0, output=str(folder / "b"))))
    assert [{k: v for k, v in m.items() if k not in names(m)} for m in with_them] == without


@pytest.mark.parametrize("greedy", [False, True])
def test_scores_are_those_of_the_models_answers(folder, greedy):
    """The saved model, asked again with the same draws by an engine of its own, is worth what the run says."""
    (metrics,) = list(PPO(config(folder, **changes(folder, steps=1, eval_greedy=greedy, eval_limit=5))))
    trainer = PPO(config(folder, **changes(folder, eval_limit=5), output=str(folder / "b")))
    model = AutoModelForCausalLM.from_pretrained(folder / "out/model")
    trainer.policy.model.load_state_dict(model.state_dict())
    engine = Engine(trainer.policy.model, eos_token_ids=[1])
    prompts = [prompt.tokens for prompt in trainer.held_out.prompts]
    samples = engine.generate(prompts, Sampling(8, greedy=greedy), seeds=trainer.held_out.seeds)
    ids = [sample.response for sample in samples]
    scores = torch.tensor(share_of_low_tokens(prompts, ids, response_ids=ids), dtype=torch.float64)
    assert metrics["eval/score"] == pytest.approx(scores.mean().item(), abs=1e-6)
    assert metrics["eval/score_error"] == pytest.approx((scores.var() / 5).sqrt().item(), abs=1e-6)
    assert metrics["eval/length"] == sum(map(len, ids)) / 5 and len(prompts) == 5


def test_another_reward_judges_and_its_best_model_is_kept(folder, capsys):
    options = {"batch_size": 32, "epochs": 4, "learning_rate": 1e-2, "kl_coef": 0.0, "schedule": "constant"}
    trainer = PPO(config(folder, **changes(folder, eval_reward=high_tokens, steps=12), **options))
    kept = {0: {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}}
    for number, metrics in enumerate(trainer, 1):
        if names(metrics):
            kept[number] = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
            assert metrics["eval/trained_score"] == pytest.approx(1 - metrics["eval/score"], abs=1e-6)
    assert metrics["eval/best_step"] < 12  # the trained reward went up, so the other one went down
    best = AutoModelForCausalLM.from_pretrained(folder / "out/best")
    for name, parameter in best.named_parameters():
        assert torch.equal(parameter, kept[metrics["eval/best_step"]][name]), name
    assert (folder / "out/best/tokenizer.json").exists()
    assert "score of held-out answers fell from" in capsys.readouterr().out


def test_the_average_answers_where_it_is_the_final_model(folder):
    trainer = PPO(config(folder, **changes(folder, steps=2, ema_decay=0.99, learning_rate=1e-1)))
    *_, metrics = trainer
    policy = PPO(config(folder, **changes(folder, steps=2, learning_rate=1e-1), output=str(folder / "b")))
    *_, of_policy = policy
    assert (
        trainer.rollout.final_engine is not trainer.rollout.engine
        and policy.rollout.final_engine is policy.rollout.engine
    )
    assert metrics["eval/score"] != of_policy["eval/score"]


def test_a_killed_run_with_held_out_prompts_resumes_bit_for_bit(folder):
    run = settings(folder, **changes(folder, steps=8, eval_every=3), reward="ppo_runs:share_of_low_tokens")
    assert_resumes_bit_for_bit(PPO, PPOConfig, {**run, "save_every": 2}, folder, killed_after=5)
    for file in (folder / "whole/best").iterdir():
        assert file.read_bytes() == (folder / "killed/best" / file.name).read_bytes(), file.name


def test_a_run_is_resumed_with_its_own_held_out_prompts_only(folder):
    next(PPO(config(folder, **changes(folder), save_every=1)))
    write_rows(folder / "held_out.jsonl", [{"prompt": "Say something else"}])
    with pytest.raises(ValueError, match=r"resume: eval_data: .*held_out.jsonl has changed since the run began"):
        PPO(config(folder, **changes(folder), save_every=1, resume=True))


def test_prompts_that_are_trained_on_too_are_counted(folder, capsys):
    write_rows(folder / "held_out.jsonl", [{"prompt": "Say 3"}, {"prompt": "Say 300"}])
    PPO(config(folder, **changes(folder)))
    assert "warning: 1 of the 2 prompts of" in capsys.readouterr().out


def test_options_of_held_out_prompts_need_them(folder):
    for option, value in {"eval_every": 3, "eval_greedy": True, "eval_limit": 3, "eval_reward": "math:hypot"}.items():
        with pytest.raises(ValueError, match=f"{option}: give eval_data"):
            config(folder, **{option: value})


def test_a_single_prompt_has_no_error_and_the_first_best_stays_on_a_tie(folder):
    trainer = PPO(config(folder, **changes(folder, eval_limit=1)))
    judged = HeldOut.judge
    samples = trainer.generate(trainer.held_out.prompts, held_out=True)
    both = [judged(trainer.held_out, step, samples, trainer.pack(samples)) for step in (2, 4)]
    assert [metrics["eval/best_step"] for metrics in both] == [2, 2]
    assert all(math.isnan(metrics["eval/score_error"]) for metrics in both)


WELL = {"objective/kl": 1.0, "objective/entropy": 2.0, "response/length": 10.0, "response/eos_rate": 0.9}


@pytest.mark.parametrize(
    ("reward", "fall", "ill"), [(3.0, 0.5, True), (3.0, 0.2, False), (1.0, 0.5, False), (3.0, math.nan, False)]
)
def test_a_reward_that_rises_while_the_held_out_score_falls_is_told(reward, fall, ill):
    """By more than chance makes of it, as `Falls.limit` says."""
    health = HealthChecks()
    for scores in ((2.0, 1.0), (2.5, 0.9)):
        judged = dict(zip(("objective/scores", "eval/score"), scores, strict=True))
        assert health.check({**WELL, **judged, "eval/fall": 0.1, "eval/fall_limit": 0.3}) == []
    assert health.check({**WELL, "objective/scores": 9.0}) == []  # a step without held-out answers says nothing
    resumed = HealthChecks()
    resumed.state = json.loads(json.dumps(health.state))
    judged = {"objective/scores": reward, "eval/score": 0.5, "eval/fall": fall, "eval/fall_limit": 0.3}
    found = resumed.check({**WELL, **judged})
    assert len(found) == ill and all("fell from 1, the best so far, to 0.5 (by 0.5 on" in text for text in found)


def test_falls_are_measured_from_the_best_by_half_of_the_prompts_since_the_start(folder):
    steps = [m for m in PPO(config(folder, **changes(folder))) if names(m)]
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval/fall"] == 0 and all(m["eval/fall_limit"] >= 0 for m in steps)
    older = PPO(config(folder, **changes(folder), output=str(folder / "older")))
    state = older.held_out.state_dict()
    older.held_out.load_state_dict({name: value for name, value in state.items() if name != "falls"})
