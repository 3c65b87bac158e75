//! What can be wrong with a run's settings before a file of it is opened.

use super::TrainArgs;
use crate::data::batch::LossCompat;
use crate::data::template::Template;
use crate::data::tokenize::TruncationStrategy;
use crate::device::DeviceRequest;
use crate::error::{Error, Result};
use crate::lora::{self, MAX_RANK};
use crate::train::loss_scale::{MAX_SCALE, MIN_SCALE};

/// More is nobody's, and could not be counted in steps.
const MAX_EPOCHS: f64 = 1e6;

/// What `--dtype` takes, whatever the case.
const DTYPES: [&str; 4] = ["auto", "bf16", "fp16", "fp32"];

impl TrainArgs {
    /// What is wrong with the settings, against each other and against what this build does. Their numbers are finite: those of the
    /// flags are looked at before, and a file's as it is read. With what to do about the first problem of which more is known.
    pub(super) fn problems(&self) -> (Vec<String>, Option<String>) {
        let (mut problems, mut hint) = (Vec::new(), None);
        let mut require = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        let positive = [
            ("lora_rank", self.lora_rank),
            ("batch_size", self.batch_size),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps.unwrap_or(1)),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("max_length", self.max_length),
            ("logging_steps", self.logging_steps),
            ("eval_steps", self.eval_steps),
            ("save_steps", self.save_steps),
            ("save_total_limit", self.save_total_limit),
        ];
        for (name, value) in positive {
            require(value > 0, format!("--{name} is 0, expected at least 1"));
        }
        // An adapter that there is already keeps its own.
        let is_new = self.adapters.is_none() && self.resume_from_checkpoint.is_none();
        require(
            !is_new || self.lora_rank <= MAX_RANK,
            format!("--lora_rank is {}, expected at most {MAX_RANK}", self.lora_rank),
        );
        let in_range = [
            ("dataset_test_ratio", self.dataset_test_ratio),
            ("warmup_ratio", self.warmup_ratio),
            ("adam_beta1", self.adam_beta1),
            ("adam_beta2", self.adam_beta2),
        ];
        for (name, value) in in_range {
            require(
                (0.0..1.0).contains(&value),
                format!("--{name} is {value}, expected at least 0 and less than 1"),
            );
        }
        let not_negative =
            [("beta", self.beta), ("weight_decay", self.weight_decay), ("max_grad_norm", self.max_grad_norm)];
        let scales = [
            ("fp16_init_scale", self.fp16_init_scale, MIN_SCALE..=MAX_SCALE),
            ("fp16_growth_factor", self.fp16_growth_factor, 1.0..=1024.0),
            ("fp16_backoff_factor", self.fp16_backoff_factor, 1e-3..=0.999),
        ];
        for (name, value, range) in scales {
            require(
                range.contains(&value),
                format!("--{name} is {value}, expected {} to {}", range.start(), range.end()),
            );
        }
        require(self.fp16_growth_interval > 0, "--fp16_growth_interval is 0, expected at least 1".to_owned());
        for (name, value) in not_negative {
            require(value >= 0.0, format!("--{name} is {value}, expected at least 0"));
        }
        for (name, value) in [("num_train_epochs", self.num_train_epochs), ("lora_alpha", self.lora_alpha)] {
            require(value > 0.0, format!("--{name} is {value}, expected more than 0"));
        }
        require(
            // What has had no gradient, as A where B is 0, would be 0 / 0; what is less a GPU may take for 0.
            self.adam_epsilon >= f64::from(f32::MIN_POSITIVE),
            format!("--adam_epsilon is {:e}, expected at least {:e}", self.adam_epsilon, f32::MIN_POSITIVE),
        );
        require(
            self.num_train_epochs <= MAX_EPOCHS,
            format!("--num_train_epochs is {}, expected at most {MAX_EPOCHS}", self.num_train_epochs),
        );
        require(
            self.learning_rate > 0.0 && self.learning_rate < 1.0,
            // AdamW moves every weight by about as much a step: of 0 nothing is learned, and of 1 nothing is left.
            format!("--learning_rate is {}, expected more than 0 and less than 1", self.learning_rate),
        );
        require(
            self.lora_dropout == 0.0,
            format!(
                "--lora_dropout is {}: ORPO runs without dropout (TRL and ms-swift set it to 0 in silence)",
                self.lora_dropout
            ),
        );
        require(
            self.sft_type == "lora",
            format!("--sft_type is `{}`: this build trains `lora`", self.sft_type),
        );
        require(
            ["tensorboard", "none"].contains(&self.report_to.as_str()),
            format!("--report_to is `{}`, expected tensorboard or none", self.report_to),
        );
        require(
            self.adapters.is_none() || self.resume_from_checkpoint.is_none(),
            "--adapters starts anew and --resume_from_checkpoint goes on: give one of them".to_owned(),
        );
        let parsed = [
            lora::target_modules(&self.lora_target_modules).map(drop),
            check_precision(&self.dtype, self.quantization_bit, self.quantize_lm_head),
            template(&self.template_type).map(drop),
            self.truncation_strategy.parse::<TruncationStrategy>().map(drop),
            self.loss_compat.parse::<LossCompat>().map(drop),
            self.device.parse::<DeviceRequest>().map(drop),
        ];
        for error in parsed.into_iter().filter_map(Result::err) {
            hint = hint.or_else(|| error.hint().map(str::to_owned));
            match error {
                Error::Config { problems: more, .. } => problems.extend(more),
                other => problems.push(other.to_string()),
            }
        }
        (problems, hint)
    }
}

/// The template that `--template_type` names; none for `AUTO`.
///
/// # Errors
/// If there is no such template.
pub(crate) fn template(name: &str) -> Result<Option<Template>> {
    if name.eq_ignore_ascii_case("auto") { Ok(None) } else { name.parse().map(Some) }
}

/// Checks what `--dtype`, `--quantization_bit` and `--quantize_lm_head` say, whatever the device can do.
///
/// # Errors
/// Names every one of them that says nothing, or nothing together.
pub(crate) fn check_precision(dtype: &str, quantization_bit: u32, quantize_lm_head: bool) -> Result<()> {
    let (mut problems, mut hint) = (Vec::new(), None);
    if !DTYPES.contains(&dtype.to_ascii_lowercase().as_str()) {
        problems.push(format!("--dtype is `{dtype}`, expected AUTO, bf16, fp16 or fp32"));
    }
    if ![0, 4, 8].contains(&quantization_bit) {
        problems.push(format!("--quantization_bit is {quantization_bit}, expected 0, 4 or 8"));
    }
    if quantize_lm_head && quantization_bit == 0 {
        problems.push("--quantize_lm_head is true, but the linear layers are not quantised".to_owned());
        hint = Some("--quantization_bit 8 or 4 quantises them".to_owned());
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Config { problems, hint }) }
}
