"""A program of a user, as strictly typed as one can be: test_package.py has mypy check it. It is not run."""

from collections.abc import Callable, Sequence

from fastrlhf import (
    DPO,
    PPO,
    SFT,
    DPOConfig,
    KTOConfig,
    Policy,
    PPOConfig,
    RolloutBackend,
    Sample,
    Sampling,
    SFTConfig,
    Trainer,
    UserError,
)


class Backend:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> list[Sample]:
        return [Sample([*prompt], [7], [0.0], [0.0], finished=True) for prompt in prompts]


def make(policy: Policy) -> RolloutBackend:
    return Backend(policy)


def score(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def main() -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    sft = SFT(SFTConfig(model="MODEL", data=rows, output="out"))
    metrics: dict[str, float] = next(sft)
    config = PPOConfig(model=sft.model, tokenizer=sft.tokenizer, data="prompts.jsonl", reward=score, output="ppo")
    steps: int = config.steps + 1
    trainers: list[Trainer] = [sft, DPO(DPOConfig(model="MODEL", data="pairs.jsonl", output="dpo"))]
    with PPO(config, backend=make) as ppo:
        for metrics in ppo:
            print(metrics["objective/kl"], steps, ppo.evaluate(), ppo.read_samples(step=1)[0]["response"])
    try:
        KTOConfig(model="MODEL", data="labels.jsonl", output="kto", beta=0.2)
    except UserError as error:
        print(error, trainers)
