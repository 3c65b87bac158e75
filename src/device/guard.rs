//! Panics of the tensor library as errors.
//!
//! burn and cubecl answer a driver's failure with a panic, often on the device's own thread, while the thread that waits for it only
//! learns that it is gone. So panics of both are watched, and none of them is printed.

use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread::{self, ThreadId};

use burn::tensor::backend::DeviceOps;

use super::DeviceChoice;
use crate::error::{Error, Result};

/// A guarded piece of work that is running.
struct Watch {
    thread: ThreadId,
    /// How the names of the device's threads end.
    device_thread: Option<String>,
    /// What they panicked with.
    device_panics: Vec<String>,
    id: u64,
}

#[derive(Default)]
struct Watches {
    running: Vec<Watch>,
    n_started: u64,
}

static WATCHES: Mutex<Watches> = Mutex::new(Watches { running: Vec::new(), n_started: 0 });
static HOOK: Once = Once::new();

/// Runs `work` on a device and turns a panic into an error.
///
/// While it runs, panics of this thread, of the device's threads and of thread pools print nothing, unless `RUST_BACKTRACE` is `full`.
///
/// # Errors
/// What `work` returns; [`Error::Device`] with the panic's message if it, or the device's own thread, panics. `step` says what was
/// being done.
pub fn guard<T>(step: &str, choice: &DeviceChoice, work: impl FnOnce() -> Result<T>) -> Result<T> {
    HOOK.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |info| {
            if !on_panic(info) || std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value == "full") {
                usual(info);
            }
        }));
    });
    let id = start(choice);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    let device_panic = stop(id).into_iter().next();
    let message = match (outcome, device_panic) {
        (Ok(Ok(value)), None) => return Ok(value),
        (Ok(Err(error)), None) => return Err(error),
        (_, Some(message)) => message,
        (Err(payload), None) => text(payload.as_ref()),
    };
    Err(Error::Device {
        device: choice.to_string(),
        problem: format!("{step} failed: {}", first_cause(&message)),
        hint: Some(hint(choice, &message).to_owned()),
    })
}

fn watches() -> MutexGuard<'static, Watches> {
    WATCHES.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start(choice: &DeviceChoice) -> u64 {
    let device_thread = match choice {
        DeviceChoice::Cpu => None,
        DeviceChoice::Wgpu { device, .. } => {
            let id = device.id();
            Some(format!("-{}-{}", id.type_id, id.index_id))
        }
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(gpu) => {
            let id = gpu.device().id();
            Some(format!("-{}-{}", id.type_id, id.index_id))
        }
    };
    let mut watches = watches();
    watches.n_started += 1;
    let id = watches.n_started;
    watches.running.push(Watch {
        thread: thread::current().id(),
        device_thread,
        device_panics: Vec::new(),
        id,
    });
    id
}

fn stop(id: u64) -> Vec<String> {
    let mut watches = watches();
    let place = watches.running.iter().position(|watch| watch.id == id);
    place.map(|i| watches.running.swap_remove(i).device_panics).unwrap_or_default()
}

/// Notes a panic, and returns whether it belongs to guarded work.
fn on_panic(info: &PanicHookInfo) -> bool {
    let thread = thread::current();
    let mut belongs = false;
    for watch in &mut watches().running {
        if watch.device_thread.as_ref().is_some_and(|device| is_device_thread(thread.name(), device)) {
            watch.device_panics.push(text(info.payload()));
            belongs = true;
        }
        // A thread pool's threads have no name, and pass a panic on to the thread that they work for.
        belongs |= watch.thread == thread.id() || thread.name().is_none();
    }
    belongs
}

/// cubecl names them `DSD-0-1`: device service, downstream or upstream, device type, index.
fn is_device_thread(name: Option<&str>, device: &str) -> bool {
    name.and_then(|name| name.strip_prefix("DS")).is_some_and(|name| name.ends_with(device))
}

fn text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message").to_owned()
}

/// An error's message in one line: without its backtrace, and without the words that say only that there is an error.
pub(super) fn first_cause(message: &str) -> String {
    const MAX_CHARS: usize = 400;
    let end = ["Backtrace:", "No backtrace available"].iter().filter_map(|text| message.find(text)).min();
    let message = &message[..end.unwrap_or(message.len())];
    let message = message.trim_start_matches("called `Result::unwrap()` on an `Err` value: ");
    let empty = ["An error happened during execution", "Caused by:"];
    let lines = message.lines().map(str::trim).filter(|line| !line.is_empty() && !empty.contains(line));
    let line = lines.collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

fn hint(choice: &DeviceChoice, message: &str) -> &'static str {
    let message = message.to_lowercase();
    let is_full = ["memory", "alloc", "buffer"].iter().any(|word| message.contains(word));
    match choice {
        DeviceChoice::Cpu => {
            "this is a fault of this program: with RUST_BACKTRACE=full it says where it happened"
        }
        _ if is_full => {
            "the device is probably full: lower --max_length or --batch_size, close other programs, or pass --device cpu"
        }
        _ => {
            "update the GPU's driver or pass --device cpu; with RUST_BACKTRACE=full it says where it happened"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guarded(work: impl FnOnce() -> Result<()>) -> String {
        guard("a test", &DeviceChoice::Cpu, work).unwrap_err().to_string()
    }

    #[test]
    fn panics_become_errors_and_errors_stay() {
        assert_eq!(guard("a test", &DeviceChoice::Cpu, || Ok(7)).unwrap(), 7);
        assert_eq!(guarded(|| Err(Error::config("wrong"))), "invalid configuration: wrong");
        assert_eq!(guarded(|| panic!("no {}", "luck")), "device cpu: a test failed: no luck");
    }

    #[test]
    fn guards_nest() {
        let outer = guarded(|| {
            assert_eq!(guarded(|| panic!("inner")), "device cpu: a test failed: inner");
            panic!("outer")
        });
        assert_eq!(outer, "device cpu: a test failed: outer");
    }

    #[test]
    fn a_message_is_one_line_without_backtrace() {
        let message =
            "An error happened during execution\nCaused by:\n  a bad\n  shader\nBacktrace:\n 0: main";
        assert_eq!(first_cause(message), "a bad shader");
        let unwrapped = "called `Result::unwrap()` on an `Err` value: no room\nNo backtrace available";
        assert_eq!(first_cause(unwrapped), "no room");
        assert_eq!(first_cause(&"é".repeat(500)).chars().count(), 401);
    }

    #[test]
    fn device_threads_are_known_by_name() {
        assert!(is_device_thread(Some("DSD-0-1"), "-0-1"), "the device's own");
        assert!(!is_device_thread(Some("DSD-0-11"), "-0-1"), "another device's");
        assert!(!is_device_thread(Some("main"), "-0-1"), "no device's");
        assert!(!is_device_thread(None, "-0-1"), "no name");
    }
}
