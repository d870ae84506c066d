"""Which fast paths the models of the supported families take, with the transformers that is installed."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model

from fastrlhf.cli.main import main
from fastrlhf.models.fast_paths import fast_paths, load_packed_model
from fastrlhf.models.policy import RewardModel

CPU = torch.device("cpu")
LLAMA_LIKE = ("llama", "qwen2", "qwen3", "mistral")
# family -> of its two layers: norms, MLPs and rotations that are ours, linear layers, and whether the last is trimmed.
# Gemma scales by 1 + weight and gates by GELU; GPT-NeoX turns a quarter of each head; GPT-2 has positions, and Conv1D
EXPECTED = {
    **dict.fromkeys(LLAMA_LIKE, (5, 2, 2, 15, 1)),
    "qwen3": (9, 2, 2, 15, 1),
    "gemma3_text": (0, 0, 2, 15, 0),
    "gpt_neox": (0, 0, 0, 9, 0),
    "gpt2": (0, 0, 0, 1, 0),
}


@pytest.fixture
def saved(tmp_path):
    def save(arch, **changes):
        tiny_model(arch, **changes).save_pretrained(tmp_path / arch)
        return tmp_path / arch

    return save


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_family_takes_the_fast_paths_that_it_can(saved, arch):
    role = load_packed_model(saved(arch), autocast=None, device=CPU)
    assert tuple(len(path.taken) for path in fast_paths(role)) == EXPECTED[arch]


@pytest.mark.parametrize("arch", LLAMA_LIKE)
def test_of_llama_like_models_no_layer_is_left(saved, arch):
    left = [path.left for path in fast_paths(load_packed_model(saved(arch), autocast=None, device=CPU))]
    assert left == [{}] * 5


def test_in_half_precision_what_is_not_called_does_not_count(saved):
    paths = fast_paths(load_packed_model(saved("llama"), autocast=torch.bfloat16, device=CPU))
    taken = {path.name: len(path.taken) for path in paths}
    # transformers turns in float32 what autocast made bfloat16, and a thin product is of float32
    assert (taken["fused rotations"], taken["thin products"]) == (0, 0) and taken["fused MLPs"] == 2


def test_a_reward_model_is_read_as_one(saved, tmp_path):
    RewardModel.from_pretrained(saved("llama"), new_head=True).save_pretrained(tmp_path / "reward")
    role = load_packed_model(tmp_path / "reward", autocast=None, device=CPU)
    assert isinstance(role, RewardModel)
    assert [len(path.taken) for path in fast_paths(role)] == [5, 2, 2, 15, 1]


def test_a_path_that_is_not_taken_is_seen_on_the_command_line(saved, capsys, monkeypatch):
    monkeypatch.setattr("fastrlhf.models.fused_layers._rotating", lambda original: None)
    assert main(["info", "--model", str(saved("llama"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("fused rotations"))
    assert lines[at].split(maxsplit=2)[2] == "0 of 2: none"
    assert lines[at + 1].strip() == "left to transformers: LlamaAttention model.layers.0-1.self_attn"
    assert "MLPs       2 of 2: LlamaMLP model.layers.0-1.mlp" in "\n".join(lines) and lines[-1].split()[-1] == "yes"


def test_a_prompt_that_is_read_again_for_each_response_is_seen(saved, capsys, monkeypatch):
    monkeypatch.setattr("fastrlhf.cli.info.can_share_prompts", lambda *_: False)
    assert main(["info", f"--model={saved('llama')}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["shared", "prompts", "no"]


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--model", "/no/such"], 1, "model '/no/such' not found"),
        (["--modle", "x"], 2, "unknown option --modle; did you mean --model?"),
        (["x"], 2, "expected an option --key, got 'x'"),
        (["--device", "tpu"], 2, "device must be"),
    ],
)
def test_wrong_options_and_folders_are_named(arguments, status, text, capsys):
    assert main(["info", *arguments]) == status
    assert text in capsys.readouterr().err
