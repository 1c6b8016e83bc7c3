"""The tables of docs/models.md that say what is tested of how many families and formats, from the tests."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import test_families
import test_family_adapters
import test_family_merges
import test_gpu_stored
import test_merge_quantised
import test_sources
import test_unmarked
import transformers
from test_families import COMPUTED, DOCUMENT, WRITE_NOTHING
from test_family_merges import SHARED, WITHOUT_FP8

FUSED = "experts fused in one tensor, which is read in floating point only"


def row(what: str, *tests: object, without: dict[str, str] | None = None) -> str:
    """What tests show, in how many families, and the others with the reason."""
    assert all(callable(test) for test in tests)
    reasons: dict[str, list[str]] = {}
    for name, why in sorted((without or {}).items()):
        reasons.setdefault(why, []).append(name)
    left = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
    return f"| {what} | {len(set(COMPUTED) - set(without or {}))} | {left} |"


def families() -> Iterable[str]:
    families, merges = test_families, test_family_merges
    yield "| tested in each family | families | not in |"
    yield "|---|---|---|"
    yield row("both doors: logits, every gradient", families.test_logits_and_gradients)
    yield row("`generate()` with a cache", families.test_generate, without=WRITE_NOTHING)
    yield row("`wrap`: the bits of `KtMoeConfig`", families.test_a_loaded_model_is_taken_over)
    yield row("weights bit for bit those on disk", families.test_weights_are_those_of_the_checkpoint)
    yield row("LoRA: W + s B A, every gradient", families.test_lora)
    yield row("one expert wrong is seen", families.test_one_expert_wrong_is_seen)
    yield row("adapter in plain PEFT's process", test_family_adapters.test_plain_peft_reads_it)
    one_set = dict.fromkeys(SHARED, "encoder and decoder share one set of experts")
    yield row("merged", merges.test_merged, without=one_set)
    fp8 = dict.fromkeys(WITHOUT_FP8, FUSED) | one_set
    yield row("merged in FP8", merges.test_merged_in_fp8, without=fp8)


def formats() -> Iterable[str]:
    yield "| tested of stored formats | formats |"
    yield "|---|---|"
    for what, found in (
        ("read, copied to a GPU's slots, packed, paged", test_gpu_stored.CHECKPOINTS),
        ("without a gate", test_sources.WITHOUT_GATE),
        ("merged: W + s B A, and how much of it arrives", test_merge_quantised.FORMATS),
    ):
        yield f"| {what} | {'; '.join(found)} |"


def test_the_document_has_what_is_tested() -> None:
    if not transformers.__version__.startswith("5.23"):
        pytest.skip("the document is of transformers 5.23")
    assert set(test_unmarked.BLOCKS) <= set(COMPUTED)
    for table in (families(), formats()):
        text = "\n".join(table)
        assert text in DOCUMENT, f"docs/models.md wants\n{text}"
