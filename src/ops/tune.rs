//! How the products of [`lora_linear`](super::lora_linear) are made where that was timed on the device itself.
//!
//! Without a timing an engine follows a rule, which knows blocks and workgroups but no device. [`tune`] times the few ways that an
//! engine has of making a product on scratch tensors, and from then on products of the same kind take the fastest that comes out right:
//! drivers run some that they should refuse, or pretend to.

mod cuts;
pub(super) mod pattern;
mod routes;

use std::any::TypeId;
use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use burn::cubecl::Runtime;
use burn::cubecl::client::ComputeClient;
use burn::cubecl::device::{Device, DeviceId};
use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use cuts::{Choice, Cuts, Kind};
pub use routes::{Instruction, Route, RouteKind, Routes};

/// A matrix engine that has several ways of making a product.
pub trait MatrixEngine: 'static {
    /// Where it runs.
    type Runtime: CubeRuntime;
    /// What the time of a product depends on.
    type Kind: Debug + Copy + Eq + Hash + Serialize + DeserializeOwned + Send;
    /// A way.
    type Choice: Debug + Copy + Eq + Serialize + DeserializeOwned + Send;
    /// The operands of a product that is only timed.
    type Scratch;

    /// What is known in this process.
    fn table() -> &'static Table<Self::Kind, Self::Choice>;

    /// What the ways are: other code has others.
    fn revision() -> String;

    /// The products of a linear layer, `[tokens, in, out, rank]`, with frozen weights of this type.
    fn of_linear(extents: [u32; 4], weight: DType) -> Vec<Self::Kind>;

    /// A product's multiplications and additions.
    fn flops(kind: Self::Kind) -> f64;

    /// How many products of two entries each entry of the output sums.
    fn depth(kind: Self::Kind) -> usize;

    /// What is worth timing, the rule's choice first.
    fn candidates(client: &ComputeClient<Self::Runtime>, kind: Self::Kind) -> Vec<Self::Choice>;

    /// Operands of a product, with entries of which each sum is known.
    fn scratch(
        client: &ComputeClient<Self::Runtime>,
        device: &<Self::Runtime as Runtime>::Device,
        kind: Self::Kind,
    ) -> Self::Scratch;

    /// Launches the product, and gives nothing where it cannot be made in this way. It is written over `zeros`, where these are there.
    fn launch(
        scratch: &Self::Scratch,
        choice: Self::Choice,
        zeros: Option<CubeTensor<Self::Runtime>>,
    ) -> Option<CubeTensor<Self::Runtime>>;

    /// Zeros of the output's shape and type.
    fn zeros(scratch: &Self::Scratch) -> CubeTensor<Self::Runtime>;
}

/// The choices of a process, by runtime, device and kind.
pub type Table<K, C> = LazyLock<Mutex<HashMap<(TypeId, DeviceId, K), C>>>;

/// What was measured for one kind of product.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Timing<K, C> {
    /// The product.
    pub kind: K,
    /// The fastest.
    pub choice: C,
    /// Its time, in ms.
    pub ms: f64,
}

/// The timings of an engine.
pub type Timings<E> = Vec<Timing<<E as MatrixEngine>::Kind, <E as MatrixEngine>::Choice>>;

/// The device of an engine.
pub type DeviceOf<E> = <<E as MatrixEngine>::Runtime as Runtime>::Device;

/// Products of fewer operations are not timed: there is nothing to win.
pub const LEAST_FLOPS: f64 = 1e8;
const WARM_UPS: usize = 2;
const RUNS: usize = 3;
/// The shortest span that is timed.
const LEAST_MS: f64 = 5.0;

/// What is known of a kind of product on a device.
pub(super) fn choice<E: MatrixEngine>(device: &DeviceOf<E>, kind: E::Kind) -> Option<E::Choice> {
    let table = E::table().lock().unwrap_or_else(PoisonError::into_inner);
    table.get(&key::<E>(device, kind)).copied()
}

