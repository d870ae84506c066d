"""Real vLLM servers on a CPU, and how far their log-probabilities are from ours: what tests/vllm_server needs."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import torch
from loops import write_rows

from fastrlhf.packing import pack

VOCAB, EOS = 300, 1
SECONDS = 400  # that a server may take to start
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
}  # heads of 32, as vLLM's kernels ask
SERVED = ("--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16")
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ALONE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class Vllm:
    """A server in a process of its own. log: the path of what it prints"""

    def __init__(self, folder, model, *options, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / f"{port}.log"
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        caches = {"VLLM_CACHE_ROOT": str(folder / "cache"), "HF_HOME": str(folder / "hub")}
        command = [os.environ["FASTRLHF_VLLM"], "serve", str(model), "--port", str(port), *SERVED, *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**inherited, **SMALL, **ALONE, **caches, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self):
        """Returns once it answers. Raises: RuntimeError when it does not start."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            try:
                return urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"no vLLM came up:\n{self.log.read_text(errors='replace')[-4000:]}")

    def stop(self):
        """Ends it with its workers: they are its process group."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


@torch.no_grad()
def logprobs_of(policy, sample, temperature=1.0):
    """The policy's own log-probabilities of a sample's tokens, from logits in float64."""
    batch = pack([sample.prompt + sample.response])
    rows = torch.arange(len(sample.prompt) - 1, len(sample.prompt) + len(sample.response) - 1)
    logits = policy.model.get_output_embeddings()(policy.hidden(batch, rows)).double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.response)[:, None])[:, 0].tolist()


def differences(policy, samples, temperature=1.0):
    """|difference| of each token's log-probability: the server's, and the policy's own."""
    return [
        abs(theirs - ours)
        for sample in samples
        for theirs, ours in zip(sample.logprobs, logprobs_of(policy, sample, temperature), strict=True)
    ]


def prompts_of(*lengths):
    """Random prompts, some longer than a block of the server's cache of prefixes."""
    draw = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(5, VOCAB, (length,), generator=draw).tolist() for length in lengths]


def share_of_low_tokens(prompts, responses, *, response_ids, **_):
    return [sum(t < 30 for t in ids) / len(ids) for ids in response_ids]


def ppo_settings(models, url, folder, **changes):
    """Of a short PPO run on `base`, whose responses come from a server."""
    # the start of every prompt is longer than a block of the server's cache of prefixes
    rows = [{"prompt": f"Answer in few words and say what you know of {n}"} for n in range(40)]
    return {
        "model": str(models / "base"),
        "data": write_rows(folder / "prompts.jsonl", rows),
        "output": str(folder / "out"),
        "reward": share_of_low_tokens,
        "steps": 3,
        "batch_size": 8,
        "minibatches": 2,
        "epochs": 2,
        "max_new_tokens": 16,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "value_warmup_steps": 0,
        "rollout_url": url,
        **changes,
    }
