"""The oldest PEFT and transformers that the package works with, looked at where pip has not seen to it."""

from importlib.metadata import version

from packaging.version import Version


#: Package -> its oldest release, and what an older one does.
OLDEST = {
    "peft": ((0, 21), "saves and loads its adapters wrongly"),
    "transformers": ((5, 8), "has towers that it does not know, and may load adapters without their weights"),
}


def check_installed() -> None:
    """
    Raises:
        ImportError: an installed package is too old; the message says what to install.
    """
    for name, (oldest, reason) in OLDEST.items():
        found = version(name)
        if Version(found).release < oldest:
            needed = ".".join(map(str, oldest))
            raise ImportError(
                f"sep_peft needs {name} {needed} or newer, but {found} is installed, which {reason}. "
                f'Run: pip install "{name}>={needed}"'
            )
