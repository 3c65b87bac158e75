//! What a training step costs: floating-point operations and memory, from the model's shape and the batch's alone.
//!
//! Both are formulas over what [`step`](super::step) and the ops do, so that a run can be judged before it starts. Letters: `T` tokens
//! of the packed batch, `R` scored rows, `e` bytes of an activation; sizes of the model as in its configuration.

use crate::data::batch::Batch;
use crate::model::llama::{Keep, KeepPlan, LINEAR_NAMES};
use crate::model::parts::MAX_SHARD_ROWS;
use crate::model::{LlamaConfig, Precision};
use crate::ops::attention::{CHUNK_ROWS, Visible};
use crate::ops::quantize::Storage;

/// Whose memory a step takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A GPU's: the embedding is in the computer's own memory, and kernels hold little between their inputs and outputs.
    Gpu,
    /// The computer's own, where the references compute.
    Cpu {
        /// The embedding as it is stored.
        embedding_bytes: usize,
    },
}

/// What the costs depend on besides the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepShape {
    /// Tokens of the packed batch.
    pub tokens: usize,
    /// Rows that meet the head.
    pub rows: usize,
    /// (query, key) pairs that attend to each other.
    pub visible: usize,
    /// Rank of each linear's adapter, in the order of [`LINEAR_NAMES`]; 0 for none.
    pub ranks: [usize; LINEAR_NAMES.len()],
    /// Types of activations and weights.
    pub precision: Precision,
    /// What of the layers is kept for backward.
    pub keep: KeepPlan,
    /// Whether gradients of an earlier micro-batch wait for those of this one.
    pub accumulates: bool,
    /// The most bytes that a chunk of logits takes; see [`Head::logits_bytes`](crate::ops::token_logps::Head::logits_bytes).
    pub logits_bytes: usize,
    /// Whose memory it takes.
    pub place: Place,
}

impl StepShape {
    /// The shape of this batch's step.
    pub fn of(
        batch: &Batch,
        ranks: [usize; LINEAR_NAMES.len()],
        precision: Precision,
        keep: impl Into<KeepPlan>,
        accumulates: bool,
        logits_bytes: usize,
        place: Place,
    ) -> Self {
        let visible = batch.visible().iter().map(Visible::n_keys).sum();
        Self {
            tokens: batch.n_tokens(),
            rows: batch.rows.len(),
            visible,
            ranks,
            precision,
            keep: keep.into(),
            accumulates,
            logits_bytes,
            place,
        }
    }
}

/// Floating-point operations of a step; a product of `[m, k]` and `[k, n]` has `2 m n k`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepFlops {
    /// The frozen linears, forward and the gradients by their inputs.
    pub linears: f64,
    /// Linears and attention that are run again in backward.
    pub recompute: f64,
    /// Attention, two products forward and five backward.
    pub attention: f64,
    /// The head, two products.
    pub head: f64,
    /// The adapters, two thin products forward and four backward.
    pub adapters: f64,
}

impl StepFlops {
    /// Counts the operations of a step.
    pub fn of(config: &LlamaConfig, shape: &StepShape) -> Self {
        let (layers, tokens) = (config.num_hidden_layers as f64, shape.tokens as f64);
        let product = |[n_out, n_in]: [usize; 2]| 2.0 * tokens * n_out as f64 * n_in as f64;
        let [q, k, v, o, gate, up, down] = config.linear_shapes().map(product);
        let layer = q + k + v + o + gate + up + down;
        let width = (config.num_attention_heads * config.head_dim) as f64;
        let attention_product = 2.0 * shape.visible as f64 * width;
        let again = match shape.keep.rest {
            Keep::Input => layer - down + 2.0 * attention_product,
            Keep::Attention => q + k + v + gate + up,
            Keep::All => 0.0,
        };
        let adapter = adapter_values(config, shape) as f64;
        Self {
            // Nothing below the first layer's attention learns.
            linears: 2.0 * layers * layer - (q + k + v),
            recompute: shape.keep.n_again(config.num_hidden_layers) as f64 * again,
            attention: 7.0 * layers * attention_product,
            head: 4.0 * (shape.rows * config.vocab_size * config.hidden_size) as f64,
            adapters: layers * 3.0 * 2.0 * tokens * adapter,
        }
    }

    /// All of them.
    pub fn total(&self) -> f64 {
        self.linears + self.recompute + self.attention + self.head + self.adapters
    }
}

/// Values of a layer's adapters.
fn adapter_values(config: &LlamaConfig, shape: &StepShape) -> usize {
    config.linear_shapes().iter().zip(shape.ranks).map(|([n_out, n_in], rank)| (n_out + n_in) * rank).sum()
}

