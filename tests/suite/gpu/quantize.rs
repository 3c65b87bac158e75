//! Matrices in codes: against bitsandbytes and numpy, the kernels against the loops on the host, and the products that they are for.

use std::path::Path;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::Flex;
use half::f16;
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::lora_linear::{
    InputGrad, Lora, LoraGrads, LoraOutputGrad, lora_backward_a, lora_backward_b, lora_linear,
    lora_linear_backward, lora_rank_r,
};
use orpo_wgpu::ops::quantize::{BLOCK, DYNAMIC_LEVELS, NF4_LEVELS, Packed, Scales, Storage, Weight};

use super::on::{Gpu, adapter};
use super::tensors::values;
use crate::support::{Numbers, assert_close};

const FIXTURE: &str = "tests/fixtures/quantize/quantize.safetensors";
const CASES: [&str; 3] = ["usual", "outliers", "awkward"];

/// What `make_quantized.py` wrote; it is read by the library that made it, and not by this program's reader of models.
struct Fixture(Vec<u8>);

impl Fixture {
    fn open() -> Self {
        Self(std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(FIXTURE)).unwrap())
    }

    fn bytes(&self, name: &str) -> (Vec<usize>, Vec<u8>) {
        let file = safetensors::SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).unwrap();
        (view.shape().to_vec(), view.data().to_vec())
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.bytes(name).1.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn shape(&self, case: &str) -> [usize; 2] {
        self.bytes(&format!("{case}.values")).0.try_into().unwrap()
    }
}

fn vector<B: Backend>(values: &[f32], device: &B::Device) -> Tensor<B, 1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), (device, DType::F32))
}

/// Quantises values of a matrix; a dense one in `dtype` is what it is made for.
fn quantized<B: Kernels>(
    values: &[f32],
    shape: [usize; 2],
    storage: Storage,
    dtype: DType,
    device: &B::Device,
) -> Weight<B> {
    match storage {
        Storage::PackedF16 => {
            let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
            Weight::packed_f16(&halves, shape, device)
        }
        _ => Weight::quantize(shape, storage, dtype, |range| vector(&values[range], device)),
    }
}

fn packed<B: Backend>(weight: &Weight<B>) -> &Packed<B> {
    match weight {
        Weight::Packed(packed) => packed,
        Weight::Dense(_) => panic!("a weight in codes"),
    }
}

/// The codes one by one, without those that fill the last block.
fn codes<B: Backend>(weight: &Weight<B>) -> Vec<u32> {
    let packed = packed(weight);
    let n_bits = match packed.storage {
        Storage::Nf4 => 4,
        Storage::Int8 => 8,
        _ => 16,
    };
    let words = packed.codes.clone().into_data().to_vec::<u32>().unwrap();
    let all = words
        .into_iter()
        .flat_map(|word| (0..32 / n_bits).map(move |i| word >> (i * n_bits) & ((1 << n_bits) - 1)));
    all.take(packed.shape[0] * packed.shape[1]).collect()
}

/// Compares bit for bit.
#[track_caller]
fn assert_same(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: number of values");
    let differ = |i: &usize| got[*i].to_bits() != want[*i].to_bits();
    if let Some(first) = (0..got.len()).find(differ) {
        let n = (0..got.len()).filter(differ).count();
        panic!(
            "{what}: {n} of {} differ, the first at {first}: {} against {}",
            got.len(),
            got[first],
            want[first]
        );
    }
}

/// By how much a block's scale is off where it is added to the mean in one rounding more or less: the two may be large beside their sum.
fn scale_error<B: Backend>(weight: &Weight<B>) -> f32 {
    match &packed(weight).scales {
        Scales::Double { mean, .. } => f32::EPSILON * mean.abs(),
        _ => 0.0,
    }
}

