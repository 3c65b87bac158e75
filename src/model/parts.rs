//! A model out of its tensors, wherever they come from.

use std::ops::Range;

use burn::tensor::{DType, Tensor, backend::Backend};

use super::attention::Attention;
use super::linear::Linear;
use super::llama::{DecoderLayer, LINEAR_NAMES, Llama};
use super::mlp::Mlp;
use super::norm::RmsNorm;
use super::stored::HostMatrix;
use super::{LlamaConfig, Precision};
use crate::ops::quantize::Weight;
use crate::ops::token_logps::{self, Head};

/// The most rows of a shard of the head. Enough for a product to run at full speed; with few, a chunk of logits stays small while it
/// covers all scored rows, so that the head is read once a batch.
pub const MAX_SHARD_ROWS: usize = 8192;

/// Where the parts of a model come from.
pub(super) struct Parts<B: Backend, N, L> {
    /// `[hidden]` of a name.
    pub(super) norm: N,
    /// `[out, in]` of a name and a shape.
    pub(super) linear: L,
    pub(super) embed_tokens: HostMatrix,
    pub(super) head_shards: Vec<Weight<B>>,
}

/// Puts a model together of this precision.
pub(super) fn assemble<B: Backend>(
    config: &LlamaConfig,
    precision: Precision,
    shard_bytes: usize,
    parts: Parts<B, impl Fn(&str) -> Tensor<B, 1>, impl Fn(&str, [usize; 2]) -> Weight<B>>,
) -> Llama<B> {
    let dtype = precision.dtype;
    let norm = |name: &str, dtype| RmsNorm { weight: (parts.norm)(name), eps: config.rms_norm_eps, dtype };
    let layers = (0..config.num_hidden_layers).map(|layer| {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = std::array::from_fn(|i| {
            Linear::frozen((parts.linear)(&name(LINEAR_NAMES[i]), config.linear_shapes()[i]))
        });
        DecoderLayer {
            input_layernorm: norm(&name("input_layernorm"), dtype),
            self_attn: Attention { q_proj, k_proj, v_proj, o_proj, head_dim: config.head_dim },
            post_attention_layernorm: norm(&name("post_attention_layernorm"), dtype),
            mlp: Mlp { gate_proj, up_proj, down_proj },
        }
    });
    Llama {
        config: config.clone(),
        precision,
        layers: layers.collect(),
        // The head's logits and their softmax are f32, and few rows get there.
        norm: norm("model.norm.weight", DType::F32),
        embed_tokens: parts.embed_tokens,
        lm_head: Head { shards: parts.head_shards, chunk_bytes: chunk_bytes(shard_bytes) },
    }
}

/// Makes a matrix in shards of rows, each at most `shard_bytes` when it is multiplied in `dtype`, from what makes a range of rows of so
/// many columns.
pub(super) fn in_shards<B: Backend>(
    [n_rows, n_columns]: [usize; 2],
    dtype: DType,
    shard_bytes: usize,
    shard: impl Fn(Range<usize>, usize) -> Weight<B>,
) -> Vec<Weight<B>> {
    let shard_rows = max_shard_rows(n_columns, dtype, shard_bytes);
    let starts = (0..n_rows).step_by(shard_rows);
    starts.map(|start| shard(start..(start + shard_rows).min(n_rows), n_columns)).collect()
}

fn max_shard_rows(n_columns: usize, dtype: DType, shard_bytes: usize) -> usize {
    (shard_bytes / (n_columns * dtype.size())).clamp(1, MAX_SHARD_ROWS)
}

/// The most bytes that a chunk of logits may take.
fn chunk_bytes(shard_bytes: usize) -> usize {
    shard_bytes.min(64 << 20)
}

/// What [`Head::logits_bytes`] says of a model that is not loaded.
pub fn logits_bytes(config: &LlamaConfig, precision: Precision, shard_bytes: usize, n_rows: usize) -> usize {
    let dtype = precision.dtype;
    let shard_rows = max_shard_rows(config.hidden_size, dtype, shard_bytes).min(config.vocab_size);
    token_logps::logits_bytes(shard_rows, chunk_bytes(shard_bytes), dtype, n_rows)
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;

    #[test]
    fn logits_are_known_before_the_model_is_loaded() {
        let config = LlamaConfig { num_hidden_layers: 1, ..crate::model::presets::preset("small").unwrap() };
        let precision = Precision::dense(DType::F32);
        for shard_bytes in [1 << 30, 1 << 22] {
            let model = Llama::<Flex>::random(&config, precision, shard_bytes, &Default::default());
            for n_rows in [1, 100, 5000] {
                let known = logits_bytes(&config, precision, shard_bytes, n_rows);
                assert_eq!(known, model.lm_head.logits_bytes(n_rows), "{shard_bytes} {n_rows}");
            }
        }
    }
}