/// Memory of a run in bytes, at its fullest: in the head, or in the backward of one of the layers. Those above it have given up
/// what was kept for them by then, and left their gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepMemory {
    /// Frozen weights but for the embedding.
    pub weights: usize,
    /// The embedding, where it is in the same memory.
    pub embedding: usize,
    /// The adapters, as they are and as they began, and their two moments.
    pub adapters: usize,
    /// The adapters' gradients that exist by then, those of an earlier micro-batch included.
    pub gradients: usize,
    /// What forward keeps of the layers, and what all of them share.
    pub kept: usize,
    /// The activations of the one layer that backward is in, the gradient that comes into it, and what a reference holds meanwhile. What
    /// attention's backward makes for itself, sums of its splits included, comes when the MLP's activations are gone, and is less than
    /// these in every preset.
    pub layer: usize,
    /// What lives as long as a product: the largest matrix as it is multiplied, where it is stored otherwise, and the product in the
    /// engine's own type, where that is another.
    pub scratch: usize,
    /// Logits and rows of the head.
    pub head: usize,
}

impl StepMemory {
    /// Predicts the memory of a run of such steps.
    pub fn of(config: &LlamaConfig, shape: &StepShape) -> Self {
        const F32: usize = size_of::<f32>();
        let Precision { dtype, linears, head } = shape.precision;
        let e = dtype.size();
        let (tokens, rows, layers) = (shape.tokens, shape.rows, config.num_hidden_layers);
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let shapes = config.linear_shapes();
        let matrices: usize = shapes.iter().map(|[n_out, n_in]| linears.bytes(n_out * n_in)).sum();
        let dense = |storage: Storage, n_values: usize| if storage.is_dense() { 0 } else { e * n_values };
        let scratch = shapes.iter().map(|[n_out, n_in]| dense(linears, n_out * n_in)).max().unwrap_or(0);
        let shard = dense(head, config.vocab_size.min(MAX_SHARD_ROWS) * hidden);
        let adapter = F32 * adapter_values(config, shape);
        let waiting = if shape.accumulates { layers * adapter } else { 0 };

        let stream = F32 * tokens * hidden;
        let attention = tokens * (e * q + F32 * config.num_attention_heads);
        let rank_r = F32 * tokens * shape.ranks.iter().sum::<usize>();
        // Two norms' outputs, queries, keys and values, and three of the MLP's width.
        let again = e * tokens * (2 * hidden + q + 2 * kv + 3 * inner) + rank_r;
        let whole = 2 * stream + attention + again;
        let (kept, live) = match shape.keep.rest {
            Keep::Input => (stream, attention + stream + again),
            Keep::Attention => (2 * stream + attention, again),
            Keep::All => (whole, 0),
        };
        let n_again = shape.keep.n_again(layers);
        let kept_below = |n: usize| n.min(n_again) * kept + n.saturating_sub(n_again) * whole;
        let rope = F32 * tokens * config.head_dim;
        let (embedding, between) = match shape.place {
            Place::Gpu => (0, 0),
            // The reference of SwiGLU's backward has the sigmoid and both factors of `dgate` beside what it is given. What attention's
            // threads free stays theirs: about five tables of a chunk of rows, and a copy of what they read and write.
            Place::Cpu { embedding_bytes } => {
                let tables = 5 * config.num_attention_heads * CHUNK_ROWS.min(tokens);
                (embedding_bytes, F32 * tokens * (3 * inner + tables + 4 * (q + kv)))
            }
        };
        let in_head = Self {
            weights: layers * matrices
                + head.bytes(config.vocab_size * hidden)
                + F32 * (2 * layers + 1) * hidden,
            embedding,
            adapters: 4 * layers * adapter,
            gradients: waiting,
            kept: kept_below(layers) + rope,
            layer: 0,
            scratch: shard,
            // Rows into and out of the norm, the expected rows and a shard's part of them.
            head: 4 * F32 * rows * hidden + shape.logits_bytes,
        };
        let in_layer = |layer: usize| Self {
            gradients: waiting + (layers - layer) * adapter,
            kept: kept_below(layer + 1) + rope,
            layer: stream + between + if layer < n_again { live } else { 0 },
            scratch,
            head: 0,
            ..in_head
        };
        (0..layers).map(in_layer).fold(in_head, |a, b| if b.total() > a.total() { b } else { a })
    }

    /// All of it.
    pub fn total(&self) -> usize {
        let Self { weights, embedding, adapters, gradients, kept, layer, scratch, head } = self;
        weights + embedding + adapters + gradients + kept + layer + scratch + head
    }
}

