//! x
use burn_cubecl::{CubeBackend, FloatElement, IntElement, element::BoolElement};
use burn_wgpu::WgpuRuntime;

use super::Kernels;

impl<F: FloatElement, I: IntElement, BT: BoolElement> Kernels for CubeBackend<WgpuRuntime, F, I, BT> {}
