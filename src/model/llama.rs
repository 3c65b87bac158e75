//! The model: embedding, decoder layers, final norm and head.

use std::collections::HashMap;

use burn::tensor::{Tensor, TensorData, backend::Backend};

use super::attention::{Attention, AttentionActivations, AttentionLayout, LayerCache};
use super::linear::Linear;
use super::mlp::{Mlp, MlpActivations};
use super::norm::RmsNorm;
use super::stored::HostMatrix;
use super::{LlamaConfig, Precision};
use crate::ops::attention::AttentionOutput;
use crate::ops::token_logps::Head;
use crate::ops::{Kernels, to_f32};

/// One decoder layer: attention and MLP, each behind its norm and added to the residual stream.
#[derive(Debug, Clone)]
pub struct DecoderLayer<B: Backend> {
    /// Norm before attention.
    pub input_layernorm: RmsNorm<B>,
    /// Attention.
    pub self_attn: Attention<B>,
    /// Norm before the MLP.
    pub post_attention_layernorm: RmsNorm<B>,
    /// MLP.
    pub mlp: Mlp<B>,
}

/// Everything that a layer's backward needs.
#[derive(Debug, Clone)]
pub struct LayerActivations<B: Backend> {
    /// The residual stream into the layer, `[tokens, hidden]`.
    x: Tensor<B, 2>,
    attention: AttentionActivations<B>,
    /// The residual stream between attention and MLP, `[tokens, hidden]`.
    middle: Tensor<B, 2>,
    mlp: MlpActivations<B>,
}

/// How much of a layer's forward pass is kept for its backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// The layer's input.
    Input,
    /// Also what attention computed, and the residual stream behind it: two products and attention are not run again.
    Attention,
    /// Everything.
    All,
}

/// What is kept of all layers.
///
/// Those that keep everything are the topmost: backward has used it up by the time it runs the first layer again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepPlan {
    /// How many layers keep everything, from the top down.
    pub whole: usize,
    /// What the layers below keep.
    pub rest: Keep,
}

impl From<Keep> for KeepPlan {
    /// All layers alike.
    fn from(keep: Keep) -> Self {
        Self { whole: 0, rest: keep }
    }
}

impl KeepPlan {
    /// How many of so many layers are run again in backward.
    pub fn n_again(self, n_layers: usize) -> usize {
        if self.rest == Keep::All { 0 } else { n_layers.saturating_sub(self.whole) }
    }

    /// What one of so many layers keeps, counted from the bottom.
    pub fn of(self, layer: usize, n_layers: usize) -> Keep {
        if layer < self.n_again(n_layers) { self.rest } else { Keep::All }
    }
}

/// What of a layer's forward pass was kept.
#[derive(Debug, Clone)]
pub enum Kept<B: Backend> {
    /// See [`Keep::Input`].
    Input(Tensor<B, 2>),
    /// See [`Keep::Attention`].
    Attention {
        /// The residual stream into the layer.
        x: Tensor<B, 2>,
        /// What attention computed.
        output: AttentionOutput<B>,
        /// The residual stream between attention and MLP.
        middle: Tensor<B, 2>,
    },
    /// See [`Keep::All`].
    All(Box<LayerActivations<B>>),
}

impl<B: Kernels> DecoderLayer<B> {
    /// Runs the layer over packed rows, `[tokens, hidden] -> [tokens, hidden]`.
    pub fn forward(&self, x: Tensor<B, 2>, layout: &AttentionLayout<B>) -> Tensor<B, 2> {
        let x = self.self_attn.forward(self.input_layernorm.forward(x.clone()), x, layout);
        self.mlp.forward(self.post_attention_layernorm.forward(x.clone()), x)
    }

    /// Runs the layer for the next rows of one sequence.
    pub fn forward_cached(
        &self,
        x: Tensor<B, 2>,
        layout: &AttentionLayout<B>,
        cache: &mut Option<LayerCache<B>>,
    ) -> Tensor<B, 2> {
        let x = self.self_attn.forward_cached(self.input_layernorm.forward(x.clone()), x, layout, cache);
        self.mlp.forward(self.post_attention_layernorm.forward(x.clone()), x)
    }

