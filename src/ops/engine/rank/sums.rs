//! What partial sums come to: those of the splits of a depth, of slabs of rows, and of the parts of factors; of several products in one
//! launch, as each is small.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::Side;
use crate::ops::cube::{arrays, one_thread_each};

/// How the sums of a product lie, and its outputs. How often there is all of it follows from the number of sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Layout {
    /// `[splits, m, parts, outputs, r] -> outputs[i][m, r]`
    Tokens {
        /// Sums of one row.
        parts: usize,
    },
    /// `[splits, outputs, r, n] -> outputs[i]`, which lie as told.
    Ranks(Side),
}

/// The sums of one product.
#[derive(Clone)]
pub(super) struct Sums<R: CubeRuntime> {
    pub(super) terms: CubeTensor<R>,
    pub(super) layout: Layout,
    /// What the sum of them is multiplied by.
    pub(super) scale: f32,
    /// All of one shape.
    pub(super) outputs: Vec<CubeTensor<R>>,
}

/// Launches the sums of products of one device: as many of them at once as it binds buffers.
pub(super) fn launch<R: CubeRuntime>(sums: &[Sums<R>]) {
    let n_buffers = sums.iter().map(|sums| 1 + sums.outputs.len()).max().unwrap_or(1);
    // One is for the launch's sizes.
    let most = sums[0].terms.client.properties().hardware.max_bindings as usize - 1;
    sums.chunks((most / n_buffers).max(1)).for_each(launch_once);
}

fn launch_once<R: CubeRuntime>(sums: &[Sums<R>]) {
    let client = &sums[0].terms.client;
    let n_entries = |sums: &Sums<R>| sums.outputs.len() * sums.outputs[0].meta.num_elements();
    let (cubes, cube) = one_thread_each(client, sums.iter().map(n_entries).sum());
    let (mut of_products, mut outputs) = (SequenceArg::new(), SequenceArg::new());
    for Sums { terms, layout, scale, outputs: of_product } in sums {
        let shape = of_product[0].meta.shape();
        let (length, rank) = match layout {
            Layout::Tokens { .. } | Layout::Ranks(Side::Columns) => (shape[0], shape[1]),
            Layout::Ranks(Side::Rows) => (shape[1], shape[0]),
        };
        let parts = if let Layout::Tokens { parts } = layout { *parts } else { 1 };
        let splits = terms.meta.num_elements() / (parts * of_product.len() * length * rank);
        let terms = terms.clone().into_array_arg();
        of_products.push(TermsLaunch::new(terms, splits, length, rank, *scale, *layout));
        outputs.push(arrays(of_product));
    }
    #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
    // SAFETY: a product's entries are held against their number, and terms are counted.
    unsafe {
        sum_kernel::launch_unchecked::<R>(client, cubes, cube, of_products, outputs);
    }
}

/// What the outputs of one product are the sums of.
#[derive(CubeType, CubeLaunch)]
struct Terms {
    entries: Array<f32>,
    splits: usize,
    /// Tokens, or columns of the large matrix.
    length: usize,
    rank: usize,
    scale: f32,
    #[cube(comptime)]
    layout: Layout,
}

#[cube(launch_unchecked)]
fn sum_kernel(products: &Sequence<Terms>, outputs: &mut Sequence<Sequence<Array<f32>>>) {
    let mut first = 0usize;
    #[unroll]
    for i in 0..products.len() {
        let terms = products.index(i);
        let n_entries = outputs.index(i).len() * terms.rank * terms.length;
        if ABSOLUTE_POS >= first && ABSOLUTE_POS < first + n_entries {
            sum(terms, outputs.index_mut(i), ABSOLUTE_POS - first);
        }
        first += n_entries;
    }
}

