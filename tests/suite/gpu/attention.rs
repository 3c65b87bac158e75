//! `attention` on a GPU against the reference on the CPU under burn's autodiff: the output, the log-sum-exp and every gradient.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData, TensorPrimitive};
use burn_autodiff::Autodiff;
use burn_flex::Flex;
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::attention::trial::{self, Pass};
use orpo_wgpu::ops::attention::{
    AdditiveMask, AttentionMask, AttentionOutput, Tile, Visible, attention, attention_backward,
    attention_reference, launch,
};
use orpo_wgpu::ops::engine::Engine as _;
use orpo_wgpu::ops::notes;

use super::on::{BURNS_ERROR, Gpu, GpuDevice, GpuRuntime, adapter, stored_types};
use crate::gpu::product::matrix_sizes;
use crate::support::{Numbers, assert_close, has_matrices, left_out_without_matrices};

/// Sums of up to some hundred products of numbers around one, in another order than the reference's.
const ATOL: f32 = 1e-5;
const RTOL: f32 = 1e-4;

#[derive(Debug, Clone)]
struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    visible: Vec<Visible>,
    /// Of the queries; scores grow with it.
    size: f32,
    /// Of all tensors.
    dtype: DType,
}

impl Case {
    fn new(heads: usize, kv_heads: usize, head_dim: usize, visible: Vec<Visible>) -> Self {
        Self { heads, kv_heads, head_dim, visible, size: 1.0, dtype: DType::F32 }
    }

    fn stored(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    fn n_keys(&self) -> usize {
        self.visible.iter().map(|v| v.end).max().unwrap() as usize
    }
}

/// The rows of one sequence after `n_cached` cached ones.
fn causal(n_cached: u32, n_new: u32) -> Vec<Visible> {
    let row = |i| Visible { first: 0, prefix_end: 0, own_start: 0, end: n_cached + i + 1 };
    (0..n_new).map(row).collect()
}

/// The rows of pairs of a prefix and two answers, given by their lengths.
fn pairs(lengths: &[[u32; 3]]) -> Vec<Visible> {
    let mut rows = Vec::new();
    let mut first = 0;
    for &[prefix, chosen, rejected] in lengths {
        let prefix_end = first + prefix;
        let parts = [
            (first, prefix, first),
            (prefix_end, chosen, prefix_end),
            (prefix_end + chosen, rejected, prefix_end),
        ];
        for (own_start, len, prefix_end) in parts {
            rows.extend((own_start..own_start + len).map(|i| Visible {
                first,
                prefix_end,
                own_start,
                end: i + 1,
            }));
        }
        first += prefix + chosen + rejected;
    }
    rows
}

/// `q`, `k`, `v` and the gradient of `out`, by numbers that the case's type has exactly.
struct Inputs {
    q: (Vec<f32>, [usize; 3]),
    k: (Vec<f32>, [usize; 3]),
    v: (Vec<f32>, [usize; 3]),
    dout: (Vec<f32>, [usize; 2]),
}

impl Inputs {
    fn new(case: &Case) -> Self {
        let mut numbers = Numbers::new(5);
        let mut vec = |len, size| {
            let values = numbers.vec(len, size);
            let round = |v: f32| match case.dtype {
                DType::F16 => half::f16::from_f32(v).to_f32(),
                DType::BF16 => half::bf16::from_f32(v).to_f32(),
                _ => v,
            };
            values.into_iter().map(round).collect::<Vec<_>>()
        };
        let (n, n_keys) = (case.visible.len(), case.n_keys());
        let (heads, kv_heads, head_dim) = (case.heads, case.kv_heads, case.head_dim);
        Self {
            q: (vec(n * heads * head_dim, case.size), [n, heads, head_dim]),
            k: (vec(n_keys * kv_heads * head_dim, 1.0), [n_keys, kv_heads, head_dim]),
            v: (vec(n_keys * kv_heads * head_dim, 1.0), [n_keys, kv_heads, head_dim]),
            dout: (vec(n * heads * head_dim, 1.0), [n, heads * head_dim]),
        }
    }
}

fn tensor<B: Backend, const D: usize>(
    (values, shape): &(Vec<f32>, [usize; D]),
    device: &B::Device,
) -> Tensor<B, D> {
    Tensor::from_data(TensorData::new(values.clone(), *shape), device)
}

fn values<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().to_vec().expect("the values are f32")
}

