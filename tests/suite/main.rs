//! The one test binary.

mod cli;
mod demo;
mod goldens;
mod gpu {
    mod lora_linear;
    mod orpo_loss;
}
mod packing;
mod shaders;
mod support;
mod tidy;

// The library's own file: how a kernel is compiled and launched is nobody's business outside of it.
#[path = "../../src/ops/kernel.rs"]
mod kernel;
