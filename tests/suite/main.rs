//! The one test binary.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it stands")]

mod bench;
mod cli;
mod convergence;
mod demo;
mod device;
mod fp16;
mod goldens;
mod gpu {
    mod adamw;
    mod attention;
    mod lora_linear;
    mod orpo_loss;
    mod product;
    mod profile;
    mod quantize;
    mod rms_norm;
    mod rope;
    mod swiglu;
    mod tensors;
    mod token_logps;
}
mod infer;
mod load;
mod packing;
mod plain;
mod plan;
mod quantized;
mod shaders;
mod support;
mod tidy;
