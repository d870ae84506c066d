"""What a vLLM server answers: tokens that count on."""

from fastrlhf.generation.rollout_server import server_seed

EOS = 1
# of ServerBackend, by the parity of the seed that the server gets: of long responses (1), and of those that end by EOS
SEEDS = {parity: [seed for seed in range(40) if server_seed(seed) % 2 == parity] for parity in (0, 1)}
LONG, ENDS = SEEDS[1], SEEDS[0]


def completion(body):
    """What the server answers: its tokens count on from the prompt's last; an even seed ends by EOS, see SEEDS."""
    count = body["max_tokens"] if body["seed"] % 2 else min(3, body["max_tokens"])
    tokens = [(body["prompt"][-1] + n) % 300 for n in range(1, count + 1)]
    if body["seed"] % 2 == 0:
        tokens[-1] = EOS
    logprobs = {
        "token_logprobs": [-0.25 * n for n in range(count)],
        "tokens": ["x"] * count,
        "text_offset": [0] * count,
    }
    choice = {"index": 0, "text": "x" * count, "logprobs": logprobs, "stop_reason": None}
    choice |= {"token_ids": tokens, "prompt_token_ids": body["prompt"]}
    choice["finish_reason"] = "length" if body["seed"] % 2 else "stop"
    return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}
