//! The products that `lora_linear` is made of, variant by variant, against `f64`.

use std::collections::BTreeSet;

use burn::cubecl::Runtime;
use burn::cubecl::features::MmaConfig;
use burn::cubecl::ir::{ElemType, FloatKind, StorageType};
use burn::tensor::{FloatDType, Tensor, TensorData, TensorPrimitive};
use burn_cubecl::tensor::CubeTensor;
use burn_wgpu::{Wgpu, WgpuDevice, WgpuRuntime};
use half::f16;
use orpo_wgpu::ops::engine::Engine as _;
use orpo_wgpu::ops::kernel::{
    self, BAND, Cut, DirectTile, Element, Elements, Layout, MatrixTile, Quads, Shader, Tile,
};

use crate::support::{Numbers, adapter, assert_close, has_matrices, left_out};

/// Sums of up to 331 products of numbers around one, in another order than the reference's.
pub(crate) const ATOL: f32 = 1e-5;
pub(crate) const RTOL: f32 = 1e-4;
/// The last bit of an f16, and its last of a number around zero.
pub(crate) const ATOL_F16: f32 = 1e-5;
pub(crate) const RTOL_F16: f32 = 1e-3;
/// A prologue's operands rounded to f16, as matrices take them, and sums that go out as f16.
pub(crate) const ATOL_MATRICES: f32 = 2e-3;
pub(crate) const RTOL_MATRICES: f32 = 2e-3;

/// One product of one variant, in two splits of the depth where its output is `f32`; with a prologue it is added to something, which of
/// an even number of columns is the output itself.
fn product(shader: Shader, [m, n, depth, rank]: [usize; 4], device: &WgpuDevice) -> (Vec<f32>, Vec<f32>) {
    let Shader::Product { layout, cut, elements, .. } = shader else { panic!("{shader:?} is no product") };
    let [block_m, block_n, block_k] = cut.block();
    let mut numbers = Numbers::new(11);
    let mut operand = |lines: usize, depth: usize, is_rows: bool, element: Element| {
        let mut values = numbers.vec(lines * depth, 1.0 / (depth as f32).sqrt());
        let shape = if is_rows { [lines, depth] } else { [depth, lines] };
        let mut tensor = Tensor::<Wgpu, 2>::from_data(TensorData::new(values.clone(), shape), device);
        if element == Element::F16 {
            values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32());
            tensor = tensor.cast(FloatDType::F16);
        }
        let at = move |line: usize, k: usize| {
            f64::from(if is_rows { values[line * depth + k] } else { values[k * lines + line] })
        };
        let TensorPrimitive::Float(primitive) = tensor.into_primitive() else { unreachable!() };
        (primitive, at)
    };
    let [lhs_rows, rhs_rows] = layout.are_rows();
    let (lhs, lhs_at) = operand(m, depth, lhs_rows, elements.lhs);
    let (rhs, rhs_at) = operand(n, depth, rhs_rows, elements.rhs);
    let (prologue_lhs, prologue_lhs_at) = operand(m, rank.max(1), lhs_rows, Element::F32);
    let (prologue_rhs, prologue_rhs_at) = operand(n, rank.max(1), rhs_rows, Element::F32);
    // As in the program, the right operand stands in the place of a prologue that is not there.
    let [prologue_lhs, prologue_rhs] =
        if rank > 0 { [prologue_lhs, prologue_rhs] } else { [rhs.clone(), rhs.clone()] };
    let (prologue_scale, scale) = (1.5f32, -0.75f32);
    // Parts of a product are f32, whatever their sum goes out as.
    let splits = if elements.out == Element::F16 { 1 } else { 2 };
    let span = depth.div_ceil(splits).next_multiple_of(block_k as usize);
    let has_addend = rank > 0;
    let (addend, addend_at) = operand(m, n, true, elements.out);
    let (is_over, n_beside) = (has_addend && n % 2 == 0, splits * m - m);
    let out = |rows: usize| {
        let out = Tensor::<Wgpu, 2>::full([rows, n], f32::NAN, device);
        if elements.out == Element::F16 { out.cast(FloatDType::F16) } else { out }
    };
    let out = match is_over {
        true => {
            let first = Tensor::from_primitive(TensorPrimitive::Float(addend.clone()));
            if n_beside > 0 { Tensor::cat(vec![first, out(n_beside)], 0) } else { first }
        }
        false => out(splits * m),
    };
    let out: CubeTensor<WgpuRuntime> = match out.into_primitive() {
        TensorPrimitive::Float(primitive) => primitive,
        TensorPrimitive::QFloat(_) => unreachable!(),
    };
    let added = if is_over { &out } else { &addend };
    let words = [m, n, depth, rank, span].map(|v| v as u32);
    let [p, s] = [prologue_scale, scale].map(f32::to_bits);
    kernel::launch(
        &lhs.client.clone(),
        shader,
        [BAND * (n as u32).div_ceil(block_n), (m as u32).div_ceil(block_m).div_ceil(BAND), splits as u32],
        &[&lhs.handle, &rhs.handle, &prologue_lhs.handle, &prologue_rhs.handle, &out.handle, &added.handle],
        &[words[0], words[1], words[2], words[3], words[4], p, s, u32::from(has_addend)],
    );
    let parts = Tensor::<Wgpu, 2>::from_primitive(TensorPrimitive::Float(out)).into_data();
    let parts: Vec<f32> = parts.convert::<f32>().to_vec().expect("the values are f32");
    let got = (0..m * n).map(|i| (0..splits).map(|z| parts[z * m * n + i]).sum()).collect();
    let entry = |i: usize| {
        let (row, column) = (i / n, i % n);
        let main: f64 = (0..depth).map(|k| lhs_at(row, k) * rhs_at(column, k)).sum();
        let prologue: f64 = (0..rank).map(|k| prologue_lhs_at(row, k) * prologue_rhs_at(column, k)).sum();
        let added = if has_addend { addend_at(row, column) } else { 0.0 };
        (added + f64::from(scale) * (main + f64::from(prologue_scale) * prologue)) as f32
    };
    (got, (0..m * n).map(entry).collect())
}

