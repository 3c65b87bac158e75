//! What NVRTC makes of the kernels for GPUs that are not here, run on the processor by the driver of `tests/fixtures/cuda_driver`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use burn::cubecl;
use burn::cubecl::cuda::CudaRuntime;
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Tensor};
use burn_cuda::{Cuda, CudaDevice};
use orpo_wgpu::config::TrainArgs;
use orpo_wgpu::data::batch::{Batch, LossCompat, pack};
use orpo_wgpu::data::dataset::Location;
use orpo_wgpu::data::tokenize::TokenizedPair;
use orpo_wgpu::device;
use orpo_wgpu::lora::{self, LoraConfig};
use orpo_wgpu::model::llama::Keep;
use orpo_wgpu::model::presets::preset;
use orpo_wgpu::model::{Llama, LlamaConfig, Precision};
use orpo_wgpu::ops::adamw::{add_grads, grad_norm};
use orpo_wgpu::ops::engine::Routes;
use orpo_wgpu::ops::notes;
use orpo_wgpu::ops::quantize::Storage;
use orpo_wgpu::ops::tune::{LinearKind, Outcome, Tunable};
use orpo_wgpu::train::optim::AdamW;
use orpo_wgpu::train::step::{DeviceBatch, forward_backward};

use crate::support::left_out;

type Engine = Routes<CudaRuntime>;

/// Where `tests/check.sh` puts CUDA's compiler; of its version, as every compute capability that is tested is one of its.
const CUDA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/cuda-12.8");

/// Lets tests of this program run on a GPU of this compute capability, whose kernels run or are only compiled, and gives the kernels
/// that were launched.
///
/// `None` leaves the test out.
///
/// # Panics
/// If there is no compiler and `ORPO_WGPU_NEED_NVRTC=1` says that there has to be, or if a test fails.
#[track_caller]
fn launched(capability: u32, runs: bool, tests: &[&str]) -> Option<BTreeSet<String>> {
    if !Path::new(CUDA).join("include").exists() {
        let why =
            format!("there is no CUDA in {CUDA}, whose NVRTC compiles the kernels; tests/check.sh gets it");
        let is_needed = std::env::var("ORPO_WGPU_NEED_NVRTC").is_ok_and(|value| value == "1");
        assert!(!is_needed, "{why}");
        left_out(&why);
        return None;
    }
    let program = std::env::current_exe().unwrap();
    let folder = tempfile::tempdir().unwrap();
    // The name that cudarc asks for first, and NVRTC's.
    for name in ["libcuda.so", "libcuda.so.1"] {
        fs::copy(program.with_file_name("libcuda_driver.so"), folder.path().join(name)).unwrap();
    }
    let libraries = [folder.path().to_owned(), Path::new(CUDA).join("nvidia/cuda_nvrtc/lib")];
    let launches = folder.path().join("launches");
    let output = Command::new(program)
        .args(["--include-ignored", "--nocapture", "--exact"])
        .args(tests)
        .env("CUDA_PATH", CUDA)
        .env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap())
        .env("ORPO_WGPU_CAPABILITY", capability.to_string())
        .env("ORPO_WGPU_RUNS_KERNELS", if runs { "1" } else { "0" })
        .env("ORPO_WGPU_LAUNCHES", &launches)
        .output()
        .unwrap();
    let said =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    let have_passed = said.contains(&format!("test result: ok. {} passed", tests.len()));
    // The driver tells of what it does not know, which then counts as wrong and not as a failure.
    let is_whole = !said.contains("LEFT OUT") && !said.contains(" is not known");
    assert!(output.status.success() && have_passed && is_whole, "compute capability {capability}: {said}");
    Some(fs::read_to_string(launches).unwrap().lines().map(str::to_owned).collect())
}

/// Runs tests of kernels on the processor, as on a GPU of this compute capability, with this kernel among them.
#[track_caller]
fn run(capability: u32, kernel: &str, tests: &[&str]) {
    let Some(kernels) = launched(capability, true, tests) else { return };
    assert!(kernels.iter().any(|launched| launched.starts_with(kernel)), "{kernel}: {kernels:?}");
}

/// Which kernels are for GPUs of which capabilities: attention in CUDA's language, products in it, and what its products of a small
/// rank begin with.
#[track_caller]
fn check(capability: u32) {
    let Some(kernels) = launched(capability, false, &["cuda_on_cpu::everything_is_launched"]) else { return };
    for (name, is_launched) in [
        ("attention_mma", capability >= 80),
        ("lora_linear_warpgroup", capability == 90),
        ("fill_kernel", capability == 90),
    ] {
        let has = kernels.iter().any(|kernel| kernel.starts_with(name));
        assert_eq!(has, is_launched, "compute capability {capability}, {name}: {kernels:?}");
    }
}

#[test]
fn volta() {
    check(70);
}

#[test]
fn turing() {
    check(75);
}

#[test]
fn ampere() {
    check(80);
}

/// With as little workgroup memory as GPUs for games have.
#[test]
fn ampere_for_games() {
    check(86);
}

#[test]
fn hopper() {
    check(90);
}

