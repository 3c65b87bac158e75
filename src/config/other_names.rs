//! What other trainers call our flags and commands: TRL and `transformers`, LLaMA-Factory, ms-swift of all versions, Unsloth, Axolotl, mlx-lm.

/// Our flag as it is typed, perhaps with its value or a remark, and what others call it.
pub const OTHER_NAMES: &[(&str, &[&str])] = &[
    (
        "--model_id_or_path",
        &["model", "model_name", "model_name_or_path", "model_path", "base_model", "pretrained_model"],
    ),
    ("--adapters", &["adapter", "adapter_path", "adapter_name_or_path", "ckpt_dir", "lora_path"]),
    ("--sft_type lora, and nothing else", &["finetuning_type", "train_type", "tuner_type", "use_peft"]),
    ("--lora_target_modules", &["lora_target", "target_modules"]),
    ("--lora_rank", &["lora_r", "r", "rank"]),
    ("--lora_alpha", &["alpha"]),
    ("--dtype", &["torch_dtype", "precision", "compute_type", "infer_dtype"]),
    ("--dtype bf16", &["bf16", "bfloat16", "pure_bf16"]),
    ("--dtype fp16", &["fp16", "float16"]),
    ("--quantization_bit", &["quant_bits", "bits"]),
    ("--quantization_bit 4", &["load_in_4bit"]),
    ("--quantization_bit 8", &["load_in_8bit"]),
    (
        "--dataset, which takes files and folders",
        &["data", "data_path", "dataset_dir", "dataset_name", "dataset_path", "train_file", "train_data"],
    ),
    ("--dataset FILE#500, for 500 rows", &["max_samples", "max_train_samples", "train_dataset_sample"]),
    ("--val_dataset", &["eval_dataset", "eval_file", "val_data", "validation_file"]),
    ("--dataset_test_ratio", &["split_dataset_ratio", "test_size", "val_set_size", "val_size"]),
    ("--system", &["default_system", "system_prompt"]),
    ("--template_type", &["template", "chat_template"]),
    (
        "--max_length",
        &["cutoff_len", "max_len", "max_seq_len", "max_seq_length", "model_max_length", "sequence_len"],
    ),
    ("--max_length, which counts prompt and answer", &["max_prompt_length", "max_completion_length"]),
    ("--truncation_strategy", &["truncation_mode"]),
    ("--beta", &["dpo_beta", "orpo_alpha", "orpo_beta", "pref_beta", "rl_beta"]),
    (
        "--batch_size",
        &["micro_batch_size", "per_device_batch_size", "per_device_train_batch_size", "train_batch_size"],
    ),
    ("--batch_size, of evaluation as well", &["eval_batch_size", "per_device_eval_batch_size"]),
    (
        "--gradient_accumulation_steps",
        &["acc_steps", "accumulation_steps", "grad_accum", "gradient_accumulation"],
    ),
    ("--num_train_epochs", &["epochs", "num_epochs", "train_epochs"]),
    ("--max_steps", &["iters", "num_steps", "total_steps", "train_steps"]),
    ("--learning_rate", &["lr"]),
    ("--lr_scheduler_type", &["lr_scheduler", "scheduler", "scheduler_type"]),
    ("--warmup_ratio, a share of the steps", &["num_warmup_steps", "warmup", "warmup_steps"]),
    ("--adam_epsilon", &["adam_eps", "eps"]),
    ("--max_grad_norm", &["clip_grad", "grad_clip", "gradient_clipping"]),
    ("--gradient_checkpointing", &["grad_checkpoint", "use_gradient_checkpointing"]),
    ("--gradient_checkpointing false", &["disable_gradient_checkpointing"]),
    ("--seed", &["data_seed", "random_seed", "random_state"]),
    ("--device", &["cuda", "device_type", "gpu", "gpus"]),
    ("--logging_steps", &["logging_strategy", "steps_per_report"]),
    (
        "--eval_steps; --dataset_test_ratio 0 evaluates nothing",
        &["eval_strategy", "evaluation_strategy", "steps_per_eval"],
    ),
    ("--save_steps", &["save_every", "save_strategy"]),
    ("--output_dir", &["out", "out_dir", "output", "save_path"]),
    ("--resume_from_checkpoint", &["resume", "resume_from"]),
    ("--report_to", &["tracker"]),
    ("--max_new_tokens", &["max_tokens", "max_gen_len"]),
];

