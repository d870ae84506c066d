"""The grammar of rewards, and what it makes of scores, against numpy."""

import numpy as np
import pytest
import torch
from compare import filled
from loops import model_folder, write_rows
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from fastrlhf.data import Prompt
from fastrlhf.generation.engine import Sample
from fastrlhf.models.policy import RewardModel
from fastrlhf.packing import pack
from fastrlhf.rewards.combine import FORMS, Combined, combine, parse_reward, sources_of
from fastrlhf.rewards.scorer import Scorer
from fastrlhf.rewards.sources import is_model, reward_folders, short_names, split_head
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.trainers.ppo.trainer import PPO

rng = np.random.default_rng(0)
A, B, C = rng.normal(size=(3, 50))
SCORES = {name: torch.from_numpy(values) for name, values in {"a": A, "b": B, "m:c": C}.items()}
LCB = np.mean([A, B, C], 0) - 0.5 * np.sqrt(np.mean((np.stack([A, B, C]) - np.mean([A, B, C], 0)) ** 2, 0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", A),
        ("a=2", 2 * A),
        ("a=0.25, m:c=-1.5", 0.25 * A - 1.5 * C),
        ("a,a=2", 3 * A),
        ("mean(a|b|m:c)", (A + B + C) / 3),
        ("min(a|b)=2,m:c", 2 * np.minimum(A, B) + C),
        ("lcb(a|b|m:c;0.5)", LCB),
        ("lcb( a | b | m:c ; 0.5 )", LCB),
        ("lcb(a|b;1)", np.minimum(A, B)),  # of two, mean - deviation is the lesser
        ("gate(a|b;0.3)", np.where(B >= 0.3, A, B)),
        ("gate(a|b;0.3;-2)", np.where(B >= 0.3, A, -2.0)),
        ("standard(a;0.5;2)=3", 3 * (A - 0.5) / 2),
        ("gate(standard(a;1;4)|min(b|m:c);-1e-1)", np.where(np.minimum(B, C) >= -0.1, (A - 1) / 4, np.minimum(B, C))),
    ],
)
def test_a_reward_is_what_numpy_makes_of_the_scores(text, expected):
    np.testing.assert_allclose(combine(parse_reward(text), SCORES).numpy(), expected, rtol=1e-14, atol=1e-14)


def test_the_gate_opens_at_its_threshold():
    scores = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.5, 0.4999])}
    assert combine(parse_reward("gate(a|b;0.5;-9)"), scores).tolist() == [1.0, -9.0]


def test_standard_scores_of_their_own_moments_have_mean_0_and_deviation_1():
    value = combine(parse_reward(f"standard(a;{A.mean()};{A.std()})"), SCORES)
    assert value.mean().item() == pytest.approx(0, abs=1e-12) and value.std(correction=0).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "give a reward model folder, module:function or http\\(s\\)://URL"),
        ("a=much", "the weight in 'a=much' is no number; write SOURCE=WEIGHT"),
        ("a=nan", "the weight in 'a=nan' is no number"),
        ("a,", "no source in ''"),
        ("=1", "no source in '=1'"),
        ("mean(a|)", "no source in 'mean"),
        ("max(a|b)", r"no max\(...\) in 'max\(a\|b\)'; there are mean, min, lcb, gate, standard"),
        ("mean(a)", r"'mean\(a\)' must be mean\(A\|B\|...\)"),
        ("mean(a|b;1)", r"must be mean\(A\|B\|...\)"),
        ("lcb(a|b)", r"must be lcb\(A\|B\|...;LAMBDA\)"),
        ("lcb(a|b;inf)", "with finite numbers"),
        ("lcb(a|b;-1)", "LAMBDA in .* must be at least 0"),
        ("gate(a|b|c;1)", r"must be gate\(A\|B;THRESHOLD\) or gate\(A\|B;THRESHOLD;PENALTY\)"),
        ("gate(a|b;1;2;3)", "must be gate"),
        ("standard(a;0;0)", "the deviation in .* must be above 0"),
        ("mean(a|b", r"a parenthesis in 'mean\(a\|b' lacks its partner"),
        ("mean(a|b))", "lacks its partner"),
        ("a|b", r"\| and ; in 'a\|b' stand outside of parentheses"),
        ("mean(a=2|b)", "a weight stands after a term, and not inside 'mean"),
    ],
)
def test_a_text_that_is_no_reward_is_refused_by_the_part_that_is_wrong(text, words):
    with pytest.raises(ValueError, match=words):
        parse_reward(text)