#[test]
fn blackwell_for_games() {
    check(120);
}

#[test]
fn values_of_attention_on_matrices() {
    run(80, "attention_mma", &["cuda::attention::on_matrices"]);
}

#[test]
fn values_of_attention_on_warpgroups() {
    run(90, "attention_mma", &["cuda::attention::on_matrices"]);
}

#[test]
fn values_of_products_on_warpgroups() {
    run(90, "lora_linear_warpgroup", &["cuda::routes::warpgroups_pass_their_trial"]);
}

#[test]
fn values_of_training_are_those_of_trl() {
    run(
        86,
        "forward",
        &[
            "cuda::training::forward_is_that_of_transformers",
            "cuda::training::first_gradients_are_those_of_trl",
        ],
    );
}

/// Otherwise it would not show that a kernel has one too few.
#[test]
fn a_missing_barrier_shows() {
    run(80, "turned", &["cuda_on_cpu::what_others_wrote_is_read"]);
}

#[test]
fn a_place_outside_of_memory_is_refused() {
    run(80, "far_away", &["cuda_on_cpu::a_write_outside_of_memory"]);
}

/// It would otherwise keep the tests for ever.
#[test]
fn a_loop_without_end_is_ended() {
    run(80, "waiting", &["cuda_on_cpu::a_wait_for_what_nobody_writes"]);
}

/// Each thread gives what the last but its own number wrote.
#[cube(launch_unchecked)]
fn turned(out: &mut Array<f32>, #[comptime] waits: bool) {
    let mut values = SharedMemory::<f32>::new(THREADS as usize);
    values[UNIT_POS as usize] = UNIT_POS as f32;
    if comptime!(waits) {
        sync_cube();
    }
    out[ABSOLUTE_POS] = values[(THREADS - 1 - UNIT_POS) as usize];
}

#[cube(launch_unchecked)]
fn waiting(out: &mut Array<f32>) {
    while out[0] == 0.0 {
        sync_cube();
    }
}

#[cube(launch_unchecked)]
fn far_away(out: &mut Array<f32>) {
    out[ABSOLUTE_POS + (1 << 29)] = 1.0;
}

const THREADS: u32 = 64;

#[test]
#[ignore = "a test beside it starts it, on the driver that has no GPU"]
fn what_others_wrote_is_read() {
    let turn = |waits: bool| {
        let out = Tensor::<Cuda, 1>::zeros([2 * THREADS as usize], &CudaDevice::default());
        let places = out.clone().into_primitive().tensor();
        #[expect(unsafe_code, reason = "a checked launch would hide what the test looks for")]
        // SAFETY: there is a place for each thread.
        unsafe {
            turned::launch_unchecked::<CudaRuntime>(
                &places.client.clone(),
                CubeCount::new_1d(2),
                CubeDim::new_1d(THREADS),
                places.into_array_arg(),
                waits,
            );
        }
        out.into_data().to_vec::<f32>().unwrap()
    };
    let want: Vec<f32> = (0..2 * THREADS).map(|i| (THREADS - 1 - i % THREADS) as f32).collect();
    assert_eq!(turn(true), want);
    // The half that is read before it is written is no number: of one workgroup the first, of the other the last.
    let (without, half) = (turn(false), THREADS as usize / 2);
    let is_right: Vec<bool> = without.chunks(half).zip(want.chunks(half)).map(|(a, b)| a == b).collect();
    assert_eq!(without.iter().filter(|value| value.is_nan()).count(), 2 * half, "{without:?}");
    assert!(is_right == [true, false, false, true] || is_right == [false, true, true, false], "{without:?}");
}

/// What a kernel of one workgroup ends with, for a tensor of zeros.
fn end_of(
    launch: impl FnOnce(&ComputeClient<CudaRuntime>, CubeCount, CubeDim, ArrayArg<CudaRuntime>),
) -> String {
    let out = Tensor::<Cuda, 1>::zeros([THREADS as usize], &CudaDevice::default()).into_primitive().tensor();
    let client = out.client.clone();
    launch(&client, CubeCount::new_single(), CubeDim::new_1d(THREADS), out.into_array_arg());
    format!("{:?}", pollster::block_on(client.sync()))
}

#[test]
#[ignore = "a test beside it starts it, on the driver that has no GPU"]
fn a_write_outside_of_memory() {
    #[expect(unsafe_code, reason = "a checked launch would hide what the test looks for")]
    let end = end_of(|client, count, dim, out| {
        // SAFETY: the driver refuses the places.
        unsafe { far_away::launch_unchecked::<CudaRuntime>(client, count, dim, out) };
    });
    assert!(end.contains("ILLEGAL_ADDRESS"), "{end}");
}

#[test]
#[ignore = "a test beside it starts it, on the driver that has no GPU"]
fn a_wait_for_what_nobody_writes() {
    #[expect(unsafe_code, reason = "a checked launch would hide what the test looks for")]
    let end = end_of(|client, count, dim, out| {
        // SAFETY: the place that is read is there.
        unsafe { waiting::launch_unchecked::<CudaRuntime>(client, count, dim, out) };
    });
    assert!(end.contains("LAUNCH_TIMEOUT"), "{end}");
}

