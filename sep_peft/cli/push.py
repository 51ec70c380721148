"""``sep-peft push``: shares a saved adapter on the Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..classifier.sharing import push_folder
from .session import Result, Session


def push(
    adapter: Path, repo_id: str, session: Session, *, private: bool | None = None, base_model: str | None = None
) -> Result:
    """Upload a saved adapter; arguments as for `push_folder`."""
    pushed = push_folder(adapter, repo_id, private=private, token=session.token, base_model=base_model)
    return Result(asdict(pushed), [pushed.url])
