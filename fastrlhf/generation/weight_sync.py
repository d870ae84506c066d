"""Brings a policy's weights to vLLM servers before a rollout (docs/rollout.md): `lora` an adapter, `whole` all of them.

Either writes a folder that the servers must see under the same path. For a setting they are named
`weight_sync: lora`; in Python, `update_weights=lambda: lora(policy, urls, folder=...)`.
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastrlhf.errors import UserError
from fastrlhf.generation.server import ModelClient, ServerError
from fastrlhf.models.lora import Adapter
from fastrlhf.models.policy import Policy
from fastrlhf.models.tied_head import write_tied_head

TIMEOUT = 600.0  # seconds a server may take to load weights
RESET_TIMEOUT = 30.0  # seconds until its cache must be free
LORA_FLAGS = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
OURS = re.compile("[0-9a-f]{32}")  # names of the folders that are made here
DEV_MODE = "start it with VLLM_SERVER_DEV_MODE=1"
# what deletes the folder of a policy's last adapter
_kept: weakref.WeakKeyDictionary[Policy, weakref.finalize[Any, Any]] = weakref.WeakKeyDictionary()


def lora(
    policy: Policy, urls: Sequence[str], *, folder: str | Path, model: str = "policy", api_key: str | None = None
) -> None:
    """Brings the policy's adapter to servers that were started with --enable-lora.

    folder: each call writes the adapter into a new folder inside, and deletes earlier ones; no two runs may share it.
    A server keys its cached prefixes by the adapter's path, so it uses none of older weights
    model: the name under which they serve the adapter; it is loaded anew under that
    api_key: sent as the bearer token

    The last folder stays while the policy lives, since a server may read it again.
    Raises: ValueError for a policy without an adapter; ServerError for a server that does not load it."""
    adapter = check_adapter(policy)
    new = _new_folder(folder)
    try:
        adapter.save(new)
        for server in _servers(urls, model, api_key):
            try:
                server.post_text("/v1/unload_lora_adapter", {"lora_name": model}, repeat=False)
            except ServerError as error:
                if error.status != 404:  # none is loaded yet
                    raise
            _tell(server, "/v1/load_lora_adapter", {"lora_name": model, "lora_path": str(new)}, LORA_FLAGS)
    except BaseException:
        _delete(new)
        raise
    if policy in _kept:
        _kept[policy]()
    _kept[policy] = weakref.finalize(policy, _delete, new)
    _delete_others(new)


def check_adapter(policy: Policy) -> Adapter:
    """Returns the policy's adapter. Raises: ValueError if there is none."""
    if policy.adapter is None:
        raise UserError("weight_sync: lora brings an adapter, and the policy has none: set lora_rank, or take whole")
    return policy.adapter


def whole(
    policy: Policy, urls: Sequence[str], *, folder: str | Path, model: str = "policy", api_key: str | None = None
) -> None:
    """Brings all of the policy's weights, with an adapter in them, to servers started with VLLM_SERVER_DEV_MODE=1.

    folder: the weights lie in a new folder inside until all servers have them; no two runs may share it
    model, api_key: as of `lora`

    A tied head is written too: a server that keeps a head of its own needs it, others pass over it.
    Raises: ServerError for a server that does not load them."""
    new = _new_folder(folder)
    _delete_others(new)
    try:
        policy.save_pretrained(new)
        write_tied_head(policy.model, new)
        for server in _servers(urls, model, api_key):
            _call(server, "update_config", overrides={"load_config": {"load_format": "auto"}})
            _call(server, "reload_weights", weights_path=str(new))
            _reset_prefixes(server)
    finally:
        _delete(new)


def _new_folder(folder: str | Path) -> Path:
    """Makes a folder inside with a name that no earlier run used, by which a server would know old weights."""
    new = Path(folder).absolute() / uuid.uuid4().hex
    new.mkdir(parents=True)
    return new


def _delete(new: Path) -> None:
    shutil.rmtree(new, ignore_errors=True)
    with suppress(OSError):  # it is not empty
        new.parent.rmdir()


def _delete_others(new: Path) -> None:
    """Deletes the folders of weights that a killed run left; nothing else that lies beside them."""
    for path in new.parent.iterdir():
        if path != new and OURS.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _servers(urls: Sequence[str], model: str, api_key: str | None) -> list[ModelClient]:
    return [ModelClient("weight_sync", url, model, timeout=TIMEOUT, key=api_key) for url in urls]


def _call(server: ModelClient, method: str, **arguments: Any) -> None:
    """Calls a method of the server's workers."""
    _tell(server, "/collective_rpc", {"method": method, "kwargs": arguments}, DEV_MODE)


def _reset_prefixes(server: ModelClient) -> None:
    """Empties the server's cache of prefixes, which it refuses while a request runs."""
    until = time.monotonic() + RESET_TIMEOUT
    while server.post("/reset_prefix_cache", {}).get("success") is not True:
        if time.monotonic() > until:
            text = "runs requests of somebody else, so prefixes of old weights stay in its cache"
            raise ServerError(f"weight_sync: {server.url} {text}")
        time.sleep(0.1)


def _tell(server: ModelClient, path: str, request: dict[str, Any], flags: str) -> None:
    """Tells the server to do something. flags: what a server that does not know the path lacks."""
    try:
        server.post_text(path, request, repeat=False)
    except ServerError as error:
        if error.status == 404 and "Not Found" in str(error):  # not a folder that it does not find
            raise ServerError(f"{error}; {flags}", error.status) from error
        sent = request.get("lora_path") or request.get("kwargs", {}).get("weights_path")
        if sent and (error.status == 404 or path == "/collective_rpc"):
            raise ServerError(f"{error}; it must see the folder {sent} under this path", error.status) from error
        raise
