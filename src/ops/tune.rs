//! How the products of [`lora_linear`](super::lora_linear) are made where that was timed on the device itself.
//!
//! Without a timing an engine follows a rule, which knows blocks and workgroups but no device. [`tune`] times the few ways that an
//! engine has of making a product on scratch tensors, and from then on products of the same kind take the fastest that comes out right:
//! drivers run some that they should refuse, or pretend to.

mod pattern;

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

use super::cube::settle;

pub use pattern::is_product;
pub(super) use pattern::{LEFT, RIGHT, operand};

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

    /// Operands of a product, of [`typical_rows`], with entries of which each sum is known.
    fn scratch(
        client: &ComputeClient<Self::Runtime>,
        device: &<Self::Runtime as Runtime>::Device,
        kind: Self::Kind,
    ) -> Self::Scratch;

    /// Launches the product, and gives nothing where it cannot be made in this way. A way that writes its output itself writes it over
    /// `zeros`, where these are there: then what is not written shows.
    fn launch(
        scratch: &Self::Scratch,
        choice: Self::Choice,
        zeros: Option<CubeTensor<Self::Runtime>>,
    ) -> Option<CubeTensor<Self::Runtime>>;

    /// Zeros of the output's shape and type, without gaps between rows.
    fn zeros(scratch: &Self::Scratch) -> CubeTensor<Self::Runtime>;
}

/// What is known of products of one kind: every way that was tried, with its time where it came out right.
type Tried<C> = Vec<(C, Option<f64>)>;

/// What is known in a process, by runtime, device and kind.
pub type Table<K, C> = LazyLock<Mutex<HashMap<(TypeId, DeviceId, K), Tried<C>>>>;

/// What was measured of one way of making one kind of product.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Timing<K, C> {
    /// The product.
    pub kind: K,
    /// The way.
    pub choice: C,
    /// Its time, in ms; none where it does not come out right.
    pub ms: Option<f64>,
}

/// The timings of an engine.
pub type Timings<E> = Vec<Timing<<E as MatrixEngine>::Kind, <E as MatrixEngine>::Choice>>;

/// The device of an engine.
pub type DeviceOf<E> = <<E as MatrixEngine>::Runtime as Runtime>::Device;

/// How a kind of product is best made on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict<C> {
    /// Nothing was tried.
    Untried,
    /// The fastest way that comes out right.
    Fastest(C),
    /// What was tried comes out wrong.
    Wrong,
}

/// Products of fewer operations are not timed: there is nothing to win.
pub const LEAST_FLOPS: f64 = 1e8;
const WARM_UPS: usize = 2;
const RUNS: usize = 3;
/// The shortest span that is timed.
const LEAST_MS: f64 = 5.0;

/// The rows for which all products stand whose rows round up to this power of two: as many as are in the middle between it and the
/// one before, and no multiple of a block's, as a batch's tokens are none.
pub fn typical_rows(power_of_two: usize) -> usize {
    3 * power_of_two / 4 + 1
}

/// What is known of a kind of product on a device.
pub fn verdict<E: MatrixEngine>(device: &DeviceOf<E>, kind: E::Kind) -> Verdict<E::Choice> {
    let tried = tried::<E>(device, kind);
    let right = tried.iter().filter_map(|&(choice, ms)| Some((choice, ms?)));
    match right.min_by(|a, b| a.1.total_cmp(&b.1)) {
        Some((choice, _)) => Verdict::Fastest(choice),
        None if tried.is_empty() => Verdict::Untried,
        None => Verdict::Wrong,
    }
}

fn tried<E: MatrixEngine>(device: &DeviceOf<E>, kind: E::Kind) -> Tried<E::Choice> {
    let table = E::table().lock().unwrap_or_else(PoisonError::into_inner);
    table.get(&key::<E>(device, kind)).cloned().unwrap_or_default()
}

fn key<E: MatrixEngine>(device: &DeviceOf<E>, kind: E::Kind) -> (TypeId, DeviceId, E::Kind) {
    (TypeId::of::<E::Runtime>(), device.to_id(), kind)
}

