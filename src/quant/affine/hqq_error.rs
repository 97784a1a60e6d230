//! The HQQ solver's decision to stop, which is one for the whole tensor.
//!
//! Owns: an exact sum of errors and the rule. Refuses to know: how parts exchange their sums.
//!
//! The reference stops when the mean of `|W - Wr|` over the WHOLE tensor no longer falls, so neither a thread nor a rank can
//! decide alone. Parts therefore report an [`ErrorSum`] after each iteration. It is an integer, so the total does not depend
//! on the cut or on the order of addition (`AF-2`): threads merge theirs, ranks send 24 bytes each and merge all of them, and
//! everybody gives the total to an [`HqqStop`] of his own and gets the same answer. An iteration thus costs one tiny
//! all-gather. A part that decided by its own errors would stop earlier or later than the whole: valid codes, but not
//! the reference's, and others for every number of ranks; so no such mode is offered.

/// Units of [`ErrorSum`] in 1.0.
const UNITS_PER_ONE: f64 = (1_u128 << 80) as f64;

/// The most iterations, hqq's `iters`.
const MAX_ITERATIONS: u32 = 20;

/// The sum of `|W - Wr|` over some groups: units of 2^-80, rounded once for each group, and the number of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErrorSum {
    units: u128,
    weights: u64,
}

impl ErrorSum {
    /// Bytes of [`Self::to_le_bytes`].
    pub const BYTES: usize = 24;

    /// The sum of one group of `weights` weights. What is not finite or too large saturates, and ends the solver.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float cast to an integer saturates; errors are magnitudes"
    )]
    pub(super) fn of_group(sum: f64, weights: u64) -> Self {
        let units = if sum.is_finite() { (sum * UNITS_PER_ONE).round_ties_even() as u128 } else { u128::MAX };
        Self { units, weights }
    }

    /// Both together; exact, so the order does not matter.
    #[must_use]
    pub const fn merge(self, other: Self) -> Self {
        Self { units: self.units.saturating_add(other.units), weights: self.weights.saturating_add(other.weights) }
    }

    /// The mean error, NaN for no weight and infinite when the sum saturated.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "rounded to f32 after")]
    #[expect(clippy::cast_possible_truncation, reason = "the reference compares means in f32")]
    pub fn mean(self) -> f32 {
        match self.units {
            u128::MAX => f32::INFINITY,
            units => (units as f64 / UNITS_PER_ONE / self.weights as f64) as f32,
        }
    }

    /// The form in which ranks exchange it.
    #[must_use]
    pub fn to_le_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..16].copy_from_slice(&self.units.to_le_bytes());
        bytes[16..].copy_from_slice(&self.weights.to_le_bytes());
        bytes
    }

    /// The reverse of [`Self::to_le_bytes`].
    #[must_use]
    pub fn from_le_bytes(bytes: [u8; Self::BYTES]) -> Self {
        let (mut units, mut weights) = ([0; 16], [0; 8]);
        units.copy_from_slice(&bytes[..16]);
        weights.copy_from_slice(&bytes[16..]);
        Self { units: u128::from_le_bytes(units), weights: u64::from_le_bytes(weights) }
    }
}

/// When the iterations of one tensor end: after 20, or when the mean error no longer falls.
///
/// Means are compared as f32, as in the reference. torch's own mean over a whole tensor depends on its number of threads, so
/// a comparison of two means that differ by few ulp may there go either way; here it is made on the exact mean, rounded once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HqqStop {
    best: f32,
    iterations: u32,
}

impl HqqStop {
    /// Before the first iteration.
    #[must_use]
    pub const fn new() -> Self {
        Self { best: f32::INFINITY, iterations: 0 }
    }

    /// Whether another iteration follows the one whose errors, of the whole tensor, are `total`.
    pub fn goes_on(&mut self, total: ErrorSum) -> bool {
        let error = total.mean();
        self.iterations += 1;
        if error < self.best {
            self.best = error;
            self.iterations < MAX_ITERATIONS
        } else {
            false
        }
    }

    /// The number of iterations so far.
    #[must_use]
    pub const fn iterations(&self) -> u32 {
        self.iterations
    }
}

impl Default for HqqStop {
    fn default() -> Self {
        Self::new()
    }
}