#[derive(Debug, PartialEq)]
struct Outcome {
    out: Vec<f32>,
    lse: Vec<f32>,
    grads: [Vec<f32>; 3],
}

/// How the kernels cut their work: the tile, and the splits of the walks over the queries.
type Cut = (Tile, usize);

/// Forward and backward of the op; of the kernels cut so, where that is given.
fn run(case: &Case, cut: Option<Cut>, device: &GpuDevice) -> Outcome {
    let inputs = Inputs::new(case);
    let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(|t| tensor::<Gpu, 3>(t, device).cast(case.dtype));
    let dout = tensor::<Gpu, 2>(&inputs.dout, device).cast(case.dtype);
    let mask = AttentionMask::new(case.visible.clone(), device);
    let (output, grads) = match cut {
        None => {
            let output = attention(q.clone(), k.clone(), v.clone(), &mask);
            (output.clone(), attention_backward(dout, q, k, v, output, &mask))
        }
        Some((tile, splits)) => {
            let mask = mask.launch_mask::<GpuRuntime>();
            let qkv = [q, k, v].map(|t| t.into_primitive().tensor());
            let (out, lse) = launch::attention_forward(qkv.clone(), &mask, tile);
            let dout = dout.into_primitive().tensor();
            let saved = [out.clone(), lse.clone()];
            let grads = launch::attention_backward(dout, qkv, saved, &mask, tile, splits);
            let [out, lse] = [out, lse].map(|t| Tensor::from_primitive(TensorPrimitive::Float(t)));
            (AttentionOutput { out, lse }, grads.map(|t| Tensor::from_primitive(TensorPrimitive::Float(t))))
        }
    };
    Outcome { out: values(output.out), lse: values(output.lse), grads: grads.map(values) }
}

/// The same by burn's autodiff through the reference, and the log-sum-exp by loops.
fn run_reference(case: &Case) -> Outcome {
    type B = Autodiff<Flex>;
    let inputs = Inputs::new(case);
    let device = Default::default();
    let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(|t| tensor::<B, 3>(t, &device).require_grad());
    let out =
        attention_reference(q.clone(), k.clone(), v.clone(), &AdditiveMask::new(&case.visible, &q.device()));
    let grads = (out.clone() * tensor::<B, 2>(&inputs.dout, &device)).sum().backward();
    let lse = (0..case.visible.len() * case.heads).map(|i| {
        let scores = Scores::new(case, &inputs, i / case.heads, i % case.heads);
        scores.lse as f32
    });
    Outcome {
        lse: lse.collect(),
        out: values(out.inner()),
        grads: [q, k, v].map(|t| values(t.grad(&grads).expect("every input has a gradient"))),
    }
}

/// One row's scores in `f64`, by visible key.
struct Scores {
    scores: Vec<(usize, f64)>,
    lse: f64,
}

impl Scores {
    fn new(case: &Case, inputs: &Inputs, query: usize, head: usize) -> Self {
        let (d, kv_head) = (case.head_dim, head / (case.heads / case.kv_heads));
        let visible = case.visible[query];
        let q = &inputs.q.0[(query * case.heads + head) * d..][..d];
        let keys = (visible.first..visible.prefix_end).chain(visible.own_start..visible.end);
        let scores: Vec<_> = keys
            .map(|key| {
                let k = &inputs.k.0[(key as usize * case.kv_heads + kv_head) * d..][..d];
                let sum: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                (key as usize, sum / (d as f64).sqrt())
            })
            .collect();
        let max = scores.iter().map(|s| s.1).fold(f64::NEG_INFINITY, f64::max);
        let lse = max + scores.iter().map(|s| (s.1 - max).exp()).sum::<f64>().ln();
        Self { scores, lse }
    }
}

/// The 16-bit types, with the error that a result of them may have.
fn halves() -> Vec<(DType, f32)> {
    stored_types().into_iter().filter(|(dtype, _)| *dtype != DType::F32).collect()
}

