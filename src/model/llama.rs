//! The model: embedding, decoder layers, final norm and head.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use burn_autodiff::Autodiff;

use super::LlamaConfig;
use super::attention::{Attention, AttentionLayout, LayerCache};
use super::load::HostMatrix;
use super::mlp::Mlp;
use super::norm::RmsNorm;
use crate::ops::Ops;
use crate::ops::lora_linear::{Lora, lora_linear};
use crate::ops::token_logps::Head;

/// A linear layer without bias: a frozen weight and, where one is attached, a LoRA adapter.
#[derive(Debug, Clone)]
pub struct Linear<B: Backend> {
    /// `[out, in]`, as the checkpoint stores it.
    pub weight: Tensor<B, 2>,
    /// The trainable part.
    pub lora: Option<Lora<B>>,
}

impl<B: Backend> Linear<B> {
    /// A layer without adapter.
    pub fn frozen(weight: Tensor<B, 2>) -> Self {
        Self { weight, lora: None }
    }

    /// Applies the layer: `[tokens, in] -> [tokens, out]`.
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2>
    where
        B: Ops,
    {
        lora_linear(x, self.weight.clone(), self.lora.as_ref())
    }

    /// The same layer under autodiff: frozen weight, tracked adapter.
    pub fn lift(&self) -> Linear<Autodiff<B>> {
        let track = |t: &Tensor<B, 2>| Tensor::from_inner(t.clone()).require_grad();
        Linear {
            weight: Tensor::from_inner(self.weight.clone()),
            lora: self.lora.as_ref().map(|lora| Lora {
                a: track(&lora.a),
                b: track(&lora.b),
                scale: lora.scale,
            }),
        }
    }
}

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

impl<B: Backend> DecoderLayer<B> {
    /// Runs the layer over packed rows, `[tokens, hidden] -> [tokens, hidden]`.
    pub fn forward(&self, x: Tensor<B, 2>, layout: &AttentionLayout<B>) -> Tensor<B, 2>
    where
        B: Ops,
    {
        let x = x.clone() + self.self_attn.forward(self.input_layernorm.forward(x), layout);
        self.forward_mlp(x)
    }

    /// Runs the layer for the next rows of one sequence.
    pub fn forward_cached(
        &self,
        x: Tensor<B, 2>,
        layout: &AttentionLayout<B>,
        cache: &mut Option<LayerCache<B>>,
    ) -> Tensor<B, 2>
    where
        B: Ops,
    {
        let x = x.clone() + self.self_attn.forward_cached(self.input_layernorm.forward(x), layout, cache);
        self.forward_mlp(x)
    }

    fn forward_mlp(&self, x: Tensor<B, 2>) -> Tensor<B, 2>
    where
        B: Ops,
    {
        x.clone() + self.mlp.forward(self.post_attention_layernorm.forward(x))
    }

    /// The same layer under autodiff: frozen weights, tracked adapters.
    pub fn lift(&self) -> DecoderLayer<Autodiff<B>> {
        DecoderLayer {
            input_layernorm: self.input_layernorm.lift(),
            self_attn: self.self_attn.lift(),
            post_attention_layernorm: self.post_attention_layernorm.lift(),
            mlp: self.mlp.lift(),
        }
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

/// A Llama model on one device. Its embedding stays in host memory: a step reads only the rows of its tokens.
#[derive(Debug, Clone)]
pub struct Llama<B: Backend> {
    /// The shape.
    pub config: LlamaConfig,
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

    /// Looks up the tokens' embeddings, `[tokens] -> [tokens, hidden]`.
    ///
    /// # Panics
    /// If a token is outside the vocabulary.
    pub fn embed(&self, tokens: &[u32]) -> Tensor<B, 2> {
        let rows = self.embed_tokens.gather(tokens);
        Tensor::from_data(TensorData::new(rows, [tokens.len(), self.config.hidden_size]), &self.device())
    }

    /// Computes the final hidden states, after the last norm, `[tokens] -> [tokens, hidden]`.
    pub fn forward(&self, tokens: &[u32], layout: &AttentionLayout<B>) -> Tensor<B, 2>
    where
        B: Ops,
    {
        let x = self.layers.iter().fold(self.embed(tokens), |x, layer| layer.forward(x, layout));
        self.norm.forward(x)
    }

    /// Computes the final hidden states of the next tokens of one sequence and extends its cache.
    pub fn forward_cached(&self, tokens: &[u32], cache: &mut KvCache<B>) -> Tensor<B, 2>
    where
        B: Ops,
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
