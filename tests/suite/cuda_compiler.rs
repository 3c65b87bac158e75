//! What NVRTC makes of the kernels for GPUs that are not here: the driver of `tests/fixtures/cuda_driver.rs` takes them, and runs none.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::cubecl::Runtime;
use burn::cubecl::cuda::CudaRuntime;
use burn::tensor::DType;
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

/// The driver as cargo has built it.
///
/// # Panics
/// If it has not, or not since the source changed: a test alone has no examples built.
fn driver() -> PathBuf {
    let built =
        Path::new(env!("CARGO_BIN_EXE_orpo-wgpu")).with_file_name("examples").join("libcuda_driver.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cuda_driver.rs");
    let changed = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let is_new = changed(&built).is_some_and(|built| Some(built) >= changed(&source));
    assert!(is_new, "build {}: `cargo build --features cuda --example cuda_driver`", built.display());
    built
}

/// Lets [`everything_is_launched`] run on a GPU of this compute capability, and gives the kernels that were launched.
///
/// `None` leaves the test out.
///
/// # Panics
/// If there is no compiler and `ORPO_WGPU_NEED_NVRTC=1` says that there has to be.
fn launched(capability: u32) -> Option<Vec<String>> {
    if !Path::new(CUDA).join("include").exists() {
        let why =
            format!("there is no CUDA in {CUDA}, whose NVRTC compiles the kernels; tests/check.sh gets it");
        let is_needed = std::env::var("ORPO_WGPU_NEED_NVRTC").is_ok_and(|value| value == "1");
        assert!(!is_needed, "{why}");
        left_out(&why);
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    // The name that cudarc asks for first, and NVRTC's.
    for name in ["libcuda.so", "libcuda.so.1"] {
        fs::copy(driver(), folder.path().join(name)).unwrap();
    }
    let libraries = [folder.path().to_owned(), Path::new(CUDA).join("nvidia/cuda_nvrtc/lib")];
    let launches = folder.path().join("launches");
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cuda_compiler::everything_is_launched", "--ignored", "--nocapture"])
        .env("CUDA_PATH", CUDA)
        .env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap())
        .env("ORPO_WGPU_CAPABILITY", capability.to_string())
        .env("ORPO_WGPU_LAUNCHES", &launches)
        .output()
        .unwrap();
    let said =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success() && said.contains("1 passed"), "compute capability {capability}: {said}");
    Some(fs::read_to_string(launches).unwrap().lines().map(str::to_owned).collect())
}

/// Which kernels are for GPUs of which capabilities: attention in CUDA's language, products in it, and what its products of a small
/// rank begin with.
#[track_caller]
fn check(capability: u32) {
    let Some(kernels) = launched(capability) else { return };
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
#[ignore = "the tests beside it start it, with a driver that runs nothing"]
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

/// Nothing comes out right without a GPU, so that steps have tried matrix units and taken others. From here on they take what they tried.
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
