//! The ops on wgpu: which shader is launched how often, on which buffers.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorPrimitive};
use burn_cubecl::element::BoolElement;
use burn_cubecl::{CubeBackend, FloatElement, IntElement};
use burn_wgpu::{WgpuDevice, WgpuRuntime};

use super::adamw::{self, AdamWStep};
use super::attention::{self, AttentionMask, AttentionOutput, Tile as AttentionTile};
use super::kernel::{Layout, RANK_QUADS, Shader, launch};
use super::lora_linear::{Lora, LoraGrads};
use super::orpo_loss::{MEAN_LOGP_MAX, PairSpan};
use super::product::{Floats, Product, dims, lora_backward, output};
use super::quantize::{KernelScales, Packed, Scales, Storage};
use super::rope::RopeTable;
use super::token_logps::{self, Expected, ExpectedRows, Head, ScoredToken, TokenLogps};
use super::{Kernels, cube, profile, quantize, rms_norm, rope, swiglu};

impl<F: FloatElement, I: IntElement, BT: BoolElement> Kernels for CubeBackend<WgpuRuntime, F, I, BT> {
    fn bytes_in_use(device: &WgpuDevice) -> Option<u64> {
        let client = <WgpuRuntime as burn::cubecl::Runtime>::client(device);
        client.memory_usage().ok().map(|usage| usage.bytes_in_use)
    }

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
        let s = rank_r(&x, lora);
        let y = product.after(&s, &input(lora.b.clone()), lora.scale).run();
        (tensor(y), Some(tensor(s)))
    }

    fn lora_rank_r(x: Tensor<Self, 2>, lora: &Lora<Self>) -> Tensor<Self, 2> {
        tensor(rank_r(&operand(x), lora))
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

    fn token_logps_forward(
        hidden: Tensor<Self, 2>,
        head: &Head<Self>,
        scored: &[ScoredToken],
        expected: Expected,
    ) -> TokenLogps<Self> {
        token_logps::forward_fused(hidden, head, scored, expected)
    }

    fn token_logps_backward(
        dlogps: Tensor<Self, 1>,
        expected: ExpectedRows<Self>,
        head: &Head<Self>,
        scored: &[ScoredToken],
    ) -> Tensor<Self, 2> {
        token_logps::backward_fused(dlogps, expected, head, scored)
    }

    fn quantize_blocks(values: Tensor<Self, 1>, storage: Storage) -> (Tensor<Self, 1, Int>, Tensor<Self, 1>) {
        let (codes, scales) = quantize::launch_quantize(input(values), storage);
        (Tensor::from_primitive(codes), tensor(scales))
    }

    fn dequantize_blocks(packed: &Packed<Self>) -> Tensor<Self, 2> {
        let codes = |codes: &Tensor<Self, 1, Int>| codes.clone().into_primitive();
        let numbers = |numbers: &Tensor<Self, 1>| Some(input(numbers.clone()));
        let none = KernelScales { codes: None, scales: None, levels: None, mean: 0.0 };
        let scales = match &packed.scales {
            Scales::None => none,
            Scales::Single(scales) => KernelScales { scales: numbers(scales), ..none },
            Scales::Double { codes: scale_codes, scales, mean, levels } => KernelScales {
                codes: Some(codes(scale_codes)),
                scales: numbers(scales),
                levels: numbers(levels),
                mean: *mean,
            },
        };
        let Packed { shape, storage, dtype, .. } = *packed;
        tensor(quantize::launch_dequantize(codes(&packed.codes), scales, storage, shape, dtype))
    }

    fn rms_norm_forward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        eps: f64,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        let (x, weight) = (input(x), input(weight));
        let threads = rms_norm::most_threads(&x.client);
        tensor(rms_norm::launch_forward(x, weight, eps, dtype, threads))
    }

    fn rms_norm_backward(
        dy: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        eps: f64,
        sum: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        let (x, weight, sum) = (input(x), input(weight), sum.map(input));
        let threads = rms_norm::most_threads(&x.client);
        tensor(rms_norm::launch_backward(operand(dy), x, weight, eps, sum, threads))
    }

    fn rope_forward(x: Tensor<Self, 3>, table: &RopeTable<Self>) -> Tensor<Self, 3> {
        rotate(x, table, 1.0)
    }

    fn rope_backward(dy: Tensor<Self, 3>, table: &RopeTable<Self>) -> Tensor<Self, 3> {
        rotate(dy, table, -1.0)
    }

    fn swiglu_forward(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        tensor(swiglu::launch_forward(operand(gate), operand(up)))
    }

    fn swiglu_backward(
        dh: Tensor<Self, 2>,
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
    ) -> (Tensor<Self, 2>, Tensor<Self, 2>) {
        let (dgate, dup) = swiglu::launch_backward(operand(dh), operand(gate), operand(up));
        (tensor(dgate), tensor(dup))
    }

    fn grad_norm(grads: &[Tensor<Self, 2>]) -> Tensor<Self, 1> {
        tensor(adamw::launch_norm(grads.iter().map(|grad| input(grad.clone())).collect()))
    }

    fn adamw(
        parameter: Tensor<Self, 2>,
        grad: Tensor<Self, 2>,
        moments: [Tensor<Self, 2>; 2],
        norm: Tensor<Self, 1>,
        step: &AdamWStep,
    ) -> (Tensor<Self, 2>, [Tensor<Self, 2>; 2]) {
        let (parameter, grad, norm) = (input(parameter), input(grad), input(norm));
        let (parameter, moments) = adamw::launch_update(parameter, grad, moments.map(input), norm, step);
        (tensor(parameter), moments.map(tensor))
    }

    fn attention_forward(
        q: Tensor<Self, 3>,
        k: Tensor<Self, 3>,
        v: Tensor<Self, 3>,
        mask: &AttentionMask<Self>,
    ) -> AttentionOutput<Self> {
        if !has_kernel(&q) {
            return attention::attention_forward_reference(q, k, v, mask);
        }
        let (q, mask) = (operand(q), mask.launch_mask());
        let tile = AttentionTile::of(&q, q.meta.shape()[2]);
        let qkv = [q, operand(k), operand(v)];
        let (out, lse) = attention::launch::attention_forward(qkv, &mask, tile);
        AttentionOutput { out: tensor(out), lse: tensor(lse) }
    }

    fn attention_backward(
        dout: Tensor<Self, 2>,
        q: Tensor<Self, 3>,
        k: Tensor<Self, 3>,
        v: Tensor<Self, 3>,
        output: AttentionOutput<Self>,
        mask: &AttentionMask<Self>,
    ) -> [Tensor<Self, 3>; 3] {
        if !has_kernel(&q) {
            return attention::attention_backward_reference(dout, q, k, v, output, mask);
        }
        let (q, mask) = (operand(q), mask.launch_mask());
        let tile = AttentionTile::of(&q, q.meta.shape()[2]);
        let qkv = [q, operand(k), operand(v)];
        let output = [operand(output.out), operand(output.lse)];
        attention::launch::attention_backward(operand(dout), qkv, output, &mask, tile).map(tensor)
    }

    fn orpo_loss_forward(logps: Tensor<Self, 1>, pairs: &[PairSpan]) -> Tensor<Self, 2> {
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

/// The tensor as a kernel reads it: contiguous, `f32` or `f16`.
fn operand<B: Backend<FloatTensorPrimitive = Floats>, const D: usize>(tensor: Tensor<B, D>) -> Floats {
    cube::readable(tensor.into_primitive().tensor())
}

/// The same of a tensor that has to be `f32`.
fn input<B: Backend<FloatTensorPrimitive = Floats>, const D: usize>(tensor: Tensor<B, D>) -> Floats {
    cube::readable_f32(tensor.into_primitive().tensor())
}

/// Whether attention's kernels take heads of this width.
fn has_kernel<B: Backend>(q: &Tensor<B, 3>) -> bool {
    q.dims()[2].is_multiple_of(4)
}

/// The primitive as a tensor.
fn tensor<B: Backend<FloatTensorPrimitive = Floats>, const D: usize>(primitive: Floats) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// `x Aᵀ`
fn rank_r<B: Backend<FloatTensorPrimitive = Floats>>(x: &Floats, lora: &Lora<B>) -> Floats {
    Product::new(Layout::RowsRows, x, &input(lora.a.clone())).named("lora_linear rank r").run()
}

fn rotate<B: Backend<FloatTensorPrimitive = Floats>>(
    x: Tensor<B, 3>,
    table: &RopeTable<B>,
    direction: f32,
) -> Tensor<B, 3> {
    let (cos, sin) = (input(table.cos.clone()), input(table.sin.clone()));
    tensor(rope::launch(operand(x), cos, sin, direction))
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
