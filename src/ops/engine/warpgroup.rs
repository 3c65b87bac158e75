//! Products on whole warpgroups, as NVIDIA's compute capability 9.0 makes them: which can be made so, in tiles of how many columns, and in
//! how many parts of the depth.

use burn::cubecl::client::ComputeClient;
use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::Engine;
use super::extended::{Pair, Place, is_turned};
use super::product::has_matrices;
use super::routes::{Route, RouteKind, Routes};
use crate::ops::tune;

/// Rows of a tile.
pub const TILE_ROWS: usize = 128;
/// Entries of the depth in a stage.
pub const TILE_DEPTH: usize = 64;
/// Columns of the tiles that there are.
pub const TILE_COLUMNS: [u32; 3] = [256, 192, 128];
/// What the columns of a tile cost that is not there: what it takes to begin one and to write it out.
const COLUMNS_BESIDE: usize = 16;
/// A row of an operand is a multiple of so many entries: the copy engine takes 16 bytes at a time.
pub(super) const ROW_ENTRIES: usize = 8;

/// `out = addend + left · right`, each of the operands with what it goes on with.
#[derive(Debug)]
pub struct WarpgroupProduct<'a, R: CubeRuntime> {
    /// `[m, depth]`
    pub left: &'a CubeTensor<R>,
    /// `[depth, n]`
    pub right: &'a CubeTensor<R>,
    /// `[m, tail]` and `[tail, n]`, which lie as the operands do.
    pub tails: Option<&'a [CubeTensor<R>; 2]>,
    /// `[m, n]`; may be the addend. Of more than one split `[splits · m, n]`.
    pub out: &'a CubeTensor<R>,
    /// `[m, n]`, of the output's type.
    pub addend: Option<&'a CubeTensor<R>>,
    /// Parts of the depth that are summed each on its own. None may be without a stage.
    pub splits: usize,
}

/// Whether the copy engine can read a matrix: rows or columns without gaps in them, each beginning at a multiple of 16 bytes.
pub(in crate::ops) fn has_rows<R: CubeRuntime>(matrix: &CubeTensor<R>) -> bool {
    let [long, short] = [0, 1].map(|i| matrix.meta.strides()[if is_turned(matrix) { 1 - i } else { i }]);
    let begin = matrix.handle.offset_start.unwrap_or(0);
    short == 1 && long.is_multiple_of(ROW_ENTRIES) && begin.is_multiple_of(16)
}

/// Whether the device has warpgroups that multiply this type, and may use them.
pub(super) fn are_there<R: Engine>(client: &ComputeClient<R>, dtype: DType) -> bool {
    R::warpgroup_processors(client).is_some() && has_matrices(client, dtype)
}

/// Columns of the tiles in which a device makes this kind of product of `m` rows; none where it has to be made otherwise.
pub(super) fn columns<R: Engine>(client: &ComputeClient<R>, kind: RouteKind, m: usize) -> Option<u32> {
    let RouteKind { n, depth, dtype, out, .. } = kind;
    let has_rows = n.is_multiple_of(ROW_ENTRIES) && depth.is_multiple_of(ROW_ENTRIES);
    let is_taken = are_there(client, dtype) && has_rows && [DType::F32, dtype].contains(&out);
    let processors = R::warpgroup_processors(client)?;
    is_taken.then(|| fastest_columns(m, n, processors))
}

/// Whether tiles of so many columns make this kind of product right; tried once a process.
///
/// # Panics
/// If the device failed before.
pub(super) fn comes_out_right<R: Engine>(device: &R::Device, kind: RouteKind, columns: u32) -> bool {
    tune::comes_out_right::<Routes<R>>(device, kind.sample_of_many_tiles(), Route::Warpgroups { columns })
}

/// Of the tiles' columns those with which a product `[m, n]` is fastest. All processors make a tile each, and then the next: fewer
/// rounds, or as many of smaller tiles, take less time.
fn fastest_columns(m: usize, n: usize, processors: usize) -> u32 {
    let time = |columns: u32| {
        let tiles = m.div_ceil(TILE_ROWS) * n.div_ceil(columns as usize);
        tiles.div_ceil(processors) * (columns as usize + COLUMNS_BESIDE)
    };
    TILE_COLUMNS.into_iter().min_by_key(|&columns| time(columns)).unwrap_or(TILE_COLUMNS[0])
}

/// Launches the product in tiles of so many columns.
///
/// # Errors
/// If the device cannot, or the operands do not lie as it reads them.
pub(super) fn launch<R: Engine>(
    columns: u32,
    Pair { frozen: [left, right], tails }: &Pair<'_, R>,
    place: &Place<'_, R>,
) -> Result<(), &'static str> {
    let (out, addend) = match *place {
        Place::New { out, addend } => (out, addend),
        Place::Over(addend) => (addend, Some(addend)),
    };
    let tails = tails.as_ref();
    R::warpgroup_product(columns, &WarpgroupProduct { left, right, tails, out, addend, splits: 1 })
}

/// In how many parts of the depth a product keeps the device busy whose tiles of these columns are few.
pub(super) fn splits<R: Engine>(client: &ComputeClient<R>, [m, n, depth]: [usize; 3], columns: u32) -> usize {
    let tiles = m.div_ceil(TILE_ROWS) * n.div_ceil(columns as usize);
    splits_of(R::warpgroup_processors(client).unwrap_or(1), tiles, depth.div_ceil(TILE_DEPTH))
}

fn splits_of(processors: usize, tiles: usize, stages: usize) -> usize {
    let splits = (processors / tiles).clamp(1, stages);
    stages.div_ceil(stages.div_ceil(splits))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was the fastest on an H100, of 132 processors: TFLOP/s by columns.
    #[test]
    fn rounds_tell_the_fastest_tile() {
        for (m, n, fastest) in [
            (1536, 4096, 192),  // 581, against 500 of 256 columns and 564 of 128
            (1536, 1024, 128),  // 415, against 262 and 318
            (1536, 14336, 192), // 681, against 625 and 549
            (1537, 4096, 256),  // 496, against 412 and 363
            (6144, 4096, 256),  // 695, against 631 and 524
            (6144, 14336, 256), // 696, against 641 and 522
        ] {
            assert_eq!(fastest_columns(m, n, 132), fastest, "{m} x {n}");
        }
    }

    #[test]
    fn no_split_is_without_a_stage() {
        for stages in 1..300usize {
            for tiles in 1..140 {
                let splits = splits_of(132, tiles, stages);
                // As the kernel has it.
                let stages_of_split = stages.div_ceil(splits);
                assert!((splits - 1) * stages_of_split < stages, "{stages} stages in {splits} splits");
                assert!(splits * tiles <= 132.max(tiles), "{tiles} tiles in {splits} splits");
            }
        }
    }
}
