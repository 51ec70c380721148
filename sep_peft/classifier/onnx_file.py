"""Files of ONNX: written from a module, made smaller by 8 bits a weight, and run by ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch


#: Packages that the extra ``[export]`` installs.
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
#: Where the metadata of a file keep our document.
METADATA_KEY = "sep_peft"
#: Bytes of weights that one file may hold: those of a message of protobuf.
MAX_BYTES = 2**31 - 2**24
#: Products with weights, which are what can be done in 8 bits.
QUANTIZED = ["MatMul", "Gemm"]


def check_packages() -> None:
    """
    Raises:
        ImportError: a package for ONNX is missing.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ImportError(f'ONNX needs {", ".join(missing)}: pip install "sep_peft[export]".')


def write_onnx(program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str], metadata: str) -> None:
    """Write a program with one input `pixel_values` and the dimension "batch".

    Args:
        program: with a batch of any size.
        path: of the file.
        outputs: their names.
        metadata: what the file says of itself, under `METADATA_KEY`.

    Raises:
        ValueError: the weights are larger than one file may be.
    """
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > MAX_BYTES:
        raise ValueError(
            f"The model has {size / 1e9:.1f} GB of weights, but a file of ONNX holds {MAX_BYTES / 1e9:.1f} at most. "
            "Write a .pt2."
        )
    import onnx_ir
    from onnx_ir.passes import common as passes
    from onnxscript import optimizer

    with quietly():
        made = torch.onnx.export(program, dynamo=True, output_names=list(outputs), verbose=False, optimize=False)
    assert made is not None, "a program is returned where no file is named"
    passes.InlinePass()(made.model)
    # both passes of the tower transpose the same weights; once for both, and then in the file, where a quantizer looks
    passes.CommonSubexpressionEliminationPass()(made.model)
    with quietly():
        optimizer.optimize(made.model, input_size_limit=MAX_BYTES, output_size_limit=MAX_BYTES)
    passes.ClearMetadataAndDocStringPass()(made.model)  # which name files of this machine
    made.model.metadata_props[METADATA_KEY] = metadata
    onnx_ir.save(made.model, path)


def quantize_onnx(path: Path) -> None:
    """Make the weights of products of a file 8 bits, in place; what they are multiplied with is rounded as it comes.

    Rounding by what images showed before (static quantization) needs images, and with 64 of them it was no closer: of
    180 images of Caltech-101 96.7 to 97.2 % kept their class, with this 97.8 %, in the same time.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    add_pre_process_metadata(model)  # or it would advise what `write_onnx` has done
    quantize_dynamic(model, path, op_types_to_quantize=QUANTIZED, weight_type=QuantType.QInt8)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


class OnnxModel:
    """A file of ONNX, as a stranger runs it.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def __call__(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, height, width) -> each output, (B, ...)."""
        found: Any = self.session.run(None, {"pixel_values": pixel_values.numpy()})
        return [torch.from_numpy(np.asarray(output)) for output in found]


@contextmanager
def quietly() -> Iterator[None]:
    """Without what exporters warn of inside torch and themselves, and what they log of packages that are not there and
    of operators that they leave as they are."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with ExitStack() as undo, warnings.catch_warnings():
        for logger, level in zip(loggers, levels, strict=True):
            undo.callback(logger.setLevel, level)
            logger.setLevel(logging.ERROR)
        for kind in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", kind)
        yield
