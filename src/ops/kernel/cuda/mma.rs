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
    /// Whether its warps multiply as one.
    is_warpgroup: bool,
    is_bf16: bool,
    is_in_splits: bool,
}

/// The rooms lie at multiples of so many bytes.
const ALIGNMENT: usize = 1 << 10;

impl Attention {
    /// Warps that multiply on their own walk over more lines in forward alone, and where several workgroups find room for them beside each
    /// other. What whole warpgroups multiply is read from workgroup memory for each product, as little as possible of it where both
    /// operands are as large.
    fn walked(pass: MmaPass, is_warpgroup: bool, most_bytes: usize) -> usize {
        if is_warpgroup || pass == MmaPass::Forward && most_bytes > 100 << 10 { 64 } else { 32 }
    }

    /// Workgroups that are to fit a processor: three leave a thread 168 registers, and two 255.
    fn workgroups(self) -> usize {
        match self.pass {
            MmaPass::Forward => 3,
            MmaPass::Queries if !self.is_warpgroup => 3,
            MmaPass::Queries | MmaPass::Keys => 2,
        }
    }

    /// The names of the operands of the two products of whole warpgroups, whose sums are this array's.
    fn operands(columns: usize) -> [String; 2] {
        let list = |item: &dyn Fn(usize) -> String| (0..columns / 2).map(item).collect::<Vec<_>>().join(", ");
        let registers = list(&|i| format!("%{i}"));
        [format!("\"{{{registers}}}\""), list(&|i| format!("\"+f\"(sums.at[{}][{}])", i / 4, i % 4))]
    }
}

impl Variant for Attention {
    const ENTRY_POINT: &'static str = "attention_mma";
    const THREADS: u32 = 128;

    /// The lines that a workgroup owns of one tensor or two, and rooms for those that it walks over of two others.
    fn shared_bytes(&self) -> usize {
        let [n_owned, rooms] = if self.pass == MmaPass::Forward { [1, 3] } else { [2, 4] };
        let stats = if self.pass == MmaPass::Keys { 2 * self.walked * 2 * size_of::<f32>() } else { 0 };
        ALIGNMENT + (n_owned * MMA_OWNED + rooms * self.walked) * self.head_dim * size_of::<u16>() + stats
    }

    fn definitions(&self) -> Vec<(&'static str, String)> {
        let [score_registers, score_operands] = Self::operands(self.walked);
        let [sum_registers, sum_operands] = Self::operands(self.head_dim);
        let [scores, sums] = [self.walked, self.head_dim].map(|columns| columns / 2);
        let text = |text: String| format!("\"{text}\"");
        vec![
            ("WARPGROUP", flag(self.is_warpgroup)),
            ("WORKGROUPS", self.workgroups().to_string()),
            ("SCORES_COLUMNS", text(self.walked.to_string())),
            ("SCORES_REGISTERS", score_registers),
            ("SCORES_OPERANDS", score_operands),
            ("SCORES_LEFT", text(format!("%{scores}"))),
            ("SCORES_RIGHT", text(format!("%{}", scores + 1))),
            ("SCORES_ADDS", text(format!("%{}", scores + 2))),
            ("SUMS_COLUMNS", text(self.head_dim.to_string())),
            ("SUMS_REGISTERS", sum_registers),
            ("SUMS_OPERANDS", sum_operands),
            ("SUMS_LEFT", text(format!("{{%{sums}, %{}, %{}, %{}}}", sums + 1, sums + 2, sums + 3))),
            ("SUMS_RIGHT", text(format!("%{}", sums + 4))),
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
    let MmaLaunch { workgroups, is_warpgroup, buffers, heads_of_tile, head_dim, splits, sizes, scale } =
        *launch;
    let is_bf16 = buffers[0].dtype == DType::BF16;
    let most_bytes = buffers[0].client.properties().hardware.max_shared_memory_size;
    let walked = Attention::walked(pass, is_warpgroup, most_bytes);
    let heads = heads_of_tile;
    let variant =
        Attention { pass, head_dim, heads, walked, is_warpgroup, is_bf16, is_in_splits: splits > 1 };
    let [n_queries, n_keys, n_seen, heads, kv_heads] = sizes.map(|n| n as u32);
    let numbers = [[n_queries, n_keys], [n_seen, heads], [kv_heads, scale.to_bits()]];
    super::launch(variant, workgroups, Vec::new(), buffers, numbers.map(bytemuck::cast).to_vec());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compute capabilities 8.6, 8.9 and 12.0 have 100 KiB a processor, of which a workgroup is given 99; 9.0 has warpgroups.
    #[test]
    fn lines_fit_the_memory_of_a_workgroup() {
        let passes = [MmaPass::Forward, MmaPass::Queries, MmaPass::Keys];
        for (most_bytes, is_warpgroup) in
            [(99 << 10, false), (163 << 10, false), (227 << 10, false), (227 << 10, true)]
        {
            for pass in passes {
                let walked = Attention::walked(pass, is_warpgroup, most_bytes);
                let [is_bf16, is_in_splits] = [true; 2];
                let variant =
                    Attention { pass, head_dim: 128, heads: 4, walked, is_warpgroup, is_bf16, is_in_splits };
                let workgroups =
                    if most_bytes < 100 << 10 { 1 } else { variant.workgroups().min(most_bytes >> 16) };
                assert!(workgroups * variant.shared_bytes() <= most_bytes, "{variant:?} of {most_bytes}");
            }
        }
    }
}
