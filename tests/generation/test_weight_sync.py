"""weight_sync:lora and :whole against a small server that keeps what it is told (tests/vllm_server: a real vLLM)."""

import json
import shutil
import uuid
from pathlib import Path

import pytest
import torch
from fake_server import serving
from loops import model_folder, write_rows
from safetensors.torch import load_file

from fastrlhf.cli.main import main
from fastrlhf.generation import weight_sync
from fastrlhf.models.policy import Policy
from fastrlhf.runtime.http import ServerError
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.trainers.ppo.rollout import weight_hook

pytestmark = pytest.mark.usefixtures("one_thread")
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
CALL, RESET = "/collective_rpc", "/reset_prefix_cache"


class Weights:
    """What a server was asked, in order, and what lay in the folders that it was given at that moment."""

    def __init__(self, kept):
        self.asked, self.loaded, self.kept = [], [], kept
        self.say = lambda path: (200, "Success") if path in (LOAD, UNLOAD) else {"success": True}
        self.answers = {path: self.answer(path) for path in (LOAD, UNLOAD, CALL, RESET)}

    def answer(self, path):
        def answer(body):
            self.asked.append((path, body.get("method")))
            folder = body.get("lora_path") or body.get("kwargs", {}).get("weights_path")
            if folder:
                shutil.copytree(folder, self.kept / str(len(self.loaded)))
                self.loaded.append(Path(folder))
            return self.say(path)

        return answer


@pytest.fixture
def weights(tmp_path):
    return Weights(tmp_path / "kept")


@pytest.fixture
def server(weights):
    with serving(weights.answers) as running:
        yield running


@pytest.fixture
def model(tmp_path):
    return model_folder(tmp_path / "model", tie_word_embeddings=True)


@pytest.fixture
def adapted(model):
    return Policy.from_pretrained(model, freeze=True).adapt(None, rank=2, alpha=4.0)


def test_each_adapter_lies_in_a_folder_of_its_own_and_the_last_one_stays(adapted, server, weights, tmp_path):
    folder = tmp_path / "new" / "sync"
    (folder / uuid.uuid4().hex).mkdir(parents=True)  # of a run that was killed
    for value in (1.0, 2.0):
        with torch.no_grad():
            adapted.adapter.up[0].fill_(value)
        weight_sync.lora(adapted, [server.url], folder=folder, model="mine", api_key="secret")
        assert list(folder.iterdir()) == weights.loaded[-1:]
    first, second = weights.loaded
    assert first != second and first.is_absolute()
    for n, value in enumerate((1.0, 2.0)):
        tensors = load_file(weights.kept / str(n) / "adapter_model.safetensors")
        assert any((tensor == value).all() for tensor in tensors.values())
    assert weights.asked == [(UNLOAD, None), (LOAD, None)] * 2
    assert all(body["lora_name"] == "mine" for body, _ in server.requests)
    assert all(headers["Authorization"] == "Bearer secret" for _, headers in server.requests)
    del adapted
    # the fixture has the policy still; what ends with it is what was registered
    weight_sync._kept.popitem()[1]()
    assert not folder.exists()


def test_an_adapter_that_is_not_loaded_yet_need_not_be_unloaded(adapted, server, weights, tmp_path):
    weights.say = lambda path: (
        (404, '{"error": {"message": "cannot be found"}}') if path == UNLOAD else (200, "Success")
    )
    weight_sync.lora(adapted, [f"{server.url}/v1/"], folder=tmp_path / "sync")
    assert weights.asked == [(UNLOAD, None), (LOAD, None)]


@pytest.mark.parametrize("bring", [weight_sync.lora, weight_sync.whole])
def test_what_else_lies_in_the_folder_stays(adapted, server, tmp_path, bring):
    theirs = tmp_path / "sync" / "results" / "of_a_week.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("7")
    for _ in range(2):
        bring(adapted, [server.url], folder=tmp_path / "sync")
    assert theirs.read_text() == "7"


@pytest.mark.parametrize("sharded", [False, True])
def test_whole_weights_have_the_tied_head_and_are_gone_afterwards(
    model, server, weights, tmp_path, sharded, monkeypatch
):
    policy = Policy.from_pretrained(model)
    if sharded:
        save = policy.model.save_pretrained
        monkeypatch.setattr(policy.model, "save_pretrained", lambda folder: save(folder, max_shard_size="40KB"))
    folder = tmp_path / "sync"
    (folder / uuid.uuid4().hex).mkdir(parents=True)  # of a run that was killed
    weight_sync.whole(policy, [server.url], folder=folder)
    assert weights.asked == [(CALL, "update_config"), (CALL, "reload_weights"), (RESET, None)]
    assert not folder.exists()
    files = sorted((weights.kept / "0").glob("*.safetensors"))
    index = weights.kept / "0" / "model.safetensors.index.json"
    assert index.is_file() == sharded and len(files) > 2 * sharded
    if sharded:  # vLLM reads no file that is not in the index
        names = json.loads(index.read_text())["weight_map"]
        assert {name: load_file(index.parent / file)[name].shape for name, file in names.items()}
        assert set(names.values()) == {path.name for path in files}
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    expected = policy.model.state_dict()
    assert tensors.keys() == expected.keys() and "lm_head.weight" in tensors
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name])