/// Whether no kernel takes heads of this width, so that burn's ops do.
fn is_burns_alone(head_dim: usize) -> bool {
    !head_dim.is_multiple_of(4)
}

fn compare(case: &Case, cut: Option<Cut>, device: &GpuDevice) {
    let got = run(case, cut, device);
    let want = run_reference(case);
    let Case { heads, kv_heads, head_dim, visible, size, dtype } = case;
    let name = format!(
        "{} rows, {heads}/{kv_heads} heads of {head_dim}, size {size}, {dtype:?}, {cut:?}",
        visible.len()
    );
    let (atol, rtol) = match halves().into_iter().find(|half| half.0 == *dtype) {
        // What storage rounds off: of `out` before it goes into backward, and of every result.
        Some((_, error)) => (error, error),
        None if is_burns_alone(*head_dim) => (BURNS_ERROR, BURNS_ERROR),
        None => (ATOL * size.max(1.0), RTOL),
    };
    assert_close(&got.out, &want.out, atol, rtol, &format!("{name}: out"));
    let (lse_atol, lse_rtol) =
        if is_burns_alone(*head_dim) { (BURNS_ERROR, BURNS_ERROR) } else { (ATOL, RTOL) };
    assert_close(&got.lse, &want.lse, lse_atol, lse_rtol, &format!("{name}: lse"));
    for (what, got, want) in
        [("dq", 0), ("dk", 1), ("dv", 2)].map(|(what, i)| (what, &got.grads[i], &want.grads[i]))
    {
        // Sums of products of rounded numbers with `q`.
        let atol = if *dtype != DType::F32 && what == "dk" { atol * size.max(1.0) } else { atol };
        // A query that sees one key has a weight of one, whatever its score. In bf16 only the large gradients show.
        let is_flat = visible.len() == 1 && visible[0].end == 1 && what != "dv";
        assert!(
            is_flat || *dtype == DType::BF16 || want.iter().any(|v| v.abs() > 10.0 * atol),
            "{name}: {what} is too small to compare"
        );
        assert_close(got, want, atol, rtol, &format!("{name}: {what}"));
    }
}

/// The tile for software adapters; on them, one whose threads hand each other what they read.
fn tile_of_software(head_dim: usize, device: &GpuDevice) -> Tile {
    let like = Tensor::<Gpu, 1>::zeros([1], device).into_primitive().tensor();
    let tile = Tile::on_software(&like, head_dim);
    let lanes = like.client.properties().hardware.plane_size_max;
    if lanes <= 16 {
        assert_ne!(tile, Tile::of_lanes(1, head_dim), "a software adapter's shuffles come out wrong");
        // Mesa's, of which `tests/check.sh` has this as well.
        if let Ok(bits) = std::env::var("LP_NATIVE_VECTOR_WIDTH") {
            assert_eq!(Ok(32 * lanes), bits.parse(), "bits of the vectors");
        }
    }
    tile
}

/// Narrow heads, with groups of every size, and one width that has no kernel.
#[test]
fn narrow_heads() {
    let Some(device) = adapter() else { return };
    tile_of_software(16, &device);
    for (heads, kv_heads, head_dim) in [(4, 4, 16), (8, 4, 24), (8, 1, 64), (2, 1, 18)] {
        compare(&Case::new(heads, kv_heads, head_dim, pairs(&[[20, 31, 26]])), None, &device);
    }
}

/// Wide heads, of which the last have a tile of their own on software adapters.
#[test]
fn wide_heads() {
    let Some(device) = adapter() else { return };
    for (heads, kv_heads, head_dim) in [(6, 1, 80), (4, 1, 128), (2, 2, 256)] {
        compare(&Case::new(heads, kv_heads, head_dim, pairs(&[[20, 31, 26]])), None, &device);
    }
}

