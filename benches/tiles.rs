//! The `tiles` group of the ops' bench: every tile on matrices that the device has, of which a program that trains times the few that
//! it takes for the fastest.

use burn::cubecl::Runtime;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Distribution, FloatDType, Tensor, TensorPrimitive};
use burn_cubecl::tensor::CubeTensor;
use burn_wgpu::{Wgpu, WgpuDevice, WgpuRuntime};
use orpo_wgpu::ops::kernel::{BAND, Cut, Element, Elements, Layout, MatrixTile, Quads, Shader, launch};
use orpo_wgpu::ops::matrix_units_are_off;

use super::{RUNS, WARM_UPS, median, time};

/// Launches that are timed together: one is short beside a wait for the device.
const LAUNCHES: usize = 8;
/// Tokens, columns and depth, and the rank of the prologue: `gate_proj` of Llama-3-8B, and a linear that a software adapter is done with.
const ON_A_GPU: [usize; 4] = [1534, 14336, 4096, 8];
const ON_SOFTWARE: [usize; 4] = [128, 256, 256, 8];

fn random(shape: [usize; 2], dtype: FloatDType, device: &WgpuDevice) -> CubeTensor<WgpuRuntime> {
    let tensor = Tensor::<Wgpu, 2>::random(shape, Distribution::Normal(0.0, 1.0), device).cast(dtype);
    match tensor.into_primitive() {
        TensorPrimitive::Float(primitive) => primitive,
        TensorPrimitive::QFloat(_) => unreachable!("what was cast to a float"),
    }
}

pub(super) fn bench_tiles(device: &WgpuDevice, is_software: bool) {
    let client = WgpuRuntime::client(device);
    let hardware = &client.properties().hardware;
    let lanes = MatrixTile::LANES.into_iter().find(|&lanes| hardware.plane_size_max <= lanes);
    let [f16, f32] = [DType::F16, DType::F32].map(Into::into);
    let shapes = client.properties().features.matmul.cmma.iter();
    let shapes: Vec<_> = shapes
        .filter(|shape| (shape.a_type, shape.b_type, shape.cd_type) == (f16, f16, f32))
        .map(|shape| [shape.m, shape.n, shape.k])
        .collect();
    let sizes: Vec<_> = MatrixTile::SIZES.into_iter().filter(|&size| shapes.contains(&[size; 3])).collect();
    // As in the program: naga's Metal turns row-major matrices round, and the variable is for a driver that does not survive them.
    if sizes.is_empty() || cfg!(target_os = "macos") || matrix_units_are_off() {
        println!(
            "tiles: left out, as the device lists no square matrices of f16 with sums in f32, or they may not be used"
        );
        return;
    }
    let [tokens, n_out, n_in, rank] = if is_software { ON_SOFTWARE } else { ON_A_GPU };
    for layout in [Layout::RowsRows, Layout::RowsColumns] {
        let [m, n, depth] =
            if layout == Layout::RowsRows { [tokens, n_out, n_in] } else { [tokens, n_in, n_out] };
        let tensor = |rows: usize, columns: usize, dtype| random([rows, columns], dtype, device);
        let [lhs, rhs, out] = [(m, depth), (n_out, n_in), (m, n)].map(|(r, c)| tensor(r, c, FloatDType::F16));
        let prologue_rhs = if layout == Layout::RowsRows { [n, rank] } else { [rank, n] };
        let prologue = [[m, rank], prologue_rhs].map(|[r, c]| tensor(r, c, FloatDType::F32));
        let words = [m, n, depth, rank].map(|extent| extent as u32);
        let elements = Elements { lhs: Element::F16, rhs: Element::F16, out: Element::F16 };
        for tile in
            sizes.iter().flat_map(|&size| MatrixTile::all(size, lanes.unwrap_or(MatrixTile::LANES[2])))
        {
            let MatrixTile { size, block_m, block_n, block_k, patch_m, patch_n, .. } = tile;
            let what = format!(
                "tiles {layout:?} {m} x {n} x {depth}: {block_m} x {block_n} x {block_k}, a subgroup's {patch_m} x {patch_n}, \
                 matrices of {size}"
            );
            if tile.shared_bytes() as usize > hardware.max_shared_memory_size {
                println!("{what}: left out, as it takes {} bytes of workgroup memory", tile.shared_bytes());
                continue;
            }
            let shader = Shader::Product {
                layout,
                cut: Cut::Matrices(tile),
                elements,
                quads: Quads::new(layout, words),
            };
            let workgroups =
                [BAND * words[1].div_ceil(block_n), words[0].div_ceil(block_m).div_ceil(BAND), 1];
            let buffers = [&lhs, &rhs, &prologue[0], &prologue[1], &out, &out].map(|tensor| &tensor.handle);
            let span = words[2].next_multiple_of(block_k);
            let [one, none] = [1f32.to_bits(), 0];
            let params = [words[0], words[1], words[2], words[3], span, one, one, none];
            let run = || {
                for _ in 0..LAUNCHES {
                    launch(&client, shader, workgroups, &buffers, &params);
                }
            };
            let mut times = (0..WARM_UPS + RUNS).map(|_| time(device, run).1).collect();
            let ms = median(&mut times) / LAUNCHES as f64;
            let flops = 2.0 * (m * n * (depth + rank)) as f64;
            println!("{what}: {ms:8.3} ms, {:8.3} TFLOP/s", flops / ms / 1e9);
        }
    }
    <Wgpu as Backend>::memory_cleanup(device);
}
