"""Damaged and hostile images, folders, class lists and caches: refused by name, and the classifier stays as it was.

Adapters have a table of their own in test_hostile_adapters.
"""

from __future__ import annotations
