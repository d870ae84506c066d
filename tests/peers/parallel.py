"""What each of two processes runs in tests of FSDP and of `accelerate launch`: parallel.py sharded | trained

The first process prints a line of JSON."""

import json
import sys

import torch
import torch.distributed as dist


def sharded():
    """A step with TRL's fused head under FSDP2, plain and patched: losses and gradients, and what our op served."""
    from torch.distributed.device_mesh import init_device_mesh
    from trl.trainer import utils

    import fastrlhf
    from fastrlhf.integrations import trl

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    served = [0]

    def counted(*args, ours=trl.linear_token_logprobs, **kwargs):
        served[0] += 1
        return ours(*args, **kwargs)

    found = {}
    for form in ("whole", "in parts"):
        plain = step(utils, mesh, form)
        with fastrlhf.patch("trl"):
            trl.linear_token_logprobs, ours, served[0] = counted, trl.linear_token_logprobs, 0
            patched = step(utils, mesh, form)
            trl.linear_token_logprobs = ours
        found[form] = {"plain": plain, "patched": patched, "served": served[0]}
    original, outcomes = utils._ChunkedLogProbFunction, []
    with fastrlhf.patch("trl"):
        for function in (original, utils._ChunkedLogProbFunction):
            outcomes.append(of_a_dtensor(function, mesh))
    found["DTensor"] = {"plain": outcomes[0], "patched": outcomes[1]}
    return found


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, **size))


def step(utils, mesh, form):
    """The loss and the norm of each gradient; `form` says whether head and backbone are sharded by themselves."""
    from torch.distributed.fsdp import fully_shard

    model = small_llama()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if form == "in parts":
        fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model.model, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tokens = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(dist.get_rank()))
    output = model(input_ids=tokens, labels=tokens, fused_lm_head=True)
    (output.loss + 0.1 * output.entropy.sum()).backward()
    norms = [p.grad.full_tensor().norm().item() for p in model.parameters()]
    return [output.loss.item(), *norms]


def of_a_dtensor(function, mesh):
    """What a weight that is still sharded gives: a number, or the name of the error."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 16), torch.randn(300, 16), torch.randint(300, (6,))
    weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    try:
        outputs = function.apply(hidden, weight, None, targets, 1.0, 4, None, 1.0, ("log_probs",))
        return outputs[0].sum().item()
    except Exception as error:
        return type(error).__name__


def trained():
    """Two steps of GRPO; FASTRLHF_PATCH says whether it is patched."""
    import trainers
    from trl.trainer import utils

    trainer = trainers.made("GRPO", 2)
    trainer.train()
    replaced = hasattr(utils._ChunkedLogProbFunction, "__replaced_by_fastrlhf__")
    patched = [None] * dist.get_world_size()
    dist.all_gather_object(patched, replaced)
    return {"patched": patched, "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


if __name__ == "__main__":
    found = {"sharded": sharded, "trained": trained}[sys.argv[1]]()
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()
