"""Reward models of rankings, labels and ratings, and of several heads."""

import json
import random
from itertools import combinations
from pathlib import Path

import pytest
import torch
from loops import assert_resumes_bit_for_bit, model_folder, word, write_rows
from tiny import ARCHITECTURES
from transformers import AutoModelForSequenceClassification

from fastrlhf.data import Pair, Ranking, load_demonstrations, read_rows
from fastrlhf.data.importers import gsm8k, oasst
from fastrlhf.errors import DataError
from fastrlhf.models.policy import Policy, RewardModel
from fastrlhf.packing import pack
from fastrlhf.rewards.scorer import load_reward_model
from fastrlhf.settings.training import RewardConfig
from fastrlhf.trainers.packed_rows import full_sequences, pack_rows
from fastrlhf.trainers.reward import RewardTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
LETTERS = ("xxxab", "xyaab", "yyyab")  # of responses, from good to bad


def judged(path, kind, num=48, seed=0):
    """Responses are the better the more often they have the letter x, the less often y."""
    rng = random.Random(seed)
    rows = []
    for n in range(num):
        row = {"prompt": word(rng, "abcd", rng.randint(2, 6))}
        places = [0, 2] if n % 4 == 0 else [0, 1, 2]
        texts = [word(rng, LETTERS[place], rng.randint(4, 9)) for place in places]
        if kind == "rankings":
            order = rng.sample(range(len(places)), len(places))
            row |= {"responses": [texts[k] for k in order], "ranks": [places[k] for k in order]}
        else:
            row["completion"] = texts[(0, -1)[n % 2]]
            row |= {"labels": {"label": n % 2 == 0}, "ratings": {"rating": 3 - 2 * (n % 2)}}[kind]
        rows.append(row)
    return write_rows(path, rows)


def two_heads(path, num=48):
    """One head likes x, the other y."""
    rng = random.Random(0)
    rows = []
    for n in range(num):
        x, y = word(rng, "xxxab", rng.randint(4, 9)), word(rng, "yyyab", rng.randint(4, 9))
        sides = {"chosen": x, "rejected": y} if n % 2 else {"chosen": y, "rejected": x}
        rows.append({"prompt": word(rng, "abcd", 3), **sides, "head": "likes x" if n % 2 else "likes y"})
    return write_rows(path, rows)


@pytest.fixture
def settings(tmp_path):
    return {
        "model": model_folder(tmp_path / "model"),
        "output": str(tmp_path / "out"),
        "template": "none",
        "max_length": 64,
        "batch_size": 8,
        "device": "cpu",
        "learning_rate": 5e-3,
        "save_every": 0,
    }


