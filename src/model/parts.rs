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
use crate::ops::token_logps::Head;

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
        lm_head: Head { shards: parts.head_shards, chunk_bytes: shard_bytes.min(64 << 20) },
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
    let shard_rows = (shard_bytes / (n_columns * dtype.size())).clamp(1, MAX_SHARD_ROWS);
    let starts = (0..n_rows).step_by(shard_rows);
    starts.map(|start| shard(start..(start + shard_rows).min(n_rows), n_columns)).collect()
}
