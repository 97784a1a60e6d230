//! Identities: who, which incarnation, which point in training, which tensor.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The index of one worker process within the world, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rank(pub u32);

impl Rank {
    /// The rank that reads under the low-memory strategy.
    pub const ZERO: Self = Self(0);

    /// The rank as an index into per-rank vectors.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number of ranks of a job; never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorldSize(NonZeroU32);

/// A world of zero ranks was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("world size: expected at least 1 rank, found 0")]
pub struct ZeroWorld;

impl WorldSize {
    /// One rank.
    pub const ONE: Self = Self(NonZeroU32::MIN);

    /// A world of `count` ranks.
    ///
    /// # Errors
    /// [`ZeroWorld`] when `count` is 0.
    pub const fn new(count: u32) -> Result<Self, ZeroWorld> {
        match NonZeroU32::new(count) {
            Some(count) => Ok(Self(count)),
            None => Err(ZeroWorld),
        }
    }

    /// The number of ranks.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// The number of ranks, for sizing per-rank vectors.
    #[must_use]
    pub const fn count(self) -> usize {
        self.0.get() as usize
    }

    /// All ranks of the world in order.
    pub fn ranks(self) -> impl Iterator<Item = Rank> + Clone {
        (0..self.0.get()).map(Rank)
    }

    /// Whether `rank` belongs to this world.
    #[must_use]
    pub const fn contains(self, rank: Rank) -> bool {
        rank.0 < self.0.get()
    }
}

impl fmt::Display for WorldSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter! {
    /// One incarnation of the membership; a higher one fences every message of a lower one. Never reused.
    Generation
}
counter! {
    /// One optimizer step; 0 is the state right after loading.
    Step
}
counter! {
    /// One try at writing a checkpoint of a step; names its temporary directory.
    Attempt
}

impl Generation {
    /// The generation after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

macro_rules! text {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The text itself.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text.into())
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

text! {
    /// PyTorch's fully qualified tensor name, such as `model.layers.0.self_attn.q_proj.weight`.
    Fqn
}
impl Fqn {
    /// The number of the layer that the tensor belongs to: the digits after `layers.`, `layer.`, `h.`, `blocks.` or `block.`.
    #[must_use]
    pub fn layer(&self) -> Option<u32> {
        let mut parts = self.as_str().split('.');
        while let Some(part) = parts.next() {
            if matches!(part, "layers" | "layer" | "h" | "blocks" | "block")
                && let Some(number) = parts.next().and_then(|number| number.parse().ok())
            {
                return Some(number);
            }
        }
        None
    }
}
text! {
    /// The name of a job, the same over restarts.
    JobId
}