#[test]
fn masks_of_every_kind() {
    let Some(device) = adapter() else { return };
    let all = [
        causal(0, 1),
        causal(0, 130),
        causal(37, 1),
        causal(150, 9),
        causal(64, 64),
        pairs(&[[64, 64, 64]]),
        pairs(&[[90, 1, 100]]),
        pairs(&[[5, 40, 3], [33, 0, 12], [1, 50, 0], [70, 9, 90]]),
        pairs(&[[0, 30, 30], [17, 40, 41]]),
    ];
    for (i, visible) in all.into_iter().enumerate() {
        let case = Case::new(4, 2, 32, visible);
        compare(&case, None, &device);
        // Each kind of device would never see what is meant for the other.
        for tile in [tile_of_software(32, &device), Tile::of_lanes(1, 32), Tile::GPU] {
            compare(&case, Some((tile, 1 + i % 3)), &device);
        }
    }
}

/// More turns of loops than llvmpipe lets a thread take, which ends them without a word.
#[test]
fn long_walks() {
    let Some(device) = adapter() else { return };
    compare(&Case::new(3, 1, 16, causal(0, 2000)), Some((tile_of_software(16, &device), 1)), &device);
    compare(&Case::new(3, 1, 16, causal(0, 2000)), None, &device);
    // As many keys as forward takes there with eight lanes.
    compare(&Case { size: 60.0, ..Case::new(1, 1, 16, causal(131_007, 1)) }, None, &device);
}

#[test]
fn from_halves() {
    let Some(device) = adapter() else { return };
    for (dtype, _) in halves() {
        compare(&Case::new(4, 1, 64, pairs(&[[40, 33, 21], [9, 12, 30]])).stored(dtype), None, &device);
        compare(&Case::new(2, 1, 128, causal(0, 40)).stored(dtype), None, &device);
        // Without splits the kernel itself stores `dk` and `dv` in 16 bits.
        let whole = Some((tile_of_software(64, &device), 1));
        compare(&Case::new(4, 1, 64, pairs(&[[40, 33, 21]])).stored(dtype), whole, &device);
    }
}

/// The tile that is meant for GPUs, with and without splits.
#[test]
fn tile_of_gpus() {
    let Some(device) = adapter() else { return };
    let in_splits = |splits| Some((Tile::GPU, splits));
    compare(&Case::new(8, 2, 40, pairs(&[[50, 33, 71], [9, 12, 30]])), in_splits(3), &device);
    compare(&Case::new(4, 4, 64, causal(70, 9)), in_splits(1), &device);
    // Three parts of a group, eight heads a tile, and wide ones.
    compare(&Case::new(6, 1, 80, pairs(&[[20, 31, 26]])), in_splits(2), &device);
    compare(&Case::new(8, 1, 64, causal(0, 130)), in_splits(1), &device);
    compare(&Case::new(2, 2, 256, pairs(&[[20, 31, 26]])), in_splits(1), &device);
    // More splits than steps.
    compare(&Case::new(4, 4, 64, causal(0, 3)), in_splits(4), &device);
    for (dtype, _) in halves() {
        compare(&Case::new(4, 1, 128, pairs(&[[20, 33, 40]])).stored(dtype), in_splits(2), &device);
    }
}

const PASSES: [Pass; 3] = [Pass::Forward, Pass::Backward, Pass::BackwardInSplits];

