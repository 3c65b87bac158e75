//! How the products of [`lora_linear`](super::lora_linear) are made where that was timed on the device itself.
//!
//! Without a timing an engine follows a rule, which knows blocks and workgroups but no device. [`tune()`] times the few ways that an
//! engine has of making a product on scratch tensors, and from then on products of the same kind take the fastest that comes out right:
//! drivers run some that they should refuse, or pretend to. So a rule takes matrix units only where they get a small product right.

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
use burn::cubecl::server::ServerError;
use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::cube::settle;

pub use pattern::is_product;
pub(super) use pattern::{LEFT, RIGHT, addend, operand};

/// A matrix engine that has several ways of making a product, of which a device has its fastest.
pub trait Tunable: 'static {
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

    /// The products of a linear layer, forward and by its input.
    fn of_linear(linear: LinearKind) -> [Self::Kind; 2];

    /// A product's multiplications and additions.
    fn flops(kind: Self::Kind) -> f64;

    /// How many products of two entries each entry of the output sums, the adapter's included.
    fn depth(kind: Self::Kind) -> usize;

    /// The same product of the next larger number of [`like_rows`].
    fn of_more_rows(kind: Self::Kind) -> Self::Kind;

    /// What is worth timing, the rule's choice first.
    fn candidates(device: &<Self::Runtime as Runtime>::Device, kind: Self::Kind) -> Vec<Self::Choice>;

    /// Operands of a product, of [`typical_rows`], with entries of which each sum is known.
    fn scratch(
        client: &ComputeClient<Self::Runtime>,
        device: &<Self::Runtime as Runtime>::Device,
        kind: Self::Kind,
    ) -> Self::Scratch;

    /// Launches the product, and gives nothing where it cannot be made in this way. With a `place` it is made to be looked at, and written
    /// over that or added to it; without one there is only the time to be seen.
    fn launch(
        scratch: &Self::Scratch,
        choice: Self::Choice,
        place: Option<CubeTensor<Self::Runtime>>,
    ) -> Option<CubeTensor<Self::Runtime>>;

    /// A tensor of the output's shape and type, without gaps between rows: what the product is added to in place, else zeros, so that it
    /// shows where nothing is written.
    fn place(scratch: &Self::Scratch) -> CubeTensor<Self::Runtime>;

    /// Whether a product that is looked at is added to something.
    fn is_added(kind: Self::Kind) -> bool;
}

/// What the products of a linear layer depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearKind {
    /// `[tokens, in, out, rank]`
    pub extents: [u32; 4],
    /// What its frozen weight holds, and the activations.
    pub dtype: DType,
    /// Whether its output joins the residual stream, which is `f32`, as is the gradient that it gets then.
    pub joins_stream: bool,
    /// Whether the gradient by its input is added to another linear's.
    pub shares_input: bool,
}

/// What is known of products of one kind: every way that was tried, and what came of it.
type Tried<C> = Vec<(C, Outcome)>;

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
pub type Timings<E> = Vec<Timing<<E as Tunable>::Kind, <E as Tunable>::Choice>>;

/// The device of an engine.
pub type DeviceOf<E> = <<E as Tunable>::Runtime as Runtime>::Device;

/// How a kind of product is best made on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict<C> {
    /// Nothing was tried.
    Untried,
    /// The fastest way that comes out right.
    Fastest(C),
    /// Of what was tried, none comes out right.
    NoneRight,
}

/// Raised with every change of what is timed or held to be right: older timings say something else.
pub const METHOD: u32 = 10;
/// Products of fewer operations are not timed: there is nothing to win.
pub const LEAST_FLOPS: f64 = 1e8;
/// Times that each way of making a product is timed, at least.
const ROUNDS: u32 = 4;
/// How long a kind's ways are timed, at least: a GPU that waited for a compiler has slowed its clock down, and takes a while.
const LEAST_SPAN: Duration = Duration::from_millis(300);
/// A way that takes so many times the fastest's time at first is not timed again; a slow clock alone makes it less.
const FAR_SLOWER: f64 = 8.0;
/// The shortest span that is timed.
const LEAST_MS: f64 = 5.0;

