"""Bugs that other PPO code had or has: each with the tests that would fail if we had it.

COVERED names the tests of other files, a bug a key; the tests below are of bugs that no other file covers.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
from compare import peak_bytes
from engines import engine_of, model_of, prompts_of
from loops import demonstrations, model_folder, pairs
from ppo_by_hand import ByHand, make_models, our_run, responses_of
from ppo_runs import config as ppo_config
from ppo_runs import make_folder

from fastrlhf import PPO, PPOConfig
from fastrlhf.cli.commands import COMMANDS
from fastrlhf.generation.engine import Sampling
from fastrlhf.settings.training import RewardConfig, SFTConfig
from fastrlhf.settings.values import field_types
from fastrlhf.trainers.reward import RewardTrainer
from fastrlhf.trainers.sft import SFT

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]

COVERED = {
    "torchtune: whiten(shift_mean=True) adds the mean back, so advantages are scaled but not centred": [
        "test_center_false_keeps_the_mean_and_true_removes_it",
        "test_gradients_are_those_of_the_formulas",
    ],
    "trlx: the KL statistic is k3 with the wrong sign": [
        "test_expectations_are_those_of_the_divergence",
        "test_kl_is_summed_over_responses_of_both_signs_and_k3_is_of_the_same_direction",
    ],
    "trlx: whiten ignores the mask": ["test_mean_is_0_and_biased_variance_1_over_the_mask"],
    "alpaca_farm: the KL of a token is clamped at 0": [
        "test_kl_is_summed_over_responses_of_both_signs_and_k3_is_of_the_same_direction",
        "test_rewards_values_and_returns_are_those_of_the_formulas",
    ],
    "alpaca_farm: the loss is a mean over padding too": [
        "test_gradients_are_those_of_the_formulas",
        "test_losses_and_statistics_of_the_updates_are_means_over_response_tokens",
    ],
    "TRL: approxkl and entropy are means over padding too": [
        "test_losses_and_statistics_of_the_updates_are_means_over_response_tokens"
    ],
    "TRL: the loss is a mean of micro-batches' means": [
        "test_gradients_are_those_of_the_formulas",
        "test_micro_batches_do_not_change_the_metrics",
    ],
    "TRL: EOS is no stop unless asked for": ["test_eos_ends_a_response_and_is_part_of_it"],
    "TRL: a pad that is the EOS masks real ends": [
        "test_a_pad_that_is_the_eos_changes_nothing",
        "test_a_tokenizer_whose_pad_is_its_eos_gives_the_same_tokens_and_masks",
    ],
    "TRL: the score lands one token late, and the value of a pad is trained": [
        "test_rewards_values_and_returns_are_those_of_the_formulas",
        "test_gradients_are_those_of_the_formulas",
    ],
    "TRL: a reward model with another tokenizer reads the policy's ids": [
        "test_a_model_with_another_vocabulary_is_refused"
    ],
    "TRL: no resume, and the value model, optimizer and generators are lost": [
        "test_a_killed_run_resumes_bit_for_bit",
        "test_a_killed_run_with_every_memory_resumes_bit_for_bit",
        "test_state_and_all_random_numbers_come_back",
    ],
    "TRL: a table of probabilities of the whole vocabulary for an entropy": [
        "test_policy_logprobs_and_entropies_are_those_of_the_models_logits"
    ],
    "OpenRLHF: rows are cut and their last token is overwritten with EOS": [
        "test_a_bad_row_is_rejected_with_its_reason",
        "test_a_response_that_was_cut_off_gets_no_end",
    ],
    "DeepSpeed-Chat: llama is sampled greedily": [
        "test_a_first_token_follows_the_models_distribution",
        "test_the_responses_to_a_prompt_are_neighbours_and_differ",
    ],
    "DeepSpeed-Chat: the reward model's loss is a mean over all tokens after the two responses part": [
        "test_loss_is_that_of_transformers_scores"
    ],
    "DPO's reference code: the rejected text is cut where the chosen one's prompt ends": [
        "test_a_bad_row_is_rejected_with_its_reason",
        "test_pairs_of_every_layout",
    ],
    "TRL from 0.12 on: no adaptive KL, KL limit of an update, scaling or clipping of scores": [
        "test_kl_coef_moves_towards_the_target_by_at_most_a_fifth_a_horizon",
        "test_the_policys_updates_of_a_step_end_at_the_kl_limit_and_the_value_models_go_on",
        "test_scores_are_shaped_rule_by_rule",
    ],
}


def test_every_test_that_is_named_here_exists():
    texts = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    missing = [name for names in COVERED.values() for name in names if f"\ndef {name}(" not in texts]
    assert not missing


def test_the_kl_controller_follows_the_kl_of_responses_and_not_its_reverse_or_the_mean_of_a_token(tmp_path):
    """trlx feeds it exp(r) - 1 - r of r = log policy - log reference, verl the KL of a token."""
    folder = make_models(tmp_path)
    settings = PPOConfig(model="m", data="d", output="o", reward="r", kl_coef=0.3)
    for seed in range(50):
        rows = responses_of((5, 1, 8, 3, 6, 2), eos=(), seed=seed)
        ratios = -torch.cat(ByHand(folder, rows, settings).log_ratios)
        target = 1.05 * ratios.sum().item() / 6
        reverse, a_token = (ratios.exp() - 1 - ratios).sum().item() / 6, ratios.mean().item()
        if target > 0.1 and abs(reverse / target - 1) > 0.1 and a_token < 0.5 * target:
            break  # responses on which either number would lead to another coefficient
    else:
        pytest.fail("no responses show the difference")
    with our_run(folder, rows, kl_coef=0.3, kl_target=target, steps=2) as trainer:
        found = [metrics["objective/kl_coef"] for metrics in trainer][1]
    assert found == pytest.approx(0.3 * (1 + (1 / 1.05 - 1) * 6 / 10_000), rel=1e-7)


def test_a_response_that_ends_by_any_end_token_is_not_fined_for_a_missing_one(tmp_path):
    """TRL's missing_eos_penalty looks for eos_token_id alone, whatever the stop token is."""
    folder, ends = make_folder(tmp_path), [1, *range(100, 200)]
    settings = folder / "model/generation_config.json"
    settings.write_text(settings.read_text().replace('"eos_token_id": 1', f'"eos_token_id": {ends}'))
    trainer = PPO(ppo_config(folder, missing_eos="subtract:5", max_new_tokens=4, batch_size=16))
    samples = trainer.generate(trainer.next_prompts())
    paid = trainer.shaped_scores(samples, trainer.pack(samples), torch.ones(16)).tolist()
    assert paid == [1.0 if sample.response[-1] in ends else -4.0 for sample in samples]
    assert {1.0, -4.0} == set(paid) and {sample.response[-1] for sample in samples} & {*ends[1:]}