/// `[m, n, depth, rank]` of products about as large as a block, without a prologue and with one: of whole quads, and of others, by turns
/// in every buffer and in those along the columns. A step has 16 or 32 entries of the depth and of the rank.
fn extents(cut: Cut, turn: usize) -> [[[usize; 4]; 2]; 2] {
    let [m, n, _] = cut.block().map(|n| n as usize);
    let [more_m, depth] = [[3, 37], [4, 44]][turn % 2];
    [[[m + 4, n + 4, 44, 0], [m + 4, n + 4, 64, 40]], [0, 37].map(|rank| [m + more_m, n - 3, depth, rank])]
}

/// Those of software adapters for the lanes that the device's subgroups have, which are as many in each.
fn direct_cuts(device: &WgpuDevice) -> Vec<Cut> {
    let hardware = WgpuRuntime::client(device).properties().hardware.clone();
    if hardware.plane_size_min == hardware.plane_size_max {
        return DirectTile::all(hardware.plane_size_max).map(Cut::Direct).to_vec();
    }
    assert!(hardware.plane_size_max > 16, "a software adapter's subgroups are of one size");
    left_out("the products for software adapters take subgroups of one size alone");
    Vec::new()
}

/// A software adapter has its tiles by this. Lanes that are not there make no right answer, which is Mesa's doing: WGSL leaves it open.
#[test]
fn shuffles_are_tried() {
    let Some(device) = adapter() else { return };
    let client = WgpuRuntime::client(&device);
    let lanes = client.properties().hardware.plane_size_max;
    if lanes > 16 {
        left_out("only a software adapter's shuffles are tried");
        return;
    }
    assert!(WgpuRuntime::shuffles(&client, lanes));
    assert!(!WgpuRuntime::shuffles(&client, 2 * lanes));
}

/// A launch takes the variants that suit its device, so that a software adapter would never see those meant for GPUs.
#[test]
fn every_variant_multiplies() {
    let Some(device) = adapter() else { return };
    // What is read and written is one line of the source each, so that no tile has to meet every mix. Every other one is plain f32,
    // and the mixes' number is no divisor of the cuts', so that each layout pairs them otherwise.
    let mixes = Elements::all().flat_map(|elements| [Elements::F32, elements]).skip(1).collect::<Vec<_>>();
    let registers = Cut::all().into_iter().filter(|cut| matches!(cut, Cut::Registers(_)));
    let cuts: Vec<_> = registers.chain(direct_cuts(&device)).collect();
    assert_ne!(2 * cuts.len() % mixes.len(), 0, "every layout pairs mixes and cuts alike");
    let mut mixes = mixes.into_iter().cycle();
    for (i, layout) in Layout::ALL.into_iter().enumerate() {
        for (j, &cut) in cuts.iter().enumerate() {
            for pair in extents(cut, i + j) {
                let elements = mixes.next().expect("it goes round");
                for [m, n, depth, rank] in pair {
                    let quads = Quads::new(layout, [m, n, depth, rank].map(|n| n as u32));
                    let is_f16 = elements.out == Element::F16;
                    let (atol, rtol) = if is_f16 { (ATOL_F16, RTOL_F16) } else { (ATOL, RTOL) };
                    let shader = Shader::Product { layout, cut, elements, quads };
                    let (got, want) = product(shader, [m, n, depth, rank], &device);
                    assert_close(&got, &want, atol, rtol, &format!("{shader:?}, rank {rank}"));
                }
            }
        }
    }
}