/// Why there is no such flag here, and the flags of others that are answered so.
pub const NOT_HERE: &[(&str, &[&str])] = &[
    (
        "ORPO is what is trained, and nothing else; for ORPO leave it out",
        &["dpo_loss", "loss_type", "pref_loss", "rl", "rlhf_type", "rpo_alpha", "stage", "train_mode"],
    ),
    (
        "adapters are plain LoRA, so leave it out",
        &["lora_bias", "loraplus_lr_ratio", "modules_to_save", "use_dora", "use_rslora"],
    ),
    (
        "a run takes one device, so leave it out",
        &["ddp_backend", "deepspeed", "fsdp", "nproc_per_node", "num_gpus", "num_processes"],
    ),
    (
        "attention and other ops always run in kernels of this program's own, so leave it out",
        &[
            "attn_impl",
            "attn_implementation",
            "flash_attn",
            "use_flash_attn",
            "use_liger",
            "use_liger_kernel",
        ],
    ),
    (
        "rows are packed without padding anyway, so leave it out",
        &["packing", "padding_free", "sample_packing"],
    ),
    (
        "nothing is asked of a hub, so leave it out",
        &["hub_model_id", "hub_token", "push_to_hub", "trust_remote_code", "use_hf"],
    ),
    (
        "this program needs no such setting, so leave it out",
        &[
            "bnb_4bit_compute_dtype",
            "bnb_4bit_quant_type",
            "bnb_4bit_use_double_quant",
            "dataloader_num_workers",
            "dataset_num_proc",
            "do_eval",
            "do_train",
            "disable_dropout",
            "infer_backend",
            "logging_dir",
            "logging_first_step",
            "num_proc",
            "optim",
            "overwrite_cache",
            "plot_loss",
            "preprocessing_num_workers",
            "run_name",
            "save_only_model",
            "stream",
            "streaming",
        ],
    ),
    (
        "a run ends with its last step; a large --save_total_limit keeps all checkpoints, to choose one by eval_loss in logging.jsonl",
        &["early_stopping_patience", "load_best_model_at_end", "metric_for_best_model"],
    ),
    ("`export` merges an adapter into its model", &["merge_adapter", "merge_lora"]),
];

/// What a command of others is here, and what they call it.
pub const OTHER_COMMANDS: &[(&str, &[&str])] = &[
    ("here this is `train`", &["fine-tune", "finetune", "fit", "lora", "orpo", "rlhf", "run", "tune"]),
    ("ORPO is what is trained here, and nothing else: `train` does it", &["cpo", "dpo", "kto", "pt", "sft"]),
    ("here this is `infer`", &["chat", "cli", "generate", "inference", "predict"]),
    (
        "a checkpoint is a PEFT adapter, which vLLM serves (see the README); `infer` answers in the terminal",
        &["api", "app", "deploy", "serve", "webchat", "webui"],
    ),
    ("here this is `eval`", &["evaluate", "test"]),
    ("here this is `bench`", &["benchmark"]),
    ("here this is `plan`", &["estimate", "estimate-memory"]),
    ("here this is `devices`", &["env", "gpus", "info"]),
    ("here this is `export`", &["fuse", "merge", "merge-lora", "merge_lora", "merge-model"]),
];

/// What a command of another trainer is here.
pub fn our_command(theirs: &str) -> Option<&'static str> {
    OTHER_COMMANDS.iter().find(|(_, names)| names.contains(&theirs)).map(|(ours, _)| *ours)
}

/// Why a flag or setting of another trainer is none here.
pub fn not_here(theirs: &str) -> Option<&'static str> {
    let name = name_of(theirs);
    NOT_HERE.iter().find(|(_, names)| names.contains(&name.as_str())).map(|(why, _)| *why)
}

/// The name of a flag or setting, whatever its dashes: `batch_size`.
pub fn name_of(flag: &str) -> String {
    flag.trim_start_matches('-').replace('-', "_")
}

/// What a flag or setting of another trainer is here, whatever its dashes: `--batch_size`.
pub fn ours(theirs: &str) -> Option<&'static str> {
    let name = name_of(theirs);
    OTHER_NAMES.iter().find(|(_, names)| names.contains(&name.as_str())).map(|(ours, _)| *ours)
}

/// The name of the flag in what [`ours`] gives: `batch_size`.
pub fn flag_of(ours: &str) -> &str {
    ours.trim_start_matches('-').split([' ', ',', ';']).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_whatever_their_dashes() {
        for theirs in ["--per_device_train_batch_size", "--per-device-train-batch-size"] {
            assert_eq!(ours(theirs), Some("--batch_size"));
        }
        assert_eq!(ours("--load_in_4bit").map(flag_of), Some("quantization_bit"));
        assert_eq!(ours("--warmup_steps").map(flag_of), Some("warmup_ratio"));
        assert_eq!(ours("--num_generations"), None);
        assert_eq!(not_here("--use-dora"), Some("adapters are plain LoRA, so leave it out"));
    }
}
