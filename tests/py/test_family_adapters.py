"""Adapters on the experts of every family, in another process that never imports kt_moe: the same output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from test_families import COMPUTED, Family
from tiny_models import PEFT_WARNINGS, error
from torch import Tensor, nn

import kt_moe

pytestmark = [*PEFT_WARNINGS, pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")]

PLAIN = """
import sys, torch, transformers, peft

@torch.no_grad()
def output(model, ids):
    torch.manual_seed(4)  # which a diffusion model begins with
    return model(input_ids=ids)[0]

work = torch.load(sys.argv[1])
for name, (class_name, base, adapter, ids) in work.items():
    try:
        made = getattr(transformers, class_name)
        model = made.from_pretrained(base, dtype=torch.float32, experts_implementation="eager").eval()
        before = output(model, ids)
        work[name] = before, output(peft.PeftModel.from_pretrained(model, adapter).eval(), ids)
    except Exception as problem:
        work[name] = f"{type(problem).__name__}: {problem}"
assert "kt_moe" not in sys.modules
torch.save(work, sys.argv[1])
"""


@torch.no_grad()
def output(model: nn.Module, ids: Tensor) -> Tensor:
    """The same in both processes."""
    torch.manual_seed(4)
    out: Tensor = model(input_ids=ids)[0]
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, object]]:
    """For every family our output, and what the other process gave: outputs without and with, or an error."""
    ours, work = {}, {}
    for name in COMPUTED:
        path = tmp_path_factory.mktemp(name)
        family = Family(name, path / "base")
        config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["experts"], init_lora_weights=False)
        torch.manual_seed(3)
        model = peft.get_peft_model(family.by_config(), config).eval()
        kt_moe.save_adapter(model, path / "adapter")
        ours[name] = output(model, family.ids)
        again = kt_moe.load_adapter(family.by_config(), path / "adapter").eval()
        assert torch.equal(output(again, family.ids), ours[name]), name
        paths = str(family.path), str(path / "adapter")
        work[name] = (family.model_class.__name__, *paths, family.ids)
    file = tmp_path_factory.mktemp("work") / "work.pt"
    torch.save(work, file)
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-W", "ignore", "-c", PLAIN, str(file)]
    subprocess.run(command, check=True, env=environment, cwd=Path(file).parent)
    return {name: (ours[name], found) for name, found in torch.load(file).items()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", COMPUTED)
def test_plain_peft_reads_it(name: str, plain: dict[str, tuple[Tensor, object]]) -> None:
    ours, found = plain[name]
    assert isinstance(found, tuple), found
    before, after = found
    assert error(ours, after) < 0.02
    assert error(before, after) > 0.05, "the adapter had no effect"
