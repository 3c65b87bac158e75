//! `lora_linear_warpgroup.cu`

use burn::cubecl::cuda::CudaRuntime;
use burn::cubecl::prelude::*;
use burn::cubecl::server::{TensorMapBinding, TensorMapMeta};
use burn::cubecl::zspace::metadata::Metadata;
use burn::cubecl::zspace::strides;
use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;

use super::{Variant, flag};
use crate::ops::engine::{
    TILE_COLUMNS, TILE_DEPTH, TILE_ROWS, WarpgroupProduct, has_rows, is_turned, turned,
};

/// Columns of a right operand that lies along its rows that are copied at once.
const BOX_COLUMNS: usize = 64;
/// What the stages may take of the 227 KiB that a workgroup has.
const STAGES_BYTES: usize = 200 << 10;
/// Stages lie at multiples of so many bytes.
const ALIGNMENT: usize = 1 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Product {
    /// Of a tile.
    columns: usize,
    is_bf16: bool,
    is_right_along_depth: bool,
    has_tail: bool,
    has_addend: bool,
    is_out_f32: bool,
}

impl Product {
    /// What is begun to be copied before the first of it is multiplied.
    fn stages(self) -> usize {
        STAGES_BYTES / self.stage_bytes()
    }

    fn stage_bytes(self) -> usize {
        (TILE_ROWS + self.columns) * TILE_DEPTH * size_of::<u16>()
    }
}

impl Variant for Product {
    const ENTRY_POINT: &'static str = "lora_linear_warpgroup";
    /// One warpgroup that copies and two that multiply.
    const THREADS: u32 = 3 * 128;

    /// Stages and, for each, two barriers.
    fn shared_bytes(&self) -> usize {
        ALIGNMENT + self.stages() * (self.stage_bytes() + 2 * size_of::<u64>())
    }

    fn definitions(&self) -> Vec<(&'static str, String)> {
        let sums = self.columns / 2;
        let list = |item: &dyn Fn(usize) -> String| (0..sums).map(item).collect::<Vec<_>>().join(", ");
        let registers = list(&|i| format!("%{i}"));
        vec![
            ("TILE_M", TILE_ROWS.to_string()),
            ("TILE_K", TILE_DEPTH.to_string()),
            ("BOX_N", BOX_COLUMNS.to_string()),
            ("TILE_N", self.columns.to_string()),
            ("TILE_N_TEXT", format!("\"{}\"", self.columns)),
            ("STAGES", self.stages().to_string()),
            ("BF16", flag(self.is_bf16)),
            ("RIGHT_ALONG_DEPTH", flag(self.is_right_along_depth)),
            ("RIGHT_IS_TRANSPOSED", format!("\"{}\"", flag(!self.is_right_along_depth))),
            ("HAS_TAIL", flag(self.has_tail)),
            ("HAS_ADDEND", flag(self.has_addend)),
            ("OUT_F32", flag(self.is_out_f32)),
            ("SUM_REGISTERS", format!("\"{{{registers}}}\"")),
            ("LEFT_REGISTER", format!("\"%{sums}\"")),
            ("RIGHT_REGISTER", format!("\"%{}\"", sums + 1)),
            ("ADDS_REGISTER", format!("\"%{}\"", sums + 2)),
            ("SUM_OPERANDS", list(&|i| format!("\"+f\"(sums[{i}])"))),
        ]
    }

    fn source(&self) -> &'static str {
        include_str!("../../../../shaders/lora_linear_warpgroup.cu")
    }
}