@pytest.mark.parametrize("option", ["reward", "eval_reward"])
def test_ppo_refuses_it_before_anything_is_read(option):
    texts = {"reward": "rules:brief", "eval_data": "no_such_file", option: "mean(a|b"}
    with pytest.raises(ValueError, match="lacks its partner"):
        PPO(PPOConfig(model="no_such_model", data="no_such_file", output="out", **texts))


def test_every_form_is_in_the_grammar_of_the_docstring():
    from fastrlhf.rewards import combine as combining

    for form in FORMS.values():
        for usage in filled(
            form.usage.replace("A|B|...", "VALUE|VALUE|...").replace("standard(A", "standard(VALUE").split(" or ")
        ):
            assert usage in combining.__doc__


def test_sources_are_listed_once_and_paths_keep_their_signs():
    value = parse_reward("gate(runs/lr=1e-5/a|runs(2)/b;0),min(x:f|runs(2)/b)=2")
    assert list(sources_of(value)) == ["runs/lr=1e-5/a", "runs(2)/b", "x:f"]
    assert isinstance(value.parts[0], Combined) and value.numbers == (1.0, 2.0)


def test_a_head_stands_after_the_folder(tmp_path):
    folder = tmp_path / "reward#1"
    folder.mkdir()
    assert split_head(str(folder)) == (str(folder), None)
    assert split_head(f"{folder}#harmless") == (str(folder), "harmless")
    assert is_model(f"{folder}#harmless") and not is_model("rules:brief")
    assert short_names([f"{folder}#harmless", f"{folder}#helpful"]) == ["reward#1#harmless", "reward#1#helpful"]
    assert short_names(["http://host:80/", "https://host/a/b", "rules:c"]) == ["host:80", "b", "c"]
    assert list(reward_folders(f"min({folder}#x|{folder})")) == [str(folder)]
    with pytest.raises(ValueError, match="no head in"):
        is_model(f"{folder}#")
    with pytest.raises(FileNotFoundError, match="no folder"):
        is_model("./nowhere#helpful")


RULES = """
def short(prompts, responses, *, response_ids):
    return [-float(len(ids)) for ids in response_ids]
"""


