"""pytest plugin, in a peer's tests: patches the peer of $PEER before they are collected; counts go to $PEER_CALLS."""

import collections
import dataclasses
import functools
import json
import os
import sys
import warnings
from pathlib import Path

from fastrlhf import integrations

calls = collections.Counter()


def counting(known, path):
    def make(original):
        ours = known.make(original)
        name = "apply" if isinstance(ours, type) else "__call__"
        call = ours.apply if isinstance(ours, type) else ours

        @functools.wraps(call)
        def counted(*args, **kwargs):
            calls[path] += 1
            return call(*args, **kwargs)

        return type(ours.__name__, (), {name: staticmethod(counted)}) if isinstance(ours, type) else counted

    return dataclasses.replace(known, make=make)


def pytest_configure(config):
    peer = os.environ["PEER"]
    integrations.PEERS[peer] = tuple(
        dataclasses.replace(replacement, known=tuple(counting(known, replacement.path) for known in replacement.known))
        for replacement in integrations.PEERS[peer]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left alone is printed
        done = integrations.patch(peer)
    calls.clear()  # those of the self-tests
    calls.update(dict.fromkeys(done.replaced, 0))
    print(done, file=sys.stderr)


def pytest_sessionfinish(session):
    Path(os.environ["PEER_CALLS"]).write_text(json.dumps(calls))
