//! For tests: saying that one is left out.

use std::io::Write;

/// Says that this test is left out, and why.
pub(crate) fn left_out(why: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    // Written to the stream itself: the harness keeps what the macros print to itself when a test passes.
    writeln!(std::io::stderr(), "LEFT OUT: {test}, as {why}").expect("standard error can be written");
}
