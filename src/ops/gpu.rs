//! The ops on the runtimes of CubeCL: what is launched on which tensors.

use burn::tensor::{DType, Int, Tensor, TensorPrimitive};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};

use super::adamw::{self, AdamWStep};
use super::attention::trial::Pass;
use super::attention::{self, AttentionMask, AttentionOutput, Tile as AttentionTile};
use super::engine::{Engine, Floating};
use super::lora_linear::{Lora, LoraGrads, LoraOutputGrad};
use super::orpo_loss::PairSpan;
use super::quantize::{KernelScales, Packed, Scales, Storage};
use super::rope::RopeTable;
use super::token_logps::{self, Expected, ExpectedRows, Head, ScoredToken, TokenLogps};
use super::{Kernels, cube, quantize, rms_norm, rope, swiglu};

impl<R: Engine, F: FloatElement, I: IntElement, BT: BoolElement> Kernels for CubeBackend<R, F, I, BT> {
    fn bytes_in_use(device: &Self::Device) -> Option<u64> {
        let client = R::client(device);
        client.memory_usage().ok().map(|usage| usage.bytes_in_use)
    }

    fn lora_rank_r(x: Tensor<Self, 2>, loras: &[&Lora<Self>]) -> Vec<Tensor<Self, 2>> {
        R::lora_rank_r(x, loras)
    }

    fn lora_linear_forward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        adapter: Option<(&Lora<Self>, Tensor<Self, 2>)>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        R::lora_linear_forward(x, weight, adapter, residual)
    }

    fn lora_backward_b(layers: &[LoraOutputGrad<'_, Self>]) -> Vec<LoraGrads<Self>> {
        R::lora_backward_b(layers)
    }

    fn lora_backward_a(x: Tensor<Self, 2>, ds: &[Tensor<Self, 2>]) -> Vec<Tensor<Self, 2>> {
        R::lora_backward_a(x, ds)
    }

    fn lora_linear_backward_input(
        dy: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        ds_a: Option<(Tensor<Self, 2>, Tensor<Self, 2>)>,
        sum: Option<Tensor<Self, 2>>,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        R::lora_linear_backward_input(dy, weight, ds_a, sum, dtype)
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

    fn add_grads(sums: Vec<Tensor<Self, 2>>, grads: Vec<Tensor<Self, 2>>) -> Vec<Tensor<Self, 2>> {
        let inputs = |tensors: Vec<Tensor<Self, 2>>| tensors.into_iter().map(input).collect::<Vec<_>>();
        adamw::launch_add(inputs(sums), &inputs(grads)).into_iter().map(tensor).collect()
    }

    fn adamw(
        parameters: Vec<Tensor<Self, 2>>,
        grads: Vec<Tensor<Self, 2>>,
        moments: [Vec<Tensor<Self, 2>>; 2],
        norm: Tensor<Self, 1>,
        step: &AdamWStep,
    ) -> (Vec<Tensor<Self, 2>>, [Vec<Tensor<Self, 2>>; 2]) {
        let inputs = |tensors: Vec<Tensor<Self, 2>>| tensors.into_iter().map(input).collect::<Vec<_>>();
        let (parameters, grads, moments) = (inputs(parameters), inputs(grads), moments.map(inputs));
        let (parameters, moments) = adamw::launch_update(parameters, &grads, moments, &input(norm), step);
        let tensors = |primitives: Vec<_>| primitives.into_iter().map(tensor).collect();
        (tensors(parameters), moments.map(tensors))
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
        let (qkv, mask) = ([q, k, v].map(operand), mask.launch_mask());
        let tile = AttentionTile::of(&qkv[0], &qkv[1], Pass::Forward);
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
        let (qkv, mask) = ([q, k, v].map(operand), mask.launch_mask());
        let splits = attention::launch::splits(&qkv[0], &qkv[1]);
        let pass = if splits > 1 { Pass::BackwardInSplits } else { Pass::Backward };
        let tile = AttentionTile::of(&qkv[0], &qkv[1], pass);
        let output = [operand(output.out), operand(output.lse)];
        attention::launch::attention_backward(operand(dout), qkv, output, &mask, tile, splits).map(tensor)
    }

    fn orpo_loss_forward(logps: Tensor<Self, 1>, pairs: &[PairSpan]) -> Tensor<Self, 2> {
        R::orpo_loss_forward(logps, pairs)
    }

    fn orpo_loss_backward(
        stats: Tensor<Self, 2>,
        pairs: &[PairSpan],
        beta: f32,
        grad_scale: f32,
    ) -> Tensor<Self, 1> {
        R::orpo_loss_backward(stats, pairs, beta, grad_scale)
    }
}

/// The tensor as a kernel reads it: contiguous, in a type that the kernels take.
pub(super) fn operand<R: CubeRuntime, B: Floating<R>, const D: usize>(tensor: Tensor<B, D>) -> CubeTensor<R> {
    cube::readable(tensor.into_primitive().tensor())
}

/// The same of a tensor that has to be `f32`.
pub(super) fn input<R: CubeRuntime, B: Floating<R>, const D: usize>(tensor: Tensor<B, D>) -> CubeTensor<R> {
    cube::readable_f32(tensor.into_primitive().tensor())
}

/// The primitive as a tensor.
pub(super) fn tensor<R: CubeRuntime, B: Floating<R>, const D: usize>(
    primitive: CubeTensor<R>,
) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// Whether attention's kernels take heads of this width.
fn has_kernel<B: Kernels>(q: &Tensor<B, 3>) -> bool {
    q.dims()[2].is_multiple_of(4)
}

fn rotate<R: CubeRuntime, B: Floating<R>>(
    x: Tensor<B, 3>,
    table: &RopeTable<B>,
    direction: f32,
) -> Tensor<B, 3> {
    let (cos, sin) = (input(table.cos.clone()), input(table.sin.clone()));
    tensor(rope::launch(operand(x), cos, sin, direction))
}
