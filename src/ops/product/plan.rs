//! How a product is cut on a device: which block a workgroup computes, and in how many parts of the depth.

use burn::cubecl::client::ComputeClient;
use burn::tensor::DType;
use burn_wgpu::{WgpuDevice, WgpuRuntime};

use crate::ops::cube::{is_software, matrix_units};
use crate::ops::kernel::{
    BAND, Cut, DirectTile, Element, Elements, Layout, MAX_WORKGROUPS, MatrixTile, Tile,
};
use crate::ops::lanes::shuffling_lanes;

/// Cuts on matrices that are worth timing, and others.
const MOST_CUTS: [usize; 2] = [5, 4];

/// What a product is cut for.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Device {
    /// Lanes of a software adapter's subgroups, where these hand each other what they have read.
    direct_lanes: Option<u32>,
    /// How many workgroups keep it busy.
    pub(super) busy: u32,
    /// The size of its matrices of `f16` with `f32` sums, and the lanes of a subgroup.
    matrices: Option<[u32; 2]>,
    /// Bytes of workgroup memory.
    shared_bytes: u32,
}

const GPU: Device = Device { direct_lanes: None, busy: 128, matrices: None, shared_bytes: 16 << 10 };
const SOFTWARE: Device = Device { direct_lanes: Some(8), busy: 4, matrices: None, shared_bytes: 16 << 10 };

impl Device {
    pub(in crate::ops) fn of(client: &ComputeClient<WgpuRuntime>, device: &WgpuDevice) -> Self {
        let most_lanes = client.properties().hardware.plane_size_max;
        let direct_lanes = is_software(client).then(|| shuffling_lanes(client, device)).flatten();
        let device = if is_software(client) { SOFTWARE } else { GPU };
        let units = matrix_units(client, DType::F16);
        // naga 29's MSL turns row-major matrices round, and knows no sums of another type than the operands'.
        let size = MatrixTile::SIZES
            .into_iter()
            .find(|size| !cfg!(target_os = "macos") && units.contains(&[*size; 3]));
        let lanes = MatrixTile::LANES.into_iter().find(|&lanes| most_lanes <= lanes);
        let matrices = size.map(|size| [size, lanes.unwrap_or(MatrixTile::LANES[2])]);
        let shared_bytes = client.properties().hardware.max_shared_memory_size as u32;
        Self { direct_lanes, matrices, shared_bytes, ..device }
    }

    /// Of a product's cuts those that are worth timing: beside matrices, of a GPU's others the cheapest alone.
    pub(super) fn worth_timing(self, mut cuts: Vec<Cut>) -> Vec<Cut> {
        let n_matrices = cuts.iter().filter(|cut| matches!(cut, Cut::Matrices(_))).count();
        if n_matrices > 0 && self.direct_lanes.is_none() {
            cuts.truncate(n_matrices + 1);
        }
        cuts
    }

    /// Whether it multiplies matrices of `f16` with `f32` sums.
    pub(super) fn has_matrices(self) -> bool {
        self.matrices.is_some()
    }

    /// The time of a block, its operands' loads included, times the blocks, or the workgroups that would have been busy meanwhile.
    fn cost(self, cut: Cut, [m, n]: [u32; 2]) -> u64 {
        let [block_m, block_n, _] = cut.block();
        let blocks = (m.div_ceil(block_m) * n.div_ceil(block_n)).max(self.busy);
        let loads = match cut {
            Cut::Direct(tile) => 20 * tile.threads() * tile.loads(),
            _ => 8 * (block_m + block_n),
        };
        u64::from(blocks) * u64::from(block_m * block_n + loads)
    }

    /// The cuts for its threads.
    fn tiles(self) -> Vec<Cut> {
        match self.direct_lanes {
            Some(lanes) => DirectTile::all(lanes).map(Cut::Direct).to_vec(),
            None => Tile::ALL.map(Cut::Registers).to_vec(),
        }
    }

    /// The cuts that the device has for a product, the cheapest first; matrices, which are many times faster, before all others.
    /// They take `f16`; `rounds` says whether an `f32` that meets a weight in `f16` may be rounded to it.
    pub(in crate::ops) fn cuts(
        self,
        layout: Layout,
        elements: Elements,
        extents: [u32; 2],
        rounds: bool,
    ) -> Vec<Cut> {
        let is_f16 = elements.rhs == Element::F16 && (elements.lhs == Element::F16 || rounds);
        let fits = is_f16 && layout != Layout::ColumnsColumns;
        let matrices = self.matrices.filter(|_| fits).into_iter();
        let matrices = matrices.flat_map(|[size, lanes]| MatrixTile::all(size, lanes));
        let matrices = matrices.filter(|tile| tile.shared_bytes() <= self.shared_bytes);
        let mut matrices: Vec<_> = matrices.map(Cut::Matrices).collect();
        let mut tiles = self.tiles();
        for (cuts, most) in [&mut matrices, &mut tiles].into_iter().zip(MOST_CUTS) {
            cuts.retain(|&cut| blocks(cut, extents).iter().all(|&blocks| blocks <= MAX_WORKGROUPS));
            cuts.sort_by_key(|&cut| self.cost(cut, extents));
            cuts.truncate(most);
        }
        matrices.extend(tiles);
        matrices
    }
}

/// A product's workgroups in the first two dimensions of its dispatch: bands of blocks down m, each with all blocks along n.
pub(super) fn blocks(cut: Cut, [m, n]: [u32; 2]) -> [u32; 2] {
    let [block_m, block_n, _] = cut.block();
    [BAND * n.div_ceil(block_n), m.div_ceil(block_m).div_ceil(BAND)]
}