/// What the largest tensor of a step holds, and its bytes; the head comes in shards that fit.
pub fn largest_tensor(config: &LlamaConfig, shape: &StepShape) -> (&'static str, usize) {
    let e = shape.precision.dtype.size();
    let matrices = config.linear_shapes().map(|[n_out, n_in]| e * n_out * n_in);
    let all = [
        ("the weights of a linear layer", matrices.into_iter().fold(0, usize::max)),
        ("the MLP's activations", e * shape.tokens * config.intermediate_size),
        ("the rows of the residual stream", size_of::<f32>() * shape.tokens * config.hidden_size),
    ];
    all.into_iter().max_by_key(|(_, bytes)| *bytes).unwrap_or(("nothing", 0))
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;

    use super::*;
    use crate::model::presets::preset;

    /// One pair of two sequences of `s` tokens that share half of them.
    fn shape(s: usize, precision: Precision, keep: Keep) -> StepShape {
        let half = s / 2;
        StepShape {
            tokens: 3 * half,
            rows: 2 * half,
            visible: half * half / 2 + 2 * (half * half + half * half / 2),
            ranks: [8; LINEAR_NAMES.len()],
            precision,
            keep: keep.into(),
            accumulates: true,
            logits_bytes: 64 << 20,
            place: Place::Gpu,
        }
    }

    /// Gigabytes of one pair without anything shared: the most that two sequences of `s` tokens can be.
    fn gigabytes(s: usize, linears: Storage, head: Storage) -> f64 {
        let config = preset("llama3-8b-instruct").unwrap();
        let precision = Precision { dtype: DType::F16, linears, head };
        let unshared = StepShape { tokens: 2 * s, rows: 2 * s, ..shape(s, precision, Keep::Input) };
        StepMemory::of(&config, &unshared).total() as f64 / 1e9
    }

    #[test]
    fn llama_3_8b_trains_on_the_cards_that_people_have() {
        let f16 = gigabytes(2048, Storage::F16, Storage::F16);
        assert!(f16 < 24.0 && f16 > 16.0, "{f16}: the weights alone are 15 GB");
        let int8 = gigabytes(2048, Storage::Int8, Storage::F16);
        assert!(int8 < 16.0, "{int8}");
        let nf4 = gigabytes(2048, Storage::Nf4, Storage::F16);
        assert!(nf4 < 12.0, "{nf4}");
        let short = gigabytes(1024, Storage::Nf4, Storage::F16);
        assert!(short < 8.0, "{short}");
        assert!(gigabytes(1024, Storage::Nf4, Storage::Int8) < short - 0.4, "the head is 1 GB in f16");
    }

    #[test]
    fn gradients_of_a_high_rank_are_counted_where_backward_ends() {
        let config = preset("llama3-8b-instruct").unwrap();
        let precision = Precision { dtype: DType::F16, linears: Storage::Nf4, head: Storage::F16 };
        let steps = [(384, false), (1536, true)];
        let [one, two] = steps.map(|(tokens, accumulates)| {
            let shape = shape(tokens, precision, Keep::Input);
            let shape = StepShape { tokens, ranks: [256; LINEAR_NAMES.len()], accumulates, ..shape };
            StepMemory::of(&config, &shape)
        });
        // An adapter of 671 million values.
        assert_eq!([one, two].map(|memory| memory.gradients), [1, 2].map(|n| n * 4 * 671_088_640));
    }

    #[test]
    fn keeping_more_costs_memory_and_saves_operations() {
        let config = preset("llama3-8b-instruct").unwrap();
        let all = [Keep::Input, Keep::Attention, Keep::All]
            .map(|keep| shape(1024, Precision::dense(DType::F16), keep));
        let memory = all.map(|shape| StepMemory::of(&config, &shape).total());
        let flops = all.map(|shape| StepFlops::of(&config, &shape).total());
        assert!(memory.is_sorted() && memory[0] < memory[2], "{memory:?}");
        assert!(flops.is_sorted_by(|a, b| a > b), "{flops:?}");

        let with = |whole| StepShape { keep: KeepPlan { whole, rest: Keep::Attention }, ..all[1] };
        let plans = [0, 1, 2, 31, 32].map(|whole| StepMemory::of(&config, &with(whole)).total());
        assert!(plans.is_sorted_by(|a, b| a <= b), "{plans:?}");
        assert_eq!([plans[0], plans[4]], [memory[1], memory[2]], "none and all of the layers");
        let half = StepFlops::of(&config, &with(16)).recompute;
        assert_eq!(2.0 * half, StepFlops::of(&config, &all[1]).recompute);
    }

    /// The table of the costs of an unshared pair in the design notes' terms: 28.6 TFLOP forward at 2 x 1024 tokens.
    #[test]
    fn the_linears_of_llama_3_8b_cost_28_6_tflop_forward_at_2048_tokens() {
        let config = preset("llama3-8b-instruct").unwrap();
        let shape = StepShape { tokens: 2048, ..shape(1024, Precision::dense(DType::F16), Keep::All) };
        let linears = StepFlops::of(&config, &shape).linears;
        assert!((linears / 2.0 / 28.6e12 - 1.0).abs() < 0.01, "{linears:e}");
    }
}
