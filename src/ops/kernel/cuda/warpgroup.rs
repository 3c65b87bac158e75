//! `lora_linear_warpgroup.cu`

use burn::cubecl::cuda::CudaRuntime;
use burn::cubecl::prelude::*;
use burn::cubecl::server::{TensorMapBinding, TensorMapMeta};
use burn::cubecl::zspace::metadata::Metadata;
use burn::cubecl::zspace::strides;
use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;

use super::{Variant, flag};
use crate::ops::engine::{TILE_DEPTH, TILE_ROWS, WarpgroupProduct, is_turned, turned};

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
/// Operands and output have to lie as the caller in `engine/warpgroup.rs` has made sure of.
pub(in crate::ops) fn launch(columns: u32, processors: usize, product: &WarpgroupProduct<'_, CudaRuntime>) {
    let WarpgroupProduct { left, right, tails, out, addend, splits } = *product;
    let ([m, depth], [_, n]) = ([0, 1].map(|i| left.meta.shape()[i]), [0, 1].map(|i| right.meta.shape()[i]));
    let columns = columns as usize;
    let variant = Product {
        columns,
        is_bf16: right.dtype == DType::BF16,
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
    let buffers: Vec<_> = [Some(out), addend].into_iter().flatten().collect();
    let tail = tails.map_or(0, |[left, _]| left.meta.shape()[1]);
    let extents = [m, n, depth.div_ceil(TILE_DEPTH), tail.div_ceil(TILE_DEPTH), splits];
    let tiles = m.div_ceil(TILE_ROWS) * n.div_ceil(columns) * splits;
    let extents = extents.map(|extent| extent as u64).to_vec();
    super::launch(variant, [tiles.min(processors), 1], maps, &buffers, extents);
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
    use crate::ops::engine::TILE_COLUMNS;

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
