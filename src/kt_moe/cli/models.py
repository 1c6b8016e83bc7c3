"""`kt-moe models`: the families of models in the installed transformers, and whether their experts work."""

from __future__ import annotations

import argparse

from kt_moe.cli.errors import UserError
from kt_moe.cli.text import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="families to show (default: all)")


def run(args: argparse.Namespace) -> int:
    """Print a row for each family: what its experts compute and are called on disk, or why they do not work.

    Raises:
        UserError: a name of no family.
    """
    import transformers

    from kt_moe.families import expert_classes, families, refused_classes

    if unknown := sorted(set(args.names) - expert_classes().keys() - refused_classes().keys()):
        raise UserError(f"transformers {transformers.__version__} has no experts in {', '.join(unknown)}")
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what models say of default configs is of no interest
    found = list(families(args.names))
    transformers.utils.logging.set_verbosity(verbosity)
    names, lacking = {one.name for one in found}, {one.name for one in found if not one.works}
    head = ("family", "works", "activation, or why not", "router", "experts on disk, by default")
    lines = [
        (one.name, "no" if one.name in lacking else "yes", one.what, one.router, one.on_disk) for one in found
    ]
    working = f"{len(names - lacking)} of {len(names)} families work"
    print(f"{table([head, *dict.fromkeys(lines)])}\n\ntransformers {transformers.__version__}: {working}")
    return 0
