//! Blocks of a shard file of which only a part was wanted, kept for the neighbour that wants the rest.
//!
//! Owns: which blocks are kept. Refuses to know: how a block is read and verified.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Blocks kept of one file: a few for each reader thread, because neighbours are read soon after each other.
const KEPT_BLOCKS: usize = 16;

/// The bytes of a block, once somebody has read and verified them.
pub(super) type Slot = Arc<Mutex<Option<Vec<u8>>>>;

/// The blocks of one file that were asked for last.
#[derive(Debug, Default)]
pub(super) struct Edges {
    recent: Mutex<VecDeque<(u64, Slot)>>,
}

impl Edges {
    /// The block's slot. Who finds it empty fills it while holding its lock, so that no block is read twice at a time, and
    /// different blocks do not wait for each other.
    pub(super) fn slot(&self, block: u64) -> Slot {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, slot)) = recent.iter().find(|(kept, _)| *kept == block) {
            return slot.clone();
        }
        if recent.len() == KEPT_BLOCKS {
            recent.pop_front();
        }
        let slot = Slot::default();
        recent.push_back((block, slot.clone()));
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_blocks_are_kept_and_no_more() {
        let edges = Edges::default();
        let filled = |block: u64| edges.slot(block).lock().expect("not poisoned").is_some();
        for block in 0..40 {
            *edges.slot(block).lock().expect("not poisoned") = Some(vec![1]);
        }
        assert!(filled(39) && filled(24));
        assert!(!filled(23), "40 blocks were asked for, and 16 are kept");
    }
}
