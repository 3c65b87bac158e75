//! Products on whole warpgroups, as NVIDIA's compute capability 9.0 makes them: which can be made so, and in tiles of how many columns.

use burn::cubecl::client::ComputeClient;
use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::Engine;
use super::extended::{Pair, Place, is_turned};
use super::routes::RouteKind;
use crate::ops::tune::typical_rows;

/// Rows of a tile.
pub const TILE_ROWS: usize = 128;
/// Columns of the tiles that there are.
pub const TILE_COLUMNS: [u32; 3] = [256, 192, 128];
/// What the columns of a tile cost that is not there: what it takes to begin one and to write it out.
const COLUMNS_BESIDE: usize = 16;
/// A row of an operand is a multiple of so many entries: the copy engine takes 16 bytes at a time.
const ROW_ENTRIES: usize = 8;

/// `out = addend + left · right`, each of the operands with what it goes on with.
#[derive(Debug)]
pub struct WarpgroupProduct<'a, R: CubeRuntime> {
    /// `[m, depth]`
    pub left: &'a CubeTensor<R>,
    /// `[depth, n]`
    pub right: &'a CubeTensor<R>,
    /// `[m, tail]` and `[tail, n]`, which lie as the operands do.
    pub tails: Option<&'a [CubeTensor<R>; 2]>,
    /// `[m, n]`; may be the addend.
    pub out: &'a CubeTensor<R>,
    /// `[m, n]`, of the output's type.
    pub addend: Option<&'a CubeTensor<R>>,
}

/// Columns of the tiles in which a device may make this kind of product, the likely fastest first.
pub(super) fn columns<R: Engine>(client: &ComputeClient<R>, kind: RouteKind) -> Vec<u32> {
    let RouteKind { m, n, depth, dtype, out, .. } = kind;
    let fits = n.is_multiple_of(ROW_ENTRIES) && depth.is_multiple_of(ROW_ENTRIES);
    match R::warpgroup_processors(client) {
        Some(processors) if fits && [DType::F32, dtype].contains(&out) => {
            by_rounds(typical_rows(m), n, processors)
        }
        _ => Vec::new(),
    }
}

/// All processors make a tile each, and then the next: fewer rounds of smaller tiles are faster.
fn by_rounds(m: usize, n: usize, processors: usize) -> Vec<u32> {
    let mut columns = TILE_COLUMNS.to_vec();
    columns.sort_by_key(|&columns| {
        let columns = columns as usize;
        let tiles = m.div_ceil(TILE_ROWS) * n.div_ceil(columns);
        tiles.div_ceil(processors) * (columns + COLUMNS_BESIDE)
    });
    columns
}

/// Launches the product.
///
/// # Errors
/// If the copy engine cannot read an operand as it lies, or the device has no warpgroups.
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
    let [left_tail, right_tail] = [0, 1].map(|i| tails.map(|tails| &tails[i]));
    let lies_along_depth =
        |right: &CubeTensor<R>| is_turned(right) == is_turned(tails.map_or(right, |tails| &tails[1]));
    let lefts_lie =
        [Some(*left), left_tail].into_iter().flatten().all(|left| !is_turned(left) && has_rows(left));
    let rights_lie = [Some(*right), right_tail].into_iter().flatten().all(has_rows);
    if !lefts_lie || !rights_lie || !lies_along_depth(right) {
        return Err("an operand does not lie as the copy engine reads");
    }
    if [Some(out), addend].into_iter().flatten().any(|tensor| !tensor.is_contiguous()) {
        return Err("an output with gaps");
    }
    R::warpgroup_product(columns, &WarpgroupProduct { left, right, tails, out, addend })
}

/// Whether the copy engine can read a matrix: rows or columns without gaps in them, each beginning at a multiple of 16 bytes.
fn has_rows<R: CubeRuntime>(matrix: &CubeTensor<R>) -> bool {
    let [long, short] = [0, 1].map(|i| matrix.meta.strides()[if is_turned(matrix) { 1 - i } else { i }]);
    let begin = matrix.handle.offset_start.unwrap_or(0);
    short == 1 && long.is_multiple_of(ROW_ENTRIES) && begin.is_multiple_of(16)
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
            (6144, 4096, 256),  // 695, against 631 and 524
            (6144, 14336, 256), // 696, against 641 and 522
        ] {
            assert_eq!(by_rounds(m, n, 132)[0], fastest, "{m} x {n}");
        }
    }
}