/// Neighbours read neighbours.
#[cube]
fn sum(terms: &Terms, outputs: &mut Sequence<Array<f32>>, entry: usize) {
    let Terms { splits, length, rank, .. } = *terms;
    let ranks = outputs.len() * rank;
    let mut sum = 0.0f32;
    let (line, at) = match comptime!(terms.layout) {
        Layout::Tokens { parts } => {
            let (row, line) = (entry / ranks, entry % ranks);
            for split in 0..splits {
                #[unroll]
                for part in 0..parts {
                    sum += terms.entries[((split * length + row) * parts + part) * ranks + line];
                }
            }
            (line, row * rank + line % rank)
        }
        Layout::Ranks(side) => {
            let (line, column) = (entry / length, entry % length);
            for split in 0..splits {
                sum += terms.entries[(split * ranks + line) * length + column];
            }
            let at = match side {
                Side::Columns => column * rank + line % rank,
                Side::Rows => line % rank * length + column,
            };
            (line, at)
        }
    };
    #[unroll]
    for i in 0..outputs.len() {
        if line / rank == i {
            outputs.index_mut(i)[at] = sum * terms.scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Shape};
    use burn_wgpu::{WgpuDevice, WgpuRuntime};

    use super::*;
    use crate::ops::cube::empty;
    use crate::ops::engine::any_device::{device, random, values};

    const SCALE: f32 = 0.5;
    const SPLITS: usize = 2;
    const PARTS: usize = 3;

    /// The sums of a product, and what its outputs `[lines, length]` have to be.
    struct Case {
        sums: Sums<WgpuRuntime>,
        wanted: Vec<Vec<f32>>,
    }

    impl Case {
        fn new(layout: Layout, n_outputs: usize, [lines, length]: [usize; 2], device: &WgpuDevice) -> Self {
            let parts = if let Layout::Tokens { .. } = layout { PARTS } else { 1 };
            let (entries, terms) = random(length, [SPLITS * parts * n_outputs * lines, length], device);
            let output = || empty(&terms, Shape::from([lines, length]), DType::F32);
            let outputs = (0..n_outputs).map(|_| output()).collect();
            let of_entry = |i: usize, line: usize, at: usize| -> Vec<usize> {
                let term = |split: usize, part: usize| match layout {
                    Layout::Tokens { .. } => {
                        (((split * lines + line) * PARTS + part) * n_outputs + i) * length + at
                    }
                    Layout::Ranks(Side::Rows) => ((split * n_outputs + i) * lines + line) * length + at,
                    Layout::Ranks(Side::Columns) => ((split * n_outputs + i) * length + at) * lines + line,
                };
                (0..SPLITS)
                    .flat_map(|split| (0..parts).map(move |part| (split, part)))
                    .map(|(s, p)| term(s, p))
                    .collect()
            };
            let sum =
                |i, line, at| SCALE * of_entry(i, line, at).iter().map(|&term| entries[term]).sum::<f32>();
            let wanted =
                |i| (0..lines * length).map(|entry| sum(i, entry / length, entry % length)).collect();
            let wanted = (0..n_outputs).map(wanted).collect();
            Self { sums: Sums { terms, layout, scale: SCALE, outputs }, wanted }
        }
    }

    /// Of products whose entries end within a workgroup's: all in one launch, in as few as the device binds, and each in one.
    #[test]
    fn every_output_is_the_sum_of_all_its_terms() {
        let Some(device) = device() else { return };
        let cases = || {
            [
                Case::new(Layout::Tokens { parts: PARTS }, 3, [31, 4], &device),
                Case::new(Layout::Ranks(Side::Rows), 2, [4, 47], &device),
                Case::new(Layout::Ranks(Side::Columns), 1, [301, 5], &device),
            ]
        };
        for way in [launch_once, launch, |sums: &[Sums<_>]| sums.chunks(1).for_each(launch_once)] {
            let (sums, wanted): (Vec<_>, Vec<_>) =
                cases().into_iter().map(|Case { sums, wanted }| (sums, wanted)).unzip();
            way(&sums);
            for (sums, wanted) in sums.iter().zip(wanted) {
                for (i, (output, wanted)) in sums.outputs.iter().zip(wanted).enumerate() {
                    for (at, (got, want)) in values(output).into_iter().zip(wanted).enumerate() {
                        let what = format!("{:?}, output {i}, entry {at}", sums.layout);
                        assert!((got - want).abs() < 1e-4, "{what}: {got}, not {want}");
                    }
                }
            }
        }
    }
}
