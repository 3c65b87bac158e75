"""The trainers in Python that `peers.py` runs: one call trains with one of them, in a process of its own.

`Job.settings` are arguments of ORPOConfig; the process writes what each step logged and took to `Job.result`.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What `peers.py` orders, as JSON in the command line."""

    peer: str
    folder: str
    device: str
    dtype: str
    settings: dict
    result: str


if __name__ == "__main__":
    JOB = Job(**json.loads(sys.argv[1]))
    if JOB.peer == "unsloth":
        import unsloth  # before what it patches: transformers, PEFT and TRL

import datasets
import torch
from fixture_model import load_tokenizer, render_prompt
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class LigerLossTrainer(ORPOTrainer):
    """TRL's ORPO trainer with Liger's fused head and loss, which never holds the logits of more than one pair."""

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

        inputs = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
        ids, mask = inputs["concatenated_input_ids"], inputs["concatenated_attention_mask"]
        llama = self.accelerator.unwrap_model(model).get_base_model()
        with self.accelerator.autocast():
            hidden = llama.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            loss_of = LigerFusedLinearORPOLoss(beta=self.beta, compiled=self.accelerator.device.type == "cuda")
            loss, parts = loss_of(
                llama.lm_head.weight,
                hidden[:, :-1],
                inputs["concatenated_labels"][:, 1:],
                nll_target=torch.where(mask == 1, ids, -100)[:, 1:],  # prompt and chosen, as TRL has it
            )
        chosen, rejected, _, _, nll_loss, chosen_rewards, rejected_rewards, log_odds_ratio, log_odds_chosen = parts
        metrics = {
            "nll_loss": nll_loss, "log_odds_ratio": log_odds_ratio, "log_odds_chosen": log_odds_chosen,
            "rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen, "logps/rejected": rejected,
        }  # fmt: skip
        return loss, {name: value.mean().item() for name, value in metrics.items()}


class StepTimer(TrainerCallback):
    """Wall time of each optimizer step, from its first micro-batch to the end of AdamW."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.started = now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(now() - self.started)


def now() -> float:
    """The time at which everything that was begun on the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def load(job: Job) -> PeftModel:
    """The model with the adapter to start from, frozen weights in the job's type and the adapter in f32."""
    model_folder, adapter = f"{job.folder}/model", f"{job.folder}/adapter"
    if job.peer == "unsloth":
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            model_folder,
            max_seq_length=job.settings["max_length"],
            dtype=DTYPES[job.dtype],
            load_in_4bit=False,
        )
        lora = LoraConfig.from_pretrained(adapter)
        model = unsloth.FastLanguageModel.get_peft_model(
            model, r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=0, bias="none",
            target_modules=sorted(lora.target_modules),
            use_gradient_checkpointing="unsloth" if job.settings["gradient_checkpointing"] else False,
        )  # fmt: skip
        set_peft_model_state_dict(model, load_peft_weights(adapter))
        return model
    if job.peer.startswith("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=False)  # of the loss, TRL's is ORPO's, on logits
    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=DTYPES[job.dtype], attn_implementation="sdpa")
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def train(job: Job) -> dict:
    """Trains in the file's order; what was logged, seconds and tensors' memory."""
    assert job.device == "cpu" or torch.cuda.is_available(), "torch finds no CUDA device"
    tokenizer = load_tokenizer(Path(job.folder, "model"))
    rows = [json.loads(line) for line in Path(job.folder, "pairs.jsonl").read_text().splitlines()]
    timer = StepTimer()
    trainer_class = LigerLossTrainer if job.peer == "liger-loss" else ORPOTrainer
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = trainer_class(
            model=load(job),
            processing_class=tokenizer,
            callbacks=[timer],
            train_dataset=datasets.Dataset.from_list([
                {"prompt": render_prompt(r), "chosen": r["response"], "rejected": r["rejected_response"]} for r in rows
            ]),
            args=ORPOConfig(
                output_dir=output_dir, train_sampling_strategy="sequential", bf16=job.dtype == "bf16",
                fp16=job.dtype == "fp16", use_cpu=job.device == "cpu",
                optim="adamw_torch_fused" if job.device == "cuda" else "adamw_torch", logging_nan_inf_filter=False,
                save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False, **job.settings,
            ),
        )  # fmt: skip
        expected = json.loads(Path(job.folder, "about.json").read_text())["tokens"]
        for row, tokens in zip(trainer.train_dataset, expected, strict=True):
            assert len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) == tokens["sequences"]
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {
        "seconds": timer.seconds,
        "steps": [line for line in trainer.state.log_history if "loss" in line],
        "tensor_bytes": torch.cuda.max_memory_allocated() if job.device == "cuda" else None,
    }


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    Path(JOB.result).write_text(json.dumps(train(JOB)))
