"""The ops in a trainer of your own: GRPO in plain PyTorch and transformers, without our loops.

    python examples/own_trainer.py

`token_logprobs` stands in place of log_softmax and gather, `group_advantages` compares the answers to one prompt, and
`ppo_policy_loss` is the clipped loss. Each is one native kernel with its gradient, on ordinary tensors (docs/ops.md).

On a GPU set DEVICE to "cuda": the ops then take their Triton and CUDA kernels.
"""

import torch
from tiny import MODEL, TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrlhf import group_advantages, ppo_policy_loss, token_logprobs

DEVICE, GROUP, STEPS, LENGTH = "cpu", 8, 2 if TINY else 15, 24
QUESTIONS = ["What is rain?", "What is a bridge?", "What is salt?", "What is the moon?", "What is bread?"]


def brevity(texts):
    """Your reward: the fewer characters, the better."""
    return torch.tensor([-len(text) / 100 for text in texts])


torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(DEVICE)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

for step in range(STEPS):
    chat = [{"role": "user", "content": QUESTIONS[step % len(QUESTIONS)]}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(DEVICE)
    with torch.no_grad():
        sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": LENGTH, "num_return_sequences": GROUP}
        sequences = model.generate(prompt, attention_mask=torch.ones_like(prompt), **sampling)
    responses = sequences[:, prompt.shape[1] :]
    ends = (responses == tokenizer.eos_token_id).int()
    mask = ends.cumsum(1) - ends == 0  # every token up to the first end, and that end
    scores = brevity(tokenizer.batch_decode(responses, skip_special_tokens=True))
    bounds = torch.tensor([0, GROUP], dtype=torch.int32)  # one group: the answers to one prompt
    advantages = group_advantages(scores, bounds, kind="grpo").to(DEVICE)

    old_logprobs = None
    for _ in range(2):  # two passes over the same answers; in the first one the ratio is 1
        logits = model(sequences[:, :-1]).logits[:, prompt.shape[1] - 1 :]
        logprobs = token_logprobs(logits.flatten(0, 1), responses.flatten()).view_as(responses)
        old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
        each = advantages[:, None].expand_as(logprobs)
        loss, stats = ppo_policy_loss(logprobs, old_logprobs, each, mask, clip_range=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"step {step + 1}: score {scores.mean():.2f}, tokens {mask.sum(1).float().mean():.0f}, "
          f"KL of the update {stats['approx_kl']:.4f}")  # fmt: skip
