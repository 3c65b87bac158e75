//! The engine of wgpu: which shader is launched how often, on which buffers.

use burn::cubecl::client::ComputeClient;
use burn::tensor::{DType, Tensor};
use burn_wgpu::WgpuRuntime;

use super::cube::{is_software, settle};
use super::engine::{self, Engine, Floating};
use super::gpu::{input, operand, tensor};
use super::kernel::{Layout, RANK_QUADS, Shader, launch};
use super::lora_linear::{Lora, LoraGrads, LoraOutputGrad};
use super::orpo_loss::{MEAN_LOGP_MAX, PairSpan, backward_by, forward_by};
use super::product::{Floats, Product, dims, lora_backward};

impl Engine for WgpuRuntime {
    /// CubeCL says of no software adapter that they do, so that it is tried. wgpu takes the shader where it has subgroups at all.
    fn shuffles(client: &ComputeClient<Self>, lanes: u32) -> bool {
        // What failed before must not count as a failure of the shuffles.
        settle(client);
        let shader = Shader::Lanes { lanes };
        let wrong = vec![0u32; shader.workgroup_size() as usize];
        let answers = client.create_from_slice(bytemuck::cast_slice(&wrong));
        launch(client, shader, [1, 1, 1], &[&answers], &[lanes]);
        let answers = client.read_one(answers);
        // wgpu tells of a launch that failed only when it is waited for.
        let is_launched = pollster::block_on(client.sync()).is_ok();
        is_launched
            && answers.is_ok_and(|bytes| bytemuck::cast_slice(&bytes).iter().all(|&right: &u32| right == 1))
    }

    fn lora_rank_r<B: Floating<Self>>(x: Tensor<B, 2>, loras: &[&Lora<B>]) -> Vec<Tensor<B, 2>> {
        let (x, a) = (operand(x), loras.iter().map(|lora| input(lora.a.clone())).collect::<Vec<_>>());
        let alone = |a: &Floats| Product::new(Layout::RowsRows, &x, a).named("lora_linear rank r").run();
        let rank_r =
            narrow_together(&a, |a| is_narrow(&x.client, dims(a)[0]), |a| engine::rank_r(&x, a), alone);
        rank_r.into_iter().map(tensor).collect()
    }

    fn lora_linear_forward<B: Floating<Self>>(
        x: Tensor<B, 2>,
        weight: Tensor<B, 2>,
        adapter: Option<(&Lora<B>, Tensor<B, 2>)>,
        residual: Option<Tensor<B, 2>>,
    ) -> Tensor<B, 2> {
        let (x, weight) = (operand(x), operand(weight));
        let dtype = residual.as_ref().map_or(x.dtype, Tensor::dtype);
        let product =
            Product::new(Layout::RowsRows, &x, &weight).add_to(residual.map(operand)).into_dtype(dtype);
        let y = match adapter {
            Some((lora, s)) => product.after(&input(s), &input(lora.b.clone()), lora.scale).run(),
            None => product.run(),
        };
        tensor(y)
    }

    fn lora_backward_b<B: Floating<Self>>(layers: &[LoraOutputGrad<'_, B>]) -> Vec<LoraGrads<B>> {
        let alone = |LoraOutputGrad { dy, s, lora }: &LoraOutputGrad<'_, B>| {
            let (dy, s, b) = (operand(dy.clone()), input(s.clone()), input(lora.b.clone()));
            let (ds, db) = match RANK_QUADS.into_iter().find(|quads| dims(&b)[1] <= 4 * quads) {
                Some(rank_quads) => lora_backward(rank_quads, &dy, &b, &s, lora.scale),
                None => (
                    Product::new(Layout::RowsColumns, &dy, &b).times(lora.scale).run(),
                    Product::new(Layout::ColumnsColumns, &dy, &s).times(lora.scale).run(),
                ),
            };
            LoraGrads { ds: tensor(ds), db: tensor(db) }
        };
        let client = input(layers[0].s.clone()).client;
        let is_narrow = |layer: &LoraOutputGrad<'_, B>| is_narrow(&client, layer.s.dims()[1] as u32);
        narrow_together(layers, is_narrow, engine::backward_b, alone)
    }

    fn lora_backward_a<B: Floating<Self>>(x: Tensor<B, 2>, ds: &[Tensor<B, 2>]) -> Vec<Tensor<B, 2>> {
        let (x, ds) = (operand(x), ds.iter().map(|ds| input(ds.clone())).collect::<Vec<_>>());
        let alone = |ds: &Floats| Product::new(Layout::ColumnsColumns, ds, &x).run();
        let das = narrow_together(
            &ds,
            |ds| is_narrow(&x.client, dims(ds)[1]),
            |ds| engine::backward_a(&x, ds),
            alone,
        );
        das.into_iter().map(tensor).collect()
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
        let forward = forward_by(input(logps), pairs, |logps, spans, stats| {
            launch(
                &logps.client,
                Shader::OrpoLoss,
                [pairs.len() as u32, 1, 1],
                &[&logps.handle, &spans, &stats.handle],
                &[pairs.len() as u32, MEAN_LOGP_MAX.to_bits()],
            );
        });
        tensor(forward)
    }

    fn orpo_loss_backward<B: Floating<Self>>(
        stats: Tensor<B, 2>,
        pairs: &[PairSpan],
        beta: f32,
        grad_scale: f32,
    ) -> Tensor<B, 1> {
        let backward = backward_by(input(stats), pairs, |stats, spans, dlogps| {
            launch(
                &stats.client,
                Shader::OrpoLossBackward,
                [pairs.len() as u32, 1, 1],
                &[&stats.handle, &spans, &dlogps.handle],
                &[pairs.len() as u32, MEAN_LOGP_MAX.to_bits(), beta.to_bits(), grad_scale.to_bits()],
            );
        });
        tensor(backward)
    }
}

/// The highest rank whose products with a matrix of tokens are made as narrow ones: they read it anew for every eight ranks.
const NARROW: u32 = 32;

/// Whether an adapter's products are too narrow for a GPU's tiles, and for panels that read `dy` once: either leaves most of it idle.
fn is_narrow(client: &ComputeClient<WgpuRuntime>, rank: u32) -> bool {
    !is_software(client) && rank <= NARROW
}

/// What is made of each of these, in order: of narrow ones together, of others alone.
fn narrow_together<T: Clone, O>(
    items: &[T],
    is_narrow: impl Fn(&T) -> bool,
    together: impl FnOnce(&[T]) -> Vec<O>,
    alone: impl Fn(&T) -> O,
) -> Vec<O> {
    let narrow: Vec<T> = items.iter().filter(|item| is_narrow(item)).cloned().collect();
    let mut made = if narrow.is_empty() { Vec::new() } else { together(&narrow) }.into_iter();
    let each = |item| match is_narrow(item) {
        true => made.next().expect("narrow ones are all made"),
        false => alone(item),
    };
    items.iter().map(each).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_together_comes_back_in_order() {
        for items in [&[][..], &[1, 2, 3], &[10, 1, 20, 2, 3, 30], &[10, 20]] {
            let together = |items: &[i32]| {
                assert!(!items.is_empty() && items.iter().all(|item| *item < 10));
                items.iter().map(|item| 2 * item).collect()
            };
            let made = narrow_together(items, |item| *item < 10, together, |item| 2 * item);
            assert_eq!(made, items.iter().map(|item| 2 * item).collect::<Vec<_>>());
        }
    }
}