/// How the depth of a product is cut.
pub(super) struct Plan {
    /// Parts of the depth, each summed by workgroups of its own.
    pub(super) splits: u32,
    /// Entries of the depth in a part.
    pub(super) span: u32,
}

impl Plan {
    /// Cuts the depth when the blocks alone keep fewer than `busy` workgroups.
    pub(super) fn new(busy: u32, cut: Cut, [m, n, depth]: [u32; 3], has_prologue: bool) -> Self {
        let [block_m, block_n, block_k] = cut.block();
        // A part is worth a second launch when it is long, and a prologue belongs to one part only.
        let most = if has_prologue { 1 } else { (depth / (16 * block_k).max(128)).max(1) };
        let splits = busy.div_ceil(m.div_ceil(block_m) * n.div_ceil(block_n)).clamp(1, most);
        let span = depth.div_ceil(splits).next_multiple_of(block_k);
        Self { splits: depth.div_ceil(span), span }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPES: [[u32; 3]; 9] = [
        [1, 1, 1],
        [1, 4096, 4096],
        [7, 331, 107],
        [2048, 8, 4096],
        [8, 4096, 2048],
        [2048, 4096, 14336],
        [4096, 16, 2049],
        [100_000, 128_256, 17],
        [2048, 65_544, 17],
    ];

    /// Every cut of every device, and how many workgroups keep it busy.
    fn cuts() -> impl Iterator<Item = (u32, Cut)> {
        let matrices = MatrixTile::all(16, 32).map(|tile| (GPU.busy, Cut::Matrices(tile)));
        let tiles =
            [GPU, SOFTWARE].into_iter().flat_map(|d| d.tiles().into_iter().map(move |cut| (d.busy, cut)));
        tiles.chain(matrices)
    }

    #[test]
    fn the_parts_of_a_product_cover_its_depth_once() {
        for (busy, cut) in cuts() {
            for [m, n, depth] in SHAPES {
                let Plan { splits, span } = Plan::new(busy, cut, [m, n, depth], false);
                assert_eq!(span % cut.block()[2], 0, "{cut:?}: {m} x {n} x {depth}");
                assert!(
                    splits * span >= depth && (splits - 1) * span < depth,
                    "{cut:?}: {m} x {n} x {depth}: {splits} x {span}"
                );
                assert_eq!(Plan::new(busy, cut, [m, n, depth], true).splits, 1, "{m} x {n} x {depth}");
            }
        }
    }

    #[test]
    fn a_plan_stays_within_the_dispatch_limits() {
        let matrices = Some([16, 32]);
        let f16 = Elements { lhs: Element::F16, rhs: Element::F16, out: Element::F32 };
        for device in [GPU, SOFTWARE, Device { matrices, ..GPU }] {
            for [m, n, depth] in SHAPES {
                let cuts = device.cuts(Layout::RowsRows, f16, [m, n], false);
                assert!(!cuts.is_empty(), "{m} x {n} x {depth}");
                for cut in cuts {
                    let Plan { splits, .. } = Plan::new(device.busy, cut, [m, n, depth], false);
                    let [x, y] = blocks(cut, [m, n]);
                    let is_within = [x, y, splits].iter().all(|n| (1..=MAX_WORKGROUPS).contains(n));
                    assert!(is_within, "{cut:?}: {m} x {n} x {depth}: {x} x {y} x {splits}");
                }
            }
        }
    }

    #[test]
    fn matrices_are_for_f16_on_devices_that_have_them() {
        let device = Device { matrices: Some([16, 32]), ..GPU };
        let f16 = Elements { lhs: Element::F16, rhs: Element::F16, out: Element::F32 };
        let has_matrices = |device: Device, layout, elements| {
            let cuts = device.cuts(layout, elements, [2048, 4096], false);
            cuts.iter().any(|cut| matches!(cut, Cut::Matrices(_)))
        };
        assert!(has_matrices(device, Layout::RowsRows, f16));
        assert!(!has_matrices(device, Layout::ColumnsColumns, f16));
        assert!(!has_matrices(device, Layout::RowsRows, Elements { rhs: Element::F32, ..f16 }));
        assert!(!has_matrices(GPU, Layout::RowsRows, f16));
    }

    #[test]
    fn narrow_products_get_narrow_tiles_and_split_depths() {
        let cut = |extents| GPU.cuts(Layout::RowsRows, Elements::F32, extents, false)[0];
        let narrow = cut([2048, 8]);
        assert_eq!(narrow.block()[1], 8);
        assert_eq!(Plan::new(GPU.busy, narrow, [2048, 8, 4096], false).splits, 8);
        assert_eq!(cut([8, 4096]).block()[0], 8);
        assert_eq!(cut([2048, 4096]), Cut::Registers(Tile::ALL[0]));
        assert_eq!(cut([256, 1024]).block()[0], 32);

        let direct = |extents| SOFTWARE.cuts(Layout::RowsRows, Elements::F32, extents, false)[0];
        for (extents, i) in [([512, 1024], 0), ([512, 8], 3), ([8, 1024], 2), ([1, 4096], 4)] {
            assert_eq!(direct(extents), Cut::Direct(DirectTile::all(8)[i]), "{extents:?}");
        }
        let without_shuffles = Device { direct_lanes: None, ..SOFTWARE };
        let cuts = without_shuffles.cuts(Layout::RowsRows, Elements::F32, [512, 1024], false);
        assert!(cuts.iter().all(|cut| matches!(cut, Cut::Registers(_))), "{cuts:?}");
    }
}