/// What so many rows count as: the next power of two, or three quarters of it. Which tile is fastest depends on how many there are.
pub fn like_rows(rows: usize) -> usize {
    let power = rows.checked_next_power_of_two().unwrap_or(rows);
    let before = power / 4 * 3;
    if rows <= before { before } else { power }
}

/// The rows for which all products stand that count as so many: as many as are in the middle between them and the next fewer, and no
/// multiple of a block's, as a batch's tokens are none.
pub fn typical_rows(like: usize) -> usize {
    let fewer = if like.is_power_of_two() { like / 4 * 3 } else { like / 3 * 2 };
    usize::midpoint(fewer, like) + 1
}

/// What is known of a kind of product on a device. A run times its longest rows and the usual ones: of others it is what is known of
/// up to twice as many.
pub fn verdict<E: Tunable>(device: &DeviceOf<E>, kind: E::Kind) -> Verdict<E::Choice> {
    let kinds = std::iter::successors(Some(kind), |&kind| Some(E::of_more_rows(kind))).take(3);
    let mut verdicts = kinds.map(|kind| verdict_of::<E>(device, kind));
    verdicts.find(|verdict| *verdict != Verdict::Untried).unwrap_or(Verdict::Untried)
}

fn verdict_of<E: Tunable>(device: &DeviceOf<E>, kind: E::Kind) -> Verdict<E::Choice> {
    with_tried::<E, _>(device, kind, |tried| {
        let time =
            |&(choice, outcome)| if let Outcome::Right(ms) = outcome { Some((choice, ms)) } else { None };
        match tried.iter().filter_map(time).min_by(|a, b| a.1.total_cmp(&b.1)) {
            Some((choice, _)) => Verdict::Fastest(choice),
            None if tried.iter().any(|(_, outcome)| *outcome == Outcome::Wrong) => Verdict::NoneRight,
            None => Verdict::Untried,
        }
    })
}

/// What came of a way of making this kind of product, where it was tried.
fn known<E: Tunable>(device: &DeviceOf<E>, kind: E::Kind, choice: E::Choice) -> Option<Outcome> {
    with_tried::<E, _>(device, kind, |tried| {
        let known = tried.iter().find(|(known, _)| *known == choice);
        known.map(|&(_, outcome)| outcome)
    })
}

/// Whether a way makes this kind of product right, where that was found out.
pub(super) fn is_known_right<E: Tunable>(
    device: &DeviceOf<E>,
    kind: E::Kind,
    choice: E::Choice,
) -> Option<bool> {
    match known::<E>(device, kind, choice)? {
        Outcome::Right(_) => Some(true),
        Outcome::Wrong => Some(false),
        Outcome::Failed => None,
    }
}

fn with_tried<E: Tunable, T>(
    device: &DeviceOf<E>,
    kind: E::Kind,
    f: impl FnOnce(&[(E::Choice, Outcome)]) -> T,
) -> T {
    let table = E::table().lock().unwrap_or_else(PoisonError::into_inner);
    f(table.get(&key::<E>(device, kind)).map_or(&[], |tried| tried))
}

fn keep<E: Tunable>(device: &DeviceOf<E>, kind: E::Kind, choice: E::Choice, outcome: Outcome) {
    let mut table = E::table().lock().unwrap_or_else(PoisonError::into_inner);
    let tried = table.entry(key::<E>(device, kind)).or_default();
    tried.retain(|&(known, _)| known != choice);
    tried.push((choice, outcome));
}

fn key<E: Tunable>(device: &DeviceOf<E>, kind: E::Kind) -> (TypeId, DeviceId, E::Kind) {
    (TypeId::of::<E::Runtime>(), device.to_id(), kind)
}

