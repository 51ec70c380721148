"""The command line ``sep-peft``."""

from .app import main


__all__ = ["main"]
