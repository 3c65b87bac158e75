//! How the products of [`lora_linear`](super::lora_linear) are made where that was timed on the device itself.
//!
//! Without a timing a formula chooses, which knows blocks and workgroups but no device. [`tune`] times the few ways that the
//! formula likes best, and burn's own product, on scratch tensors, and from then on products of the same kind take the fastest.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use burn::cubecl::Runtime;
use burn::tensor::backend::Backend;
use burn_wgpu::{Wgpu, WgpuDevice, WgpuRuntime};
use serde::{Deserialize, Serialize};

use super::kernel::{Cut, Elements, Layout};
use super::product;

/// What the time of a product depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Kind {
    /// How the operands lie in memory.
    pub layout: Layout,
    /// Rows of the output, rounded up to a power of two.
    pub m: u32,
    /// Columns of the output.
    pub n: u32,
    /// Entries that each entry of the output sums.
    pub depth: u32,
    /// Rank of the adapter whose product it starts from, or 0.
    pub rank: u32,
    /// What the operands hold.
    pub elements: Elements,
}

impl Kind {
    /// The kind of a product of these extents.
    pub fn new(layout: Layout, [m, n, depth, rank]: [u32; 4], elements: Elements) -> Self {
        // A product of more rows than that is no product of any model.
        let m = m.checked_next_power_of_two().unwrap_or(m);
        Self { layout, m, n, depth, rank, elements }
    }

    /// Its multiplications and additions.
    pub fn flops(self) -> f64 {
        2.0 * f64::from(self.m) * f64::from(self.n) * (f64::from(self.depth) + f64::from(self.rank))
    }

    /// The forward product of a linear layer and its gradient by the input, `[tokens, in, out, rank]`, with activations, weight
    /// and output of these types.
    pub fn of_linear([tokens, n_in, n_out, rank]: [u32; 4], elements: Elements) -> [Self; 2] {
        [
            Self::new(Layout::RowsRows, [tokens, n_out, n_in, rank], elements),
            Self::new(Layout::RowsColumns, [tokens, n_in, n_out, rank], elements),
        ]
    }

    /// Whether burn's product is as precise: it rounds to its operands' type, and so does every sum that follows it.
    fn suits_burn(self) -> bool {
        self.elements == Elements::F32
    }
}

/// Who makes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Choice {
    /// The project's kernels.
    Own(Cut),
    /// burn's product, to which the rest is added.
    Burn,
}

/// What was measured for one kind of product.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// The product.
    pub kind: Kind,
    /// The fastest.
    pub choice: Choice,
    /// Its time, in ms.
    pub ms: f64,
}

/// Products of fewer operations are not timed: there is nothing to win.
pub const LEAST_FLOPS: f64 = 1e8;
const WARM_UPS: usize = 2;
const RUNS: usize = 3;
/// The shortest span that is timed.
const LEAST_MS: f64 = 5.0;

static TABLE: LazyLock<Mutex<HashMap<(WgpuDevice, Kind), Choice>>> = LazyLock::new(Mutex::default);

/// What is known of a kind of product on a device.
pub(super) fn choice(device: &WgpuDevice, kind: Kind) -> Option<Choice> {
    let table = TABLE.lock().unwrap_or_else(PoisonError::into_inner);
    table.get(&(device.clone(), kind)).copied()
}

/// Lets the device's products follow earlier timings, and returns of how many. One that the device cannot run is left out.
pub fn install(device: &WgpuDevice, timings: &[Timing]) -> usize {
    let client = WgpuRuntime::client(device);
    let mut table = TABLE.lock().unwrap_or_else(PoisonError::into_inner);
    let fits =
        |timing: &&Timing| candidates(product::Device::of(&client), timing.kind).contains(&timing.choice);
    let installed: Vec<_> = timings.iter().filter(fits).collect();
    table.extend(installed.iter().map(|timing| ((device.clone(), timing.kind), timing.choice)));
    installed.len()
}

/// Times every kind of product, installs what is fastest and gives it back. Kinds that are tiny, that were timed before or that
/// the budget has no time for are left out.
pub fn tune(device: &WgpuDevice, kinds: &[Kind], budget: Duration) -> Vec<Timing> {
    let client = WgpuRuntime::client(device);
    let start = Instant::now();
    let mut timings: Vec<Timing> = Vec::new();
    for &kind in kinds {
        let is_known = choice(device, kind).is_some() || timings.iter().any(|timing| timing.kind == kind);
        if is_known || kind.flops() < LEAST_FLOPS || start.elapsed() > budget {
            continue;
        }
        let scratch = product::Scratch::new(&client, device, kind);
        let times = candidates(product::Device::of(&client), kind).into_iter();
        // The formula's own choice comes first; without a rival's time it stands anyway.
        let times = times.take_while(|_| start.elapsed() <= budget);
        let times = times.map(|choice| (choice, time(device, &scratch, choice)));
        if let Some((choice, ms)) = times.filter(|(_, ms)| ms.is_finite()).min_by(|a, b| a.1.total_cmp(&b.1))
        {
            timings.push(Timing { kind, choice, ms });
        }
    }
    // What the scratch tensors took is the model's.
    client.memory_cleanup();
    install(device, &timings);
    timings
}

/// What is worth timing, the formula's choice first.
fn candidates(device: product::Device, kind: Kind) -> Vec<Choice> {
    // Only the gradient by a layer's input meets a weight of another type and may be rounded to it.
    let rounds = kind.layout == Layout::RowsColumns;
    let cuts = device.cuts(kind.layout, kind.elements, [kind.m, kind.n], rounds);
    let mut candidates: Vec<_> = cuts.into_iter().map(Choice::Own).collect();
    candidates.extend(kind.suits_burn().then_some(Choice::Burn));
    candidates
}

/// The best time of a few, in ms; each over as many launches as take long beside a wait for the device.
fn time(device: &WgpuDevice, scratch: &product::Scratch, choice: Choice) -> f64 {
    let run = |launches: u32| {
        let start = Instant::now();
        for _ in 0..launches {
            drop(scratch.run(choice));
        }
        // A device that fails here fails the run soon after, with a better message.
        let is_done = <Wgpu as Backend>::sync(device).is_ok();
        if is_done { start.elapsed().as_secs_f64() * 1e3 / f64::from(launches) } else { f64::INFINITY }
    };
    let warm = (0..WARM_UPS).map(|_| run(1)).fold(f64::INFINITY, f64::min);
    let launches = (LEAST_MS / warm).ceil().clamp(1.0, 32.0) as u32;
    (0..RUNS).map(|_| run(launches)).fold(f64::INFINITY, f64::min)
}
