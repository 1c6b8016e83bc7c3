"""Settings every Python test shares: Hypothesis profiles and a bound on threads."""

from __future__ import annotations

import os

# torch's OpenMP team and our worker pool share the cores: keep torch's small. It reads this at import.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # and asleep while it waits
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import HealthCheck, settings

# Examples take as long as their shapes are large, so no deadline; the timeout of pytest bounds a test.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("dev", **_COMMON, max_examples=25)
settings.register_profile("ci", **_COMMON, max_examples=25, derandomize=True)
settings.register_profile("thorough", **_COMMON, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))
