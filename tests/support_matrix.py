"""The support matrix of docs/models.md, made from the specs of `sep_peft.families` and the cases of `families`.

python tests/support_matrix.py     # writes it there
"""

from __future__ import annotations

import sys
from pathlib import Path

from families import CASES

from sep_peft.families.find import DUAL_ENCODER
from sep_peft.families.spec import TowerSpec
from sep_peft.families.table import ARCHITECTURES, DUAL_ENCODER_TEXT, DUAL_ENCODER_VISION


DOC = Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- support matrix -->\n", "<!-- end of support matrix -->"


def tested() -> dict[tuple[str, str], set[str]]:
    """(model type, tower) -> attention implementations in the test table; towers of dual encoders by their own type."""
    found: dict[tuple[str, str], set[str]] = {}
    for case in CASES.values():
        config = case.config()
        for tower in case.towers:
            model_type = config.model_type
            if model_type == DUAL_ENCODER:
                model_type = f"{DUAL_ENCODER}: {getattr(config, f'{tower}_config').model_type}"
            found.setdefault((model_type, tower), set()).update(case.attentions)
    return found


def rows() -> list[tuple[str, str, TowerSpec]]:
    """Model type, tower, row; what a class of a model type has beyond the common row counts with it."""
    found = []
    for model_type, architecture in sorted(ARCHITECTURES.items()):
        towers = {}
        for one in (*architecture.variants.values(), architecture):
            towers |= one.towers
        found += [(model_type, tower, towers[tower]) for tower in ("text", "vision") if tower in towers]
    for tower, table in (("text", DUAL_ENCODER_TEXT), ("vision", DUAL_ENCODER_VISION)):
        found += [(f"{DUAL_ENCODER}: {model_type}", tower, spec) for model_type, spec in sorted(table.items())]
    return found


def describe_prompts(spec: TowerSpec) -> str:
    if spec.insert_at is None:
        return "after all patches"
    where = "in front" if spec.insert_at == 0 else "after the first token"
    if spec.inputs != "input_ids":
        return where
    return f"{where}, {'tokens move up' if spec.positions or spec.rotary else 'no position of their own'}"


def describe_mix(spec: TowerSpec) -> str:
    if spec.projection is None:
        return "in the tower's output"
    if spec.reader is not None:
        return f"after `{spec.reader}`, before the projection"
    return "after the projection" if getattr(spec, "mixes_after_projection", False) else "before the projection"


def render() -> str:
    """The matrix as Markdown."""
    tests = tested()
    lines = ["| model type | tower | prompts stand | mixed | tested with |", "|---|---|---|---|---|"]
    refusals = []
    for model_type, tower, spec in rows():
        if spec.refused is not None:
            refusals.append(f"- `{model_type}`, {tower} tower: {spec.refused}.")
            continue
        for word, options in (("with", spec.refused_options), ("without", spec.needed_options)):
            refusals += [f"- `{model_type}`, {tower} tower {word} `{name}`: {why}." for name, why in options.items()]
        attentions = ", ".join(sorted(tests[model_type, tower]))  # a row without a case is an error
        lines.append(f"| `{model_type}` | {tower} | {describe_prompts(spec)} | {describe_mix(spec)} | {attentions} |")
    for _, architecture in sorted(ARCHITECTURES.items()):
        for name, variant in architecture.variants.items():
            refused = {tower: spec.refused for tower, spec in variant.towers.items() if spec.refused is not None}
            refusals += [f"- `{name}`, {tower} tower: {reason}." for tower, reason in refused.items()]
    if refusals:
        lines += ["", "Refused, before the model is touched:", "", *refusals]
    return "\n".join(lines) + "\n"


def replace_in(text: str) -> str:
    """The document with the present matrix."""
    head, rest = text.split(START)
    return head + START + render() + END + rest.split(END)[1]


if __name__ == "__main__":
    DOC.write_text(replace_in(DOC.read_text()))
    sys.exit(0)
