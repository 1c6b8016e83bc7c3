"""Qwen3-235B-A22B on one GPU of 32 GB: experts in int4, packed once into files that later starts map.

    OMP_WAIT_POLICY=passive python examples/qwen3_235b.py --data train.jsonl
    python examples/qwen3_235b.py --tiny

Memory: 174.5 GiB of the host (118.97 of them experts) and 27.74 of the GPU (4.00 of them experts), by
`kt-moe plan` with rows of 2,048 tokens, one a step.

What to expect: at most 253 tokens/s of the experts alone, bound by the link, as the plan predicts for
machine A of docs/hardware.md; more tokens a step are faster.
The first start reads the bf16 checkpoint and writes the packed layers; that takes the disk's time for both.
"""

from common import options
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import kt_moe

args = options(__doc__, "Qwen/Qwen3-235B-A22B", "qwen3_moe")

# LoRA of the experts is larger than what the GPU has free: it stays in host memory, with its optimizer
config = kt_moe.KtMoeConfig(
    format="int4",
    cache_dir=args.output / "packed",
    gpu_memory="4GiB",
    lora_device="cpu",
    checkpoint_experts="retain",
)
model = kt_moe.load_model(args.model, config, dtype="bfloat16")
lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "experts"])
model = get_peft_model(model, lora)

trainer = SFTTrainer(
    model,
    args=SFTConfig(
        output_dir=str(args.output),
        max_length=2048,
        per_device_train_batch_size=1,
        max_steps=args.steps,
        learning_rate=1e-4,
        logging_steps=1,
        bf16=False,  # no autocast: the weights are bf16 already
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(args.model),
)
trainer.train()
kt_moe.save_adapter(model, args.output)