#[test]
#[ignore = "the tests beside it start it, on the driver that has no GPU"]
fn everything_is_launched() {
    let gpus = device::gpus().unwrap();
    assert_eq!(gpus[0].name, "no GPU", "the driver is a GPU's");
    let device = gpus[0].device();
    let bf16 = gpus[0].computes_bf16().then_some(DType::BF16);
    for _ in 0..2 {
        for dtype in [DType::F32, DType::F16].into_iter().chain(bf16) {
            let dense = Precision::dense(dtype);
            // Heads of 80 are for no kernel in CUDA's language.
            for head_dim in [64, 80, 128] {
                step(dense, head_dim, Keep::All, &device);
            }
            step(dense, 64, Keep::Input, &device);
            if dtype != DType::F32 {
                for linears in [Storage::Int8, Storage::Nf4] {
                    step(Precision { linears, head: Storage::Int8, ..dense }, 64, Keep::Attention, &device);
                }
            }
        }
        take_what_was_tried();
    }
    let n_ways = if gpus[0].compute_capability == (7, 0) { 5 } else { 10 };
    ways_of_making_a_product(bf16.unwrap_or(DType::F16), n_ways, &device);
}

/// Nothing comes out right where nothing runs, so that steps have tried matrix units and taken others. From here on they take what they tried.
fn take_what_was_tried() {
    let mut table = Engine::table().lock().unwrap();
    assert!(!table.is_empty(), "products on matrix units were tried");
    for ((_, _, kind), tried) in table.iter_mut() {
        for (way, outcome) in tried {
            assert_ne!(*outcome, Outcome::Failed, "{kind:?}, {way:?}: does not compile, or is not launched");
            *outcome = Outcome::Right(1.0);
        }
    }
}

/// Two pairs of unlike lengths.
fn batch(vocab_size: usize) -> Batch {
    let ids =
        |n: usize, seed: usize| (0..n).map(|i| ((i * 7919 + seed) % vocab_size) as u32).collect::<Vec<_>>();
    let pair = |seed: usize| TokenizedPair {
        prompt: ids(70 * seed, seed),
        chosen: ids(90, seed + 1),
        rejected: ids(45, seed + 2),
        location: Location::new(Path::new("pairs"), seed),
    };
    pack(&[&pair(1), &pair(2)], LossCompat::Swift)
}

/// A whole step of a small model, and the first two tokens of an answer.
fn step(precision: Precision, head_dim: usize, keep: Keep, device: &CudaDevice) {
    let config = LlamaConfig {
        hidden_size: 256,
        intermediate_size: 384,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim,
        vocab_size: 512,
        ..preset("small").unwrap()
    };
    let mut model = Llama::<Cuda>::random(&config, precision, 64 << 20, device);
    let target_modules = lora::target_modules(&["ALL".to_owned()]).unwrap();
    lora::attach(&mut model, &LoraConfig { r: 8, lora_alpha: 32.0, target_modules }, 42);
    let mut optimizer = AdamW::new(TrainArgs::default().adamw(), &lora::parameters(&model));
    let batch = DeviceBatch::new(&model, &batch(config.vocab_size));
    let gradients = forward_backward(&model, batch, 0.1, 1.0, keep);
    let sums = add_grads(gradients.lora.clone(), gradients.lora);
    let norm = grad_norm(&sums);
    optimizer.update(1e-4, lora::tensors_mut(&mut model), sums, &norm, 1.0);
    let mut cache = model.new_cache();
    for tokens in [&[3; 70][..], &[5]] {
        let hidden = model.forward_cached(tokens, &mut cache);
        model.lm_head.logits(hidden).try_into_data().unwrap();
    }
    // A launch that failed shows where something is read, but for one that was a trial.
    gradients.stats.try_into_data().unwrap();
    lora::parameters(&model).swap_remove(0).try_into_data().unwrap();
    let noted = notes::take();
    let has_failed = noted.iter().any(|note| note.contains("attention"));
    assert!(
        !has_failed,
        "{precision}, heads of {head_dim}: what reads as zeros agrees, so a kernel failed: {noted:?}"
    );
}

/// Those of a linear layer's product, of which a run times each.
fn ways_of_making_a_product(dtype: DType, n_ways: usize, device: &CudaDevice) {
    let client = CudaRuntime::client(device);
    // Where warpgroups multiply, cubek's routines are for rows that these do not take.
    let extents = [70, 84, 100, 8];
    let linear = LinearKind { extents, dtype, joins_stream: false, shares_input: false };
    let kind = Engine::of_linear(linear)[0];
    let scratch = Engine::scratch(&client, device, kind);
    let ways = Engine::candidates(device, kind);
    assert_eq!(ways.len(), n_ways, "{ways:?}");
    for way in ways {
        let made = Engine::launch(&scratch, way, Some(Engine::place(&scratch)));
        assert!(made.is_some(), "{dtype:?}, {way:?} is refused");
        pollster::block_on(client.sync()).unwrap_or_else(|e| panic!("{dtype:?}, {way:?}: {e:?}"));
    }
}
