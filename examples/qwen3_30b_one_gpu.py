"""Qwen3-30B-A3B on one GPU of 24 GB: LoRA on attention and all experts, which stay in host memory in bf16.

    OMP_WAIT_POLICY=passive python examples/qwen3_30b_one_gpu.py --data train.jsonl
    python examples/qwen3_30b_one_gpu.py --tiny

Memory: 68.7 GiB of the host (54.00 of them experts) and 16.64 of the GPU (8.00 of them experts), by
`kt-moe plan` with rows of 2,048 tokens, one a step.

What to expect: at most 791 tokens/s of the experts alone, bound by the CPU, as the plan predicts for
machine A of docs/hardware.md; more tokens a step are faster.
With format="int4" the experts take 15.2 GiB of host memory instead of 54, and a quarter crosses the link.
"""

from common import options
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import kt_moe

args = options(__doc__, "Qwen/Qwen3-30B-A3B", "qwen3_moe")

# "retain": gradient checkpointing, TRL's default, keeps what the experts computed
config = kt_moe.KtMoeConfig(gpu_memory="8GiB", checkpoint_experts="retain")
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
