//! What NVRTC makes of the kernels for GPUs that are not here: the driver of `tests/fixtures/cuda_driver.rs` takes them, and runs none.

use std::fs;
use std::path::Path;
use std::process::Command;

use burn::cubecl::Runtime;
use burn::cubecl::cuda::{CudaRuntime, install};
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
use orpo_wgpu::ops::adamw::grad_norm;
use orpo_wgpu::ops::engine::Routes;
use orpo_wgpu::ops::quantize::Storage;
use orpo_wgpu::ops::tune::{self, LinearKind, Tunable};
use orpo_wgpu::train::optim::AdamW;
use orpo_wgpu::train::step::{DeviceBatch, forward_backward};

use crate::support::left_out;

type Engine = Routes<CudaRuntime>;

/// Lets [`everything_is_launched`] run on a GPU of this compute capability, and gives the kernels that were launched.
///
/// `None` leaves the test out, which happens only where there is no CUDA.
fn launched(capability: u32) -> Option<Vec<String>> {
    if install::cuda_path().is_none() {
        left_out("there is no CUDA, whose NVRTC compiles the kernels; `bash tests/check.sh` gets it");
        return None;
    }
    let built =
        Path::new(env!("CARGO_BIN_EXE_orpo-wgpu")).with_file_name("examples").join("libcuda_driver.so");
    let folder = tempfile::tempdir().unwrap();
    for name in ["libcuda.so", "libcuda.so.1"] {
        fs::copy(&built, folder.path().join(name)).unwrap_or_else(|e| {
            panic!("{}: {e}; `cargo build --features cuda --example cuda_driver`", built.display())
        });
    }
    let libraries = [folder.path().to_owned()].into_iter();
    let others = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let libraries = std::env::join_paths(libraries.chain(std::env::split_paths(&others))).unwrap();
    let launches = folder.path().join("launches");
    let test = "cuda_compiler::everything_is_launched";
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", libraries)
        .env("ORPO_WGPU_CAPABILITY", capability.to_string())
        .env("ORPO_WGPU_LAUNCHES", &launches)
        .output()
        .unwrap();
    let said =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success() && said.contains("1 passed"), "compute capability {capability}: {said}");
    Some(fs::read_to_string(launches).unwrap().lines().map(str::to_owned).collect())
}

/// Whether the kernels in CUDA's language are launched on it, and no others of that language.
#[track_caller]
fn check(capability: u32, in_cudas_language: &[(&str, bool)]) {
    let Some(kernels) = launched(capability) else { return };
    for &(name, is_launched) in in_cudas_language {
        let has = kernels.iter().any(|kernel| kernel == name);
        assert_eq!(has, is_launched, "compute capability {capability}, {name}: {kernels:?}");
    }
    assert!(kernels.len() > 100, "compute capability {capability}: {kernels:?}");
}

#[test]
fn volta_compiles_everything() {
    check(70, &[("attention_mma", false), ("lora_linear_warpgroup", false)]);
}

#[test]
fn turing_compiles_everything() {
    check(75, &[("attention_mma", false), ("lora_linear_warpgroup", false)]);
}

#[test]
fn ampere_compiles_everything() {
    check(86, &[("attention_mma", true), ("lora_linear_warpgroup", false)]);
}

#[test]
fn hopper_compiles_everything() {
    check(90, &[("attention_mma", true), ("lora_linear_warpgroup", true)]);
}

#[test]
fn blackwell_compiles_everything() {
    check(120, &[("attention_mma", true), ("lora_linear_warpgroup", false)]);
}

#[test]
#[ignore = "the tests beside it start it, with a driver that runs nothing"]
fn everything_is_launched() {
    let gpus = device::gpus().unwrap();
    assert_eq!(gpus[0].name, "no GPU", "the driver is a GPU's");
    let device = gpus[0].device();
    let bf16 = gpus[0].computes_bf16().then_some(DType::BF16);
    let dtypes = [DType::F32, DType::F16].into_iter().chain(bf16);
    for dtype in dtypes {
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
    ways_of_making_a_product(bf16.unwrap_or(DType::F16), &device);
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

/// A whole step of a small model.
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
    let norm = grad_norm(&gradients.lora);
    optimizer.update(1e-4, lora::tensors_mut(&mut model), gradients.lora, &norm, 1.0);
    // A launch that failed shows where something is read.
    gradients.stats.try_into_data().unwrap();
    lora::parameters(&model).swap_remove(0).try_into_data().unwrap();
}

/// Those of a linear layer's product; a run times each, and none of them fails.
fn ways_of_making_a_product(dtype: DType, device: &CudaDevice) {
    let client = CudaRuntime::client(device);
    // Where warpgroups multiply, cubek's routines are for rows that these do not take.
    let extents = [70, 84, 100, 8];
    let linear = LinearKind { extents, dtype, joins_stream: false, shares_input: false };
    let kind = Engine::of_linear(linear)[0];
    let scratch = Engine::scratch(&client, device, kind);
    for way in Engine::candidates(device, kind) {
        let made = tune::is_right::<Engine>(&scratch, kind, way);
        assert!(made.is_ok(), "{dtype:?}, {way:?}: {made:?}");
    }
}
