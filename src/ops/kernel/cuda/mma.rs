//! `attention_mma.cu`

use burn::cubecl::cuda::CudaRuntime;
use burn::tensor::DType;

use super::{Variant, flag};
use crate::ops::attention::{MMA_OWNED, MmaLaunch, MmaPass, MmaUnit};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Attention {
    pass: MmaPass,
    head_dim: usize,
    /// That share a key head and a tile.
    heads: usize,
    /// Lines that a workgroup walks over at a time.
    walked: usize,
    unit: MmaUnit,
    /// Workgroups that are to fit a processor.
    workgroups: usize,
    is_bf16: bool,
    is_in_splits: bool,
}

/// The rooms of whole warpgroups lie at multiples of so many bytes.
const ALIGNMENT: usize = 1 << 10;
/// What a workgroup takes of a processor's memory beside its own, and by what that exceeds the most that one is given.
const RESERVED: usize = 1 << 10;

impl Attention {
    /// The variant for a device that gives a workgroup so many bytes.
    fn new(pass: MmaPass, unit: MmaUnit, head_dim: usize, most_bytes: usize) -> Self {
        // A whole warpgroup reads both operands from workgroup memory for each product: the fewest bytes where both are as large. For
        // warps on their own several workgroups have to find room beside each other.
        let is_wide = unit == MmaUnit::Warpgroup || pass == MmaPass::Forward && most_bytes > 100 << 10;
        let walked = if is_wide { 64 } else { 32 };
        let one = Self {
            pass,
            head_dim,
            heads: 1,
            walked,
            unit,
            workgroups: 1,
            is_bf16: true,
            is_in_splits: false,
        };
        let fit = (most_bytes + RESERVED) / (one.shared_bytes() + RESERVED);
        // Three leave a thread 168 registers, and two 255.
        let wanted = match (pass, unit) {
            (MmaPass::Forward, _) | (MmaPass::Queries, MmaUnit::Warp) => 3,
            (MmaPass::Queries, MmaUnit::Warpgroup) | (MmaPass::Keys, _) => 2,
        };
        Self { workgroups: fit.clamp(1, wanted), ..one }
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
        let alignment = if self.unit == MmaUnit::Warpgroup { ALIGNMENT } else { 0 };
        alignment + (n_owned * MMA_OWNED + rooms * self.walked) * self.head_dim * size_of::<u16>() + stats
    }

    fn definitions(&self) -> Vec<(&'static str, String)> {
        let [score_registers, score_operands] = Self::operands(self.walked);
        let [sum_registers, sum_operands] = Self::operands(self.head_dim);
        let [scores, sums] = [self.walked, self.head_dim].map(|columns| columns / 2);
        let text = |text: String| format!("\"{text}\"");
        vec![
            ("WARPGROUP", flag(self.unit == MmaUnit::Warpgroup)),
            ("WORKGROUPS", self.workgroups.to_string()),
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
    let MmaLaunch { workgroups, unit, buffers, heads_of_tile, head_dim, splits, sizes, scale } = *launch;
    let most_bytes = buffers[0].client.properties().hardware.max_shared_memory_size;
    let variant = Attention {
        heads: heads_of_tile,
        is_bf16: buffers[0].dtype == DType::BF16,
        is_in_splits: splits > 1,
        ..Attention::new(pass, unit, head_dim, most_bytes)
    };
    let [n_queries, n_keys, n_seen, heads, kv_heads] = sizes.map(|n| n as u32);
    let numbers = [[n_queries, n_keys], [n_seen, heads], [kv_heads, scale.to_bits()]];
    super::launch(variant, workgroups, Vec::new(), buffers, numbers.map(bytemuck::cast).to_vec());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What compute capabilities 8.6, 8.9 and 12.0, 8.0, and 9.0 give a workgroup of a processor's 100, 164 and 228 KiB.
    #[test]
    fn workgroups_fit_beside_each_other() {
        use MmaPass::{Forward, Keys, Queries};
        use MmaUnit::{Warp, Warpgroup};
        for (kib, unit, head_dim, fit) in [
            (99, Warp, 64, [3, 3, 2]),
            (99, Warp, 128, [2, 1, 1]),
            (163, Warp, 64, [3, 3, 2]),
            (163, Warp, 128, [2, 2, 2]),
            (227, Warp, 128, [3, 3, 2]),
            (227, Warpgroup, 64, [3, 2, 2]),
            (227, Warpgroup, 128, [3, 2, 2]),
        ] {
            let workgroups = [Forward, Queries, Keys]
                .map(|pass| Attention::new(pass, unit, head_dim, kib << 10).workgroups);
            assert_eq!(workgroups, fit, "{unit:?}, heads of {head_dim}, {kib} KiB");
        }
    }
}