def test_an_untied_head_is_not_written_twice(server, weights, tmp_path):
    policy = Policy.from_pretrained(model_folder(tmp_path / "untied", tie_word_embeddings=False))
    weight_sync.whole(policy, [server.url], folder=tmp_path / "sync")
    assert [path.name for path in (weights.kept / "0").glob("*.safetensors")] == ["model.safetensors"]


def test_prefixes_are_reset_again_while_a_request_holds_them(model, server, weights, tmp_path, monkeypatch):
    policy, tried = Policy.from_pretrained(model), []
    weights.say = lambda path: {"success": path != RESET or len(tried) > 1 or bool(tried.append(1))}
    weight_sync.whole(policy, [server.url], folder=tmp_path / "sync")
    assert [path for path, _ in weights.asked].count(RESET) == 3
    monkeypatch.setattr(weight_sync, "RESET_TIMEOUT", 0.2)
    weights.say = lambda path: {"success": path != RESET}
    with pytest.raises(ServerError, match="runs requests of somebody else, so prefixes of old weights stay"):
        weight_sync.whole(policy, [server.url], folder=tmp_path / "sync")
    assert not (tmp_path / "sync").exists()


NO_PATH = '{"detail": "Not Found"}'
NO_FOLDER = '{"error": {"message": "Loading lora policy failed: No adapter found for /x", "code": 404}}'
RANK = '{"error": {"message": "LoRA rank 16 is greater than max_lora_rank 8.", "code": 500}}'


@pytest.mark.parametrize(
    ("bring", "status", "said", "text"),
    [
        ("lora", 404, NO_PATH, f"{LOAD} answered 404: Not Found; start it with --enable-lora and VLLM_ALLOW_RUNTIME"),
        ("lora", 404, NO_FOLDER, "No adapter found for /x; it must see the folder "),
        ("lora", 500, RANK, f"{LOAD} answered 500: LoRA rank 16 is greater than max_lora_rank 8."),
        ("whole", 404, NO_PATH, f"{CALL} answered 404: Not Found; start it with VLLM_SERVER_DEV_MODE=1"),
        ("whole", 401, '{"error": "Unauthorized"}', f"{CALL} answered 401: Unauthorized"),
    ],
)
def test_what_a_server_refuses_is_one_line_and_leaves_no_folder(
    adapted, server, weights, tmp_path, bring, status, said, text
):
    weights.say = lambda path: (404, NO_PATH) if path == UNLOAD else (status, said)
    with pytest.raises(ServerError) as caught:
        getattr(weight_sync, bring)(adapted, [server.url], folder=tmp_path / "sync")
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"weight_sync: {server.url}/") and not (tmp_path / "sync").exists()


def test_a_policy_without_an_adapter_is_refused_in_one_line(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(16)])
    Path("rules_of_low.py").write_text("def low(prompts, responses, **_):\n    return [0.0] * len(prompts)\n")
    options = {"model": model, "data": data, "output": "out", "reward": "rules_of_low:low", "batch-size": 8}
    options |= {"rollout-url": "http://127.0.0.1:9", "weight-sync": "lora"}
    assert main(["ppo", *(f"--{name}={value}" for name, value in options.items())]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "weight_sync" in line)
    assert "error: weight_sync: lora brings an adapter, and the policy has none: set lora_rank, or take whole" in line


def test_a_hook_gets_the_keywords_that_it_names(tmp_path):
    got = {}

    def names_none(policy, urls):
        got["none"] = urls

    def names_some(policy, urls, *, model):
        got["some"] = model

    def takes_all(policy, urls, **options):
        got["all"] = options

    def calls_the_policy_model(model, folder, /, api_key=None):
        got["first"] = model

    def calls_it_model_and_takes_all(model, urls, **options):
        got["others"] = [model, *options]

    for hook in (names_none, names_some, takes_all, calls_the_policy_model, calls_it_model_and_takes_all):
        settings = {"model": "m", "data": "d", "reward": "r", "output": str(tmp_path / "out"), "rollout_model": "mine"}
        weight_hook(PPOConfig(**settings, rollout_url="http://x", weight_sync=hook), "policy")()
    assert got["none"] == ["http://x"] and got["some"] == "mine"
    assert got["all"]["folder"] == tmp_path / "out" / "rollout_weights" and got["all"]["model"] == "mine"
    assert got["first"] == "policy" and got["others"] == ["policy", "folder", "api_key"]
