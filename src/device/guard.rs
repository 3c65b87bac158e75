//! Panics of the tensor library as errors.
//!
//! burn and cubecl answer a driver's failure with a panic, often on the device's own thread, while the thread that waits for it only
//! learns that it is gone. So panics of both are watched, and none of them is printed.

use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread::{self, ThreadId};

use burn::tensor::backend::DeviceOps;

use super::{DeviceChoice, size};
use crate::error::{Error, Result};

/// A guarded piece of work that is running.
struct Watch {
    thread: ThreadId,
    /// How the names of the device's threads end.
    device_thread: Option<String>,
    /// What they panicked with.
    device_panics: Vec<String>,
    /// What the work is at, where it says so.
    doing: Option<String>,
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
/// What `work` returns, with the device as the user names it; [`Error::Device`] with the panic's message if it, or the device's own thread, panics, and
/// [`Error::OutOfMemory`] where that, or an error of the device, says that there was no room. `step` says what was being done, unless
/// [`doing`] did.
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
    let (doing, device_panics) = stop(id);
    let cause = match (outcome, device_panics.into_iter().next()) {
        (Ok(Ok(value)), None) => return Ok(value),
        (Ok(Err(error)), None) => match error {
            // What the device itself says comes without a hint.
            Error::Device { problem, hint, .. } if hint.is_none() || is_out_of_memory(&problem) => problem,
            Error::Device { problem, hint, .. } => {
                return Err(Error::Device { device: choice.to_string(), problem, hint });
            }
            other => return Err(other),
        },
        (_, Some(message)) => message,
        (Err(payload), None) => text(payload.as_ref()),
    };
    let (device, cause) = (choice.to_string(), first_cause(&cause));
    let doing = doing.unwrap_or_else(|| step.to_owned());
    if is_out_of_memory(&cause) {
        let problem = format!("{}; {}", not_allocated(choice, &cause), held(choice));
        return Err(Error::OutOfMemory { device, doing, problem, hint: Some(SMALLER.to_owned()) });
    }
    let problem = format!("{doing} failed: {cause}");
    Err(Error::Device { device, problem, hint: Some(hint(choice, &cause).to_owned()) })
}

/// Says what the guarded work of this thread is at, for the error that it may end with: `step 12`.
///
/// # Panics
/// If the device's own thread has panicked, with its message: that launched something no more, and the numbers of what follows would be
/// anything. The guard makes an error of it.
pub fn doing(what: impl Into<String>) {
    let thread = thread::current().id();
    let mut watches = watches();
    // The innermost comes last.
    let Some(watch) = watches.running.iter_mut().rev().find(|watch| watch.thread == thread) else { return };
    if let Some(message) = watch.device_panics.first().cloned() {
        drop(watches);
        panic!("{message}");
    }
    watch.doing = Some(what.into());
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
        doing: None,
        id,
    });
    id
}

