//! Faults on request.
//!
//! Owns: what a fault is and how it is written down. Refuses to know: how it is carried out.

use std::ffi::c_int;

/// What goes wrong on one rank, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) rank: u32,
    /// The rank's call of a collective, counted from 0.
    pub(crate) call: u64,
}

/// How it goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Not at all.
    None = 0,
    /// The operation ends in `ncclRemoteError`.
    Fail = 1,
    /// The operation never ends, until it is aborted.
    Hang = 2,
    /// The call itself returns `ncclSystemError`.
    Refuse = 3,
    /// The connections break without a word, as when the process is killed.
    Vanish = 4,
    /// The initialization never ends, until it is aborted.
    HangInitialization = 5,
}

impl Fault {
    /// No fault.
    pub(crate) const NONE: Self = Self { kind: Kind::None, rank: 0, call: 0 };

    /// The fault with these numbers, as the C interface and the environment give them.
    pub(crate) fn new(kind: c_int, rank: u32, call: u64) -> Option<Self> {
        use Kind::{Fail, Hang, HangInitialization, None, Refuse, Vanish};
        let kinds = [None, Fail, Hang, Refuse, Vanish, HangInitialization];
        let kind = kinds.into_iter().find(|known| *known as c_int == kind)?;
        Some(Self { kind, rank, call })
    }

    /// The fault of `WEIGHTCAST_MOCK_NCCL_FAULT=kind:rank:call`; none when it is not set or not understood.
    #[expect(clippy::disallowed_methods, reason = "a library that is loaded by name has no other configuration")]
    pub(crate) fn from_environment() -> Self {
        let parse = || {
            let text = std::env::var("WEIGHTCAST_MOCK_NCCL_FAULT").ok()?;
            let mut numbers = text.split(':');
            let fault =
                Self::new(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?)?;
            numbers.next().is_none().then_some(fault)
        };
        parse().unwrap_or(Self::NONE)
    }

    /// Whether it happens on `rank` at its call number `call`.
    pub(crate) fn strikes(&self, rank: u32, call: u64) -> bool {
        (self.rank, self.call) == (rank, call)
    }
}
