//! What the tests share: comparison, the device to test on, reproducible numbers.

use std::process::Command;
use std::sync::LazyLock;

use burn::tensor::DType;
use burn_wgpu::WgpuDevice;
use orpo_wgpu::device::{self, DeviceChoice};

#[path = "../../src/left_out.rs"]
mod left_out;
pub(crate) use left_out::left_out;

/// Runs an ignored test of this program in a process of its own: where another thread goes backward meanwhile, burn's autodiff may lose
/// gradients of a leaf that is used twice (issue 5573 of tracel-ai/burn).
#[track_caller]
pub(crate) fn alone(test: &str) {
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program).args(["--ignored", "--exact", test]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("test result: ok. 1 passed"), "{said}");
}

/// Compares element by element: `|got − want| <= atol + rtol · |want|`.
///
/// # Panics
/// If an element of `what` is farther off, if only one of the two is NaN, or if the lengths differ.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f32], atol: f32, rtol: f32, what: &str) {
    assert!(rtol <= 0.1, "{what}: a relative tolerance of {rtol} shows nothing");
    assert_eq!(got.len(), want.len(), "{what}: number of values");
    let excess = |i: usize| {
        let (got, want) = (f64::from(got[i]), f64::from(want[i]));
        match (got.is_nan(), want.is_nan()) {
            (true, true) => 0.0,
            (false, false) if got == want => 0.0,
            (false, false) => (got - want).abs() - f64::from(rtol) * want.abs() - f64::from(atol),
            _ => f64::INFINITY,
        }
    };
    // An infinity against a number gives inf − inf = NaN, which is no less wrong.
    let is_wrong = |excess: f64| excess > 0.0 || excess.is_nan();
    let wrong: Vec<_> = (0..got.len()).map(|i| (i, excess(i))).filter(|&(_, e)| is_wrong(e)).collect();
    if let Some(&(worst, _)) = wrong.iter().max_by(|a, b| a.1.total_cmp(&b.1)) {
        panic!(
            "{what}: {} of {} differ, worst at {worst}: {} against {} (atol {atol}, rtol {rtol})",
            wrong.len(),
            got.len(),
            got[worst],
            want[worst]
        );
    }
}

/// The types that activations are stored in, with the relative error that a result of them may have.
pub(crate) fn stored_types() -> Vec<(DType, f32)> {
    vec![(DType::F32, 1e-4), (DType::F16, 2e-3)]
}

/// The same on CUDA's first GPU.
#[cfg(feature = "cuda")]
pub(crate) fn stored_types_on_cuda() -> Vec<(DType, f32)> {
    let bf16 = has_bf16().then_some((DType::BF16, 1.6e-2));
    stored_types().into_iter().chain(bf16).collect()
}

/// Whether CUDA's first GPU computes in bf16, of which the test is told; before Ampere none does.
#[cfg(feature = "cuda")]
pub(crate) fn has_bf16() -> bool {
    let has = GPUS.as_ref().is_ok_and(|gpus| gpus[0].computes_bf16());
    if !has {
        left_out("the GPU does not compute in bf16; what there is of it in other types is tested");
    }
    has
}

/// Gives the device to test on: the first adapter, software or not. It is looked up once, as listing the adapters loads every driver.
///
/// `None` leaves the test out, which happens only where there is no adapter and `ORPO_WGPU_SKIP_GPU=1` allows it.
///
/// # Panics
/// If there is no adapter and it was not allowed.
pub(crate) fn adapter() -> Option<WgpuDevice> {
    static DEVICE: LazyLock<Option<WgpuDevice>> =
        LazyLock::new(|| match device::select("wgpu").ok()?.choice {
            DeviceChoice::Wgpu { device, .. } => Some(device),
            _ => None,
        });
    if DEVICE.is_none() {
        may_be_left_out("no wgpu adapter; a software one will do");
    }
    DEVICE.clone()
}

#[cfg(feature = "cuda")]
static GPUS: LazyLock<device::CudaGpus> = LazyLock::new(device::gpus);

/// The same of CUDA: its first GPU.
#[cfg(feature = "cuda")]
pub(crate) fn cuda() -> Option<burn_cuda::CudaDevice> {
    match &*GPUS {
        Ok(gpus) => Some(gpus[0].device()),
        Err(missing) => {
            may_be_left_out(&format!("no CUDA: {}; {}", missing.problem, missing.hint));
            None
        }
    }
}

/// Leaves the test out, where that is allowed.
fn may_be_left_out(why: &str) {
    let is_allowed = std::env::var("ORPO_WGPU_SKIP_GPU").is_ok_and(|value| value == "1");
    assert!(is_allowed, "{why}; ORPO_WGPU_SKIP_GPU=1 leaves these tests out");
    left_out(why);
}

/// Whether the adapter has matrix units, of which the test is told; without them it is left out.
///
/// # Panics
/// If it has none and `ORPO_WGPU_NEED_MATRICES=1` says that it has to.
pub(crate) fn has_matrices(sizes: &[u32]) -> bool {
    if sizes.is_empty() {
        left_out_without_matrices("the adapter lists no cooperative matrices of f16 with f32 sums");
    }
    !sizes.is_empty()
}

/// Says that a test of matrix units is left out, and why.
///
/// # Panics
/// If `ORPO_WGPU_NEED_MATRICES=1` says that it has to run.
pub(crate) fn left_out_without_matrices(why: &str) {
    let is_needed = std::env::var("ORPO_WGPU_NEED_MATRICES").is_ok_and(|value| value == "1");
    assert!(!is_needed, "{why}");
    left_out(why);
}

/// Reproducible numbers in `[-1, 1)`.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// `len` numbers in `[-size, size)`.
    pub(crate) fn vec(&mut self, len: usize, size: f32) -> Vec<f32> {
        (0..len).map(|_| self.next() * size).collect()
    }
}

#[test]
fn close_numbers_pass() {
    assert_close(
        &[1.0, f32::NAN, f32::INFINITY, 0.0],
        &[1.00001, f32::NAN, f32::INFINITY, 1e-6],
        1e-5,
        1e-4,
        "y",
    );
}

#[test]
#[should_panic(expected = "y: 1 of 3 differ, worst at 2: -3 against 3")]
fn a_changed_sign_fails() {
    assert_close(&[1.0, 2.0, -3.0], &[1.0, 2.0, 3.0], 1e-5, 1e-4, "y");
}

#[test]
#[should_panic(expected = "worst at 0")]
fn a_nan_in_one_fails() {
    assert_close(&[f32::NAN, 1.0], &[0.0, 1.0], 1e-5, 1e-4, "y");
}

#[test]
#[should_panic(expected = "worst at 1")]
fn an_infinity_in_one_fails() {
    assert_close(&[0.0, 1.0], &[0.0, f32::INFINITY], 1e-5, 1e-4, "y");
}

#[test]
#[should_panic(expected = "number of values")]
fn a_missing_element_fails() {
    assert_close(&[0.0], &[0.0, 1.0], 1e-5, 1e-4, "y");
}