/// Lets the device's products follow earlier timings, and returns how many. One of what the device would not try is left out.
pub fn install<E: Tunable>(device: &DeviceOf<E>, timings: &[Timing<E::Kind, E::Choice>]) -> usize {
    let fits =
        |timing: &&Timing<E::Kind, E::Choice>| E::candidates(device, timing.kind).contains(&timing.choice);
    let install = |&&Timing { kind, choice, ms }: &&Timing<E::Kind, E::Choice>| {
        keep::<E>(device, kind, choice, ms.map_or(Outcome::Wrong, Outcome::Right));
    };
    timings.iter().filter(fits).inspect(install).count()
}

/// Times every way of every kind of product, the largest first, lets the device's products follow them and hands each timing to
/// `keep`. Kinds that are tiny are left out, and so is what was timed before or what the budget has no time for: that comes next time.
///
/// # Panics
/// If the device failed before, or does not survive one of the ways.
pub fn tune<E: Tunable>(
    device: &DeviceOf<E>,
    kinds: &[E::Kind],
    budget: Duration,
    mut keep_timing: impl FnMut(Timing<E::Kind, E::Choice>),
) {
    let client = E::Runtime::client(device);
    let start = Instant::now();
    let is_over = || start.elapsed() > budget;
    let mut kinds = kinds.to_vec();
    kinds.retain(|&kind| E::flops(kind) >= LEAST_FLOPS);
    kinds.sort_by(|&a, &b| E::flops(b).total_cmp(&E::flops(a)));
    for kind in kinds {
        let mut candidates = E::candidates(device, kind);
        candidates.retain(|&choice| known::<E>(device, kind, choice).is_none());
        if candidates.is_empty() || is_over() {
            continue;
        }
        let scratch = E::scratch(&client, device, kind);
        let mut right = Vec::with_capacity(candidates.len());
        for choice in candidates {
            if is_over() {
                break;
            }
            match try_out::<E>(device, &scratch, kind, choice) {
                Outcome::Right(_) => right.push(choice),
                Outcome::Wrong => keep_timing(Timing { kind, choice, ms: None }),
                Outcome::Failed => {}
            }
        }
        for (choice, ms) in right.iter().zip(time::<E>(&client, &scratch, &right, is_over)) {
            let outcome = if ms.is_finite() { Outcome::Right(ms) } else { Outcome::Failed };
            keep::<E>(device, kind, *choice, outcome);
            if outcome != Outcome::Failed {
                keep_timing(Timing { kind, choice: *choice, ms: Some(ms) });
            }
        }
    }
    // What the scratch tensors took is the model's.
    client.memory_cleanup();
}

/// Whether a way makes this kind of product right; tried once a process.
///
/// # Panics
/// If the device failed before.
pub(super) fn comes_out_right<E: Tunable>(device: &DeviceOf<E>, kind: E::Kind, choice: E::Choice) -> bool {
    // What the device failed in, maybe for want of memory, it may do another time.
    let known = known::<E>(device, kind, choice).filter(|outcome| *outcome != Outcome::Failed);
    let outcome = known.unwrap_or_else(|| {
        let client = E::Runtime::client(device);
        try_out::<E>(device, &E::scratch(&client, device, kind), kind, choice)
    });
    matches!(outcome, Outcome::Right(_))
}

/// What came of trying a way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outcome {
    /// It takes so many ms, infinitely many as long as it was not timed.
    Right(f64),
    /// It gives something else, or cannot be tried.
    Wrong,
    /// The device failed, maybe for want of memory: another time it may not.
    Failed,
}

/// Tries a way without timing it, and lets the device's products follow what came of it.
///
/// # Panics
/// If the device failed before, which must not count as a failure of this way.
fn try_out<E: Tunable>(
    device: &DeviceOf<E>,
    scratch: &E::Scratch,
    kind: E::Kind,
    choice: E::Choice,
) -> Outcome {
    let client = E::Runtime::client(device);
    settle(&client);
    let is_right = is_right::<E>(scratch, kind, choice);
    // wgpu tells of a launch that failed only when it is waited for.
    let has_failed = pollster::block_on(client.sync()).is_err();
    let outcome = match is_right {
        Ok(true) if !has_failed => Outcome::Right(f64::INFINITY),
        Ok(false) if !has_failed => Outcome::Wrong,
        _ => Outcome::Failed,
    };
    keep::<E>(device, kind, choice, outcome);
    outcome
}

