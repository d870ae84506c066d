"""What tests see of a run, and do to it: by torch's own hooks, so that no method of ours is replaced."""

from contextlib import contextmanager
from pathlib import Path

from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook


@contextmanager
def after_forward(kinds, hook):
    """Calls hook(module, inputs, output) after each forward pass of modules of these classes; what it returns, unless
    None, takes the place of the output."""
    handle = register_module_forward_hook(
        lambda m, args, output: hook(m, args, output) if isinstance(m, kinds) else None
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def before_updates(hook):
    """Calls hook() before each step of any of torch's optimizers."""
    handle = register_optimizer_step_pre_hook(lambda *_: hook())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def failing_update(number, error):
    """The update 1, 2, ... from here on raises this error."""
    done = []

    def fail():
        done.append(None)
        if len(done) == number:
            raise error

    with before_updates(fail):
        yield


def interrupted_in_step(number, metrics):
    """Ctrl-C in a step's first update, whose run writes this metrics.jsonl."""

    def interrupt():
        path = Path(metrics)
        if path.exists() and len(path.read_text().splitlines()) == number - 1:
            raise KeyboardInterrupt

    return before_updates(interrupt)
