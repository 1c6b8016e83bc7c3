"""DeepSeek-V3.1 on one GPU of 141 GB: experts stay in FP8, as stored, attention is decoded to bf16.

    OMP_WAIT_POLICY=passive python examples/deepseek_v31_fp8.py --data train.jsonl
    python examples/deepseek_v31_fp8.py --tiny

Memory: 665.3 GiB of the host (609.15 of them experts) and 81.26 of the GPU (40.00 of them experts), by
`kt-moe plan` with rows of 2,048 tokens, one a step.

What to expect: at most 136 tokens/s of the experts alone, bound by the CPU, as the plan predicts for
machine B of docs/hardware.md; more tokens a step are faster.
"""

from common import options
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, FineGrainedFP8Config
from trl import SFTConfig, SFTTrainer

import kt_moe

args = options(__doc__, "deepseek-ai/DeepSeek-V3.1", "deepseek_v3", stored="fp8")

config = kt_moe.KtMoeConfig(
    gpu_memory="40GiB",
    lora_device="cpu",
    checkpoint_experts="retain",
    rest=FineGrainedFP8Config(dequantize=True),  # of the other layers
)
model = kt_moe.load_model(args.model, config, dtype="bfloat16")
lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_b_proj", "kv_b_proj", "o_proj", "experts"])
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
