//! `attention_mma.cu`

use burn::cubecl::cuda::CudaRuntime;
use burn::tensor::DType;

use super::{Variant, flag};
use crate::ops::attention::{MMA_OWNED, MmaLaunch, MmaPass};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Attention {
    pass: MmaPass,
    head_dim: usize,
    /// That share a key head and a tile.
    heads: usize,
    /// Lines that a workgroup walks over at a time.
    walked: usize,
    is_bf16: bool,
    is_in_splits: bool,
}

impl Attention {
    /// In forward more lines at a time, where several workgroups find room for them beside each other.
    fn walked(pass: MmaPass, most_bytes: usize) -> usize {
        if pass == MmaPass::Forward && most_bytes > 100 << 10 { 64 } else { 32 }
    }
}

impl Variant for Attention {
    const ENTRY_POINT: &'static str = "attention_mma";
    const THREADS: u32 = 128;

    /// The lines that a workgroup owns of one tensor or two, and rooms for those that it walks over of two others.
    fn shared_bytes(&self) -> usize {
        let [n_owned, rooms] = if self.pass == MmaPass::Forward { [1, 3] } else { [2, 4] };
        (n_owned * MMA_OWNED + rooms * self.walked) * self.head_dim * size_of::<u16>()
    }

    fn definitions(&self) -> Vec<(&'static str, String)> {
        vec![
            ("HEAD_DIM", self.head_dim.to_string()),
            ("HEADS", self.heads.to_string()),
            ("OWNED", MMA_OWNED.to_string()),
            ("WALKED", self.walked.to_string()),
            ("BF16", flag(self.is_bf16)),
            ("FORWARD", flag(self.pass == MmaPass::Forward)),
            ("QUERIES", flag(self.pass == MmaPass::Queries)),
            ("KEYS", flag(self.pass == MmaPass::Keys)),
            ("IN_SPLITS", flag(self.is_in_splits)),
        ]
    }

    fn source(&self) -> &'static str {
        include_str!("../../../../shaders/attention_mma.cu")
    }
}

/// Launches one of the kernels.
pub(in crate::ops) fn launch(pass: MmaPass, launch: &MmaLaunch<'_, CudaRuntime>) {
    let MmaLaunch { workgroups, buffers, heads_of_tile, head_dim, splits, sizes, scale } = *launch;
    let is_bf16 = buffers[0].dtype == DType::BF16;
    let most_bytes = buffers[0].client.properties().hardware.max_shared_memory_size;
    let walked = Attention::walked(pass, most_bytes);
    let variant =
        Attention { pass, head_dim, heads: heads_of_tile, walked, is_bf16, is_in_splits: splits > 1 };
    let [n_queries, n_keys, n_seen, heads, kv_heads] = sizes.map(|n| n as u32);
    let numbers = [[n_queries, n_keys], [n_seen, heads], [kv_heads, scale.to_bits()]];
    super::launch(variant, workgroups, Vec::new(), buffers, numbers.map(bytemuck::cast).to_vec());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compute capabilities 8.6, 8.9 and 12.0 have 100 KiB a processor, of which a workgroup is given 99.
    #[test]
    fn lines_fit_the_memory_of_a_workgroup() {
        for (most_bytes, workgroups) in [(99 << 10, 1), (163 << 10, 2), (227 << 10, 3)] {
            for pass in [MmaPass::Forward, MmaPass::Queries, MmaPass::Keys] {
                let walked = Attention::walked(pass, most_bytes);
                let variant =
                    Attention { pass, head_dim: 128, heads: 4, walked, is_bf16: true, is_in_splits: true };
                assert!(workgroups * variant.shared_bytes() <= most_bytes, "{variant:?} of {most_bytes}");
            }
        }
    }
}
