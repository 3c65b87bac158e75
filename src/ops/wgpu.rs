//! The ops on wgpu: which shader is launched how often, on which buffers.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorPrimitive};
use burn_cubecl::element::BoolElement;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{CubeBackend, FloatElement, IntElement};
use burn_wgpu::WgpuRuntime;

use super::Kernels;
use super::kernel::{Layout, RANK_QUADS, Shader, launch};
use super::lora_linear::{Lora, LoraGrads};
use super::orpo_loss::{MEAN_LOGP_MAX, PairSpan};
use super::product::{Floats, Product, dims, lora_backward, output};

impl<F: FloatElement, I: IntElement, BT: BoolElement> Kernels for CubeBackend<WgpuRuntime, F, I, BT> {
    fn lora_linear_forward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        lora: Option<&Lora<Self>>,
        residual: Option<Tensor<Self, 2>>,
    ) -> (Tensor<Self, 2>, Option<Tensor<Self, 2>>) {
        let (x, weight) = (operand(x), operand(weight));
        let dtype = residual.as_ref().map_or(x.dtype, Tensor::dtype);
        let product =
            Product::new(Layout::RowsRows, &x, &weight).add_to(residual.map(operand)).into_dtype(dtype);
        let Some(lora) = lora else { return (tensor(product.run()), None) };
        let s = Product::new(Layout::RowsRows, &x, &input(lora.a.clone())).run();
        let y = product.after(&s, &input(lora.b.clone()), lora.scale).run();
        (tensor(y), Some(tensor(s)))
    }

    fn lora_rank_r(x: Tensor<Self, 2>, lora: &Lora<Self>) -> Tensor<Self, 2> {
        tensor(Product::new(Layout::RowsRows, &operand(x), &input(lora.a.clone())).run())
    }

    fn lora_linear_backward_lora(
        dy: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        s: Tensor<Self, 2>,
        lora: &Lora<Self>,
    ) -> LoraGrads<Self> {
        let (dy, x, s, b) = (operand(dy), operand(x), input(s), input(lora.b.clone()));
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

    fn lora_linear_backward_input(
        dy: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        ds_a: Option<(Tensor<Self, 2>, Tensor<Self, 2>)>,
        sum: Option<Tensor<Self, 2>>,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        let (dy, weight) = (operand(dy), operand(weight));
        let product =
            Product::new(Layout::RowsColumns, &dy, &weight).add_to(sum.map(operand)).into_dtype(dtype);
        let dx = match ds_a {
            Some((ds, a)) => product.after(&input(ds), &input(a), 1.0).run(),
            None => product.run(),
        };
        tensor(dx)
    }

    fn orpo_loss_forward(logps: Tensor<Self, 1>, pairs: &[PairSpan]) -> Tensor<Self, 2> {
        let logps = input(logps);
        check_order(pairs, logps.meta.shape()[0]);
        let stats = output(&logps, [pairs.len(), 5], DType::F32);
        let spans = logps.client.create_from_slice(bytemuck::cast_slice(&span_words(pairs)));
        launch(
            &logps.client,
            Shader::OrpoLoss,
            [pairs.len() as u32, 1, 1],
            &[&logps.handle, &spans, &stats.handle],
            &[pairs.len() as u32, MEAN_LOGP_MAX.to_bits()],
        );
        tensor(stats)
    }

    fn orpo_loss_backward(
        stats: Tensor<Self, 2>,
        pairs: &[PairSpan],
        beta: f32,
        grad_scale: f32,
    ) -> Tensor<Self, 1> {
        let stats = input(stats);
        let n_entries = pairs.last().map_or(0, |span| span.end as usize);
        check_order(pairs, n_entries);
        let dlogps = output(&stats, [n_entries], DType::F32);
        let spans = stats.client.create_from_slice(bytemuck::cast_slice(&span_words(pairs)));
        launch(
            &stats.client,
            Shader::OrpoLossBackward,
            [pairs.len() as u32, 1, 1],
            &[&stats.handle, &spans, &dlogps.handle],
            &[pairs.len() as u32, MEAN_LOGP_MAX.to_bits(), beta.to_bits(), grad_scale.to_bits()],
        );
        tensor(dlogps)
    }
}

/// The tensor as a shader reads it: contiguous, `f32`.
fn input<B: Backend<FloatTensorPrimitive = Floats>, const D: usize>(tensor: Tensor<B, D>) -> Floats {
    assert_eq!(tensor.dtype(), DType::F32, "this operand of a wgpu kernel is to be f32");
    operand(tensor)
}

/// The tensor as a shader reads it: contiguous, `f32` or `f16`.
fn operand<B: Backend<FloatTensorPrimitive = Floats>, const D: usize>(tensor: Tensor<B, D>) -> Floats {
    let tensor = tensor.into_primitive().tensor();
    assert!(
        matches!(tensor.dtype, DType::F32 | DType::F16),
        "the wgpu kernels take f32 and f16 tensors, not {:?}",
        tensor.dtype
    );
    assert!(
        !tensor.meta.shape().contains(&0),
        "the wgpu kernels take no empty tensor: {:?}",
        tensor.meta.shape()
    );
    into_contiguous(tensor)
}

/// The primitive as a tensor.
fn tensor<B: Backend<FloatTensorPrimitive = Floats>, const D: usize>(primitive: Floats) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// The shaders hold no index against the number of entries: the spans have to be in order, and the last within it.
fn check_order(pairs: &[PairSpan], n_entries: usize) {
    let ends = pairs.iter().flat_map(|p| [p.nll_start, p.chosen_start, p.rejected_start, p.end]);
    assert!(
        ends.clone().is_sorted() && ends.last().is_some_and(|end| end as usize <= n_entries),
        "orpo_loss: spans out of order or past {n_entries} entries: {pairs:?}"
    );
}

/// A pair's span as the shaders' `Span` has it.
fn span_words(pairs: &[PairSpan]) -> Vec<[u32; 8]> {
    pairs
        .iter()
        .map(|p| [p.nll_start, p.chosen_start, p.rejected_start, p.end, p.nll_weight.to_bits(), 0, 0, 0])
        .collect()
}
