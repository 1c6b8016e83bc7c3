"""Data parallelism by fully_shard over two processes: all but the experts is sharded, LoRA included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from tiny_models import ALL_EXPERTS, PEFT_WARNINGS, error, load, save_tiny_checkpoint, tokens
from torch import Tensor

import kt_moe

pytestmark = [
    *PEFT_WARNINGS,
    pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard needs it on the CPU"
    ),
]

TARGETS = ["experts", "q_proj"]
PROCESS = """
import sys
from pathlib import Path
import peft, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import kt_moe, transformers

rank, directory, targets = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
config = kt_moe.KtMoeConfig(threads=1)
model = transformers.AutoModelForCausalLM.from_pretrained(
    directory / "base", dtype=torch.float32, quantization_config=config)
model = peft.PeftModel.from_pretrained(model, directory / "adapter", is_trainable=True)
mesh = init_device_mesh("cpu", (2,))
for layer in model.base_model.model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
ids = torch.load(directory / "ids.pt")[rank : rank + 1]  # a row of the batch
out = model(input_ids=ids).logits
out.square().sum().backward()
whole = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
optimizer.step()
kt_moe.save_adapter(model, directory / "trained")
local = {n: p.to_local().numel() for n, p in model.named_parameters()}
torch.save((out.detach(), whole, local), directory / f"{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.timeout(300)
def test_two_processes_train_one_adapter(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base", **ALL_EXPERTS)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(5)
    model = peft.get_peft_model(load(base), config)
    kt_moe.save_adapter(model, tmp_path / "adapter")
    ids = tokens()[:2]
    torch.save(ids, tmp_path / "ids.pt")
    command = [sys.executable, "-W", "ignore", "-c", PROCESS]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path), *TARGETS]) for rank in range(2)]
    assert [process.wait() for process in running] == [0, 0]

    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    logits = [model(input_ids=ids[row : row + 1]).logits for row in range(2)]
    (sum(one.square().sum() for one in logits) / 2).backward()  # FSDP takes the mean over processes
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for row, (out, gradients, _) in enumerate(found):
        assert error(out, logits[row]) < 1e-5
        assert gradients.keys() == parameters.keys()
        for name, gradient in gradients.items():
            wanted: Tensor | None = parameters[name].grad
            assert wanted is not None
            assert error(gradient, wanted) < 1e-2, name
    # each process has half of every parameter
    for name, parameter in model.named_parameters():
        assert sum(local[name] for _, _, local in found) == parameter.numel(), name
    optimizer.step()
    again = kt_moe.load_adapter(load(base), tmp_path / "trained")
    model.eval()
    assert error(again(ids).logits, model(ids).logits) < 1e-2
    before = kt_moe.load_adapter(load(base), tmp_path / "adapter")
    assert error(before(ids).logits, model(ids).logits) > 5e-2
