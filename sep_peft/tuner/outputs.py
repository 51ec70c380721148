"""Hidden states and attention maps that a tower records in its output, in the shapes of the tower without prompts."""

from __future__ import annotations

import torch

from ..families.spec import TowerSpec
from ..method.sequence import split_prompts


def strip(output, spec: TowerSpec, count: int, prompted: tuple[int, int]) -> None:
    """Take the prompts out of the records of a prompted pass.

    Hidden states (B, L + n, D) become (B, L, D). Attention maps (B, H, L + n, L + n) become (B, H, L, L): the rows of
    the prompts go, and so do their columns. What tokens pay to prompts is then missing, so rows no longer sum to one;
    scaled back to one they would show attention that the tower has not paid.

    Records of another shape have no prompts, be they from before or after the layers that prompts pass. Where layers
    come in stages the records are made between these, where no prompts are.

    Args:
        output: of the tower, changed in place.
        spec: of the tower.
        count: n.
        prompted: (B, L + n) of hidden states with prompts.
    """
    if spec.in_stages:
        return
    batch, length = prompted
    prompt_index = length - count if spec.insert_at is None else spec.insert_at

    def state(record: torch.Tensor | None) -> torch.Tensor | None:
        if record is None or tuple(record.shape[:2]) != prompted:
            return record
        return split_prompts(record, count, prompt_index)[0]

    side = length + spec.layer_tokens

    def attention(record: torch.Tensor | None) -> torch.Tensor | None:
        if record is None or (record.shape[0], *record.shape[-2:]) != (batch, side, side):
            return record
        kept = [i for i in range(side) if not prompt_index <= i < prompt_index + count]
        return record[..., kept, :][..., kept]

    for name, without_prompts in (("hidden_states", state), ("attentions", attention)):
        if output.get(name) is not None:
            output[name] = tuple(without_prompts(record) for record in output[name])


def prepend_shared(prompted, frozen, spec: TowerSpec, start_layer: int, last_layers: tuple[int, ...]) -> None:
    """Complete the records of a prompted pass by those of the layers that it shares with the frozen pass.

    Args:
        prompted: output of the prompted pass, changed in place.
        frozen: output of the frozen pass.
        spec: of the tower.
        start_layer: index of the first prompted layer.
        last_layers: index of the last layer of the tower, or of each of its stages.
    """
    for name in ("hidden_states", "attentions"):
        if prompted.get(name) is None:
            continue
        known, recorded, shared = tuple(frozen[name]), tuple(prompted[name]), start_layer
        if spec.in_stages:  # one record a stage
            shared = sum(start_layer > end for end in last_layers)
        shared += name == "hidden_states"  # the input of what has the first prompts
        # from the end, because some families record the layers that were left out and others do not
        own = len(known) - shared
        prompted[name] = known[:shared] + recorded[len(recorded) - own :]