/// Launches a product in tiles of so many columns, on a device of so many processors.
///
/// # Errors
/// If there is no such tile, the copy engine cannot read an operand as it lies, or the output is not to be written so.
pub(in crate::ops) fn launch(
    columns: u32,
    processors: usize,
    product: &WarpgroupProduct<'_, CudaRuntime>,
) -> Result<(), &'static str> {
    let WarpgroupProduct { left, right, tails, out, addend, splits } = *product;
    let ([m, depth], [right_depth, n]) =
        ([0, 1].map(|i| left.meta.shape()[i]), [0, 1].map(|i| right.meta.shape()[i]));
    let [left_tail, right_tail] = [0, 1].map(|i| tails.map(|tails| &tails[i]));
    let lefts = [Some(left), left_tail].into_iter().flatten();
    let rights = [Some(right), right_tail].into_iter().flatten();
    let dtype = right.dtype;
    let stages = |depth: usize| depth.div_ceil(TILE_DEPTH);
    let is_same = |tensor: &CubeTensor<CudaRuntime>| tensor.dtype == dtype;
    let is_written = |tensor: &CubeTensor<CudaRuntime>| {
        tensor.is_contiguous() && tensor.meta.shape()[..] == [splits * m, n]
    };
    for (is_met, problem) in [
        (TILE_COLUMNS.contains(&columns), "there are no tiles of so many columns"),
        (depth == right_depth && m * n * depth > 0, "operands of different depths, or of none"),
        (
            tails.is_none_or(|[l, r]| {
                let tail = l.meta.shape()[1];
                tail > 0 && l.meta.shape()[..] == [m, tail] && r.meta.shape()[..] == [tail, n]
            }),
            "tails of other extents than the operands",
        ),
        ([DType::F16, DType::BF16].contains(&dtype), "operands that warpgroups do not multiply"),
        (lefts.clone().chain(rights.clone()).all(is_same), "operands of different types"),
        (lefts.clone().all(|left| !is_turned(left) && has_rows(left)), "a left operand that lies otherwise"),
        (
            rights.clone().all(|r| is_turned(r) == is_turned(right) && has_rows(r)),
            "a right operand that lies otherwise",
        ),
        (n.is_multiple_of(2) && is_written(out), "an output with gaps, or of an odd number of columns"),
        (out.dtype == DType::F32 || is_same(out), "an output of another type"),
        (
            addend.is_none_or(|addend| is_written(addend) && addend.dtype == out.dtype),
            "an addend unlike the output",
        ),
        (splits == 1 || addend.is_none() && tails.is_none(), "parts of the depth of more than a product"),
        (
            splits > 0 && (splits - 1) * stages(depth).div_ceil(splits) < stages(depth),
            "a part of the depth without a stage",
        ),
    ] {
        if !is_met {
            return Err(problem);
        }
    }
    let columns = columns as usize;
    let variant = Product {
        columns,
        is_bf16: dtype == DType::BF16,
        is_right_along_depth: is_turned(right),
        has_tail: tails.is_some(),
        has_addend: addend.is_some(),
        is_out_f32: out.dtype == DType::F32,
    };
    let left_map = |left: &CubeTensor<CudaRuntime>| map(left, [TILE_ROWS, TILE_DEPTH]);
    let right_map = |right: &CubeTensor<CudaRuntime>| match variant.is_right_along_depth {
        true => map(&turned(right), [columns, TILE_DEPTH]),
        false => map(right, [TILE_DEPTH, BOX_COLUMNS]),
    };
    let mut maps = vec![left_map(left), right_map(right)];
    maps.extend(tails.iter().flat_map(|[left, right]| [left_map(left), right_map(right)]));
    // The operands come once more, unread: by buffers alone a launch is put behind what other threads have launched on them.
    let buffers: Vec<_> = [Some(out), addend].into_iter().flatten().chain(lefts).chain(rights).collect();
    let tail = tails.map_or(0, |[left, _]| left.meta.shape()[1]);
    let extents = [m, n, stages(depth), stages(tail), splits];
    let tiles = m.div_ceil(TILE_ROWS) * n.div_ceil(columns) * splits;
    let extents = extents.map(|extent| extent as u64).to_vec();
    super::launch(variant, [tiles.min(processors), 1], maps, &buffers, extents);
    Ok(())
}

/// What the copy engine reads a matrix by, in boxes of so many rows and columns.
fn map(matrix: &CubeTensor<CudaRuntime>, extents: [usize; 2]) -> TensorMapBinding {
    let map = TensorMapMeta {
        format: TensorMapFormat::Tiled(TiledArgs::new(Shape::from(extents))),
        metadata: Metadata::new(matrix.meta.shape().clone(), matrix.meta.strides().clone()),
        elem_stride: strides![1; 2],
        interleave: TensorMapInterleave::None,
        swizzle: TensorMapSwizzle::B128,
        prefetch: TensorMapPrefetch::B128,
        oob_fill: OobFill::Zero,
        storage_ty: matrix.dtype.into(),
    };
    TensorMapBinding { binding: matrix.handle.clone().binding(), map }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_fit_the_memory_of_a_workgroup() {
        for columns in TILE_COLUMNS {
            let variant = Product {
                columns: columns as usize,
                is_bf16: true,
                is_right_along_depth: true,
                has_tail: true,
                has_addend: true,
                is_out_f32: true,
            };
            assert!(variant.stages() >= 4 && variant.shared_bytes() <= 227 << 10, "{variant:?}");
        }
    }
}
