"""weight_sync:whole against a real vLLM that asks for a key, and a judge there.

The server's head is its own while the policy's is tied, as docs/rollout.md advises for servers on a CPU.
"""

import json

import pytest
import torch
from loops import write_rows
from tiny import tiny_tokenizer
from vllm_tools import EOS, VOCAB, differences, ppo_settings, prompts_of

from fastrlhf import PPO, PPOConfig
from fastrlhf.commands.feedback.judges import make_question
from fastrlhf.commands.feedback.label import Label
from fastrlhf.data.template import Renderer, load_tokenizer
from fastrlhf.generation.engine import Sampling
from fastrlhf.generation.rollout_server import ServerBackend
from fastrlhf.generation.weight_sync import whole
from fastrlhf.models.policy import Policy
from fastrlhf.packing import pack
from fastrlhf.runtime.http import ServerError
from fastrlhf.runtime.jsonl import read_jsonl
from fastrlhf.settings.feedback import LabelConfig

SYNC = "fastrlhf.generation.weight_sync:whole"
KEY = "a-key-of-the-tests"
OPTIONS = (
    *("--served-model-name", "policy", "--api-key", KEY, "--logprobs-mode", "processed_logprobs"),
    *("--load-format", "dummy", "--hf-overrides", json.dumps({"tie_word_embeddings": False})),
)
PROMPTS = prompts_of(3, 90, 180)


@pytest.fixture(scope="module")
def server(serve, models):
    return serve(models / "base", *OPTIONS, VLLM_SERVER_DEV_MODE="1")


@pytest.fixture
def key_file(tmp_path):
    (tmp_path / "key").write_text(KEY + "\n")
    return str(tmp_path / "key")


def change(module, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=draw) * 0.02)


def backend_of(server, policy, folder):
    return ServerBackend(
        server.url,
        "policy",
        eos_token_ids=[EOS],
        logprobs_mode="processed_logprobs",
        api_key=KEY,
        update_weights=lambda: whole(policy, [server.url], folder=folder / "w", api_key=KEY),
    )


def test_weights_and_a_tied_head_are_used_as_soon_as_they_are_brought(server, models, tmp_path, note):
    policy = Policy.from_pretrained(models / "base")
    assert policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight
    backend = backend_of(server, policy, tmp_path)
    for seed in range(3):
        change(policy.model, seed)
        samples = backend.generate(PROMPTS, Sampling(24), seeds=range(3))
        assert note("whole weights after they were brought: server and policy", differences(policy, samples)) < 1e-4
        assert not (tmp_path / "w").exists()
    backend.update_weights = None
    change(policy.model, 3)
    samples = backend.generate(PROMPTS, Sampling(24), seeds=range(3))
    assert max(differences(policy, samples)) > 0.1  # what it is without


def test_an_adapter_is_brought_inside_the_weights(server, models, tmp_path, note):
    policy = Policy.from_pretrained(models / "base", freeze=True).adapt(None, rank=4, alpha=32.0)
    change(policy.adapter, 0)
    samples = backend_of(server, policy, tmp_path).generate(PROMPTS, Sampling(24), seeds=range(3))
    assert note("an adapter in whole weights: server and policy", differences(policy, samples)) < 1e-4


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_draws_at_another_temperature_have_its_log_probabilities(server, models, tmp_path, note, temperature):
    policy = Policy.from_pretrained(models / "base", freeze=True)
    sampling = Sampling(32, temperature=temperature)
    backend = backend_of(server, policy, tmp_path)
    samples = backend.generate(PROMPTS * 4, sampling, seeds=range(12))
    backend.check(PROMPTS, sampling)
    name = f"draws at temperature {temperature}: server and policy"
    assert note(name, differences(policy, samples, temperature)) < 1e-4
    assert max(differences(policy, samples)) > 0.1


def whole_settings(models, server, folder, key_file, **changes):
    defaults = {"rollout_key_file": key_file, "rollout_logprobs": "processed_logprobs", "weight_sync": SYNC}
    return ppo_settings(models, server.url, folder, **{**defaults, "learning_rate": 3e-3, **changes})


