"""pytest plugin, in a peer's tests: patches the peer of $PEER before they are collected.

How often each replacement was called, in how many calls it did not ask the original, and what was left alone,
go to $PEER_CALLED."""

import collections
import dataclasses
import functools
import json
import os
import warnings
from pathlib import Path

from fastrlhf import integrations

calls, asked = collections.Counter(), collections.Counter()
left = {}


def counted(function, counter, path):
    """`function`, or the `apply` of an autograd function, with its calls counted."""
    apply = getattr(function, "apply", function)

    @functools.wraps(apply)
    def call(*args, **kwargs):
        counter[path] += 1
        return apply(*args, **kwargs)

    if apply is function:
        return call
    names = {"apply": staticmethod(call), "__module__": function.__module__, "__doc__": function.__doc__}
    return type(function.__name__, (), names)


def counting(known, path):
    return dataclasses.replace(
        known, make=lambda original: counted(known.make(counted(original, asked, path)), calls, path)
    )


def pytest_configure(config):
    peer = os.environ["PEER"]
    integrations.PEERS[peer] = tuple(
        dataclasses.replace(replacement, known=tuple(counting(known, replacement.path) for known in replacement.known))
        for replacement in integrations.PEERS[peer]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left alone is written too
        done = integrations.patch(peer)
    for counter in (calls, asked):
        counter.clear()  # those of the self-tests
        counter.update(dict.fromkeys(done.replaced, 0))
    left.update(done.left)


def pytest_sessionfinish(session):
    counts = {path: (count, count - asked[path]) for path, count in calls.items()}
    Path(os.environ["PEER_CALLED"]).write_text(json.dumps({"calls": counts, "left": left}))