@pytest.mark.usefixtures("one_thread")
def test_an_ensemble_scores_with_each_model_once(tmp_path, monkeypatch):
    folders = []
    for n in range(2):
        folders.append(model_folder(tmp_path / str(n)))
        torch.manual_seed(n)
        config = AutoConfig.from_pretrained(folders[-1], num_labels=1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folders[-1])
    (tmp_path / "combining_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(tmp_path)
    samples = [Sample([10, 11], list(range(12, 15 + n)), [0.0] * (3 + n), [0.0] * (3 + n), True) for n in range(4)]
    batch = pack([s.prompt + s.response for s in samples], prompt_lengths=[2] * 4)
    prompts = [Prompt(s.prompt, "p", {}) for s in samples]
    reward = f"lcb({folders[0]}|{folders[1]};1)=2,combining_rules:short=0.1,{folders[0]}"
    scorer = Scorer(reward, tiny_tokenizer(), max_tokens=64)
    assert scorer.names == ["0", "1", "short"] and len(scorer.models) == 2
    first, second, function = scorer.terms(prompts, samples, batch)
    alone = Scorer(folders[1], tiny_tokenizer(), max_tokens=64)(prompts, samples, batch)
    torch.testing.assert_close(second, alone, rtol=0, atol=0)
    expected = 2 * torch.minimum(first, second) + 0.1 * function + first
    torch.testing.assert_close(scorer(prompts, samples, batch), expected)
    assert (first != second).all()


@pytest.fixture
def two_heads(tmp_path):
    """The folders of a policy, and of a reward model with two heads on its body."""
    policy, folder = model_folder(tmp_path / "policy"), str(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(folder)
    RewardModel.from_pretrained(policy, new_head=True, heads=("helpful", "harmless")).save_pretrained(folder)
    return policy, folder


@pytest.mark.usefixtures("one_thread")
def test_heads_of_one_folder_share_its_body(two_heads):
    _, folder = two_heads
    samples = [Sample([10, 11], list(range(12, 15 + n)), [0.0] * (3 + n), [0.0] * (3 + n), True) for n in range(4)]
    batch = pack([s.prompt + s.response for s in samples], prompt_lengths=[2] * 4)
    given = [Prompt(s.prompt, "p", {}) for s in samples], samples, batch
    both = Scorer(f"gate({folder}#harmless|{folder}#helpful;0)", tiny_tokenizer(), max_tokens=16)
    assert len(both.models) == 1 and both.names == ["reward#harmless", "reward#helpful"]
    alone = [Scorer(f"{folder}#{name}", tiny_tokenizer(), max_tokens=64) for name in ("harmless", "helpful")]
    harmless, helpful = (scorer(*given) for scorer in alone)
    torch.testing.assert_close(both.terms(*given), [harmless, helpful])
    torch.testing.assert_close(both(*given), torch.where(helpful >= 0, harmless, helpful))
    for reward, text in (
        (f"{folder}#kind", "has no head 'kind'; its heads are helpful, harmless"),
        (f"{folder}#kind,{folder}#helpful", "has no head 'kind'; its heads are helpful, harmless"),
        (folder, "must have 1 label, got 2; or name one: its heads are helpful, harmless"),
    ):
        with pytest.raises(ValueError, match=text):
            Scorer(reward, tiny_tokenizer(), max_tokens=64)


@pytest.mark.parametrize("which", ["reward", "eval_reward"])
def test_ppo_refuses_a_reward_before_it_reads_or_prints_anything(two_heads, tmp_path, capsys, which):
    policy, folder = two_heads
    (tmp_path / "empty").mkdir()
    for reward, text in (
        (f"{folder}#kind", "has no head 'kind'; its heads are helpful, harmless"),
        (folder, "must have 1 label, got 2; or name one: its heads are helpful, harmless"),
        (policy, "has no trained score head"),
        (str(tmp_path / "empty"), "empty': the folder has no config.json$"),
    ):
        settings = {"reward": f"{folder}#helpful", which: reward, "eval_data": "nowhere", "data": "nowhere"}
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            PPO(PPOConfig(model=policy, output=str(tmp_path / "out"), **settings))
    assert capsys.readouterr().out == "" and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("heads", "copied"), [(("helpful",), True), (("helpful", "harmless"), False)])
def test_the_value_model_starts_as_one_head_and_not_as_two(two_heads, tmp_path, heads, copied):
    policy, folder = two_heads
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"p{n}"} for n in range(4)])
    reward = ",".join(f"{folder}#{head}=0.5" for head in heads)
    options = {"steps": 3, "batch_size": 4, "max_new_tokens": 4, "learning_rate": 1e-3, "value_learning_rate": 1e-3}
    trainer = PPO(PPOConfig(model=policy, data=data, output=str(tmp_path / "out"), reward=reward, **options))
    assert bool(trainer.value_model.model.score.weight.any()) == copied
    metrics = list(trainer)
    assert len(metrics) == 3 and all(("objective/scores/reward#helpful" in row) != copied for row in metrics)


PROMPTS = [Prompt([5], "q", {"finished": False, "responses": "x", "kind": "k"})]
SAMPLES = [Sample([5], [100, 101], [0.0] * 2, [0.0] * 2, True)]


def asks(prompts, responses, *, finished, **columns):
    return [1.0]


def is_told(prompts, responses, **columns):
    assert set(columns) == {"kind", "response_ids", "finished"} and columns["finished"] == [True]
    return [2.0]


def asks_nothing(prompts, responses):
    assert responses == ["x"] or len(responses) == 1
    return [3.0]


def test_a_column_named_as_an_argument_is_left_out_unless_a_function_asks_for_it_by_name():
    columns, tokenizer = set(PROMPTS[0].columns), tiny_tokenizer()
    for function, score in ((is_told, 2.0), (asks_nothing, 3.0)):
        for names in (columns, None):
            scorer = Scorer(function, tokenizer, max_tokens=9, columns=names)
            assert scorer(PROMPTS, SAMPLES, pack([[5, 100, 101]])).tolist() == [score]
    with pytest.raises(ValueError, match=r"reward: asks takes 'finished', .*rename the column, or leave it out"):
        Scorer(asks, tokenizer, max_tokens=9, columns=columns)
    with pytest.raises(ValueError, match="reward: asks takes 'finished'"):
        Scorer(asks, tokenizer, max_tokens=9).check_columns(columns)
    assert Scorer(asks, tokenizer, max_tokens=9, columns={"kind"}).functions
