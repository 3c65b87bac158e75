//! Where a step's time goes on the device: the launches that cost under a name, with what it computes and moves.
//!
//! Off, a launch pays two loads for it. On, a launch is measured by itself, with the device's own timestamps where it has
//! them and by the clock otherwise, which is why a profiled step takes longer than its kernels.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::LocalKey;

use burn::cubecl::Runtime;
use burn::cubecl::client::ComputeClient;

/// The launches of one name.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The op and its direction.
    pub name: &'static str,
    /// Launches.
    pub calls: u64,
    /// Time on the device, of all of them; NaN if the device failed to measure one.
    pub seconds: f64,
    /// Floating-point operations, of all of them.
    pub flops: u64,
    /// Bytes that the ops read and write at least, of all of them.
    pub bytes: u64,
}

static IS_ON: AtomicBool = AtomicBool::new(false);
static ENTRIES: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

thread_local! {
    /// The most bytes in tensors at a launch of this thread so far, while they are watched.
    static PEAK_BYTES: Cell<Option<u64>> = const { Cell::new(None) };
    /// Under which name this thread's launches go, where an op launches another's kernels.
    static NAME: Cell<Option<&'static str>> = const { Cell::new(None) };
}

fn entries() -> MutexGuard<'static, Vec<Entry>> {
    // An entry is whole whenever the lock is free, also after a panic.
    ENTRIES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Begins to record the launches of all threads, from nothing.
pub fn start() {
    entries().clear();
    IS_ON.store(true, Ordering::Relaxed);
}

/// Ends recording and gives the entries, the one that took most time first.
pub fn finish() -> Vec<Entry> {
    IS_ON.store(false, Ordering::Relaxed);
    let mut entries = std::mem::take(&mut *entries());
    entries.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    entries
}

/// Runs `f` and gives, beside what it returns, the most bytes that tensors took at a launch of this thread, what the launch reads and
/// writes included; none if it launched nothing.
///
/// The host waits at each launch until those before are under way, which is why steps that are timed are not watched.
pub fn watch_memory<T>(f: impl FnOnce() -> T) -> (T, Option<u64>) {
    let _restore = Restore(&PEAK_BYTES, PEAK_BYTES.replace(Some(0)));
    let result = f();
    (result, PEAK_BYTES.get().filter(|&bytes| bytes > 0))
}

/// Runs `f`, whose launches are recorded under this name whatever they are called: an op may take another's kernels.
pub fn named<T>(name: &'static str, f: impl FnOnce() -> T) -> T {
    let _restore = Restore(&NAME, NAME.replace(Some(name)));
    f()
}

/// Puts a thread's value back when it is dropped, also by a panic that somebody catches.
struct Restore<T: Copy + 'static>(&'static LocalKey<Cell<T>>, T);

impl<T: Copy + 'static> Drop for Restore<T> {
    fn drop(&mut self) {
        self.0.set(self.1);
    }
}

/// Runs `launch`, which launches on `client`, and records it if recording is on. Calls do not nest.
pub fn kernel<R: Runtime>(
    name: &'static str,
    flops: usize,
    bytes: usize,
    client: &ComputeClient<R>,
    launch: impl FnOnce() + Send,
) {
    if let Some(peak_bytes) = PEAK_BYTES.get() {
        let in_use = client.memory_usage().map_or(0, |usage| usage.bytes_in_use);
        PEAK_BYTES.set(Some(peak_bytes.max(in_use)));
    }
    if !IS_ON.load(Ordering::Relaxed) {
        return launch();
    }
    let name = NAME.get().unwrap_or(name);
    let seconds = match client.profile(launch, name) {
        Ok(((), duration)) => pollster::block_on(duration.resolve()).duration().as_secs_f64(),
        Err(_) => f64::NAN,
    };
    let mut entries = entries();
    let known = entries.iter().position(|entry| entry.name == name);
    let at = known.unwrap_or_else(|| {
        entries.push(Entry { name, calls: 0, seconds: 0.0, flops: 0, bytes: 0 });
        entries.len() - 1
    });
    let entry = &mut entries[at];
    entry.calls += 1;
    entry.seconds += seconds;
    entry.flops += flops as u64;
    entry.bytes += bytes as u64;
}
