"""``sep-peft push``: shares a saved adapter on the Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..classifier.sharing import push_folder
from .session import Result, Session


def push(
    adapter: Path,
    repo_id: str,
    session: Session,
    *,
    private: bool | None = None,
    base_model: str | None = None,
    save_processor: bool = False,
) -> Result:
    """Upload a saved adapter; arguments as for `push_folder`."""
    options = {"base_model": base_model, "save_processor": save_processor}
    pushed = push_folder(adapter, repo_id, private=private, token=session.token, **options)
    return Result(asdict(pushed), [pushed.url])