def test_ppo_behind_a_key_draws_from_the_policy_that_it_trains(server, models, tmp_path, key_file, note):
    metrics = list(PPO(PPOConfig(**whole_settings(models, server, tmp_path, key_file))))
    found = [each["rollout/logprob_difference_max"] for each in metrics]
    assert len(found) == 3 and note("PPO with whole weights, a step each: server and policy", found) < 1e-4
    assert not (tmp_path / "out" / "rollout_weights").exists()
    assert KEY not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.*") if path.is_file())


def test_ppo_without_the_weights_draws_from_another_policy(server, models, tmp_path, key_file):
    def once(policy, urls, **options):
        if not seen:
            whole(policy, urls, **options)
        seen.append(urls)

    seen = []
    metrics = list(PPO(PPOConfig(**whole_settings(models, server, tmp_path, key_file, weight_sync=once))))
    found = [each["rollout/logprob_difference_max"] for each in metrics]
    assert len(seen) == 3 and found[0] < 1e-4 and min(found[1:]) > 0.05, found


def test_a_wrong_key_is_named_by_the_server_and_stays_secret(server, models, tmp_path, key_file):
    (tmp_path / "key").write_text("another-key")
    with pytest.raises(ServerError, match=f"{server.url}/v1.* answered 401: Unauthorized") as caught:
        list(PPO(PPOConfig(**whole_settings(models, server, tmp_path, key_file))))
    assert "another-key" not in str(caught.value)


ROWS = [{"prompt": f"Say {n}", "responses": [f"one {n}", f"two {n * n}"]} for n in range(6)]


def label_settings(folder, **changes):
    (folder / "rubric.txt").write_text("{prompt}|{response_1}|{response_2}|")
    return {
        "data": write_rows(folder / "rows.jsonl", ROWS),
        "rubric": str(folder / "rubric.txt"),
        "max_tokens": 4096,
        **changes,
    }


def make_judge(models, folder, templates=("auto", "none")):
    """Saves a judge that answers A or B to the questions about ROWS: those rows of its head are solved for."""
    policy = Policy.from_pretrained(models / "judge")
    question = make_question(LabelConfig(**label_settings(folder, judge="x", output="x")))
    tokenizer, hidden = load_tokenizer(models / "judge"), []
    with torch.no_grad():
        for template in templates:
            renderer = Renderer(tokenizer, template)
            for row in ROWS:
                for first, second in (row["responses"], row["responses"][::-1]):
                    ids = list(renderer.prompt(question(row["prompt"], first, second)))
                    hidden.append(policy.hidden(pack([ids]), torch.tensor([len(ids) - 1]))[0])
        head, states = policy.model.get_output_embeddings().weight, torch.stack(hidden).double()
        draw = torch.Generator().manual_seed(0)
        for answer in "AB":
            logits = 12 + torch.randn(len(states), generator=draw, dtype=torch.float64)
            solved = torch.linalg.lstsq(states, logits[:, None], driver="gelsd").solution[:, 0]
            head[tokenizer.convert_tokens_to_ids(answer)] = solved.float()
    policy.save_pretrained(folder / "judge")
    tiny_tokenizer(VOCAB).save_pretrained(folder / "judge")
    return policy


@pytest.mark.parametrize("template", ["chat", "none"])
def test_a_judge_on_the_server_says_what_it_says_here(server, models, tmp_path, key_file, note, template):
    whole(make_judge(models, tmp_path), [server.url], folder=tmp_path / "w", api_key=KEY)
    here = label_settings(tmp_path, judge=str(tmp_path / "judge"), output=str(tmp_path / "here"))
    there = {
        "judge": server.url,
        "judge_model": "policy",
        "judge_key_file": key_file,
        "output": str(tmp_path / "there"),
    }
    for options in (here, {**here, **there}):
        list(Label(LabelConfig(**options, judge_template=template)))
    ours, theirs = (read_jsonl(tmp_path / name / "pairs.jsonl") for name in ("here", "there"))
    assert len(ours) == len(theirs) == len(ROWS)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["chosen"] == its["chosen"]
    gaps = [
        abs(a - b)
        for mine, its in zip(ours, theirs, strict=True)
        for a, b in zip(mine["orders"], its["orders"], strict=True)
    ]
    assert note(f"a judge's preference, template {template} (probabilities): server and here", gaps) < 1e-4
    assert max(row["preference"] for row in ours) - min(row["preference"] for row in ours) > 0.05
