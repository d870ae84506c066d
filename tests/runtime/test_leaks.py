"""A process that trains again and again keeps nothing of the trainers that are done."""

import gc

import pytest
import torch
from loops import demonstrations, model_folder, pairs, write_rows
from tiny import tiny_tokenizer
from torch._subclasses.fake_tensor import FakeTensor

from fastrlhf import PPO, SFT, DPOConfig, PPOConfig, RewardConfig, RewardTrainer, SFTConfig
from fastrlhf.models.policy import RewardModel
from fastrlhf.trainers.kto import preference_trainer

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def makers(tmp_path_factory):
    """What makes a trainer of each kind, given its output folder."""
    folder = tmp_path_factory.mktemp("leaks")
    model = model_folder(folder / "model", **WIDTH)
    RewardModel.from_pretrained(model, new_head=True).save_pretrained(folder / "reward")
    tiny_tokenizer().save_pretrained(folder / "reward")
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(8)])
    rows, chosen = demonstrations(folder / "rows.jsonl", 8), pairs(folder / "pairs.jsonl", 8)
    shared = {"model": model, "batch_size": 4, "device": "cpu", "overwrite": True, "learning_rate": 1e-3}
    tuning = {**shared, "eval_fraction": 0.25}
    sizes = {"steps": 1, "max_new_tokens": 4, "epochs": 1, "eval_data": prompts, "eval_every": 1}
    ppo = {**shared, **sizes, "data": prompts, "reward": str(folder / "reward")}
    return folder, {
        "sft": lambda out: SFT(SFTConfig(data=rows, output=out, **tuning)),
        "lora": lambda out: SFT(SFTConfig(data=rows, output=out, lora_rank=2, gradient_checkpointing=True, **tuning)),
        "reward": lambda out: RewardTrainer(RewardConfig(data=chosen, output=out, **tuning)),
        "dpo": lambda out: preference_trainer(DPOConfig(data=chosen, output=out, **tuning)),
        "ppo": lambda out: PPO(PPOConfig(output=out, ema_decay=0.9, **ppo)),
    }


def alive():
    """(how many tensors there are, bytes of their storages)"""
    gc.collect()
    # those of torch's own compiler have no memory, and sparse ones of other tests no storage of their own
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    tensors = [each for each in tensors if not isinstance(each, FakeTensor) and each.layout == torch.strided]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return len(tensors), sum(storages.values())


def test_twenty_trainers_of_every_kind_in_one_process_leave_nothing_behind(makers, capsys):
    folder, kinds = makers
    counts = []
    for _ in range(4):
        for kind, make in kinds.items():
            list(make(str(folder / "out" / kind)))
        counts.append(alive())
    assert len(kinds) * len(counts) == 20
    assert counts[0] == counts[1] == counts[-1], counts  # after the first of each nothing is added