    /// [`forward`](Self::forward) that keeps what `keep` says.
    pub fn forward_keeping(
        &self,
        x: Tensor<B, 2>,
        layout: &AttentionLayout<B>,
        keep: Keep,
    ) -> (Tensor<B, 2>, Kept<B>) {
        if keep == Keep::Input {
            return (self.forward(x.clone(), layout), Kept::Input(x));
        }
        let normed = self.input_layernorm.forward(x.clone());
        let (middle, attention) = self.self_attn.forward_keeping(normed, x.clone(), layout);
        let normed = self.post_attention_layernorm.forward(middle.clone());
        if keep == Keep::Attention {
            let output = attention.output().clone();
            drop(attention);
            let y = self.mlp.forward(normed, middle.clone());
            return (y, Kept::Attention { x, output, middle });
        }
        let (y, mlp) = self.mlp.forward_keeping(normed, middle.clone());
        (y, Kept::All(Box::new(LayerActivations { x, attention, middle, mlp })))
    }

    /// What backward needs, computed again from what was kept. The layer's output is not among it.
    pub fn recompute(&self, kept: Kept<B>, layout: &AttentionLayout<B>) -> LayerActivations<B> {
        let (x, middle, attention) = match kept {
            Kept::All(activations) => return *activations,
            Kept::Input(x) => {
                let normed = self.input_layernorm.forward(x.clone());
                let (middle, attention) = self.self_attn.forward_keeping(normed, x.clone(), layout);
                (x, middle, attention)
            }
            Kept::Attention { x, output, middle } => {
                let normed = self.input_layernorm.forward(x.clone());
                let attention = self.self_attn.recompute(normed, output, layout);
                (x, middle, attention)
            }
        };
        let mlp = self.mlp.recompute(self.post_attention_layernorm.forward(middle.clone()));
        LayerActivations { x, attention, middle, mlp }
    }

    /// The gradient by the layer's input, where it is asked for, and those of its adapters, in the order of
    /// [`linears`](Self::linears), from that of its output.
    pub fn backward(
        &self,
        dy: Tensor<B, 2>,
        activations: LayerActivations<B>,
        layout: &AttentionLayout<B>,
        needs_dx: bool,
    ) -> (Option<Tensor<B, 2>>, Vec<Tensor<B, 2>>) {
        let LayerActivations { x, attention, middle, mlp } = activations;
        let below = needs_dx || self.attention_linears().iter().any(|linear| linear.lora.is_some());
        let mut mlp_grads = Vec::new();
        let dnormed = self.mlp.backward(dy.clone(), mlp, below, &mut mlp_grads);
        let mut grads = Vec::new();
        let mut dx = None;
        if let Some(dnormed) = dnormed {
            let dmiddle = self.post_attention_layernorm.backward(dnormed, middle, Some(dy));
            let dnormed = self.self_attn.backward(dmiddle.clone(), attention, layout, needs_dx, &mut grads);
            dx = dnormed.map(|dnormed| self.input_layernorm.backward(dnormed, x, Some(dmiddle)));
        }
        grads.extend(mlp_grads);
        (dx, grads)
    }
}

impl<B: Backend> DecoderLayer<B> {
    fn attention_linears(&self) -> [&Linear<B>; 4] {
        let a = &self.self_attn;
        [&a.q_proj, &a.k_proj, &a.v_proj, &a.o_proj]
    }

