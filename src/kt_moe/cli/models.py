"""`kt-moe models`: the families of models in the installed transformers, and whether their experts work."""

from __future__ import annotations

import argparse

from kt_moe.cli.terminal import UserError, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="families to show (default: all)")


def run(args: argparse.Namespace) -> int:
    """Print a row for each family: what its experts compute and are called on disk, or why they do not work.

    Raises:
        UserError: a name of no family.
    """
    import transformers

    from kt_moe.families import Family, expert_classes, families, refused_classes

    if unknown := sorted(set(args.names) - expert_classes().keys() - refused_classes().keys()):
        raise UserError(f"transformers {transformers.__version__} has no experts in {', '.join(unknown)}")
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what models say of default configs is of no interest
    found = list(families(args.names))
    transformers.utils.logging.set_verbosity(verbosity)
    rows: dict[tuple[str, ...], list[Family]] = {}
    for one in found:  # classes of a family that compute the same have one row
        rows.setdefault((one.name, "yes" if one.works else "no", one.what), []).append(one)
    names, lacking = {one.name for one in found}, {one.name for one in found if not one.works}
    working = f"{len(names - lacking)} of {len(names)} families work"
    head = ("family", "works", "activation, or why not", "router", "experts on disk, by default")
    lines: list[tuple[str, ...]] = [head]
    for row, those in rows.items():
        routers, places = ({one.router for one in those}, {one.on_disk for one in those})
        lines.append((*row, *(", ".join(sorted(filter(None, some))) for some in (routers, places))))
    print(f"{table(lines)}\n\ntransformers {transformers.__version__}: {working}")
    return 0
