//! Whole steps against TRL: in f32 as on every device, and in 16-bit types.

use burn::tensor::DType;

use super::on::{Gpu, adapter};
use crate::fp16::check_trajectories_in_fp16;
use crate::goldens::{check_first_gradients, check_forward, check_trajectories};
use crate::support::has_bf16;

#[test]
fn forward_is_that_of_transformers() {
    if let Some(device) = adapter() {
        check_forward::<Gpu>(&device);
    }
}

#[test]
fn first_gradients_are_those_of_trl() {
    if let Some(device) = adapter() {
        check_first_gradients::<Gpu>(DType::F32, &device);
    }
}

#[test]
fn first_gradients_in_bf16_are_near_those_of_trl() {
    let Some(device) = adapter() else { return };
    if has_bf16() {
        check_first_gradients::<Gpu>(DType::BF16, &device);
    }
}

#[test]
fn trajectories_are_those_of_trl() {
    if let Some(device) = adapter() {
        check_trajectories::<Gpu>(&device);
    }
}

#[test]
fn trajectories_in_fp16_are_near_those_of_trl() {
    if let Some(device) = adapter() {
        check_trajectories_in_fp16::<Gpu>(&device);
    }
}
