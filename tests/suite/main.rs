//! The one test binary.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it stands")]

mod adapters;
mod bad_input;
mod bench;
mod chat;
mod checkpoints;
mod configuration;
mod convergence;
#[cfg(all(feature = "cuda", target_os = "linux"))]
mod cuda_on_cpu;
mod demo;
mod device;
mod eval;
mod export;
mod fp16;
mod goldens;
/// The ops on wgpu.
mod gpu {
    mod on {
        pub(super) use burn_wgpu::{Wgpu as Gpu, WgpuDevice as GpuDevice, WgpuRuntime as GpuRuntime};

        pub(crate) use crate::support::{adapter, stored_types};

        /// Whether matrix units take an adapter rounded to the weight's type.
        pub(super) const ROUNDS_ADAPTERS: bool = true;
        /// What burn's products of `f32` may be off by.
        pub(super) const BURNS_ERROR: f32 = 1e-4;
    }
    mod adamw;
    mod attention;
    mod lora_linear;
    mod orpo_loss;
    pub(crate) mod product;
    mod profile;
    mod quantize;
    mod rms_norm;
    mod rope;
    mod swiglu;
    pub(crate) mod tensors;
    mod token_logps;
    mod tune;
}
/// The ops that a runtime may have an engine for, on wgpu's devices with that of a runtime that brings none: CUDA's, but for its
/// compiler.
#[path = "gpu"]
mod plain_engine {
    mod on {
        pub(super) use crate::plain_runtime::{Plain as GpuRuntime, PlainBackend as Gpu};
        pub(crate) use crate::support::{adapter, stored_types};
        pub(super) use burn_wgpu::WgpuDevice as GpuDevice;

        pub(super) const ROUNDS_ADAPTERS: bool = false;
    }
    #[expect(clippy::duplicate_mod, reason = "the same tests on another backend")]
    mod lora_linear;
    #[expect(clippy::duplicate_mod, reason = "the same tests on another backend")]
    mod orpo_loss;
    mod routes;
}
/// The ops and the whole of training on CUDA.
#[cfg(feature = "cuda")]
#[path = "gpu"]
#[expect(clippy::duplicate_mod, reason = "the same tests on another backend")]
mod cuda {
    mod on {
        pub(super) use burn::cubecl::cuda::CudaRuntime as GpuRuntime;
        pub(super) use burn_cuda::{Cuda as Gpu, CudaDevice as GpuDevice};

        pub(crate) use crate::support::{cuda as adapter, stored_types_on_cuda as stored_types};

        pub(super) const ROUNDS_ADAPTERS: bool = false;
        /// It multiplies them as TF32, with 10 bits.
        pub(super) const BURNS_ERROR: f32 = 2e-3;
    }
    mod adamw;
    mod attention;
    mod lora_linear;
    mod orpo_loss;
    mod quantize;
    mod rms_norm;
    mod rope;
    mod routes;
    mod swiglu;
    mod tensors;
    mod token_logps;
    mod training;
}
mod infer;
mod interrupts;
mod load;
mod memory;
mod packing;
mod plain;
mod plain_runtime;
mod plan;
mod quantized;
mod rows;
mod run_folder;
mod shaders;
mod support;
mod tidy;
mod workplace;
