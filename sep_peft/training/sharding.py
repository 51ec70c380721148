"""`shard_base`: several processes hold the layers of a large base model together, and each the whole adapter."""

from __future__ import annotations

from typing import cast

import torch
from torch import distributed, nn

from ..tuner.model import find_towers
from ..tuner.wrappers import layer_lists


#: Attribute of a module by which DistributedDataParallel is told the names of parameters that it leaves alone.
NOT_SENT = "_ddp_params_and_buffers_to_ignore"


def shard_base(model: nn.Module, device: torch.device | str | None = None) -> int:
    """Share out the encoder layers of both towers among the processes by FSDP2, a layer at a time.

    Each process then keeps its part of the frozen weights of every layer, and has a whole layer while that runs. The
    adapter, prototypes, embeddings and projections stay whole in every process: DistributedDataParallel, `fit` and
    Trainer take the mean of their gradients as always, and whatever is saved is the same file. Call it before these.

    Accelerate's own ``fsdp_version=2`` shards every parameter of a model, which torch refuses for models with a scalar
    among them, such as the logit scale of CLIP.

    Args:
        model: a `SEPClassifier`, or a model with a SEP adapter, whatever the processes train together; every process
            has it with the same weights.
        device: where it computes; None: where it is.

    Returns:
        parameters that this process keeps of those that are shared out.

    From here on a call of the model is a matter of all processes: one that calls it alone waits for the others, and all
    must make as many calls. The steps of `fit` and Trainer do, those that draw class texts (`Recipe.class_sample`) too.

    Raises:
        RuntimeError: there are not several processes that train together.
        ValueError: an encoder layer has parameters that are trained, such as LoRA's.

    Source: Zhao et al., "PyTorch FSDP" (arXiv 2304.11277), as `torch.distributed.fsdp.fully_shard`.
    """
    from torch.distributed.device_mesh import init_device_mesh  # where processes run, torch has these
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if not several:
        raise RuntimeError(
            "shard_base shares a model out among processes, but there is one. Start several with accelerate launch, "
            "and make the Accelerator first."
        )
    layers: list[nn.Module] = [
        cast(nn.Module, layer.base_layer) if hasattr(layer, "base_layer") else layer
        for tower in find_towers(model).values()
        for each in layer_lists(tower.base_layer, tower.spec.layers)
        for layer in each
    ]
    own = {name for layer in layers for name, p in layer.named_parameters() if p.requires_grad}
    if own:
        raise ValueError(
            f"shard_base needs encoder layers that are frozen, but {sorted(own)[0]} is trained. Take the adapter of "
            "another method out, or train without sharding."
        )
    found = torch.device(device) if device is not None else next(model.parameters()).device
    mesh = init_device_mesh(found.type, (distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer.to(found), mesh=mesh, reshard_after_forward=True)
    sharded = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    setattr(model, NOT_SENT, list(sharded))
    return sum(parameter.to_local().numel() for parameter in sharded.values())
