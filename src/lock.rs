//! Files and folders that one run has at a time.

use std::fs::{File, TryLockError};
use std::path::Path;

use crate::error::{Error, Result};

/// A file or folder that no other run takes as long as this lives. On Unix: Windows would keep readers out as well.
#[derive(Debug)]
pub(crate) struct Lock(File);

impl Lock {
    /// Takes what was opened at this path; where a file system has no locks, all the same.
    ///
    /// # Errors
    /// [`Error::File`] if another run has it.
    pub(crate) fn of(opened: File, path: &Path) -> Result<Self> {
        match cfg!(unix).then(|| opened.try_lock()) {
            Some(Err(TryLockError::WouldBlock)) => Err(Error::file(path, "another run is writing there")
                .with_hint("wait until it ends, or have this one write elsewhere")),
            _ => Ok(Self(opened)),
        }
    }

    /// What was opened.
    pub(crate) fn file(&self) -> &File {
        &self.0
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A process that was started meanwhile may still have the file, and with it the lock.
        let _ = self.0.unlock();
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_has_is_no_other_s_until_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let take = || Lock::of(File::open(folder.path()).unwrap(), folder.path());
        let first = take().unwrap();
        assert!(take().unwrap_err().to_string().ends_with(": another run is writing there"));
        drop(first);
        take().unwrap();
    }
}
