"""Tells the sources in the text of a reward apart: folders of reward models, functions, and servers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrlhf.data.objects import GivenObject
from fastrlhf.errors import MissingFileError, UserError
from fastrlhf.models.loading import NO_HEAD, check_heads, heads_in
from fastrlhf.rewards.combine import parse_reward, sources_of
from fastrlhf.rewards.named_functions import check_spelling


def short_names(sources: Sequence[str]) -> list[str]:
    """Returns a name for each source: its last part, of a server's address with the port, or all of it where last parts
    are the same."""
    names = [re.split("/" if is_server(source) else "[/:]", source.rstrip("/"))[-1] for source in sources]
    return names if len(set(names)) == len(names) else list(sources)


def is_server(source: str) -> bool:
    """Whether a source is the URL of a reward server."""
    return re.match("https?://", source, re.IGNORECASE) is not None


def is_model(source: str) -> bool:
    """Whether a source is the folder or hub id of a reward model, and neither a function nor a server.

    Raises: ValueError or FileNotFoundError for what can be none of them."""
    folder, head = split_head(source)
    if head == "":
        raise UserError(f"reward: no head in {source!r}; write FOLDER#HEAD")
    if isinstance(source, GivenObject) or Path(folder).is_dir():
        return True
    if is_server(source):
        return False
    check_spelling(source, "reward")
    if ":" not in source and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        before, _, after = source.rpartition(".")
        written = "a function is given as module:function"
        for module, name in ((source, "FUNCTION"), (before, after)):
            if module.replace(".", "_").isidentifier() and Path(f"{module.replace('.', '/')}.py").is_file():
                written = f"write {module}:{name}"
        raise MissingFileError(f"reward: no folder {source!r}; {written}")
    return ":" not in source


def split_head(source: str) -> tuple[str, str | None]:
    """Returns folder and head of "FOLDER#HEAD"; a folder whose own name has a # is one."""
    folder, mark, head = source.rpartition("#")
    return (folder, head) if mark and not Path(source).is_dir() else (source, None)


def reward_folders(reward: Any) -> dict[str, list[str | None]]:
    """The reward models in a reward, each with the heads that are read; None: its only one."""
    folders: dict[str, list[str | None]] = {}
    for source in sources_of(parse_reward(reward)) if isinstance(reward, str) else ():
        if is_model(source):
            folder, head = split_head(source)
            folders.setdefault(folder, []).append(head)
    return folders


def check_reward(*rewards: Any) -> None:
    """Refuses at once what a `Scorer` would refuse later, as far as the texts and the models' configurations tell.

    Raises: ValueError or FileNotFoundError for a text that is no reward, a folder that is none or without a trained
    head, and a head that the model has not."""
    for folder, heads in (found for reward in rewards for found in reward_folders(reward).items()):
        names = heads_in(folder)
        if not names:
            raise UserError(NO_HEAD.format(folder))
        for head in heads:
            check_heads(f"reward model: {folder}", names, head, ())