fn key<E: MatrixEngine>(device: &DeviceOf<E>, kind: E::Kind) -> (TypeId, DeviceId, E::Kind) {
    (TypeId::of::<E::Runtime>(), device.to_id(), kind)
}

/// Lets the device's products follow earlier timings, and returns of how many. One that the device cannot run is left out.
pub fn install<E: MatrixEngine>(device: &DeviceOf<E>, timings: &[Timing<E::Kind, E::Choice>]) -> usize {
    let client = E::Runtime::client(device);
    let fits =
        |timing: &&Timing<E::Kind, E::Choice>| E::candidates(&client, timing.kind).contains(&timing.choice);
    let installed: Vec<_> = timings.iter().filter(fits).collect();
    let mut table = E::table().lock().unwrap_or_else(PoisonError::into_inner);
    table.extend(installed.iter().map(|timing| (key::<E>(device, timing.kind), timing.choice)));
    installed.len()
}

/// Times every kind of product, the largest first, installs what is fastest and gives it back. Kinds that are tiny, that were timed
/// before or that the budget has no time for are left out.
pub fn tune<E: MatrixEngine>(device: &DeviceOf<E>, kinds: &[E::Kind], budget: Duration) -> Timings<E> {
    let client = E::Runtime::client(device);
    let start = Instant::now();
    let mut kinds = kinds.to_vec();
    kinds.sort_by(|&a, &b| E::flops(b).total_cmp(&E::flops(a)));
    let mut timings: Timings<E> = Vec::new();
    for kind in kinds {
        let is_known =
            choice::<E>(device, kind).is_some() || timings.iter().any(|timing| timing.kind == kind);
        if is_known || E::flops(kind) < LEAST_FLOPS || start.elapsed() > budget {
            continue;
        }
        let candidates = E::candidates(&client, kind);
        if candidates.is_empty() {
            continue;
        }
        let scratch = E::scratch(&client, device, kind);
        // The rule's own choice comes first; without a rival's time it stands anyway.
        let times = candidates.into_iter().take_while(|_| start.elapsed() <= budget);
        let times = times.filter(|&choice| is_right::<E>(&scratch, kind, choice));
        let times = times.map(|choice| (choice, time::<E>(&client, &scratch, choice)));
        if let Some((choice, ms)) = times.filter(|(_, ms)| ms.is_finite()).min_by(|a, b| a.1.total_cmp(&b.1))
        {
            timings.push(Timing { kind, choice, ms });
        }
    }
    // What the scratch tensors took is the model's.
    client.memory_cleanup();
    install::<E>(device, &timings);
    timings
}

/// Whether the product comes out right in this way.
pub fn is_right<E: MatrixEngine>(scratch: &E::Scratch, kind: E::Kind, choice: E::Choice) -> bool {
    let out = E::launch(scratch, choice, Some(E::zeros(scratch)));
    out.is_some_and(|out| pattern::is_product(&out, E::depth(kind)))
}

/// The best time of a few, in ms; each over as many launches as take long beside a wait for the device.
fn time<E: MatrixEngine>(client: &ComputeClient<E::Runtime>, scratch: &E::Scratch, choice: E::Choice) -> f64 {
    let run = |launches: u32| {
        let start = Instant::now();
        for _ in 0..launches {
            drop(E::launch(scratch, choice, None));
        }
        // A device that fails here fails the run soon after, with a better message.
        let is_done = pollster::block_on(client.sync()).is_ok();
        if is_done { start.elapsed().as_secs_f64() * 1e3 / f64::from(launches) } else { f64::INFINITY }
    };
    let warm = (0..WARM_UPS).map(|_| run(1)).fold(f64::INFINITY, f64::min);
    let launches = (LEAST_MS / warm).ceil().clamp(1.0, 32.0) as u32;
    (0..RUNS).map(|_| run(launches)).fold(f64::INFINITY, f64::min)
}
