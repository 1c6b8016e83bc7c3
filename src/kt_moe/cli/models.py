"""`kt-moe models`: the families of models in the installed transformers, and whether their experts work."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from kt_moe.cli.errors import UserError
from kt_moe.cli.text import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="families to show (default: all)")
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args: argparse.Namespace) -> int:
    """Print a row for each class of experts: what it computes, its names on disk, what the core lacks.

    Raises:
        UserError: a name of no family.
    """
    import transformers

    from kt_moe.families import expert_classes, families

    if unknown := sorted(set(args.names) - expert_classes().keys()):
        raise UserError(f"transformers {transformers.__version__} has no experts in {', '.join(unknown)}")
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what models say of default configs is of no interest
    found = list(families(args.names))
    transformers.utils.logging.set_verbosity(verbosity)
    if args.json:
        rows_of = [asdict(one) | {"works": one.works, "on_disk": one.on_disk} for one in found]
        print(json.dumps(rows_of, indent=2))
        return 0
    rows = [("family", "works", "activation, or what is lacking", "experts on disk, by default")]
    for one in found:
        what = "no module of its default config"
        if one.computation is not None:
            what = one.computation.activation or "; ".join(one.computation.lacks)
        rows.append((one.name, "yes" if one.works else "no", what, one.on_disk))
    names, lacking = {one.name for one in found}, {one.name for one in found if not one.works}
    working = f"{len(names - lacking)} of {len(names)} families work"
    print(f"{table(rows)}\n\ntransformers {transformers.__version__}: {working}")
    return 0
