//! The engine of wgpu: which shader is launched how often, on which buffers.

use burn::tensor::{DType, Tensor};
use burn_wgpu::WgpuRuntime;

use super::cube::is_software;
use super::engine::{self, Engine, Floating};
use super::gpu::{input, operand, tensor};
use super::kernel::{Layout, RANK_QUADS, Shader, launch};
use super::lora_linear::{Lora, LoraGrads};
use super::orpo_loss::{MEAN_LOGP_MAX, PairSpan, check_order, span_words};
use super::product::{Floats, Product, dims, lora_backward, output};
use super::{cube, profile};

impl Engine for WgpuRuntime {
    fn lora_linear_forward<B: Floating<Self>>(
        x: Tensor<B, 2>,
        weight: Tensor<B, 2>,
        lora: Option<&Lora<B>>,
        residual: Option<Tensor<B, 2>>,
    ) -> (Tensor<B, 2>, Option<Tensor<B, 2>>) {
        let (x, weight) = (operand(x), operand(weight));
        let dtype = residual.as_ref().map_or(x.dtype, Tensor::dtype);
        let product =
            Product::new(Layout::RowsRows, &x, &weight).add_to(residual.map(operand)).into_dtype(dtype);
        let Some(lora) = lora else { return (tensor(product.run()), None) };
        let s = rank_r(&x, lora);
        let y = product.after(&s, &input(lora.b.clone()), lora.scale).run();
        (tensor(y), Some(tensor(s)))
    }

    fn lora_rank_r<B: Floating<Self>>(x: Tensor<B, 2>, lora: &Lora<B>) -> Tensor<B, 2> {
        tensor(rank_r(&operand(x), lora))
    }

    fn lora_linear_backward_lora<B: Floating<Self>>(
        dy: Tensor<B, 2>,
        x: Tensor<B, 2>,
        s: Tensor<B, 2>,
        lora: &Lora<B>,
    ) -> LoraGrads<B> {
        let (dy, x, s) = (operand(dy), operand(x), input(s));
        if is_narrow(&dy, lora) {
            return engine::lora_grads(&dy, &x, &s, lora);
        }
        let b = input(lora.b.clone());
        let (ds, db) = match RANK_QUADS.into_iter().find(|quads| dims(&b)[1] <= 4 * quads) {
            Some(rank_quads) => lora_backward(rank_quads, &dy, &b, &s, lora.scale),
            None => (
                Product::new(Layout::RowsColumns, &dy, &b).times(lora.scale).run(),
                Product::new(Layout::ColumnsColumns, &dy, &s).times(lora.scale).run(),
            ),
        };
        let da = Product::new(Layout::ColumnsColumns, &ds, &x).run();
        LoraGrads { ds: tensor(ds), da: tensor(da), db: tensor(db) }
    }

    fn lora_linear_backward_input<B: Floating<Self>>(
        dy: Tensor<B, 2>,
        weight: Tensor<B, 2>,
        ds_a: Option<(Tensor<B, 2>, Tensor<B, 2>)>,
        sum: Option<Tensor<B, 2>>,
        dtype: DType,
    ) -> Tensor<B, 2> {
        let (dy, weight) = (operand(dy), operand(weight));
        let product = Product::new(Layout::RowsColumns, &dy, &weight)
            .rounding()
            .add_to(sum.map(operand))
            .into_dtype(dtype);
        let dx = match ds_a {
            Some((ds, a)) => product.after(&input(ds), &input(a), 1.0).run(),
            None => product.run(),
        };
        tensor(dx)
    }

    fn orpo_loss_forward<B: Floating<Self>>(logps: Tensor<B, 1>, pairs: &[PairSpan]) -> Tensor<B, 2> {
        let logps = input(logps);
        check_order(pairs, logps.meta.shape()[0]);
        let stats = output(&logps, [pairs.len(), 5], DType::F32);
        let spans = logps.client.create_from_slice(bytemuck::cast_slice(&span_words(pairs)));
        let moved = cube::bytes(&[&logps, &stats]);
        profile::kernel("orpo_loss forward", logps.meta.num_elements(), moved, &logps.client, || {
            launch(
                &logps.client,
                Shader::OrpoLoss,
                [pairs.len() as u32, 1, 1],
                &[&logps.handle, &spans, &stats.handle],
                &[pairs.len() as u32, MEAN_LOGP_MAX.to_bits()],
            );
        });
        tensor(stats)
    }

    fn orpo_loss_backward<B: Floating<Self>>(
        stats: Tensor<B, 2>,
        pairs: &[PairSpan],
        beta: f32,
        grad_scale: f32,
    ) -> Tensor<B, 1> {
        let stats = input(stats);
        let n_entries = pairs.last().map_or(0, |span| span.end as usize);
        check_order(pairs, n_entries);
        let dlogps = output(&stats, [n_entries], DType::F32);
        let spans = stats.client.create_from_slice(bytemuck::cast_slice(&span_words(pairs)));
        let moved = cube::bytes(&[&stats, &dlogps]);
        profile::kernel("orpo_loss backward", n_entries, moved, &stats.client, || {
            launch(
                &stats.client,
                Shader::OrpoLossBackward,
                [pairs.len() as u32, 1, 1],
                &[&stats.handle, &spans, &dlogps.handle],
                &[pairs.len() as u32, MEAN_LOGP_MAX.to_bits(), beta.to_bits(), grad_scale.to_bits()],
            );
        });
        tensor(dlogps)
    }
}

/// The highest rank whose products with a matrix of tokens are made as narrow ones: they read it anew for every eight ranks.
const NARROW: usize = 32;

/// Whether an adapter's products are too narrow for a GPU's tiles, and for panels that read `dy` once: either leaves most of it idle.
fn is_narrow<B: Floating<WgpuRuntime>>(tokens: &Floats, lora: &Lora<B>) -> bool {
    !is_software(&tokens.client) && lora.a.dims()[0] <= NARROW
}

/// `x Aᵀ`
fn rank_r<B: Floating<WgpuRuntime>>(x: &Floats, lora: &Lora<B>) -> Floats {
    if is_narrow(x, lora) {
        return engine::rank_r(x, lora);
    }
    Product::new(Layout::RowsRows, x, &input(lora.a.clone())).named("lora_linear rank r").run()
}