/// Ends a watch: what the work was at, and the panics of the device's threads, which are no longer those of the work around it.
fn stop(id: u64) -> (Option<String>, Vec<String>) {
    let mut watches = watches();
    let Some(place) = watches.running.iter().position(|watch| watch.id == id) else {
        return (None, Vec::new());
    };
    let ended = watches.running.remove(place);
    for outer in watches.running.iter_mut().filter(|watch| {
        watch.thread == ended.thread && watch.device_thread == ended.device_thread && watch.id < ended.id
    }) {
        let n_before = outer.device_panics.len().saturating_sub(ended.device_panics.len());
        outer.device_panics.truncate(n_before);
    }
    (ended.doing, ended.device_panics)
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

/// What makes a run smaller, where nothing is known about it.
const SMALLER: &str = "in this order: --gradient_checkpointing true, a smaller --batch_size, --dtype fp16, --quantization_bit 8 or 4, a \
                       smaller --max_length; `orpo-wgpu plan` says what fits. Other programs may hold the rest";

/// Whether a device's message says that there was no room: wgpu's `Out of Memory`, its core's `Not enough memory left`, cubecl's
/// `can't allocate buffer of size`, and Vulkan's `VK_ERROR_OUT_OF_DEVICE_MEMORY`.
fn is_out_of_memory(message: &str) -> bool {
    const SAYS: [&str; 7] = [
        "out of memory",
        "out-of-memory",
        "out_of_device_memory",
        "out_of_host_memory",
        "outofmemory",
        "not enough memory",
        "can't allocate buffer",
    ];
    let message = message.to_lowercase();
    SAYS.iter().any(|text| message.contains(text))
}

/// What there was no room for. cubecl says how many bytes; wgpu does not.
fn not_allocated(choice: &DeviceChoice, message: &str) -> String {
    let largest = choice.shard_bytes() as u64;
    let after = message.split("can't allocate buffer of size: ").nth(1);
    let digits = after.map(|text| text.chars().take_while(char::is_ascii_digit).collect::<String>());
    match digits.and_then(|digits| digits.parse().ok()) {
        Some(bytes) if bytes > largest => format!(
            "a buffer of {} could not be allocated, as the device's largest has {}",
            size(bytes),
            size(largest)
        ),
        Some(bytes) => format!("a buffer of {} could not be allocated", size(bytes)),
        None => format!("a buffer could not be allocated ({message})"),
    }
}

/// What tensors held when there was no room left, and of how much.
fn held(choice: &DeviceChoice) -> String {
    // After a failure the device may answer with another one.
    let id = start(choice);
    let held = catch_unwind(AssertUnwindSafe(|| choice.memory_bytes())).unwrap_or_default();
    stop(id);
    let shown = if held == 0 { "an unknown part".to_owned() } else { size(held) };
    match choice.total_memory() {
        Some(total) if held > 0 && held < total => format!(
            "this run held {shown} of {}, the other {} were free or another program's",
            size(total),
            size(total - held)
        ),
        Some(total) => format!("this run held {shown} of {}", size(total)),
        None => format!("this run held {shown}, and the device does not say how much there is"),
    }
}

fn hint(choice: &DeviceChoice, message: &str) -> &'static str {
    let message = message.to_lowercase();
    let is_full = ["memory", "alloc", "buffer"].iter().any(|word| message.contains(word))
        && !message.contains("illegal");
    match choice {
        DeviceChoice::Cpu => {
            "this is a fault of this program: with RUST_BACKTRACE=full it says where it happened"
        }
        _ if is_full => {
            "the device is probably full: lower --max_length or --batch_size, close other programs, or pass --device cpu"
        }
        _ => {
            "update the GPU's driver, set ORPO_WGPU_MATRIX_UNITS=0 in the environment to compute without its matrix units, or pass \
             --device cpu; with RUST_BACKTRACE=full it says where it happened"
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
        let lost = || {
            let problem = "An error happened during execution\nCaused by:\n  lost".to_owned();
            Err(Error::Device { device: "Cpu".to_owned(), problem, hint: None })
        };
        let error = guard::<()>("a test", &DeviceChoice::Cpu, lost).unwrap_err();
        assert_eq!(error.to_string(), "device cpu: a test failed: lost");
        assert!(error.hint().unwrap().starts_with("this is a fault of this program"), "{error:?}");
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

    /// The messages are those of wgpu 29 (`Error::OutOfMemory` in its default handler) and of cubecl 0.10 (`IoError::BufferTooBig`).
    #[test]
    fn a_device_thread_without_room_is_out_of_memory() {
        let device = burn_wgpu::WgpuDevice::IntegratedGpu(77);
        let id = device.id();
        let adapter =
            super::super::Adapter { memory_bytes: Some(8 << 30), ..super::super::Adapter::unknown() };
        let choice = DeviceChoice::Wgpu { device, adapter: Box::new(adapter) };
        let fails = |message: &'static str| {
            guard("training", &choice, || -> Result<()> {
                doing("step 12 (pairs.jsonl:3)");
                let name = format!("DSD-{}-{}", id.type_id, id.index_id);
                let device_thread = thread::Builder::new().name(name).spawn(move || panic!("{message}"));
                device_thread.unwrap().join().unwrap_err();
                panic!("the device's thread is gone")
            })
            .unwrap_err()
        };
        let error = fails("wgpu error: Out of Memory\n");
        let says = "device wgpu:0 is out of memory in step 12 (pairs.jsonl:3): a buffer could not be allocated (wgpu error: Out of \
                    Memory); this run held an unknown part of 8 GiB";
        assert_eq!((error.to_string().as_str(), error.exit_code()), (says, 1));
        assert!(error.hint().is_some_and(|hint| hint.contains("--quantization_bit")), "{:?}", error.hint());
        let error = fails(
            "called `Result::unwrap()` on an `Err` value: can't allocate buffer of size: 3221225472\nBacktrace:\n",
        );
        let says =
            "a buffer of 3 GiB could not be allocated, as the device's largest has 128 MiB; this run held";
        assert!(error.to_string().contains(says), "{error}");
        let error = fails("wgpu error: Validation Error");
        assert!(error.to_string().contains("step 12 (pairs.jsonl:3) failed: wgpu error"), "{error}");
    }

    #[test]
    fn work_ends_with_the_step_in_which_a_device_thread_panicked() {
        let device = burn_wgpu::WgpuDevice::IntegratedGpu(78);
        let id = device.id();
        let choice = DeviceChoice::Wgpu { device, adapter: Box::new(super::super::Adapter::unknown()) };
        let mut reached = 0;
        let error = guard("training", &choice, || {
            for step in 1..=3 {
                doing(format!("step {step}"));
                reached = step;
                let name = format!("DSD-{}-{}", id.type_id, id.index_id);
                let device_thread = thread::Builder::new().name(name);
                let device_thread = device_thread.spawn(move || assert!(step < 2, "no room on the disk"));
                let _ = device_thread.unwrap().join();
            }
            Ok(())
        });
        assert_eq!(reached, 2);
        assert!(error.unwrap_err().to_string().ends_with("step 2 failed: no room on the disk"));
    }

    /// The message is that of CUDA's `CUDA_ERROR_ILLEGAL_ADDRESS`.
    #[test]
    fn an_illegal_access_is_no_want_of_memory() {
        let choice = DeviceChoice::elsewhere(8 << 30);
        let hint_of = |message| hint(&choice, message);
        assert!(hint_of("an illegal memory access was encountered").starts_with("update the GPU's driver"));
        assert!(hint_of("Not enough memory left.").starts_with("the device is probably full"));
    }

    #[test]
    fn a_failure_that_was_handled_is_not_that_of_the_work_around_it() {
        let outer = guard("outer", &DeviceChoice::Cpu, || {
            doing("the outer");
            assert_eq!(guarded(|| panic!("inner")), "device cpu: a test failed: inner");
            Ok(1)
        });
        assert_eq!(outer.unwrap(), 1);
        let error = guard("outer", &DeviceChoice::Cpu, || -> Result<()> {
            doing("the outer");
            guard("inner", &DeviceChoice::Cpu, || -> Result<()> { panic!("Not enough memory left.") })
        });
        assert!(error.unwrap_err().to_string().contains("out of memory in inner"), "the inner error stays");
    }

    #[test]
    fn device_threads_are_known_by_name() {
        assert!(is_device_thread(Some("DSD-0-1"), "-0-1"), "the device's own");
        assert!(!is_device_thread(Some("DSD-0-11"), "-0-1"), "another device's");
        assert!(!is_device_thread(Some("main"), "-0-1"), "no device's");
        assert!(!is_device_thread(None, "-0-1"), "no name");
    }
}
