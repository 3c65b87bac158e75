//! burn's matrix product by the fastest of cubek's routines.
//!
//! burn is built without autotuning here, and its own product then takes one routine for all shapes.

use std::collections::HashMap;
use std::time::Instant;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorPrimitive};
use burn_wgpu::Wgpu;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::{Strategy, launch_ref};
use cubek::matmul::routines::BlueprintStrategy::Inferred;
use cubek::matmul::routines::TileSizeSelection::{MaxTileSize, MinTileSize};
use cubek::matmul::routines::double_unit::DoubleUnitSelectionArgs;
use cubek::matmul::routines::simple_unit::SimpleUnitSelectionArgs;
use cubek::std::InputBinding;

/// What burn's autotuning would try of products of two `f32` matrices in registers, burn's default first.
fn routines() -> [Strategy; 5] {
    [
        Strategy::Auto,
        Strategy::SimpleUnit(Inferred(SimpleUnitSelectionArgs { tile_size: MinTileSize })),
        Strategy::SimpleUnit(Inferred(SimpleUnitSelectionArgs { tile_size: MaxTileSize })),
        Strategy::DoubleUnit(Inferred(DoubleUnitSelectionArgs { tile_size: MinTileSize })),
        Strategy::DoubleUnit(Inferred(DoubleUnitSelectionArgs { tile_size: MaxTileSize })),
    ]
}

/// The fastest routine of every shape that was asked for.
#[derive(Default)]
pub(crate) struct Products(HashMap<String, usize>);

impl Products {
    /// `lhs · rhs`, both `f32`; a shape's first product times all routines.
    pub(crate) fn product(&mut self, lhs: Tensor<Wgpu, 2>, rhs: Tensor<Wgpu, 2>) -> Tensor<Wgpu, 2> {
        let strides = |t: &Tensor<Wgpu, 2>| t.clone().into_primitive().tensor().meta.strides().to_vec();
        let kind = format!("{:?} {:?} {:?} {:?}", lhs.dims(), strides(&lhs), rhs.dims(), strides(&rhs));
        let fastest = *self.0.entry(kind).or_insert_with(|| fastest(&lhs, &rhs));
        launch(&routines()[fastest], &lhs, &rhs).expect("it was launched before")
    }

    /// In how many of the shapes burn's default is not the fastest.
    pub(crate) fn n_improved(&self) -> (usize, usize) {
        (self.0.values().filter(|&&routine| routine > 0).count(), self.0.len())
    }
}

fn fastest(lhs: &Tensor<Wgpu, 2>, rhs: &Tensor<Wgpu, 2>) -> usize {
    let wait = || <Wgpu as Backend>::sync(&lhs.device()).expect("the device answers");
    let time = |routine: &Strategy| {
        let mut best = f64::INFINITY;
        for _ in 0..4 {
            wait();
            let start = Instant::now();
            launch(routine, lhs, rhs)?;
            wait();
            best = best.min(start.elapsed().as_secs_f64());
        }
        Some(best)
    };
    let times = routines().iter().map(|routine| time(routine).unwrap_or(f64::INFINITY)).collect::<Vec<_>>();
    (0..times.len()).min_by(|&a, &b| times[a].total_cmp(&times[b])).unwrap_or(0)
}

/// None where the routine has no tile for the shape.
fn launch(routine: &Strategy, lhs: &Tensor<Wgpu, 2>, rhs: &Tensor<Wgpu, 2>) -> Option<Tensor<Wgpu, 2>> {
    let out = Tensor::<Wgpu, 2>::empty([lhs.dims()[0], rhs.dims()[1]], &lhs.device());
    let [lhs, rhs, out] = [lhs, rhs, &out].map(|t| t.clone().into_primitive().tensor());
    let element = DType::F32.into();
    let globals = MatmulGlobalElems { lhs: element, rhs: element, out: element };
    let client = lhs.client.clone();
    let [lhs, rhs] = [lhs, rhs].map(|t| InputBinding::new(t.binding(), element));
    let mut elements = MatmulElems::from_globals(&globals);
    launch_ref(routine, &client, lhs, rhs, out.clone().binding(), &mut elements).ok()?;
    Some(Tensor::from_primitive(TensorPrimitive::Float(out)))
}