/// Tensors of 16-bit types on the device's matrix units.
#[test]
fn on_matrices() {
    let Some(device) = adapter() else { return };
    let sides = matrix_sizes::<GpuRuntime>(&device);
    if !has_matrices(&sides) {
        return;
    }
    let side = sides.into_iter().max().expect("there are some") as usize;
    for (dtype, _) in halves() {
        let like = Tensor::<Gpu, 1>::zeros([1], &device).cast(dtype).into_primitive().tensor();
        for case in [
            Case::new(8, 2, 64, pairs(&[[50, 33, 71], [9, 12, 30]])),
            Case::new(4, 4, 16, causal(70, 9)),
            Case::new(8, 2, 64, causal(0, 1)),
            // A plane's sums are three matrices, of which threads see two at a time.
            Case::new(6, 2, 3 * side, causal(0, 33)),
            Case::new(4, 1, 128, pairs(&[[20, 33, 40]])),
            // The largest score leaves what weights are relative to behind, again and again.
            Case { size: 60.0, ..Case::new(4, 1, 32, pairs(&[[40, 50, 60]])) },
        ] {
            let tile = Tile::on_matrices(&like, case.head_dim);
            let hardware = &like.client.properties().hardware;
            if tile.is_none() && hardware.plane_size_min != hardware.plane_size_max {
                left_out_without_matrices("attention takes matrix units where planes have one size alone");
                return;
            }
            let tile =
                tile.unwrap_or_else(|| panic!("the device's matrices take no heads of {}", case.head_dim));
            let splits = if case.kv_heads == 2 { 2 } else { 1 };
            compare(&case.stored(dtype), Some((tile, splits)), &device);
        }
        if GpuRuntime::has_mma(&like.client) {
            for case in [
                Case::new(8, 2, 64, pairs(&[[50, 33, 71], [9, 12, 30]])),
                Case::new(8, 2, 64, causal(0, 1)),
                Case::new(4, 1, 128, pairs(&[[20, 33, 40]])),
                Case::new(2, 2, 128, causal(70, 9)),
                // Eight heads a tile, and walks over the parts of a group: two of eight, three of two, three of one.
                Case::new(8, 1, 64, causal(0, 130)),
                Case::new(16, 1, 64, pairs(&[[70, 33, 71]])),
                Case::new(6, 1, 128, causal(0, 130)),
                Case::new(3, 1, 64, pairs(&[[70, 33, 71]])),
                Case { size: 60.0, ..Case::new(8, 2, 64, pairs(&[[40, 50, 60]])) },
            ] {
                let case = case.stored(dtype);
                let tiles = Tile::mma(&like, case.head_dim);
                assert!(!tiles.is_empty(), "there are kernels for heads of {}", case.head_dim);
                for (tile, splits) in tiles.into_iter().flat_map(|tile| [(tile, 1), (tile, 3)]) {
                    compare(&case, Some((tile, splits)), &device);
                }
            }
            for head_dim in [64, 128] {
                let tiles = Tile::mma(&like, head_dim).into_iter();
                for (tile, pass) in tiles.flat_map(|tile| PASSES.map(|pass| (tile, pass))) {
                    let is_right =
                        trial::is_right::<GpuRuntime>(&device, dtype, [8, 2, head_dim], tile, pass);
                    assert!(is_right, "{tile:?}, {pass:?}, heads of {head_dim}");
                }
            }
        }
        let tile = Tile::on_matrices(&like, 64).expect("it was there before");
        let is_right = |tile, pass| trial::is_right::<GpuRuntime>(&device, dtype, [8, 2, 64], tile, pass);
        for pass in PASSES {
            assert!(is_right(tile, pass), "{tile:?}, {pass:?}");
        }
        // What a GPU does with planes that are half of its own is anything; a processor has planes of up to 16.
        if like.client.properties().hardware.plane_size_max <= 16 {
            let wrong = Tile { threads_n: tile.threads_n / 2, ..tile };
            for pass in [Pass::Forward, Pass::Backward] {
                assert!(!is_right(wrong, pass), "{wrong:?}, {pass:?}");
            }
            assert!(notes::take().iter().any(|note| note.contains("attention")));
        }
    }
}

/// Scores of up to fifty, which come in an order that makes the running maximum grow.
#[test]
fn large_scores() {
    let Some(device) = adapter() else { return };
    let size = 60.0;
    let case = Case { size, ..Case::new(2, 1, 32, pairs(&[[40, 50, 60]])) };
    let inputs = Inputs::new(&case);
    let largest = Scores::new(&case, &inputs, 149, 0).scores.iter().map(|s| s.1.abs()).fold(0.0, f64::max);
    assert!(largest > 40.0, "the largest score is {largest}");
    compare(&case, None, &device);
}

