//! What partial sums come to: those of the splits of a depth, of slabs of rows, and of the parts of factors; of several products in one
//! launch, as each is small.

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::Side;
use crate::ops::cube::{arrays, one_thread_each};

/// How the sums of a product lie, and its outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Layout {
    /// `[splits, m, parts, outputs, r] -> outputs[i][m, r]`
    Tokens {
        /// Sums of one row.
        parts: usize,
    },
    /// `[terms, outputs, r, n] -> outputs[i]`, which lie as told.
    Ranks(Side),
}

/// The sums of one product.
#[derive(Clone)]
pub(super) struct Sums<R: CubeRuntime> {
    pub(super) terms: CubeTensor<R>,
    /// How many there are of each entry, but for the parts of a row.
    pub(super) n_terms: usize,
    pub(super) layout: Layout,
    /// What the sum of them is multiplied by.
    pub(super) factor: f32,
    /// All of one shape.
    pub(super) outputs: Vec<CubeTensor<R>>,
}

/// Launches the sums of products of one device: as many of them at once as it binds buffers.
pub(super) fn launch<R: CubeRuntime>(sums: &[Sums<R>]) {
    let n_buffers = sums.iter().map(|sums| 1 + sums.outputs.len()).max().unwrap_or(1);
    let most = sums[0].terms.client.properties().hardware.max_bindings as usize / n_buffers;
    sums.chunks(most.max(1)).for_each(launch_once);
}

fn launch_once<R: CubeRuntime>(sums: &[Sums<R>]) {
    let client = &sums[0].terms.client;
    let n_entries = |sums: &Sums<R>| sums.outputs.len() * sums.outputs[0].meta.num_elements();
    let (cubes, cube) = one_thread_each(client, sums.iter().map(n_entries).sum());
    let (mut of_products, mut outputs) = (SequenceArg::new(), SequenceArg::new());
    for Sums { terms, n_terms, layout, factor, outputs: of_product } in sums {
        let shape = of_product[0].meta.shape();
        let (length, rank) = match layout {
            Layout::Tokens { .. } | Layout::Ranks(Side::Columns) => (shape[0], shape[1]),
            Layout::Ranks(Side::Rows) => (shape[1], shape[0]),
        };
        let terms = terms.clone().into_array_arg();
        of_products.push(TermsLaunch::new(terms, *n_terms, length, rank, *factor, *layout));
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
    n_terms: usize,
    /// Tokens, or columns of the large matrix.
    length: usize,
    rank: usize,
    factor: f32,
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
    let Terms { n_terms, length, rank, .. } = *terms;
    let ranks = outputs.len() * rank;
    let mut sum = 0.0f32;
    let (line, at) = match comptime!(terms.layout) {
        Layout::Tokens { parts } => {
            let (row, line) = (entry / ranks, entry % ranks);
            for term in 0..n_terms {
                #[unroll]
                for part in 0..parts {
                    sum += terms.entries[((term * length + row) * parts + part) * ranks + line];
                }
            }
            (line, row * rank + line % rank)
        }
        Layout::Ranks(side) => {
            let (line, column) = (entry / length, entry % length);
            for term in 0..n_terms {
                sum += terms.entries[(term * ranks + line) * length + column];
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
            outputs.index_mut(i)[at] = sum * terms.factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Shape};
    use burn_wgpu::WgpuDevice;

    use super::*;
    use crate::ops::cube::empty;
    use crate::ops::engine::any_device::{device, random, values};

    const FACTOR: f32 = 0.5;

    /// A product's sums, and what its outputs have to be.
    struct Case {
        sums: Sums<burn_wgpu::WgpuRuntime>,
        wanted: Vec<Vec<f32>>,
    }

    /// `of_entry(entries, output, entry of it)` gives the terms of a sum.
    fn case(
        [rows, columns]: [usize; 2],
        n_terms: usize,
        layout: Layout,
        [n_outputs, lines, length]: [usize; 3],
        of_entry: impl Fn(usize, usize) -> Vec<usize>,
        device: &WgpuDevice,
    ) -> Case {
        let (entries, terms) = random(rows, [rows, columns], device);
        let outputs =
            (0..n_outputs).map(|_| empty(&terms, Shape::from([lines, length]), DType::F32)).collect();
        let sum =
            |i: usize, at: usize| FACTOR * of_entry(i, at).iter().map(|&term| entries[term]).sum::<f32>();
        let wanted = |i: usize| (0..lines * length).map(|at| sum(i, at)).collect();
        let wanted = (0..n_outputs).map(wanted).collect();
        Case { sums: Sums { terms, n_terms, layout, factor: FACTOR, outputs }, wanted }
    }

    #[test]
    fn every_output_is_the_sum_of_all_its_terms() {
        let Some(device) = device() else { return };
        let (m, n, rank, n_terms, parts) = (5, 7, 4, 2, 3);
        let tokens = |i: usize, at: usize| {
            let (row, k) = (at / rank, at % rank);
            let line = |term: usize, part: usize| ((term * m + row) * parts + part) * 3 * rank + i * rank + k;
            (0..n_terms).flat_map(|term| (0..parts).map(move |part| line(term, part))).collect()
        };
        let ranks = |n_outputs: usize, side: Side| {
            move |i: usize, at: usize| {
                let (k, column) = if side == Side::Rows { (at / n, at % n) } else { (at % rank, at / rank) };
                (0..n_terms).map(|term| ((term * n_outputs + i) * rank + k) * n + column).collect()
            }
        };
        let cases = [
            case(
                [n_terms * m, parts * 3 * rank],
                n_terms,
                Layout::Tokens { parts },
                [3, m, rank],
                tokens,
                &device,
            ),
            case(
                [n_terms * 2 * rank, n],
                n_terms,
                Layout::Ranks(Side::Rows),
                [2, rank, n],
                ranks(2, Side::Rows),
                &device,
            ),
            case(
                [n_terms * rank, n],
                n_terms,
                Layout::Ranks(Side::Columns),
                [1, n, rank],
                ranks(1, Side::Columns),
                &device,
            ),
        ];
        let (sums, wanted): (Vec<_>, Vec<_>) = cases.into_iter().map(|case| (case.sums, case.wanted)).unzip();
        launch(&sums);
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