/// Lets the device's products follow earlier timings, and returns how many. One of what the device would not try is left out.
pub fn install<E: MatrixEngine>(device: &DeviceOf<E>, timings: &[Timing<E::Kind, E::Choice>]) -> usize {
    let client = E::Runtime::client(device);
    let fits =
        |timing: &&Timing<E::Kind, E::Choice>| E::candidates(&client, timing.kind).contains(&timing.choice);
    let installed: Vec<_> = timings.iter().filter(fits).collect();
    let mut table = E::table().lock().unwrap_or_else(PoisonError::into_inner);
    for &&Timing { kind, choice, ms } in &installed {
        let tried = table.entry(key::<E>(device, kind)).or_default();
        tried.retain(|&(known, _)| known != choice);
        tried.push((choice, ms));
    }
    installed.len()
}

/// Times every way of every kind of product, the largest first, lets the device's products follow them and gives them back. Kinds that
/// are tiny are left out, and so is what was timed before or what the budget has no time for: that comes next time.
///
/// # Panics
/// If the device failed before, or one of the ways makes it fail.
pub fn tune<E: MatrixEngine>(device: &DeviceOf<E>, kinds: &[E::Kind], budget: Duration) -> Timings<E> {
    let client = E::Runtime::client(device);
    let start = Instant::now();
    let is_over = || start.elapsed() > budget;
    let mut kinds = kinds.to_vec();
    kinds.retain(|&kind| E::flops(kind) >= LEAST_FLOPS);
    kinds.sort_by(|&a, &b| E::flops(b).total_cmp(&E::flops(a)));
    let mut timings: Timings<E> = Vec::new();
    for kind in kinds {
        let tried = tried::<E>(device, kind);
        let mut candidates = E::candidates(&client, kind);
        candidates.retain(|candidate| tried.iter().all(|(choice, _)| choice != candidate));
        if candidates.is_empty() || is_over() {
            continue;
        }
        let scratch = E::scratch(&client, device, kind);
        let candidates = candidates.into_iter().take_while(|_| !is_over());
        let timed = candidates.map(|choice| measure::<E>(&client, &scratch, kind, choice));
        let timed: Timings<E> = timed.collect();
        install::<E>(device, &timed);
        timings.extend(timed);
    }
    // What the scratch tensors took is the model's.
    client.memory_cleanup();
    timings
}

/// The rule's choice for this kind of product, if it comes out right; tried once a process.
///
/// # Panics
/// As [`tune()`].
pub(super) fn rule<E: MatrixEngine>(device: &DeviceOf<E>, kind: E::Kind) -> Option<E::Choice> {
    match verdict::<E>(device, kind) {
        Verdict::Fastest(choice) => Some(choice),
        Verdict::Wrong => None,
        Verdict::Untried => {
            let client = E::Runtime::client(device);
            let choice = E::candidates(&client, kind).into_iter().next()?;
            let timing = measure::<E>(&client, &E::scratch(&client, device, kind), kind, choice);
            install::<E>(device, std::slice::from_ref(&timing));
            timing.ms.map(|_| choice)
        }
    }
}

fn measure<E: MatrixEngine>(
    client: &ComputeClient<E::Runtime>,
    scratch: &E::Scratch,
    kind: E::Kind,
    choice: E::Choice,
) -> Timing<E::Kind, E::Choice> {
    // What failed before must not count as a failure of this way.
    settle(client);
    let ms = is_right::<E>(scratch, kind, choice).then(|| time::<E>(client, scratch, choice));
    Timing { kind, choice, ms: ms.filter(|ms| ms.is_finite()) }
}

/// Whether the product comes out right in this way.
pub fn is_right<E: MatrixEngine>(scratch: &E::Scratch, kind: E::Kind, choice: E::Choice) -> bool {
    let out = E::launch(scratch, choice, Some(E::zeros(scratch)));
    out.is_some_and(|out| is_product(&out, E::depth(kind)))
}

/// The best time of a few, in ms; each over as many launches as take long beside a wait for the device.
fn time<E: MatrixEngine>(client: &ComputeClient<E::Runtime>, scratch: &E::Scratch, choice: E::Choice) -> f64 {
    let run = |launches: u32| {
        let start = Instant::now();
        for _ in 0..launches {
            drop(E::launch(scratch, choice, None));
        }
        let is_done = pollster::block_on(client.sync()).is_ok();
        if is_done { start.elapsed().as_secs_f64() * 1e3 / f64::from(launches) } else { f64::INFINITY }
    };
    let warm = (0..WARM_UPS).map(|_| run(1)).fold(f64::INFINITY, f64::min);
    let launches = (LEAST_MS / warm).ceil().clamp(1.0, 32.0) as u32;
    (0..RUNS).map(|_| run(launches)).fold(f64::INFINITY, f64::min)
}