/// Against the formula in loops of `f64`.
#[test]
fn in_double_precision() {
    let Some(device) = adapter() else { return };
    let case = Case::new(4, 2, 16, pairs(&[[9, 20, 13]]));
    let inputs = Inputs::new(&case);
    let got = run(&case, None, &device);
    let d = case.head_dim;
    let mut out = vec![0.0; inputs.q.0.len()];
    let mut grads = [&inputs.q, &inputs.k, &inputs.v].map(|t| vec![0.0; t.0.len()]);
    for query in 0..case.visible.len() {
        for head in 0..case.heads {
            let Scores { scores, lse } = Scores::new(&case, &inputs, query, head);
            let at_q = (query * case.heads + head) * d;
            let at_k = |key: usize| (key * case.kv_heads + head / (case.heads / case.kv_heads)) * d;
            let dot = |x: &[f32], y: &[f32]| -> f64 {
                x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
            };
            let dout = &inputs.dout.0[at_q..][..d];
            let weights: Vec<_> =
                scores.iter().map(|&(key, score)| (at_k(key), (score - lse).exp())).collect();
            let dweights: Vec<_> = weights.iter().map(|&(k, _)| dot(dout, &inputs.v.0[k..][..d])).collect();
            let delta: f64 = weights.iter().zip(&dweights).map(|(w, dw)| w.1 * dw).sum();
            for (&(k, weight), dweight) in weights.iter().zip(dweights) {
                let dscore = weight * (dweight - delta) / (d as f64).sqrt();
                for i in 0..d {
                    out[at_q + i] += weight * f64::from(inputs.v.0[k + i]);
                    grads[0][at_q + i] += dscore * f64::from(inputs.k.0[k + i]);
                    grads[1][k + i] += dscore * f64::from(inputs.q.0[at_q + i]);
                    grads[2][k + i] += weight * f64::from(dout[i]);
                }
            }
        }
    }
    let single = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<_>>();
    assert_close(&got.out, &single(&out), ATOL, RTOL, "out");
    for (i, what) in ["dq", "dk", "dv"].into_iter().enumerate() {
        assert_close(&got.grads[i], &single(&grads[i]), ATOL, RTOL, what);
    }
}

#[test]
fn the_same_input_gives_the_same_bits() {
    let Some(device) = adapter() else { return };
    let case = Case::new(4, 2, 32, pairs(&[[20, 90, 33]]));
    assert_eq!(run(&case, None, &device), run(&case, None, &device));
}

/// Turned tensors are copied, and rows alone keep the buffer, at an offset.
#[test]
fn from_tensors_that_lie_otherwise() {
    let Some(device) = adapter() else { return };
    fn outcome<B: Kernels>(device: &B::Device) -> Vec<Vec<f32>> {
        let mut numbers = Numbers::new(4);
        let mut whole = |shape: [usize; 3]| {
            let data = TensorData::new(numbers.vec(shape.iter().product(), 1.0), shape);
            Tensor::<B, 3>::from_data(data, device)
        };
        let q = whole([4, 50, 32]).swap_dims(0, 1).slice(8..48);
        let k = whole([60, 2, 32]).slice(16..56);
        let v = whole([40, 2, 64]).slice([0..40, 0..2, 32..64]);
        let dout = whole([4, 32, 40]).reshape([128, 40]).transpose();
        let mask = AttentionMask::causal(0, 40, device);
        let output = attention(q.clone(), k.clone(), v.clone(), &mask);
        let grads = attention_backward(dout, q, k, v, output.clone(), &mask);
        [vec![values(output.out)], grads.map(values).into()].concat()
    }
    let got = outcome::<Gpu>(&device);
    let want = outcome::<Flex>(&Default::default());
    for (got, want) in got.iter().zip(&want) {
        assert_close(got, want, ATOL, RTOL, "out and gradients");
    }
}

/// The CPU takes more rows than one chunk of them.
#[test]
fn the_reference_in_chunks_equals_autodiff() {
    let case = Case::new(2, 1, 8, pairs(&[[30, 300, 270]]));
    let inputs = Inputs::new(&case);
    let device = Default::default();
    let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(|t| tensor::<Flex, 3>(t, &device));
    let mask = AttentionMask::new(case.visible.clone(), &device);
    let output = attention(q.clone(), k.clone(), v.clone(), &mask);
    let grads = attention_backward(tensor(&inputs.dout, &device), q, k, v, output.clone(), &mask);
    let want = run_reference(&case);
    assert_close(&values(output.out), &want.out, ATOL, RTOL, "out");
    assert_close(&values(output.lse), &want.lse, ATOL, RTOL, "lse");
    for (i, (got, want)) in grads.into_iter().zip(&want.grads).enumerate() {
        assert_close(&values(got), want, ATOL, RTOL, &format!("gradient {i}"));
    }
}