/// Whether the product comes out right in this way.
///
/// # Errors
/// If the device fails.
pub fn is_right<E: Tunable>(
    scratch: &E::Scratch,
    kind: E::Kind,
    choice: E::Choice,
) -> Result<bool, ServerError> {
    let out = E::launch(scratch, choice, Some(E::place(scratch)));
    out.map_or(Ok(false), |out| is_product(&out, E::depth(kind), E::is_added(kind)))
}

/// The best time of each way in ms, infinite where the device failed; see [`best_times`].
fn time<E: Tunable>(
    client: &ComputeClient<E::Runtime>,
    scratch: &E::Scratch,
    choices: &[E::Choice],
    is_over: impl Fn() -> bool,
) -> Vec<f64> {
    let run = |i: usize, launches: u32| {
        let start = Instant::now();
        for _ in 0..launches {
            drop(E::launch(scratch, choices[i], None));
        }
        let is_done = pollster::block_on(client.sync()).is_ok();
        if is_done { start.elapsed().as_secs_f64() * 1e3 / f64::from(launches) } else { f64::INFINITY }
    };
    best_times(choices.len(), run, is_over)
}

/// The best time of each way in ms, where `run(way, launches)` gives the mean of so many launches. The ways take turns, so that none is
/// timed by a slower clock than the others; a turn has as many launches as take long beside a wait for the device. Each is launched twice
/// at least; once it `is_over`, they take no turn beyond [`LEAST_SPAN`].
fn best_times(n_ways: usize, run: impl Fn(usize, u32) -> f64, is_over: impl Fn() -> bool) -> Vec<f64> {
    // The first launch compiles: what a way was tried with may have been another kernel.
    for way in 0..n_ways {
        run(way, 1);
    }
    let mut times: Vec<_> = (0..n_ways).map(|i| run(i, 1)).collect();
    let far = FAR_SLOWER * times.iter().copied().fold(f64::INFINITY, f64::min);
    let close: Vec<_> = (0..n_ways).filter(|&i| times[i].is_finite() && times[i] <= far).collect();
    let (start, mut rounds) = (Instant::now(), 0);
    while !close.is_empty() && (rounds < ROUNDS || start.elapsed() < LEAST_SPAN) {
        for &i in &close {
            // What is timed by a slow clock alone would count in later runs as well.
            if is_over() && start.elapsed() >= LEAST_SPAN {
                return times;
            }
            if times[i].is_infinite() {
                continue;
            }
            let again = run(i, (LEAST_MS / times[i]).ceil().clamp(1.0, 32.0) as u32);
            times[i] = if again.is_finite() { times[i].min(again) } else { again };
        }
        rounds += 1;
    }
    times
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_a_first_launch_compiles_makes_no_way_slow() {
        let launched = [const { Cell::new(false) }; 2];
        let run = |i: usize, _: u32| match launched[i].replace(true) {
            true => [2.0, 1.0][i],
            false => [3.0, 1500.0][i],
        };
        assert_eq!(best_times(2, run, || false), [2.0, 1.0]);
    }

    #[test]
    fn rows_count_as_a_few_more_and_are_timed_between_these_and_fewer() {
        for rows in 1..5000 {
            let like = like_rows(rows);
            assert!(rows <= like && 2 * like <= 3 * rows, "{rows} rows as {like}");
            assert_eq!(like_rows(like), like, "{rows} rows");
            let typical = typical_rows(like);
            assert_eq!(like_rows(typical), like, "{typical} rows stand for those like {like}");
        }
        assert_eq!([1534, 1537].map(like_rows), [1536, 2048]);
        assert_eq!([1536, 2048].map(typical_rows), [1281, 1793]);
    }
}
