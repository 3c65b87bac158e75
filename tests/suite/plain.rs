//! The model and a whole training step in plain burn operations under burn's autodiff: what the project's kernels and its hand-placed
//! backward are held to, and measured against.

use burn::tensor::activation::log_softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use burn_autodiff::Autodiff;
use orpo_wgpu::data::batch::Batch;
use orpo_wgpu::model::attention::{Attention, AttentionLayout};
use orpo_wgpu::model::mlp::Mlp;
use orpo_wgpu::model::norm::RmsNorm;
use orpo_wgpu::model::{DecoderLayer, Linear, Llama};
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::attention::{AdditiveMask, attention_reference};
use orpo_wgpu::ops::lora_linear::{Lora, lora_linear_reference};
use orpo_wgpu::ops::orpo_loss::orpo_loss_reference;
use orpo_wgpu::ops::quantize::Weight;
use orpo_wgpu::ops::rms_norm::rms_norm_reference;
use orpo_wgpu::ops::rope::rope_reference;
use orpo_wgpu::ops::swiglu::swiglu_reference;

type Tracked<B> = Autodiff<B>;

/// A layer under autodiff: frozen weights, tracked adapters.
pub(crate) fn track<B: Kernels>(layer: &DecoderLayer<B>) -> DecoderLayer<Tracked<B>> {
    let frozen = |linear: &Linear<B>| {
        let track = |t: &Tensor<B, 2>| Tensor::from_inner(t.clone()).require_grad();
        let lora = linear.lora.as_ref();
        Linear {
            weight: Weight::Dense(Tensor::from_inner(linear.weight.to_dense())),
            lora: lora.map(|lora| Lora { a: track(&lora.a), b: track(&lora.b), scale: lora.scale }),
        }
    };
    let (a, m) = (&layer.self_attn, &layer.mlp);
    DecoderLayer {
        input_layernorm: track_norm(&layer.input_layernorm),
        self_attn: Attention {
            q_proj: frozen(&a.q_proj),
            k_proj: frozen(&a.k_proj),
            v_proj: frozen(&a.v_proj),
            o_proj: frozen(&a.o_proj),
            head_dim: a.head_dim,
        },
        post_attention_layernorm: track_norm(&layer.post_attention_layernorm),
        mlp: Mlp {
            gate_proj: frozen(&m.gate_proj),
            up_proj: frozen(&m.up_proj),
            down_proj: frozen(&m.down_proj),
        },
    }
}

fn track_norm<B: Backend>(norm: &RmsNorm<B>) -> RmsNorm<Tracked<B>> {
    RmsNorm { weight: Tensor::from_inner(norm.weight.clone()), eps: norm.eps, dtype: norm.dtype }
}

fn normalize<B: Backend>(norm: &RmsNorm<B>, x: Tensor<B, 2>) -> Tensor<B, 2> {
    rms_norm_reference(x, norm.weight.clone(), norm.eps, norm.dtype)
}

fn linear<B: Backend>(layer: &Linear<B>, x: Tensor<B, 2>) -> Tensor<B, 2> {
    let Weight::Dense(weight) = &layer.weight else { panic!("autodiff knows dense weights") };
    lora_linear_reference(x, weight.clone(), layer.lora.as_ref(), None)
}

/// Runs a layer over packed rows.
fn layer_forward<B: Backend>(
    layer: &DecoderLayer<Tracked<B>>,
    x: Tensor<Tracked<B>, 2>,
    layout: &AttentionLayout<B>,
    mask: &AdditiveMask<Tracked<B>>,
) -> Tensor<Tracked<B>, 2> {
    let a = &layer.self_attn;
    let normed = normalize(&layer.input_layernorm, x.clone());
    let heads = |t: Tensor<Tracked<B>, 2>| {
        let [n_tokens, width] = t.dims();
        t.reshape([n_tokens, width / a.head_dim, a.head_dim])
    };
    let rotate = |t: Tensor<Tracked<B>, 3>| {
        let table = |t: &Tensor<B, 2>| Tensor::from_inner(t.clone());
        rope_reference(t, table(&layout.rope.cos), table(&layout.rope.sin))
    };
    let q = rotate(heads(linear(&a.q_proj, normed.clone())));
    let k = rotate(heads(linear(&a.k_proj, normed.clone())));
    let v = heads(linear(&a.v_proj, normed));
    let x = x + linear(&a.o_proj, attention_reference(q, k, v, mask));
    let normed = normalize(&layer.post_attention_layernorm, x.clone());
    let (gate, up) = (linear(&layer.mlp.gate_proj, normed.clone()), linear(&layer.mlp.up_proj, normed));
    x + linear(&layer.mlp.down_proj, swiglu_reference(gate, up))
}

/// Final hidden states of packed rows, `[tokens, hidden]`.
pub(crate) fn forward<B: Backend>(
    model: &Llama<B>,
    layers: &[DecoderLayer<Tracked<B>>],
    tokens: &[u32],
    layout: &AttentionLayout<B>,
) -> Tensor<Tracked<B>, 2> {
    let embedded = Tensor::from_inner(model.embed(tokens));
    let mask = AdditiveMask::new(&layout.mask.visible, &model.device());
    let x = layers.iter().fold(embedded, |x, layer| layer_forward(layer, x, layout, &mask));
    normalize(&track_norm(&model.norm), x)
}

/// A batch's loss and the adapters' gradients, in the order of [`orpo_wgpu::lora::tensors`]: whole logits of the scored rows, every
/// activation kept.
pub(crate) fn forward_backward<B: Kernels>(
    model: &Llama<B>,
    batch: &Batch,
    beta: f32,
) -> (Tensor<B, 1>, Vec<Tensor<B, 2>>) {
    let device = model.device();
    let layout = AttentionLayout::new(&model.config, &batch.positions, batch.visible(), &device);
    let layers: Vec<_> = model.layers.iter().map(track).collect();
    let indices = |values: Vec<i32>| {
        let shape = [values.len()];
        Tensor::<Tracked<B>, 1, Int>::from_data(TensorData::new(values, shape), &device)
    };
    let rows = indices(batch.rows.iter().map(|&row| row as i32).collect());
    let hidden = forward(model, &layers, &batch.tokens, &layout).select(0, rows);
    let head = model
        .lm_head
        .shards
        .iter()
        .map(|w| hidden.clone().matmul(Tensor::<Tracked<B>, 2>::from_inner(w.to_dense()).transpose()));
    let logps = log_softmax(Tensor::cat(head.collect(), 1), 1);
    let [n_rows, vocab] = logps.dims();
    let places =
        batch.entries.iter().map(|entry| (entry.row_idx as usize * vocab) as i32 + entry.target as i32);
    let logps = logps.reshape([n_rows * vocab]).select(0, indices(places.collect()));
    let stats = orpo_loss_reference(logps, &batch.pairs);
    let column = |i: usize| stats.clone().narrow(1, i, 1).sum();
    let loss = column(0) - column(4) * (beta / batch.pairs.len() as f32);
    let grads = loss.backward();
    let linears = layers.iter().flat_map(|layer| layer.linears());
    let adapters = linears.filter_map(|(_, linear)| linear.lora.as_ref()).flat_map(|lora| [&lora.a, &lora.b]);
    let grads = adapters.map(|t| t.grad(&grads).expect("every adapter takes part")).collect();
    (loss.inner(), grads)
}