/// One extent that is no multiple of four costs only the buffers whose lines it is.
#[test]
fn every_mix_of_quads_multiplies() {
    let Some(device) = adapter() else { return };
    let elements = Elements::F32;
    let cuts: Vec<_> = [Cut::Registers(Tile::ALL[2])]
        .into_iter()
        .chain(direct_cuts(&device).into_iter().skip(2).take(2))
        .collect();
    for (layout, cut) in Layout::ALL.into_iter().flat_map(|layout| cuts.iter().map(move |&cut| (layout, cut)))
    {
        for [m, n, depth] in (0..8).map(|i| [40 + i % 2, 68 + i / 2 % 2, 36 + i / 4]) {
            let ranks = if layout == Layout::ColumnsColumns { &[0][..] } else { &[0, 4, 5] };
            for &rank in ranks {
                let quads = Quads::new(layout, [m, n, depth, rank].map(|n| n as u32));
                assert!(
                    Quads::all(layout).contains(&quads),
                    "{layout:?}: {quads:?} is among those that are validated"
                );
                let shader = Shader::Product { layout, cut, elements, quads };
                let (got, want) = product(shader, [m, n, depth, rank], &device);
                assert_close(&got, &want, ATOL, RTOL, &format!("{shader:?}, rank {rank}"));
            }
        }
    }
    let all = |prologue| Quads {
        main_lhs: true,
        main_rhs: true,
        prologue_lhs: prologue,
        prologue_rhs: prologue,
        out: true,
    };
    assert_eq!(Quads::new(Layout::RowsRows, [41, 68, 36, 8]), all(true));
    assert_eq!(Quads::new(Layout::RowsRows, [41, 68, 36, 5]), all(false));
}

/// The matrix sizes that the device has, with f16 operands and f32 sums.
pub(crate) fn matrix_sizes<R: Runtime>(device: &R::Device) -> Vec<u32> {
    let [f16, f32] = [FloatKind::F16, FloatKind::F32].map(|kind| StorageType::from(ElemType::Float(kind)));
    let client = R::client(device);
    let shapes = &client.properties().features.matmul.cmma;
    let has = |shape: &MmaConfig, n| (shape.m, shape.n, shape.k) == (n, n, n);
    let fits = |shape: &MmaConfig| shape.a_type == f16 && shape.b_type == f16 && shape.cd_type == f32;
    let sizes = MatrixTile::SIZES.into_iter();
    sizes.filter(|&n| shapes.iter().any(|shape| fits(shape) && has(shape, n))).collect()
}

/// Only of sizes that the device lists: others run on some without complaint, and wrongly.
#[test]
fn every_matrix_variant_multiplies() {
    let Some(device) = adapter() else { return };
    let sizes = matrix_sizes::<WgpuRuntime>(&device);
    if !has_matrices(&sizes) {
        return;
    }
    for size in sizes {
        let hardware = WgpuRuntime::client(&device).properties().hardware.clone();
        let plane = hardware.plane_size_max;
        // With a quarter of a subgroup's lanes one subgroup has to take several patches; the program's tiles have all of them.
        let variants = [plane / 4, 8, 32, plane];
        let variants: BTreeSet<_> = variants.into_iter().filter(|lanes| *lanes > 1).collect();
        let layouts = [Layout::RowsRows, Layout::RowsColumns];
        let mut n_tried = 0;
        for (layout, lanes) in
            layouts.into_iter().flat_map(|layout| variants.iter().map(move |&lanes| (layout, lanes)))
        {
            // A software adapter's driver takes long over the larger ones, and has eight lanes.
            let n_tiles = if lanes == 8 || lanes == plane { usize::MAX } else { 1 };
            // Workgroups on matrices are whole subgroups.
            let fits = |tile: &MatrixTile| {
                tile.shared_bytes() as usize <= hardware.max_shared_memory_size
                    && tile.threads().is_multiple_of(plane)
            };
            let tiles: Vec<_> = MatrixTile::all(size, lanes).rev().filter(fits).take(n_tiles).collect();
            let Some(&first) = tiles.first() else { continue };
            n_tried += tiles.len();
            // Sums in `f16` would be off by a hundred times as much.
            let deep = [first.block_m as usize, first.block_n as usize, 2048, 0];
            let elements = Elements { lhs: Element::F16, rhs: Element::F16, out: Element::F32 };
            let quads = Quads::new(layout, deep.map(|n| n as u32));
            let shader = Shader::Product { layout, cut: Cut::Matrices(first), elements, quads };
            let (got, want) = product(shader, deep, &device);
            assert_close(&got, &want, ATOL, RTOL, &format!("{shader:?}, deep"));
            for (turn, tile) in tiles.into_iter().enumerate() {
                let [aligned, ragged] = extents(Cut::Matrices(tile), turn);
                // The gradient of what joins the stream is `f32`, in rows of whole quads.
                let [whole, rest] = match layout {
                    Layout::RowsColumns => [Element::F32, Element::F16],
                    _ => [Element::F16, Element::F32],
                };
                for (lhs, out, pair) in [(whole, rest, aligned), (rest, whole, ragged)] {
                    let elements = Elements { lhs, rhs: Element::F16, out };
                    for [m, n, depth, rank] in pair {
                        let quads = Quads::new(layout, [m, n, depth, rank].map(|n| n as u32));
                        let shader = Shader::Product { layout, cut: Cut::Matrices(tile), elements, quads };
                        let (got, want) = product(shader, [m, n, depth, rank], &device);
                        let what = format!("{shader:?}, rank {rank}");
                        assert_close(&got, &want, ATOL_MATRICES, RTOL_MATRICES, &what);
                    }
                }
            }
        }
        assert!(n_tried > 0, "no tile of matrices of {size} x {size} fits the device");
    }
}