/// Codes bit for bit, dense values within `rtol`: of a GPU, which may add and multiply in one rounding.
fn check_fixture<B: Kernels>(rtol: f32, device: &B::Device) {
    let fixture = Fixture::open();
    for case in CASES {
        let (values, shape) = (fixture.floats(&format!("{case}.values")), fixture.shape(case));
        for (name, storage, mask) in [("nf4", Storage::Nf4, 0xf), ("int8", Storage::Int8, 0xff)] {
            let weight = quantized::<B>(&values, shape, storage, DType::F32, device);
            let want = fixture.bytes(&format!("{case}.{name}.codes")).1;
            let want: Vec<u32> = want.into_iter().map(|code| u32::from(code) & mask).collect();
            assert!(codes(&weight) == want, "{case}: codes of {name}");
            let got = weight.to_dense().into_data().to_vec::<f32>().unwrap();
            let want = fixture.floats(&format!("{case}.{name}.values"));
            let what = format!("{case}: values of {name}");
            if rtol == 0.0 {
                assert_same(&got, &want, &what);
            }
            let atol = if rtol == 0.0 { 0.0 } else { scale_error(&weight) };
            assert_close(&got, &want, atol, rtol, &what);
        }
    }
}

#[test]
fn the_levels_are_those_of_bitsandbytes() {
    let fixture = Fixture::open();
    assert_same(&NF4_LEVELS, &fixture.floats("nf4_levels"), "levels of NF4");
    assert_same(&*DYNAMIC_LEVELS, &fixture.floats("dynamic_levels"), "levels of scales");
}

#[test]
fn the_host_quantises_as_bitsandbytes_and_numpy_do() {
    check_fixture::<Flex>(0.0, &Default::default());
}

#[test]
fn kernels_quantise_as_bitsandbytes_and_numpy_do() {
    if let Some(device) = adapter() {
        check_fixture::<Gpu>(5e-7, &device);
    }
}

const STORAGES: [Storage; 3] = [Storage::PackedF16, Storage::Int8, Storage::Nf4];

/// Rows and columns; the last is more than what is quantised at a time.
const SHAPES: [[usize; 2]; 6] = [[1, 1], [3, 7], [64, 64], [5, 130], [257, 192], [2049, 4099]];

#[test]
fn kernels_make_what_the_host_makes() {
    let Some(device) = adapter() else { return };
    for storage in STORAGES {
        for shape in SHAPES {
            let mut numbers = Numbers::new(7).vec(shape[0] * shape[1], 0.1);
            // The largest f16, subnormal ones, and zeros with both signs.
            let special = [65_504.0, -6e-8, 3e-5, 0.0, -0.0];
            numbers.iter_mut().zip(special).for_each(|(number, special)| *number = special);
            for dtype in [DType::F32, DType::F16] {
                if storage == Storage::PackedF16 && dtype == DType::F16 {
                    continue;
                }
                let ours = quantized::<Gpu>(&numbers, shape, storage, dtype, &device);
                let host = quantized::<Flex>(&numbers, shape, storage, dtype, &Default::default());
                assert!(codes(&ours) == codes(&host), "{storage:?} of {shape:?}: codes");
                let (got, want) = (ours.to_dense(), host.to_dense());
                assert_eq!((got.dtype(), got.dims()), (dtype, shape));
                let what = format!("{storage:?} of {shape:?} in {dtype:?}");
                // A rounding more or less; of f16, one in its last digit.
                let (atol, rtol) =
                    if dtype == DType::F16 { (6e-8, 1e-3) } else { (scale_error(&host), 5e-7) };
                assert_close(&values(got), &values(want), atol, rtol, &what);
            }
        }
    }
}

#[test]
fn what_is_not_finite_in_f16_stays_so() {
    let Some(device) = adapter() else { return };
    let halves = [f16::INFINITY, f16::NEG_INFINITY, f16::NAN, f16::MAX];
    let dense = values(Weight::<Gpu>::packed_f16(&halves, [2, 2], &device).to_dense());
    // Shaders may take any number for a finite one, but none of these for one of f16.
    assert!(!dense[..3].iter().any(|value| value.abs() <= 65_504.0), "{dense:?}");
    assert_eq!(dense[3], 65_504.0);
}

