//! A Llama model out of a checkpoint.

use super::{Checkpoint, Flaws, settle};
use crate::error::{Error, Result};
use crate::model::llama::{LINEAR_NAMES, Llama};
use crate::model::parts::{Parts, assemble, in_shards};
use crate::model::{LlamaConfig, Precision};
use crate::ops::Kernels;

/// Names and shapes of a model's tensors, without embedding and head.
fn layer_tensors(config: &LlamaConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden_size;
    let mut tensors = vec![("model.norm.weight".to_owned(), vec![hidden])];
    for layer in 0..config.num_hidden_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        tensors.push((name("input_layernorm"), vec![hidden]));
        tensors.push((name("post_attention_layernorm"), vec![hidden]));
        let linears = LINEAR_NAMES.iter().zip(config.linear_shapes());
        tensors.extend(linears.map(|(part, shape)| (name(part), shape.to_vec())));
    }
    tensors
}

/// Which tensors of a checkpoint make a model.
struct Tensors {
    embed: &'static str,
    head: &'static str,
    /// Names and shapes, these two among them.
    all: Vec<(String, Vec<usize>)>,
}

impl Tensors {
    /// # Errors
    /// If some are missing, misshapen or none of a model's.
    fn of(checkpoint: &Checkpoint, config: &LlamaConfig) -> Result<Self> {
        const EMBED: &str = "model.embed_tokens.weight";
        const HEAD: &str = "lm_head.weight";
        let tied = config.tie_word_embeddings;
        let embed = if tied && checkpoint.shape(EMBED).is_none() && checkpoint.shape(HEAD).is_some() {
            HEAD
        } else {
            EMBED
        };
        let head = if tied { embed } else { HEAD };
        let mut all = layer_tensors(config);
        all.push((embed.to_owned(), vec![config.vocab_size, config.hidden_size]));
        if !tied {
            all.push((head.to_owned(), vec![config.vocab_size, config.hidden_size]));
        }
        // Old conversions store the rotary frequencies, which follow from the configuration.
        checkpoint.check(&all, |name| name.ends_with("rotary_emb.inv_freq") || (tied && name == HEAD))?;
        Ok(Self { embed, head, all })
    }
}

/// Checks that a checkpoint is a model of this shape, without reading it.
///
/// # Errors
/// If tensors are missing, extra or misshapen: all of them in one error.
pub fn check_llama(checkpoint: &Checkpoint, config: &LlamaConfig) -> Result<()> {
    Tensors::of(checkpoint, config).map(drop)
}

/// Loads a Llama model. Matrices that are not to be stored dense are quantised on the device, at most 32 MiB at a time. Those of the
/// vocabulary's size are split into shards of at most `shard_bytes`.
///
/// A tied model may come with `embed_tokens`, with `lm_head` or with both; the embedding counts.
///
/// # Errors
/// If tensors are missing, extra or misshapen: all of them in one error. If weights are not finite, or too large for `f16`; an embedding
/// of its own, which stays in its file, is not looked at.
pub fn load_llama<B: Kernels>(
    checkpoint: &Checkpoint,
    config: &LlamaConfig,
    precision: Precision,
    shard_bytes: usize,
    device: &B::Device,
) -> Result<Llama<B>> {
    let Tensors { embed, head, all } = Tensors::of(checkpoint, config)?;
    // An embedding of its own stays in its file.
    let is_read = |name: &&str| config.tie_word_embeddings || *name != embed;
    checkpoint.expect_to_read(all.iter().map(|(name, _)| name.as_str()).filter(is_read));

    let Precision { dtype, linears, head: head_storage } = precision;
    let shard = |rows, _| checkpoint.weight(head, rows, head_storage, dtype, device);
    let parts = Parts {
        norm: |name: &str| checkpoint.tensor(name, device),
        linear: |name: &str, [n_out, _]: [usize; 2]| {
            checkpoint.weight(name, 0..n_out, linears, dtype, device)
        },
        embed_tokens: checkpoint.host_matrix(embed),
        head_shards: in_shards([config.vocab_size, config.hidden_size], dtype, shard_bytes, shard),
    };
    let model = assemble(config, precision, shard_bytes, parts);
    settle::<B>(device);
    let Flaws { not_finite, overflowed, .. } = checkpoint.flaws();
    for (by_tensor, are, hint) in [
        (
            not_finite,
            "are no finite numbers",
            "the checkpoint is damaged, or was saved from a run that had diverged",
        ),
        (overflowed, "are beyond 65504, the largest number of fp16", "--dtype fp32 holds them"),
    ] {
        if let Some((name, n)) = by_tensor.first_key_value() {
            let (total, n_tensors) = (by_tensor.values().sum::<usize>(), by_tensor.len());
            let what = format!("{total} weights in {n_tensors} tensors {are}; {n} of them in `{name}`");
            return Err(Error::file(&checkpoint.path, what).with_hint(hint));
        }
    }
    Ok(model)
}
