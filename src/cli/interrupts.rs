//! Ctrl-C, and the signals that ask a program to end: the first has a run saved or an answer ended, the next ends the program.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What ended by a signal says to its shell.
const EXIT_CODE: i32 = 130;

/// Signals that come closer together are one: a terminal that is closed has the kernel and the shell send one each, and `timeout` sends
/// to the program and to its group, within a few milliseconds. Nobody presses Ctrl-C twice in so short a time.
const SAME: Duration = Duration::from_millis(100);

/// From here on the first signal sets a flag, which this gives, and calls `tell`; the next one, or the first where the flag is set
/// already, ends the program.
///
/// The signals are Ctrl-C and, on Unix, SIGTERM, and SIGHUP where it is not ignored. Windows ends a program whose console is closed
/// whatever it does.
pub fn watch(tell: impl Fn() + Send + 'static) -> Arc<AtomicBool> {
    let (is_interrupted, handler) = flag(tell);
    // Without a handler a signal ends the program at once, as it does everywhere else.
    unless_hangups_are_ignored(|| ctrlc::set_handler(handler).is_ok());
    is_interrupted
}

/// As [`watch`], of Ctrl-C alone: what else asks the program to end does so.
pub fn watch_ctrl_c() -> Arc<AtomicBool> {
    let (is_interrupted, handler) = flag(|| ());
    of_ctrl_c_alone(|| ctrlc::set_handler(handler).is_ok());
    is_interrupted
}

/// From here on a signal, one that [`watch`] hears, calls `clean` and ends the program.
pub fn end_after(clean: impl Fn() + Send + 'static) {
    unless_hangups_are_ignored(|| {
        ctrlc::set_handler(move || {
            clean();
            std::process::exit(EXIT_CODE);
        })
        .is_ok()
    });
}

/// A flag, and what sets it.
fn flag(tell: impl Fn() + Send + 'static) -> (Arc<AtomicBool>, impl FnMut() + Send + 'static) {
    let is_set = Arc::new(AtomicBool::new(false));
    let flag = is_set.clone();
    let mut first: Option<Instant> = None;
    let handler = move || {
        if !flag.swap(true, Ordering::Relaxed) {
            first = Some(Instant::now());
            tell();
        } else if first.is_none_or(|first| first.elapsed() > SAME) {
            std::process::exit(EXIT_CODE);
        }
    };
    (is_set, handler)
}

/// Sets handlers, and takes that of SIGHUP back where it was ignored, as below `nohup`.
#[cfg(unix)]
fn unless_hangups_are_ignored(set: impl FnOnce() -> bool) {
    let before = handle(libc::SIGHUP, libc::SIG_IGN);
    if !set() || before == libc::SIG_IGN {
        handle(libc::SIGHUP, before);
    }
}

/// Sets handlers, and takes those of SIGTERM and SIGHUP back.
#[cfg(unix)]
fn of_ctrl_c_alone(set: impl FnOnce() -> bool) {
    let before = [libc::SIGTERM, libc::SIGHUP].map(|signal| (signal, handle(signal, libc::SIG_IGN)));
    set();
    for (signal, handler) in before {
        handle(signal, handler);
    }
}

/// Has a signal handled so, and gives what handled it before.
#[cfg(unix)]
fn handle(signal: libc::c_int, handler: libc::sighandler_t) -> libc::sighandler_t {
    #[expect(unsafe_code, reason = "the standard library has no signals")]
    // SAFETY: the handlers given are SIG_IGN and what this very function returned.
    unsafe {
        libc::signal(signal, handler)
    }
}

#[cfg(not(unix))]
fn unless_hangups_are_ignored(set: impl FnOnce() -> bool) {
    set();
}

#[cfg(not(unix))]
fn of_ctrl_c_alone(set: impl FnOnce() -> bool) {
    set();
}