#[test]
fn a_matrix_takes_what_its_storage_says() {
    for storage in STORAGES {
        for [rows, columns] in &SHAPES[..5] {
            let n = rows * columns;
            let numbers = Numbers::new(3).vec(n, 1.0);
            let weight =
                quantized::<Flex>(&numbers, [*rows, *columns], storage, DType::F32, &Default::default());
            let packed = packed(&weight);
            let scales = match &packed.scales {
                Scales::None => 0,
                Scales::Single(scales) => scales.dims()[0],
                Scales::Double { codes, scales, .. } => codes.dims()[0] + scales.dims()[0],
            };
            assert_eq!(4 * (packed.codes.dims()[0] + scales), storage.bytes(n), "{storage:?} of {n} values");
        }
    }
    let bits = |storage: Storage| storage.bytes(1 << 24) as f64 * 8.0 / f64::from(1 << 24);
    assert_eq!((bits(Storage::Int8), bits(Storage::PackedF16)), (8.5, 16.0));
    assert!((bits(Storage::Nf4) - 4.127).abs() < 1e-3, "{}", bits(Storage::Nf4));
}

/// The error of a code is at most half a step of its block.
#[test]
fn values_come_back_within_half_a_step() {
    let n = 40 * BLOCK;
    let numbers = Numbers::new(11).vec(n, 3.0);
    let widest = NF4_LEVELS.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f32::max);
    for (storage, step) in [(Storage::Int8, 1.0 / 127.0), (Storage::Nf4, widest)] {
        let weight = quantized::<Flex>(&numbers, [40, BLOCK], storage, DType::F32, &Default::default());
        let dense = values(weight.to_dense());
        // NF4's scale is itself off by up to half a step of its own, which is 2 % of the largest.
        let slack = if storage == Storage::Nf4 { 0.06 } else { 1e-6 };
        for (got, want) in dense.chunks(BLOCK).zip(numbers.chunks(BLOCK)) {
            let most = want.iter().fold(0f32, |most, v| most.max(v.abs()));
            let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
            assert!(worst <= most * (step / 2.0 + slack), "{storage:?}: {worst} of {most}");
        }
    }
}

/// Output and every gradient of a layer over a weight in codes, against the same over its dense matrix on the CPU.
#[test]
fn products_go_through_the_same_weights_in_both_directions() {
    let Some(device) = adapter() else { return };
    for [tokens, n_in, n_out, rank] in [[33, 128, 192, 8], [7, 107, 65, 3]] {
        for storage in STORAGES {
            let numbers = Numbers::new(5).vec(n_out * n_in, 0.1);
            let ours = quantized::<Gpu>(&numbers, [n_out, n_in], storage, DType::F32, &device);
            let host = quantized::<Flex>(&numbers, [n_out, n_in], storage, DType::F32, &Default::default());
            let got = layer(&ours, [tokens, n_in, n_out, rank], &device);
            let dense = Weight::Dense(host.to_dense());
            let want = layer(&dense, [tokens, n_in, n_out, rank], &Default::default());
            for (i, name) in ["y", "dx", "da", "db"].iter().enumerate() {
                assert_close(&got[i], &want[i], 1e-5, 1e-4, &format!("{storage:?}: {name}"));
            }
        }
    }
}

fn layer<B: Kernels>(
    weight: &Weight<B>,
    [tokens, n_in, n_out, rank]: [usize; 4],
    device: &B::Device,
) -> [Vec<f32>; 4] {
    let mut numbers = Numbers::new(9);
    let mut matrix = |shape: [usize; 2]| {
        let data = TensorData::new(numbers.vec(shape[0] * shape[1], 1.0), shape);
        Tensor::<B, 2>::from_data(data, (device, DType::F32))
    };
    let (x, dy) = (matrix([tokens, n_in]), matrix([tokens, n_out]));
    let lora = Lora { a: matrix([rank, n_in]), b: matrix([n_out, rank]), scale: 0.5 };
    let s = lora_rank_r(x.clone(), &[&lora]).remove(0);
    let y = lora_linear(x.clone(), weight.to_dense(), Some((&lora, s.clone())), None);
    let layer = LoraOutputGrad { dy: dy.clone(), s, lora: &lora };
    let LoraGrads { ds, db } = lora_backward_b(&[layer]).remove(0);
    let da = lora_backward_a(x, std::slice::from_ref(&ds)).remove(0);
    let input = InputGrad::New(DType::F32);
    let dx = lora_linear_backward(dy, weight.to_dense(), Some((&lora, ds)), input);
    [y, dx, da, db].map(values)
}