def test_generation_keeps_no_logits_of_the_tokens_before():
    """TRL's batch_generation holds them all: 16 x 64 tokens of 8,000 numbers, 33 MB, here."""
    model = model_of(vocab=8000)
    engine, sampling = engine_of(model, eos=(), max_slots=16), Sampling(64)
    prompts = prompts_of([9] * 16)
    assert peak_bytes(lambda: engine.generate(prompts, sampling, seeds=range(16))) < 16 * 64 * 8000 * 4 / 8


@pytest.mark.parametrize(
    ("loop", "config", "data"), [(SFT, SFTConfig, demonstrations), (RewardTrainer, RewardConfig, pairs)]
)
def test_what_is_held_out_is_not_trained_on(tmp_path, loop, config, data):
    """OpenRLHF's evaluation reads the split "train" unless told otherwise."""
    settings = {"model": model_folder(tmp_path / "model"), "data": data(tmp_path / "data.jsonl"), "template": "none"}
    trainer = loop(config(**settings, output=str(tmp_path / "out"), eval_fraction=0.25))
    rows = trainer.rows
    trained, held_out = ([repr(row) for row in each] for each in (rows, trainer.held_out))
    assert len(held_out) == (len(trained) + len(held_out)) / 4 and not {*trained} & {*held_out}
    plain = next(loop(config(**settings, output=str(tmp_path / "none"))))
    assert not [name for name in plain if name.startswith("eval/")]


def documented_commands():
    """(command, option) of every line that starts with fastrlhf in README and docs, and of bare options in ppo.md."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text().replace("\\\n", " ")
        lines = re.findall(rf"(?:^ +|`)fastrlhf ({'|'.join(COMMANDS)}) ([^`\n#]*)", text, re.MULTILINE)
        lines += [("ppo", options) for options in re.findall(r"`(--[^`]*)`", text) if path.name == "ppo.md"]
        for command, options in lines:
            yield from ((command, word.split("=")[0]) for word in shlex.split(options) if word.startswith("--"))


def test_the_documented_options_exist():
    """OpenRLHF's README gives commands whose options were renamed."""
    found = set(documented_commands())
    assert {command for command, _ in found} == {*COMMANDS}
    for command, option in found:
        kinds = {name.replace("_", "-"): kind for name, kind in field_types(COMMANDS[command].config).items()}
        known = {f"--{name}" for name in kinds} | {f"--no-{name}" for name, kind in kinds.items() if kind is bool}
        assert option in known | {"--config", "--help", "--help-all"}, f"fastrlhf {command} {option}"
