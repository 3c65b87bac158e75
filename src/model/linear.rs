//! A linear layer with its adapter.

use burn::tensor::{Tensor, backend::Backend};

use crate::ops::Kernels;
use crate::ops::lora_linear::{
    InputGrad, Lora, LoraGrads, LoraOutputGrad, lora_backward_a, lora_backward_b, lora_linear,
    lora_linear_backward, lora_rank_r, output_grad,
};
use crate::ops::quantize::Weight;

/// A linear layer without bias: a frozen weight and, where one is attached, a LoRA adapter.
#[derive(Debug, Clone)]
pub struct Linear<B: Backend> {
    /// `[out, in]`, as the checkpoint stores it.
    pub weight: Weight<B>,
    /// The trainable part.
    pub lora: Option<Lora<B>>,
}

/// What a layer computes.
#[derive(Debug, Clone)]
pub struct LinearOutput<B: Backend> {
    /// `[tokens, out]`
    pub y: Tensor<B, 2>,
    /// The adapter's rank-r tensor, `[tokens, r]`.
    pub s: Option<Tensor<B, 2>>,
}

impl<B: Backend> Linear<B> {
    /// A layer without adapter.
    pub fn frozen(weight: Weight<B>) -> Self {
        Self { weight, lora: None }
    }
}

impl<B: Kernels> Linear<B> {
    /// Applies layers to one input: `[tokens, in] -> [tokens, out]` each.
    pub fn forward_each<const N: usize>(linears: [&Self; N], x: Tensor<B, 2>) -> [LinearOutput<B>; N] {
        let mut s = Self::rank_r_each(linears, x.clone()).into_iter();
        linears.map(|linear| linear.output(x.clone(), s.next().flatten(), None))
    }

    /// Applies the layer and adds the residual, `[tokens, out]`.
    pub fn forward_onto(&self, x: Tensor<B, 2>, residual: Tensor<B, 2>) -> LinearOutput<B> {
        let s = self.rank_r(x.clone());
        self.output(x, s, Some(residual))
    }

    /// The rank-r tensor alone.
    pub fn rank_r(&self, x: Tensor<B, 2>) -> Option<Tensor<B, 2>> {
        let [s] = Self::rank_r_each([self], x);
        s
    }

    fn rank_r_each<const N: usize>(linears: [&Self; N], x: Tensor<B, 2>) -> [Option<Tensor<B, 2>>; N] {
        let loras: Vec<_> = linears.iter().filter_map(|linear| linear.lora.as_ref()).collect();
        let mut s = lora_rank_r(x, &loras).into_iter();
        linears.map(|linear| linear.lora.as_ref().and_then(|_| s.next()))
    }

    fn output(
        &self,
        x: Tensor<B, 2>,
        s: Option<Tensor<B, 2>>,
        residual: Option<Tensor<B, 2>>,
    ) -> LinearOutput<B> {
        let y = lora_linear(x, self.weight.to_dense(), self.lora.as_ref().zip(s.clone()), residual);
        LinearOutput { y, s }
    }

    /// The gradient by the input of layers that share it, where it is asked for, and those of their adapters, `dA` and `dB` of each in
    /// turn, from the gradients by their outputs and the rank-r tensors that forward gave.
    ///
    /// # Shapes
    /// - `dys`: `[tokens, out]` each   - `x`: `[tokens, in]`   - `s`: `[tokens, r]` each
    ///
    /// # Panics
    /// If the shapes do not fit each other, or the rank-r tensor of a layer with an adapter is missing.
    pub fn backward_each<const N: usize>(
        linears: [&Self; N],
        dys: [Tensor<B, 2>; N],
        x: Tensor<B, 2>,
        s: [Option<Tensor<B, 2>>; N],
        needs_dx: bool,
    ) -> (Option<Tensor<B, 2>>, Vec<Tensor<B, 2>>) {
        let dtype = x.dtype();
        let dys = dys.map(|dy| output_grad(dy, dtype));
        let layers = linears.iter().zip(&dys).zip(s).filter_map(|((linear, dy), s)| {
            let lora = linear.lora.as_ref()?;
            let s = s.expect("forward with an adapter gives the rank-r tensor");
            Some(LoraOutputGrad { dy: dy.clone(), s, lora })
        });
        let grads = lora_backward_b(&layers.collect::<Vec<_>>()).into_iter();
        let (ds, dbs): (Vec<_>, Vec<_>) = grads.map(|LoraGrads { ds, db }| (ds, db)).unzip();
        // The input is the last one's to read here, and gone before the frozen products.
        let das = lora_backward_a(x, &ds);
        let lora_grads = das.into_iter().zip(dbs).flat_map(|(da, db)| [da, db]).collect();
        let mut ds = ds.into_iter();
        let mut dx = None;
        for (linear, dy) in linears.into_iter().zip(dys).filter(|_| needs_dx) {
            let adapter =
                linear.lora.as_ref().map(|lora| (lora, ds.next().expect("a gradient for every adapter")));
            let input = dx.map_or(InputGrad::New(dtype), InputGrad::AddTo);
            dx = Some(lora_linear_backward(dy, linear.weight.to_dense(), adapter, input));
        }
        (dx, lora_grads)
    }
}
