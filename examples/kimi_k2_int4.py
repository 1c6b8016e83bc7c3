"""Kimi-K2 on one GPU of 141 GB: the experts stay in INT4, as they are stored.

    OMP_WAIT_POLICY=passive python examples/kimi_k2_int4.py --data train.jsonl
    python examples/kimi_k2_int4.py --tiny

Its architecture is DeepSeek-V3's under another name, which transformers does not know; hence the class.

Memory: 618.1 GiB of the host (531.56 of them experts) and 71.69 of the GPU (40.00 of them experts), by
`kt-moe plan` with rows of 2,048 tokens, one a step.

What to expect: at most 152 tokens/s of the experts alone, bound by the link, as the plan predicts for
machine B of docs/hardware.md; more tokens a step are faster.
"""

from common import options
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, DeepseekV3ForCausalLM
from trl import SFTConfig, SFTTrainer

import kt_moe

args = options(__doc__, "moonshotai/Kimi-K2-Thinking", "deepseek_v3", stored="int4")

config = kt_moe.KtMoeConfig(gpu_memory="40GiB", lora_device="cpu", checkpoint_experts="retain")
model = DeepseekV3ForCausalLM.from_pretrained(
    args.model, quantization_config=config, device_map="auto", dtype="bfloat16"
)
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
