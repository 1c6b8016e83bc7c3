"""`kt-moe bench`: time layers and training steps against the machine's ceilings and other libraries."""

from kt_moe.cli.bench.options import add_arguments
from kt_moe.cli.bench.session import run

__all__ = ["add_arguments", "run"]