def run(settings, **changes):
    return list(RewardTrainer(RewardConfig(**{**settings, **changes})))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_prompt_read_once_for_k_responses_gives_the_scores_and_gradients_of_sequences_apart(arch, tmp_path):
    model = RewardModel.from_pretrained(model_folder(tmp_path, arch=arch), new_head=True)
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    rows = [
        Ranking(prompt, [[15, 16], [17, 18, 19], [20], [21, 22, 23, 24]], [0, 1, 1, 2]),
        Ranking([], [[20, 21], [22], [23]], [0, 1, 2]),
        Pair([5], [6], [7]),
    ]
    sizes, results = [4, 3, 2], []
    for share in (False, True):
        batch = pack_rows(rows, share_prompts=share, as_responses=False, device=torch.device("cpu"))
        assert batch.num_tokens == (27 if share else 58)
        parts = [batch, *batch.microbatches(1, together=sizes)]
        whole, *cut = (model(part) for part in parts)
        torch.testing.assert_close(torch.cat(cut), whole, rtol=1e-5, atol=1e-6)
        (whole * torch.arange(1, 10)).sum().backward()
        results.append([whole.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
    apart = [model(pack([side])) for row in rows for side in full_sequences(row)]
    torch.testing.assert_close(results[1][0], torch.cat(apart), rtol=1e-5, atol=1e-5)
    for one_by_one, shared in zip(*results, strict=True):
        torch.testing.assert_close(shared, one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["plackett_luce", "all_pairs"])
def test_it_learns_rankings_and_microbatches_change_nothing(settings, tmp_path, objective):
    settings |= {"data": judged(tmp_path / "data.jsonl", "rankings"), "objective": objective}
    both = [
        run(settings, output=str(tmp_path / str(size)), max_tokens=size, epochs=4, eval_fraction=0.25)
        for size in (50, 10_000)
    ]
    for a, b in zip(*both, strict=True):
        for name in ("loss", "accuracy", "margin", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    last = both[0][-1]
    assert last["eval/accuracy"] > 0.9 and last["eval/accuracy_low"] < last["eval/accuracy"]
    assert last["eval/num_pairs"] == 9 * 3 + 3


def test_outcomes_are_learned_and_scores_stay_log_odds(settings, tmp_path):
    data = judged(tmp_path / "data.jsonl", "labels")
    last = run(settings, data=data, epochs=6, eval_fraction=0.25)[-1]
    assert last["eval/accuracy"] > 0.9 and last["eval/common"] == 0.5 and "reward_bias" not in last


def test_ratings_are_learned_in_their_own_units(settings, tmp_path):
    data = judged(tmp_path / "data.jsonl", "ratings")
    trainer = RewardTrainer(RewardConfig(**settings, data=data, epochs=8, eval_fraction=0.25))
    assert trainer.model.bias == 2.0
    *_, last = trainer
    assert last["eval/correlation"] > last["eval/correlation_low"] > 0.8 and last["eval/rmse"] < 0.6


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_each_of_several_heads_can_be_read_alone(settings, tmp_path, lora_rank):
    data = two_heads(tmp_path / "data.jsonl")
    settings |= {"lora_rank": lora_rank, "learning_rate": 1e-2, "epochs": 4}
    trainer = RewardTrainer(RewardConfig(**settings, data=data, eval_fraction=0.25))
    *_, last = trainer
    assert min(last["eval/likes x/accuracy"], last["eval/likes y/accuracy"]) > 0.8
    folder = settings["output"] + "/model"
    batch = pack([side for row in trainer.held_out for side in full_sequences(row)])
    scores = trainer.model(batch)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    logits = torch.cat([plain(input_ids=side[None]).logits for side in batch.tokens.split(batch.lengths)])
    torch.testing.assert_close(scores, logits + torch.tensor(trainer.model.biases), rtol=1e-4, atol=1e-4)
    for n, name in enumerate(["likes x", "likes y"]):
        assert plain.config.id2label[n] == name
        assert last[f"reward_bias/{name}"] == trainer.model.biases[n]
        alone = RewardModel.from_pretrained(folder, head=name)
        assert alone.heads == (name,)
        scorer = load_reward_model(folder, [f"{folder}#{name}"], trainer.tokenizer, None, dtype=torch.float32)
        for model in (alone, scorer):
            torch.testing.assert_close(model(batch), scores[:, n], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="must have 1 label, got 2; or name one: its heads are likes x, likes y"):
        RewardModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="has no head 'likes'; its heads are likes x, likes y"):
        RewardModel.from_pretrained(folder, head="likes")
    if lora_rank:
        with pytest.raises(ValueError, match="has 2 heads; name one"):
            RewardModel.from_adapter(folder + "/adapter", Policy.from_pretrained(settings["model"]))


def test_ratings_of_several_attributes_train_a_head_each(settings, tmp_path):
    rng = random.Random(0)
    rows = []
    for n in range(48):
        text = word(rng, "xxxab" if n % 2 else "yyyab", rng.randint(4, 9))
        ratings = {"x": 4.0 * (n % 2), "length": float(len(text))} if n % 3 else {"x": 4.0 * (n % 2)}
        rows.append({"prompt": "abc", "completion": text, "ratings": ratings})
    data = write_rows(tmp_path / "data.jsonl", rows)
    last = run(settings, data=data, epochs=8, eval_fraction=0.25)[-1]
    assert last["eval/x/correlation"] > 0.9 and last["eval/length/num_ratings"] == 8
    assert RewardModel.from_pretrained(settings["output"] + "/model", head="x").bias > 1


def test_a_killed_run_with_several_heads_resumes_bit_for_bit(settings, tmp_path):
    settings |= {"data": two_heads(tmp_path / "data.jsonl"), "save_every": 2, "lora_rank": 4}
    assert_resumes_bit_for_bit(RewardTrainer, RewardConfig, settings, tmp_path, killed_after=3)


def test_demonstrations_score_0_on_average_where_they_are_given(settings, tmp_path):
    rows = [{"prompt": "ab", "completion": text} for text in ("xyz", "aaaa", "bcd")]
    file, data = write_rows(tmp_path / "demonstrations.jsonl", rows), two_heads(tmp_path / "data.jsonl", num=8)
    trainer = RewardTrainer(RewardConfig(**settings, data=data, center_data=file))
    next(trainer)
    loaded = load_demonstrations(file, trainer.tokenizer, max_tokens=64, template="none")
    scores = trainer.model(pack([row.tokens for row in loaded.rows]))
    torch.testing.assert_close(scores.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    assert 0 not in trainer.model.biases


def test_a_resumed_run_refuses_other_demonstrations_to_center_on(settings, tmp_path):
    rows = [{"prompt": "ab", "completion": text} for text in ("xyz", "aaaa")]
    file, data = write_rows(tmp_path / "demonstrations.jsonl", rows), two_heads(tmp_path / "data.jsonl", num=8)
    settings |= {"data": data, "center_data": file, "save_every": 1, "epochs": 2}
    next(RewardTrainer(RewardConfig(**settings)))
    assert RewardTrainer(RewardConfig(**settings, resume=True)).num_steps_done == 1
    write_rows(file, rows[::-1])
    with pytest.raises(ValueError, match=r"resume: center_data: .*demonstrations.jsonl has changed since the run"):
        RewardTrainer(RewardConfig(**settings, resume=True))


def test_demonstrations_beyond_the_models_context_are_refused(settings, tmp_path):
    """max_length allows them, as it does rows."""
    file = write_rows(tmp_path / "demonstrations.jsonl", [{"prompt": "ab", "completion": "x" * 300}])
    options = {"data": two_heads(tmp_path / "data.jsonl", num=8), "center_data": file, "max_length": 400}
    with pytest.raises(ValueError, match=r"longest_row_of_center_data \(303\) must not exceed the model's context of"):
        RewardTrainer(RewardConfig(**{**settings, **options}))


def test_evaluation_comes_every_so_many_steps_besides_each_epoch(settings, tmp_path):
    data = judged(tmp_path / "data.jsonl", "labels")
    metrics = run(settings, data=data, epochs=2, eval_fraction=0.25, eval_every=2)
    due = [step for step, each in enumerate(metrics, 1) if "eval/accuracy" in each]
    assert due == [2, 4, 5, 6, 8, 9]


def test_a_head_may_start_at_zero(settings, tmp_path):
    data = judged(tmp_path / "data.jsonl", "labels")
    first = next(RewardTrainer(RewardConfig(**settings, data=data, head_init="zero")))
    assert first["scores"] == 0 and first["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_an_objective_says_which_columns_it_expects(settings, tmp_path):
    data = judged(tmp_path / "data.jsonl", "labels")
    with pytest.raises(
        DataError, match=r"has the columns prompt, completion, label; rankings are read from: prompt \+"
    ):
        RewardTrainer(RewardConfig(**settings, data=data, objective="all_pairs"))
    with pytest.raises(ValueError, match="center_coef has no effect on objective outcome"):
        RewardTrainer(RewardConfig(**settings, data=data, center_coef=0.1))


SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder ../shared/data")


def imported(convert, name, folder):
    """The rows that an importer makes of a real file, as a file."""
    made = [each for _, row in read_rows(SHARED / name) for each in convert(row, None)]
    return write_rows(folder / "imported.jsonl", [row for row in made if isinstance(row, dict)])


@needs_data
def test_rankings_of_oasst_train_and_cost_fewer_tokens_than_their_pairs(settings, tmp_path, capsys):
    """100 real trees; those of up to 700 bytes train, by both losses on rankings."""
    settings |= {"model": model_folder(tmp_path / "long", max_position_embeddings=1024), "template": "chat"}
    data = imported(oasst.convert, "oasst_en_100_trees.jsonl.gz", tmp_path)
    settings |= {"data": data, "max_rejected": 1.0, "max_length": 700, "epochs": 3}
    for objective in ("plackett_luce", "all_pairs"):
        trainer = RewardTrainer(
            RewardConfig(**settings | {"objective": objective, "output": str(tmp_path / objective)})
        )
        losses = [metrics["loss"] for metrics in trainer]
        assert sum(losses[-3:]) < sum(losses[:3])
        cut = [
            Pair(row.prompt, row.responses[i], row.responses[j])
            for row in trainer.rows
            for i, j in combinations(range(len(row.responses)), 2)
        ]
        ours, theirs = (sum(map(trainer.num_forward_tokens, rows)) for rows in (trainer.rows, cut))
        apart = sum(map(trainer.num_tokens, cut))
        assert trainer.shares_prompts and ours < theirs < apart
        batch = pack_rows(trainer.rows, share_prompts=True, as_responses=False, device=torch.device("cpu"))
        assert batch.num_tokens == ours
        with capsys.disabled():
            print(
                f"\n{objective}: {len(trainer.rows)} OASST rankings, {ours} tokens; as {len(cut)} pairs that share a "
                f"prompt {theirs}, as sequences {apart}; loss {losses[0]:.3f} to {losses[-1]:.3f}"
            )


@needs_data
def test_solutions_of_gsm8k_train_an_outcome_reward_model(settings, tmp_path, capsys):
    """Real solutions by four models; whatever a model of this size makes of them is reported with its interval."""
    settings |= {"model": model_folder(tmp_path / "long", max_position_embeddings=1024), "template": "chat"}
    data = imported(gsm8k.convert, "gsm8k_model_solutions.jsonl.gz", tmp_path)
    settings |= {"data": data, "max_rejected": 1.0, "max_length": 500}
    last = run(settings, limit=700, eval_fraction=0.3, batch_size=32, learning_rate=2e-3)[-1]
    assert last["eval/accuracy_low"] <= last["eval/accuracy"] <= last["eval/accuracy_high"]
    assert last["eval/loss"] < 0.75 and last["eval/num_labels"] > 100
    with capsys.disabled():
        print(
            f"\nGSM8K, {last['eval/num_labels']} held-out solutions: accuracy {last['eval/accuracy']:.3f} "
            f"[{last['eval/accuracy_low']:.3f}, {last['eval/accuracy_high']:.3f}], commoner label "
            f"{last['eval/common']:.3f}, loss {last['eval/loss']:.3f}"
        )


def test_a_folder_of_heads_is_plain_json(settings, tmp_path):
    run(settings, data=two_heads(tmp_path / "data.jsonl", num=8))
    config = json.loads(Path(settings["output"], "model", "config.json").read_text())
    assert config["id2label"] == {"0": "likes x", "1": "likes y"} and len(config["reward_bias"]) == 2
