//! `attention_mma.cu`

use burn::cubecl::cuda::CudaRuntime;
use burn::tensor::DType;

use super::{Variant, flag};
use crate::ops::attention::{MMA_OWNED, MmaLaunch, MmaPass};

/// What forward and backward walk over at a time.
const WALKED: [usize; 2] = [64, 32];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Attention {
    pass: MmaPass,
    head_dim: usize,
    /// That share a key head and a tile.
    heads: usize,
    is_bf16: bool,
}

impl Variant for Attention {
    const ENTRY_POINT: &'static str = "attention_mma";
    const THREADS: u32 = 128;

    /// The lines that a workgroup owns of one tensor or two, and those that it walks over of two others, twice.
    fn shared_bytes(&self) -> usize {
        let lines = match self.pass {
            MmaPass::Forward => MMA_OWNED + 4 * WALKED[0],
            MmaPass::Queries | MmaPass::Keys => 2 * MMA_OWNED + 4 * WALKED[1],
        };
        lines * self.head_dim * size_of::<u16>()
    }

    fn definitions(&self) -> Vec<(&'static str, String)> {
        vec![
            ("HEAD_DIM", self.head_dim.to_string()),
            ("HEADS", self.heads.to_string()),
            ("BF16", flag(self.is_bf16)),
            ("FORWARD", flag(self.pass == MmaPass::Forward)),
            ("QUERIES", flag(self.pass == MmaPass::Queries)),
            ("KEYS", flag(self.pass == MmaPass::Keys)),
        ]
    }

    fn source(&self) -> &'static str {
        include_str!("../../../../shaders/attention_mma.cu")
    }
}

/// Launches one of the kernels.
pub(in crate::ops) fn launch(pass: MmaPass, launch: &MmaLaunch<'_, CudaRuntime>) {
    let MmaLaunch { workgroups, buffers, heads_of_tile, head_dim, sizes, scale } = *launch;
    let is_bf16 = buffers[0].dtype == DType::BF16;
    let variant = Attention { pass, head_dim, heads: heads_of_tile, is_bf16 };
    let [n_queries, n_keys, n_seen, heads, kv_heads] = sizes.map(|n| n as u32);
    let numbers = [[n_queries, n_keys], [n_seen, heads], [kv_heads, scale.to_bits()]];
    super::launch(variant, workgroups, Vec::new(), buffers, numbers.map(bytemuck::cast).to_vec());
}
