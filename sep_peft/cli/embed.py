"""``sep-peft embed``: writes the embeddings of a folder's images, or of a file's texts, into one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ..classifier.adapter import Adapter
from ..classifier.embeddings import max_text_length, too_long
from ..classifier.images import other_endings, warn_left_out
from ..classifier.whitened import check_whitening
from ..training.pairs import is_unicode
from ..tuner.disk import try_folder
from ..tuner.files import replace_files
from ..tuner.messages import shown
from ..words import counted
from .folder_index import open_index, unreadable_in
from .session import AdapterSource, Result, Session, load_adapter, warn_unreadable


#: Lines that are too long which a message names.
TOLD = 5


def embed(
    source: AdapterSource,
    given: Path,
    output: Path,
    session: Session,
    *,
    base_model: str | None = None,
    index: Path | None = None,
    whiten: bool = False,
    batch_size: int = 32,
    cut: bool = False,
) -> Result:
    """Write names and embeddings, of unit length, one a row.

    Args:
        source: of the adapter.
        given: a folder, of which images in it and below are embedded, or a text file with a text a line.
        output: a .npz, .safetensors or .parquet.
        session: how to work.
        base_model: name or folder of another base model than the one that the adapter names.
        index: file that keeps the embeddings of images for the next time; None: one in the cache.
        whiten: write whitened embeddings, which compare with images alone.
        batch_size: images embedded at a time.
        cut: cut the ends of texts that are too long.

    Raises:
        FileNotFoundError: there is no such adapter, or nothing at `given`.
        ImportError: pyarrow is missing for a .parquet.
        OSError: the file cannot be written, found out before images are embedded where that can be; one that was there
                is as it was.
        ValueError: `output` has another ending, the folder holds no image that can be read, a text does not fit, or
            whitened embeddings are asked for of texts or of an adapter without a whitening.
    """
    write = _writer(output)
    if not given.exists():
        raise FileNotFoundError(f"There is no folder or file {str(given)!r}.")
    if whiten and not given.is_dir():
        raise ValueError("--whiten is for images, which alone compare with each other by it. Leave it out for texts.")
    adapter = load_adapter(source, base_model, session)
    whitening = check_whitening(adapter.whitening) if whiten else None
    unreadable: dict[str, str] = {}
    if given.is_dir():
        warn_left_out(given, other_endings(given))
        found = open_index(given, adapter, session, index, batch_size)
        names, embeds, unreadable = list(found.names), found.embeds, found.unreadable
        embeds = embeds if whitening is None else whitening(embeds)
        warn_unreadable(unreadable)
    else:
        lines = _texts(given)
        names = list(lines.values())
        if not cut:
            _check_lengths(given, lines, adapter)
        embeds = adapter.embed_texts(names, truncate=cut)
    with replace_files(output.parent) as temporary:
        write(Path(temporary, output.name), names, embeds.float())
    kind = "image" if given.is_dir() else "text"
    data = {
        "file": str(output),
        "kind": kind,
        "rows": len(names),
        "size": embeds.shape[1],
        "unreadable": unreadable_in(given, unreadable),
    }
    line = f"wrote {output}, {counted(len(names), kind)}, {embeds.shape[1]} numbers each"
    return Result(data, [line], code=1 if unreadable else 0)


def _texts(file: Path) -> dict[int, str]:
    """Number from 1 -> line, of the lines of a file that are not blank."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(file)!r} is no text in UTF-8. Pass a folder of images, or a text file with a text a line."
        ) from error
    found = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    if not found:
        raise ValueError(f"{str(file)!r} is blank. Write a text in each line.")
    return found


def _check_lengths(file: Path, lines: Mapping[int, str], adapter: Adapter) -> None:
    """
    Raises:
        ValueError: names the lines that have more tokens than the text tower has room for.
    """
    numbers, texts = list(lines), list(lines.values())
    lengths = too_long(adapter.model, adapter.processor, texts)
    if not lengths:
        return
    found = [f"line {numbers[place]} with {length}" for place, length in lengths.items()]
    more = f" and {len(found) - TOLD} more" if len(found) > TOLD else ""
    room = max_text_length(adapter.model)
    raise ValueError(
        f"{str(file)!r} has texts of more than {room} tokens (BOS and EOS included), for which there is no room beside "
        f"the prompts: {', '.join(found[:TOLD])}{more}. Shorten them, or pass --cut."
    )


def _writer(output: Path) -> Callable[[Path, Sequence[str], torch.Tensor], None]:
    """What writes a file by its ending."""
    if output.suffix not in WRITERS:
        raise ValueError(f"The file must end in {', '.join(WRITERS)}, but got {shown(output.name)}.")
    if output.is_dir():
        raise ValueError(f"{output} is a folder, but a file of that name is to be written. Rename or remove it.")
    if output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ImportError("A .parquet needs the package pyarrow: pip install pyarrow. A .npz needs none.")
    try_folder(output.parent)
    return WRITERS[output.suffix]


def _write_npz(path: Path, names: Sequence[str], embeds: torch.Tensor) -> None:
    np.savez(path, names=np.array(names, dtype=str), embeddings=embeds.numpy())


def _write_safetensors(path: Path, names: Sequence[str], embeds: torch.Tensor) -> None:
    """As examples/embed_folder.py writes a shard."""
    save_file({"embeddings": embeds.contiguous()}, path, {"names": json.dumps(names)})


def _write_parquet(path: Path, names: Sequence[str], embeds: torch.Tensor) -> None:
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    if odd := next((name for name in names if not is_unicode(name)), None):
        raise ValueError(f"A .parquet holds UTF-8, which {shown(odd)} is not. Write a .npz or .safetensors.")
    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(embeds.flatten().numpy()), embeds.shape[1])
    parquet.write_table(pyarrow.table({"name": list(names), "embedding": rows}), path)


#: Ending -> what writes such a file.
WRITERS = {".npz": _write_npz, ".safetensors": _write_safetensors, ".parquet": _write_parquet}
