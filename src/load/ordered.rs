//! A bounded queue that takes items in any order and gives them in the order of their tickets.
//!
//! `OQ-1`: an item whose ticket is `capacity` or more ahead of the next one to be taken waits at its producer, so the
//! items held never exceed the capacity, and the producer of the next one never waits.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// See the module.
#[derive(Debug)]
pub(super) struct OrderedQueue<T, E> {
    state: Mutex<State<T, E>>,
    taken: Condvar,
    put: Condvar,
    capacity: u64,
}

#[derive(Debug)]
struct State<T, E> {
    next: u64,
    items: BTreeMap<u64, T>,
    failure: Option<E>,
    closed: bool,
}

/// The queue was closed: by its consumer, or because a producer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Closed;

impl<T, E> OrderedQueue<T, E> {
    pub(super) fn new(capacity: u64) -> Self {
        let state = State { next: 0, items: BTreeMap::new(), failure: None, closed: false };
        Self { state: Mutex::new(state), taken: Condvar::new(), put: Condvar::new(), capacity: capacity.max(1) }
    }

    /// Puts the item with this ticket; waits while it is too far ahead (`OQ-1`).
    pub(super) fn put(&self, ticket: u64, item: T) -> Result<(), Closed> {
        let mut state = self.lock();
        while !state.closed && ticket >= state.next + self.capacity {
            state = self.taken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return Err(Closed);
        }
        state.items.insert(ticket, item);
        self.put.notify_one();
        Ok(())
    }

    /// The next item in order. Waits for it; a failure of a producer comes out here, once.
    pub(super) fn take(&self) -> Result<T, Option<E>> {
        let mut state = self.lock();
        loop {
            let next = state.next;
            if let Some(item) = state.items.remove(&next) {
                state.next += 1;
                self.taken.notify_all();
                return Ok(item);
            }
            if state.closed {
                return Err(state.failure.take());
            }
            state = self.put.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Items that wait to be taken.
    pub(super) fn len(&self) -> u64 {
        crate::types::as_u64(self.lock().items.len())
    }

    /// Ends the queue; everybody who waits wakes up. The first failure is kept for the consumer.
    pub(super) fn close(&self, failure: Option<E>) {
        let mut state = self.lock();
        state.closed = true;
        if state.failure.is_none() {
            state.failure = failure;
        }
        self.taken.notify_all();
        self.put.notify_all();
    }

    /// A producer that panicked holds no half-made item, so the lock's content stays valid.
    fn lock(&self) -> MutexGuard<'_, State<T, E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use super::*;

    /// OQ-1: four producers race, the consumer sees the tickets in order.
    #[test]
    fn items_come_in_order_of_tickets() {
        let queue = OrderedQueue::<u64, ()>::new(3);
        let tickets = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        let ticket = tickets.fetch_add(1, Ordering::Relaxed);
                        if ticket >= 1000 || queue.put(ticket, ticket).is_err() {
                            return;
                        }
                    }
                });
            }
            let taken: Vec<u64> = (0..1000).map(|_| queue.take().expect("nobody closes")).collect();
            assert_eq!(taken, (0..1000).collect::<Vec<_>>());
        });
    }

    #[test]
    fn a_failure_reaches_the_consumer_and_frees_the_producers() {
        let queue = OrderedQueue::<u64, &str>::new(1);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| queue.put(5, 5));
            queue.close(Some("disk"));
            assert_eq!(waiting.join().expect("no panic"), Err(Closed));
            assert_eq!(queue.take(), Err(Some("disk")));
            assert_eq!(queue.take(), Err(None));
        });
    }
}
