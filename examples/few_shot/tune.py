"""Tune methods on validation images: as many candidates of each, for any protocol, never on a test image.

    python examples/few_shot/tune.py --data-root data --dataset caltech101 --method sep lora --budget 8 --seeds 1

tries the first 8 changes of recipe and config in `tuning/sep.json` and `tuning/lora.json`; those of a method file
elsewhere are in a folder `tuning` beside it. Printed are the best of each method and what all took; `tried.json` in
`tuning/<protocol>` of the output folder has every candidate that was tried there, best first. Candidates are ordered by
what the protocol's tables are: H of base and new classes, the average of targets or of shifted images.

Domain generalization is tuned on shifted validation images where there is one domain. Of several, that of `--held-out`
is never looked at; each of the others is held out of training in its turn.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from candidates import Candidate, equally_many, read_candidates
from intervals import SHIFTED
from protocols import PROTOCOLS, Plan, limited, on_validation, with_shifts, without_domain
from readers import ImageSet, read_dataset
from run import HERE, Cell, add_common_arguments, check_protocol, find, make_plan, run_cell
from run_folder import write_json
from script import run_as_script
from tables import WITHOUT
from transformers.utils import logging
from tried import to_text, tried


def main() -> None:
    args = parse_arguments()
    logging.disable_progress_bar()
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.precision)
    methods = equally_many(candidates_of(args.method), args.budget)
    data = {
        name: read_dataset(find(HERE / "data_sets", name), args.data_root) for name in (*args.dataset, *args.targets)
    }
    places = [(name, place) for name in args.dataset for place in places_of(name, data[name], args)]
    plans = [
        (place, tuning_plan(args, data | {name: place.data}, name, seed, place.held_out), seed)
        for name, place in places
        for seed in args.seeds
    ]
    folder = args.output / "tuning" / args.protocol
    for candidate, (place, plan, seed) in itertools.product(itertools.chain(*methods.values()), plans):
        path = folder / place.name / candidate.method.name / candidate.title / f"seed_{seed}"
        cell = Cell("tuning", place.name, candidate.method, plan, args.shots, seed, place.held_out)
        run_cell(path, cell, args, accelerator)
    if accelerator.is_main_process:
        found = tried(folder)
        write_json(folder / "tried.json", found)
        print(to_text(found))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="base-to-new")
    parser.add_argument("--method", nargs="+", required=True, help="files in methods/, or paths of such files")
    parser.add_argument("--shots", type=int, default=16, help="training images per class")
    parser.add_argument("--budget", type=int, metavar="N", help="candidates of each method at most; default: all")
    parser.add_argument("--held-out", help="domain that will be tested on, for domain-generalization with several")
    parser.add_argument(
        "--shifts", action="store_true", help="measure the trained classes on shifted validation images beside"
    )
    args = parser.parse_args()
    if args.shots < 1:
        parser.error("--shots must be at least 1")
    if args.budget is not None and args.budget < 1:
        parser.error("--budget must be at least 1")
    check_protocol(parser, args)
    if args.shifts and args.protocol == SHIFTED:
        parser.error("--shifts is for other protocols; domain-generalization has shifted images of its own")
    return args


def candidates_of(names: list[str]) -> dict[str, list[Candidate]]:
    """The candidates of methods, given as files in methods/ or by path.

    Raises:
        ValueError: two files have the same name.
    """
    files = list(dict.fromkeys(find(HERE / "methods", name) for name in names))
    if len({file.stem for file in files}) < len(files):
        raise ValueError(f"Runs are told apart by the names of methods, but {', '.join(map(str, files))} share one.")
    return {file.stem: read_candidates(file) for file in files}


class Place(NamedTuple):
    """What is tuned on.

    Args:
        name: of the folder.
        data: the images that may be looked at.
        held_out: domain that is not trained on; None: none.
    """

    name: str
    data: ImageSet
    held_out: str | None = None


def places_of(name: str, data: ImageSet, args: argparse.Namespace) -> list[Place]:
    """The places of a data set, one, or with several domains one for each domain but that of `--held-out`.

    Raises:
        ValueError: `--held-out` is not one domain of several.
    """
    stem = Path(name).stem
    if args.protocol != SHIFTED or (len(data.domains) < 2 and args.held_out is None):
        return [Place(stem, data)]
    if args.held_out == "all":
        raise ValueError("Tune for one held-out domain at a time, so that its images are not looked at.")
    rest, stem = without_domain(data, args.held_out), f"{stem}{WITHOUT}{args.held_out}"
    if len(rest.domains) < 2:
        return [Place(stem, rest)]
    return [Place(f"{stem}-and-{domain}", rest, domain) for domain in rest.domains]


def tuning_plan(
    args: argparse.Namespace, data: dict[str, ImageSet], name: str, seed: int, held_out: str | None
) -> Plan:
    """What the protocol trains, measured on validation images."""
    plan = on_validation(make_plan(args, data, name, args.shots, seed, held_out))
    plan = with_shifts(plan) if args.shifts else plan
    return plan if args.test_images is None else limited(plan, args.test_images)


if __name__ == "__main__":
    run_as_script(main)
