//! Calls that a server answered, counted by method and status code.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// See the module. Clones share it. Both labels are words of the program, so there are boundedly many.
#[derive(Clone, Debug, Default)]
pub struct Calls(Arc<Mutex<BTreeMap<(&'static str, &'static str), u64>>>);

impl Calls {
    /// One more call of `method` was answered with `code`.
    pub fn count(&self, method: &'static str, code: &'static str) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((method, code)).or_default() += 1;
    }

    /// All counts.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<(&'static str, &'static str), u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
