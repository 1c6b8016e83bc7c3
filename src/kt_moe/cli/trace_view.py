"""`kt-moe trace-view`: a trace of `kt_moe.profile` as a picture, a lane for each thread, and as a table."""

from __future__ import annotations

import argparse
from pathlib import Path

from kt_moe.cli.errors import UserError
from kt_moe.cli.options import integer, number

_LEAST = 1e-3  # us, as all times of a trace: what no clock tells apart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("trace", type=Path, metavar="FILE", help="what kt_moe.profile or KT_MOE_PROFILE wrote")
    add("-o", "--output", type=Path, metavar="PNG", help="default: FILE with the ending .png")
    add("--call", type=integer(0), metavar="N", help="only that forward or backward; the first is 0")
    add("--from", type=number(0), dest="begin", metavar="MS", help="only from there; default: the first call")
    add("--to", type=number(0), dest="end", metavar="MS", help="only up to there; default: the last call")
    add("--table", action="store_true", help="also print the time of stages: of all calls, or of --call N")


def run(args: argparse.Namespace) -> int:
    """Draw the trace.

    Raises:
        UserError: the file is no trace, or nothing of it lies in the window.
    """
    from kt_moe.cli.trace import Window, read_trace
    from kt_moe.cli.trace_plot import plot_trace
    from kt_moe.cli.trace_table import trace_table

    if args.call is not None and (args.begin is not None or args.end is not None):
        raise UserError("--call and --from or --to: wanted one or the other")
    if args.table and (args.begin is not None or args.end is not None):
        raise UserError("--table is of whole calls: wanted without --from and --to")
    output = args.output or args.trace.with_suffix(".png")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no directory {output.absolute().parent}")
    if output.resolve() == args.trace.resolve():
        raise UserError(f"--output {output} is the trace itself")
    trace = read_trace(args.trace)
    if args.call is not None:
        window = trace.window_of(args.call)
    else:
        whole = trace.whole()
        begin = whole.begin if args.begin is None else 1e3 * args.begin
        window = Window(begin, whole.end if args.end is None else 1e3 * args.end)
    shown = trace.within(window)
    if not shown.spans or window.end - window.begin < _LEAST:
        raise UserError(
            f"{args.trace}: no spans from {window.begin / 1e3:g} to {window.end / 1e3:g} ms; "
            f"the trace ends at {trace.whole().end / 1e3:g} ms"
        )
    plot_trace(shown, window, output, args.trace.name)
    if args.table:
        print(trace_table(trace, args.call), end="\n\n")
    print(f"wrote {output}")
    return 0
