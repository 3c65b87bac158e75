//! Grouped-query attention over packed rows: `softmax(q kᵀ / sqrt(head_dim) + mask) v` (arXiv:1706.03762, arXiv:2305.13245).
//!
//! Query head `h` attends with key head `h / (heads / kv_heads)`; keys and values are never repeated. Saved for backward is the
//! log-sum-exp of every row's scores (arXiv:2205.14135), from which the weights come back as `P = exp(S − lse)`:
//!
//! ```text
//! D = Σ dout · out      dV = Pᵀ dout      dS = P · (dout Vᵀ − D)      dQ = dS K / sqrt(head_dim)      dK = dSᵀ Q / sqrt(head_dim)
//! ```
//!
//! Scores and every sum are `f32`. So are weights and `dS`, which matrix units take rounded to the tensors' 16-bit type.

mod backward;
mod bounds;
mod by_head;
mod forward;
mod lanes;
pub mod launch;
mod lines;
mod mask;
mod matrices;
mod mma;
mod reference;
mod registers;
mod splits;
mod tile;
pub mod trial;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use super::Kernels;

pub(super) use by_head::{attention_backward_by_head, attention_forward_by_head};
pub use mask::{AttentionMask, Visible};
pub use mma::{MmaLaunch, MmaPass, OWNED as MMA_OWNED};
pub use reference::{AdditiveMask, CHUNK_ROWS, attention_reference};
pub(super) use reference::{attention_backward_reference, attention_forward_reference};
pub use tile::{MmaUnit, Tile, Units};

/// What attention computes, and backward needs.
#[derive(Debug, Clone)]
pub struct AttentionOutput<B: Backend> {
    /// `[queries, heads · head_dim]`, in the queries' dtype.
    pub out: Tensor<B, 2>,
    /// Log-sum-exp of the scaled scores, `[queries, heads]` in `f32`, nats.
    pub lse: Tensor<B, 2>,
}

/// Computes attention.
///
/// # Shapes
/// - `q`: `[queries, heads, head_dim]`   - `k`, `v`: `[keys, kv_heads, head_dim]`, all in one dtype
///
/// # Panics
/// If the shapes do not fit each other or the mask.
pub fn attention<B: Kernels>(
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    mask: &AttentionMask<B>,
) -> AttentionOutput<B> {
    check_shapes(&q, &k, &v, &mask.visible);
    B::attention_forward(q, k, v, mask)
}

/// Computes `[dq, dk, dv]`, of the shapes and the dtype of `q`, `k` and `v`, from the gradient of `out`.
///
/// # Panics
/// As [`attention`].
pub fn attention_backward<B: Kernels>(
    dout: Tensor<B, 2>,
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    output: AttentionOutput<B>,
    mask: &AttentionMask<B>,
) -> [Tensor<B, 3>; 3] {
    check_shapes(&q, &k, &v, &mask.visible);
    assert_eq!(dout.dims(), output.out.dims(), "attention: shape of the gradient");
    assert_eq!(dout.dtype(), q.dtype(), "attention: dtype of the gradient against q");
    assert_eq!(output.lse.dtype(), DType::F32, "attention: dtype of the log-sum-exp");
    B::attention_backward(dout, q, k, v, output, mask)
}

fn check_shapes<B: Backend>(q: &Tensor<B, 3>, k: &Tensor<B, 3>, v: &Tensor<B, 3>, visible: &[Visible]) {
    let ([n_queries, heads, head_dim], [n_keys, kv_heads, _]) = (q.dims(), k.dims());
    assert_eq!(k.dims()[2], head_dim, "attention: head_dim of q against k");
    assert_eq!(k.dims(), v.dims(), "attention: shapes of k and v");
    assert_eq!([k.dtype(), v.dtype()], [q.dtype(); 2], "attention: dtypes of k and v against q");
    assert!(heads % kv_heads == 0, "attention: {heads} heads are no multiple of {kv_heads} key heads");
    assert_eq!(visible.len(), n_queries, "attention: rows of the mask against queries");
    assert!(visible.iter().all(|v| v.end as usize <= n_keys), "attention: the mask sees past {n_keys} keys");
}

fn scale(head_dim: usize) -> f64 {
    (head_dim as f64).powf(-0.5)
}
