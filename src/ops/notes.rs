//! What the ops notice of a device that whoever runs them should be told.

use std::sync::{Mutex, PoisonError};

static NOTES: Mutex<Vec<String>> = Mutex::new(Vec::new());

pub(super) fn note(text: &str) {
    NOTES.lock().unwrap_or_else(PoisonError::into_inner).push(text.to_owned());
}

/// What was noticed since this was last asked.
pub fn take() -> Vec<String> {
    std::mem::take(&mut NOTES.lock().unwrap_or_else(PoisonError::into_inner))
}
