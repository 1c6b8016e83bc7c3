"""Preference tuning (DPO) of Qwen3-30B-A3B on one GPU; the reference is the model with its adapter disabled.

    OMP_WAIT_POLICY=passive python examples/dpo.py --data pairs.jsonl
    python examples/dpo.py --tiny

`pairs.jsonl` has {"prompt": ..., "chosen": ..., "rejected": ...} in a line.

Memory: that of qwen3_30b_one_gpu.py, as both answers of a pair, of 1,024 tokens each, go through together.

What to expect: its tokens/s, and a forward of the reference on top; precompute_ref_log_probs=True does that
once ahead.
"""

from common import options
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import kt_moe

args = options(__doc__, "Qwen/Qwen3-30B-A3B", "qwen3_moe", pairs=True)

config = kt_moe.KtMoeConfig(gpu_memory="8GiB", checkpoint_experts="retain")
model = kt_moe.load_model(args.model, config, dtype="bfloat16")
lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "experts"])
model = get_peft_model(model, lora)

trainer = DPOTrainer(
    model,
    args=DPOConfig(
        output_dir=str(args.output),
        max_length=1024,
        per_device_train_batch_size=1,
        max_steps=args.steps,
        learning_rate=5e-6,
        beta=0.1,
        logging_steps=1,
        bf16=False,  # no autocast: the weights are bf16 already
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(args.model),
)
trainer.train()
kt_moe.save_adapter(model, args.output)
