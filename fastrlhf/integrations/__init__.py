"""Our ops inside other trainers: `fastrlhf.patch("trl")`. docs/integrations.md lists what is replaced and when."""

from __future__ import annotations

import importlib.util
import sys

from fastrlhf.integrations import openrlhf, trl, verl
from fastrlhf.integrations._replacing import Patch, Replacement, replace

PEERS: dict[str, tuple[Replacement, ...]] = {
    "trl": trl.REPLACEMENTS,
    "openrlhf": openrlhf.REPLACEMENTS,
    "verl": verl.REPLACEMENTS,
}
_active: list[Patch] = []


def patch(peer: str = "auto") -> Patch:
    """Replaces functions of a trainer by ours, everywhere they are bound, and returns what was replaced.

    peer: "trl", "openrlhf", "verl", or "auto": every trainer that we know and that is imported already

    A function is replaced only if its parameters are those of a version that we know, and if ours gives what it gives,
    with gradients, on small inputs on the CPU and on the GPU where there is one. Otherwise it is left alone with a
    warning that says why. print() the result for the list; as a context manager it undoes itself at the end.
    Before a trainer is built; in every process (workers are processes of their own).
    Raises: ValueError for another peer, ImportError for one that is not installed.
    """
    if peer == "auto":
        peers = [name for name in PEERS if name in sys.modules]
    elif peer not in PEERS:
        raise ValueError(f"patch: peer must be one of {', '.join(PEERS)}, auto, got {peer!r}")
    elif importlib.util.find_spec(peer) is None:
        raise ImportError(f"patch: {peer} is not installed")
    else:
        peers = [peer]
    done = Patch()
    for name in peers:
        for replacement in PEERS[name]:
            replace(replacement, done)
    _active.append(done)
    return done


def unpatch() -> None:
    """Gives every replaced function back, everywhere it is bound by now."""
    while _active:
        _active.pop().undo()