    /// The layer's linears with their names within it (`self_attn.q_proj`), in the checkpoint's order.
    pub fn linears(&self) -> [(&'static str, &Linear<B>); 7] {
        let (a, m) = (&self.self_attn, &self.mlp);
        let linears = [&a.q_proj, &a.k_proj, &a.v_proj, &a.o_proj, &m.gate_proj, &m.up_proj, &m.down_proj];
        std::array::from_fn(|i| (LINEAR_NAMES[i], linears[i]))
    }

    /// [`linears`](Self::linears), to change.
    pub fn linears_mut(&mut self) -> [(&'static str, &mut Linear<B>); 7] {
        let (a, m) = (&mut self.self_attn, &mut self.mlp);
        [
            (LINEAR_NAMES[0], &mut a.q_proj),
            (LINEAR_NAMES[1], &mut a.k_proj),
            (LINEAR_NAMES[2], &mut a.v_proj),
            (LINEAR_NAMES[3], &mut a.o_proj),
            (LINEAR_NAMES[4], &mut m.gate_proj),
            (LINEAR_NAMES[5], &mut m.up_proj),
            (LINEAR_NAMES[6], &mut m.down_proj),
        ]
    }
}

/// The linears of a decoder layer, in the order of [`DecoderLayer::linears`].
pub const LINEAR_NAMES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// Whether a linear's output joins the residual stream.
pub fn joins_stream(name: &str) -> bool {
    matches!(name, "self_attn.o_proj" | "mlp.down_proj")
}

/// The tokens without repetition, in the order in which they come first, and where each token stands among them.
fn distinct(tokens: &[u32]) -> (Vec<u32>, Vec<i32>) {
    let mut places = HashMap::with_capacity(tokens.len());
    let mut distinct = Vec::with_capacity(tokens.len());
    let place = |&token: &u32| {
        *places.entry(token).or_insert_with(|| {
            distinct.push(token);
            distinct.len() as i32 - 1
        })
    };
    let place_of = tokens.iter().map(place).collect();
    (distinct, place_of)
}

/// Whether the gradient by a linear's input is added to that of another, whose input is the same.
pub fn shares_input(name: &str) -> bool {
    matches!(name, "self_attn.k_proj" | "self_attn.v_proj" | "mlp.up_proj")
}

/// A Llama model on one device. Its embedding stays in host memory: a step reads only the rows of its tokens.
#[derive(Debug, Clone)]
pub struct Llama<B: Backend> {
    /// The shape.
    pub config: LlamaConfig,
    /// The types.
    pub precision: Precision,
    /// `[vocab, hidden]`, as stored in the file.
    pub embed_tokens: HostMatrix,
    /// The decoder layers.
    pub layers: Vec<DecoderLayer<B>>,
    /// The final norm.
    pub norm: RmsNorm<B>,
    /// The head, in row shards.
    pub lm_head: Head<B>,
}

impl<B: Backend> Llama<B> {
    /// The device that holds the layers.
    pub fn device(&self) -> B::Device {
        self.norm.weight.device()
    }

    /// Looks up the tokens' embeddings, `[tokens] -> [tokens, hidden]`, in `f32`. Rows are sent as the file stores them where the device
    /// computes in that type, and a token that stands several times is sent once: the device waits for what it is sent.
    ///
    /// # Panics
    /// If a token is outside the vocabulary.
    pub fn embed(&self, tokens: &[u32]) -> Tensor<B, 2> {
        let device = self.device();
        let (distinct, places) = distinct(tokens);
        let rows = self.embed_tokens.gather(&distinct, self.precision.dtype);
        let dtype = rows.dtype;
        let rows = Tensor::<B, 2>::from_data(rows, (&device, dtype));
        let n_tokens = places.len();
        let rows = match distinct.len() == n_tokens {
            true => rows,
            false => rows.select(0, Tensor::from_data(TensorData::new(places, [n_tokens]), &device)),
        };
        to_f32(rows)
    }

    /// Computes the final hidden states, after the last norm, `[tokens] -> [tokens, hidden]`.
    pub fn forward(&self, tokens: &[u32], layout: &AttentionLayout<B>) -> Tensor<B, 2>
    where
        B: Kernels,
    {
        let x = self.layers.iter().fold(self.embed(tokens), |x, layer| layer.forward(x, layout));
        self.norm.forward(x)
    }

    /// Computes the final hidden states of the next tokens of one sequence and extends its cache.
    pub fn forward_cached(&self, tokens: &[u32], cache: &mut KvCache<B>) -> Tensor<B, 2>
    where
        B: Kernels,
    {
        let layout = AttentionLayout::causal(&self.config, cache.n_tokens, tokens.len(), &self.device());
        let mut x = self.embed(tokens);
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            x = layer.forward_cached(x, &layout, cache);
        }
        cache.n_tokens += tokens.len();
        self.norm.forward(x)
    }

    /// An empty cache for this model.
    pub fn new_cache(&self) -> KvCache<B> {
        KvCache { n_tokens: 0, layers: vec![None; self.layers.len()] }
    }
}

/// Keys and values of one sequence, by layer.
#[derive(Debug, Clone)]
pub struct KvCache<B: Backend> {
    /// Tokens seen.
    pub n_tokens: usize,
    layers: Vec<Option<LayerCache<B>>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_repeat_are_sent_once() {
        assert_eq!(distinct(&[7, 3, 7, 7, 9, 3]), (vec![7, 3, 9], vec![0, 1, 0, 0, 2, 1]));
    }
}
