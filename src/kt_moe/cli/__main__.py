"""`python -m kt_moe.cli`, the same as `kt-moe`."""

import sys

from kt_moe.cli import main

sys.exit(main())
