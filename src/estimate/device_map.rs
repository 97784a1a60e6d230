//! Which device gets which consecutive units (embedding, layers, head) of a model: the best placement, exactly.
//!
//! Owns: the search. Refuses to know: what units are; it is given their sizes.

use serde::Serialize;

use crate::error::{Classify, Kind};

/// More units than any model has, and few enough that the search stays short.
const MAX_UNITS: usize = 1 << 16;

/// What is to be placed, in the model's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Its memory where it is placed.
    pub bytes: u64,
    /// What it takes to compute, in any unit of its own.
    pub work: u64,
}

/// Where units can go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its memory for units.
    pub bytes: u64,
    /// Work that it does in a unit of time.
    pub speed: u64,
}

/// What is best.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Objective {
    /// That the largest used fraction of a device's memory is as small as it can be.
    #[default]
    UsedFraction,
    /// That the slowest device is as fast as it can be, and all fit.
    Time,
}

/// Which device gets which units.
///
/// ```
/// use weightcast::estimate::{DeviceMap, Objective, Place, Unit};
///
/// let layer = Unit { bytes: 2, work: 1 };
/// let devices = [Place { bytes: 12, speed: 1 }, Place { bytes: 6, speed: 1 }];
/// let map = DeviceMap::new(&[layer; 6], &devices, None, Objective::UsedFraction)?;
/// assert_eq!(map.owners, [Some(0), Some(0), Some(0), Some(0), Some(1), Some(1)]);
/// # Ok::<(), weightcast::estimate::DeviceMapError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceMap {
    /// For each unit the index of its device; none for the host.
    pub owners: Vec<Option<usize>>,
    /// For each device the bytes that it holds.
    pub used_bytes: Vec<u64>,
    /// Bytes that stay on the host.
    pub host_bytes: u64,
}

/// Why there is no placement.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceMapError {
    /// There is nothing to place, nothing to place it on, or too much of either.
    #[error("{what}: expected 1 to {most}, found {found}")]
    Count {
        /// What there is.
        what: &'static str,
        /// The most that can be.
        most: usize,
        /// How many there are.
        found: usize,
    },
    /// A device without memory or speed.
    #[error("device {device}: expected memory and speed above 0, found {bytes} bytes and speed {speed}")]
    Empty {
        /// Its index.
        device: usize,
        /// Its memory.
        bytes: u64,
        /// Its speed.
        speed: u64,
    },
    /// No placement of consecutive units fits.
    #[error(
        "{needed_bytes} bytes do not fit on {devices} devices of {device_bytes} bytes together: {placed} of {units} units do, and the next one needs {next_bytes} bytes"
    )]
    DoesNotFit {
        /// The bytes of all units.
        needed_bytes: u64,
        /// The number of devices.
        devices: usize,
        /// Their memory together.
        device_bytes: u64,
        /// How many units fit, from the first.
        placed: usize,
        /// How many there are.
        units: usize,
        /// The size of the first that does not.
        next_bytes: u64,
    },
    /// What is left does not fit on the host either.
    #[error("{needed_bytes} bytes stay for the host, which has {budget_bytes}")]
    HostDoesNotFit {
        /// What is left.
        needed_bytes: u64,
        /// What the host has.
        budget_bytes: u64,
    },
}

impl Classify for DeviceMapError {
    fn kind(&self) -> Kind {
        match self {
            Self::DoesNotFit { .. } | Self::HostDoesNotFit { .. } => Kind::Exhausted,
            _ => Kind::Invalid,
        }
    }
}

/// Work over speed, or bytes over memory, of the worst device so far; compared exactly.
#[derive(Clone, Copy, Debug)]
struct Ratio {
    over: u128,
    under: u128,
}

impl Ratio {
    const ZERO: Self = Self { over: 0, under: 1 };

    fn above(self, other: Self) -> bool {
        // Both sides are below 2^64 each, so the products fit.
        self.over * other.under > other.over * self.under
    }

    fn max(self, other: Self) -> Self {
        if other.above(self) { other } else { self }
    }
}

impl DeviceMap {
    /// The best placement of consecutive `units` on `devices`, in their order; a device may get none.
    ///
    /// With `host_bytes`, what does not fit stays on the host: the last units, as few as can be. Found by dynamic programming
    /// over (device, units placed): the worst ratio is monotone in where the last device begins, so its best beginning is
    /// where two monotone ratios cross, O(devices · units · log units).
    ///
    /// # Errors
    /// [`DeviceMapError`].
    pub fn new(
        units: &[Unit],
        devices: &[Place],
        host_bytes: Option<u64>,
        objective: Objective,
    ) -> Result<Self, DeviceMapError> {
        check(units, devices)?;
        let prefix = Prefix::new(units);
        let fitting = most_that_fit(&prefix, devices);
        let rest = prefix.bytes(fitting, units.len());
        if fitting < units.len() {
            let sum = |bytes: u128| u64::try_from(bytes).unwrap_or(u64::MAX);
            let Some(budget_bytes) = host_bytes else {
                return Err(DeviceMapError::DoesNotFit {
                    needed_bytes: sum(prefix.bytes(0, units.len())),
                    devices: devices.len(),
                    device_bytes: sum(devices.iter().map(|device| u128::from(device.bytes)).sum()),
                    placed: fitting,
                    units: units.len(),
                    next_bytes: units.get(fitting).map_or(0, |unit| unit.bytes),
                });
            };
            if rest > u128::from(budget_bytes) {
                return Err(DeviceMapError::HostDoesNotFit { needed_bytes: sum(rest), budget_bytes });
            }
        }
        let ends = best_ends(&prefix, devices, fitting, objective);
        let mut owners = vec![None; units.len()];
        let mut used_bytes = Vec::with_capacity(devices.len());
        let mut start = 0;
        for (device, end) in ends.into_iter().enumerate() {
            owners.iter_mut().take(end).skip(start).for_each(|owner| *owner = Some(device));
            used_bytes.push(u64::try_from(prefix.bytes(start, end)).unwrap_or(u64::MAX));
            start = end;
        }
        Ok(Self { owners, used_bytes, host_bytes: u64::try_from(rest).unwrap_or(u64::MAX) })
    }

    /// The proportions with which `[load] split` of a job gives the same owners to ranks: what each device holds, in units small
    /// enough for 32 bits.
    #[must_use]
    pub fn split(&self) -> Vec<u32> {
        let total: u128 = self.used_bytes.iter().map(|&bytes| u128::from(bytes)).sum();
        let scale = total.div_ceil(u128::from(u32::MAX)).max(1);
        self.used_bytes.iter().map(|&bytes| u32::try_from(u128::from(bytes) / scale).unwrap_or(u32::MAX)).collect()
    }
}

fn check(units: &[Unit], devices: &[Place]) -> Result<(), DeviceMapError> {
    for (what, found) in [("units", units.len()), ("devices", devices.len())] {
        if found == 0 || found > MAX_UNITS {
            return Err(DeviceMapError::Count { what, most: MAX_UNITS, found });
        }
    }
    match devices.iter().position(|device| device.bytes == 0 || device.speed == 0) {
        None => Ok(()),
        Some(device) => {
            let (bytes, speed) = devices.get(device).map_or((0, 0), |place| (place.bytes, place.speed));
            Err(DeviceMapError::Empty { device, bytes, speed })
        }
    }
}

/// Sums of the first units.
struct Prefix {
    bytes: Vec<u128>,
    work: Vec<u128>,
}

impl Prefix {
    fn new(units: &[Unit]) -> Self {
        let sums = |of: fn(&Unit) -> u64| {
            let mut sum = 0_u128;
            let next = units.iter().map(|unit| {
                sum += u128::from(of(unit));
                sum
            });
            std::iter::once(0).chain(next).collect::<Vec<u128>>()
        };
        Self { bytes: sums(|unit| unit.bytes), work: sums(|unit| unit.work) }
    }

    fn between(sums: &[u128], start: usize, end: usize) -> u128 {
        let at = |index: usize| sums.get(index).copied().unwrap_or(0);
        at(end).saturating_sub(at(start))
    }

    fn bytes(&self, start: usize, end: usize) -> u128 {
        Self::between(&self.bytes, start, end)
    }

    /// What the units from `start` to `end` cost `device`.
    fn cost(&self, (start, end): (usize, usize), device: Place, objective: Objective) -> Ratio {
        match objective {
            Objective::UsedFraction => Ratio { over: self.bytes(start, end), under: device.bytes.into() },
            Objective::Time => Ratio { over: Self::between(&self.work, start, end), under: device.speed.into() },
        }
    }
}

/// The largest number of first units that fit: every device takes as many as it can.
fn most_that_fit(prefix: &Prefix, devices: &[Place]) -> usize {
    devices.iter().fold(0, |start, device| {
        let room = prefix.bytes(0, start) + u128::from(device.bytes);
        // Units without bytes go with those before them.
        prefix.bytes.partition_point(|&sum| sum <= room) - 1
    })
}

/// Where each device's units end, for the first `count` units.
fn best_ends(prefix: &Prefix, devices: &[Place], count: usize, objective: Objective) -> Vec<usize> {
    // The worst ratio with the devices so far, for each number of units; nothing where they do not fit.
    let mut best: Vec<Option<Ratio>> = vec![None; count + 1];
    if let Some(first) = best.first_mut() {
        *first = Some(Ratio::ZERO);
    }
    let mut starts: Vec<Vec<usize>> = Vec::with_capacity(devices.len());
    for &device in devices {
        let at = |start: usize, end: usize| {
            let before = best.get(start).copied().flatten()?;
            Some(before.max(prefix.cost((start, end), device, objective)))
        };
        let mut next = Vec::with_capacity(count + 1);
        let mut chosen = Vec::with_capacity(count + 1);
        for end in 0..=count {
            // The first start from which the device has room.
            let least = prefix.bytes.partition_point(|&sum| sum + u128::from(device.bytes) < prefix.bytes(0, end));
            // Up from here the devices before are worse than this one, or too small.
            let (mut low, mut high) = (least.min(end), end);
            while low < high {
                let middle = usize::midpoint(low, high);
                let cost = prefix.cost((middle, end), device, objective);
                match best.get(middle).copied().flatten() {
                    Some(before) if cost.above(before) => low = middle + 1,
                    _ => high = middle,
                }
            }
            // The best is at the crossing or just before it.
            let found = [low, low.saturating_sub(1).max(least.min(end))]
                .into_iter()
                .filter_map(|start| at(start, end).map(|ratio| (start, ratio)))
                .reduce(|one, other| if one.1.above(other.1) { other } else { one });
            next.push(found.map(|(_, ratio)| ratio));
            chosen.push(found.map_or(0, |(start, _)| start));
        }
        best = next;
        starts.push(chosen);
    }
    let mut ends = vec![0; devices.len()];
    let mut end = count;
    for (slot, chosen) in ends.iter_mut().zip(&starts).rev() {
        *slot = end;
        end = chosen.get(end).copied().unwrap_or(0);
    }
    ends
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All ends of consecutive parts.
    fn all_ends(count: usize, devices: usize) -> Vec<Vec<usize>> {
        if devices == 1 {
            return vec![vec![count]];
        }
        let mut all = Vec::new();
        for first in 0..=count {
            for rest in all_ends(count - first, devices - 1) {
                all.push(std::iter::once(first).chain(rest.into_iter().map(|end| first + end)).collect());
            }
        }
        all
    }

    /// The worst ratio of a placement; nothing when it does not fit.
    fn worst(units: &[Unit], devices: &[Place], ends: &[usize], objective: Objective) -> Option<Ratio> {
        let mut start = 0;
        let mut worst = Ratio::ZERO;
        for (device, &end) in devices.iter().zip(ends) {
            let sum = |of: fn(&Unit) -> u64| units[start..end].iter().map(|unit| u128::from(of(unit))).sum::<u128>();
            let (bytes, work) = (sum(|unit| unit.bytes), sum(|unit| unit.work));
            if bytes > u128::from(device.bytes) {
                return None;
            }
            worst = worst.max(match objective {
                Objective::UsedFraction => Ratio { over: bytes, under: device.bytes.into() },
                Objective::Time => Ratio { over: work, under: device.speed.into() },
            });
            start = end;
        }
        Some(worst)
    }

    fn ends_of(map: &DeviceMap, devices: usize) -> Vec<usize> {
        (0..devices)
            .map(|device| map.owners.iter().filter(|owner| owner.is_some_and(|owner| owner <= device)).count())
            .collect()
    }

    proptest! {
        /// Against all placements: the same worst ratio, and an error just where none fits.
        #[test]
        fn no_placement_is_better(
            units in prop::collection::vec((0_u64..20, 0_u64..20), 1..9),
            devices in prop::collection::vec((1_u64..60, 1_u64..5), 1..5),
            time in any::<bool>(),
        ) {
            let units: Vec<Unit> = units.into_iter().map(|(bytes, work)| Unit { bytes, work }).collect();
            let devices: Vec<Place> = devices.into_iter().map(|(bytes, speed)| Place { bytes, speed }).collect();
            let objective = if time { Objective::Time } else { Objective::UsedFraction };
            let best = all_ends(units.len(), devices.len())
                .into_iter()
                .filter_map(|ends| worst(&units, &devices, &ends, objective))
                .reduce(|one, other| if one.above(other) { other } else { one });
            match (DeviceMap::new(&units, &devices, None, objective), best) {
                (Ok(map), Some(best)) => {
                    prop_assert!(map.owners.is_sorted());
                    let found = worst(&units, &devices, &ends_of(&map, devices.len()), objective).expect("it fits");
                    prop_assert!(!found.above(best) && !best.above(found), "{:?} {:?}", found, best);
                    prop_assert_eq!(map.used_bytes.iter().sum::<u64>(), units.iter().map(|unit| unit.bytes).sum::<u64>());
                }
                (Err(DeviceMapError::DoesNotFit { placed, .. }), None) => {
                    // With a host just as many units are on devices as any placement of first units can have there.
                    let most = (0..=units.len()).rev().find(|&count| {
                        let all = all_ends(count, devices.len());
                        all.iter().any(|ends| worst(&units, &devices, ends, objective).is_some())
                    });
                    prop_assert_eq!(most, Some(placed));
                    let map = DeviceMap::new(&units, &devices, Some(u64::MAX), objective).expect("the host has room");
                    prop_assert_eq!(map.owners.iter().flatten().count(), placed);
                }
                (found, best) => prop_assert!(false, "{:?} {:?}", found, best),
            }
        }
    }

    /// By hand: 1,000 equal layers on 64 equal devices are 15 or 16 on each.
    #[test]
    fn a_thousand_layers_on_sixty_four_devices() {
        let devices = [Place { bytes: 24 << 30, speed: 1 }; 64];
        let map = DeviceMap::new(&[Unit { bytes: 1 << 30, work: 1 }; 1000], &devices, None, Objective::UsedFraction);
        let used = map.expect("it fits").used_bytes;
        assert_eq!(used.iter().max(), Some(&(16 << 30)));
    }

    #[test]
    fn what_cannot_be_is_named() {
        let (unit, place) = (Unit { bytes: 4, work: 1 }, Place { bytes: 10, speed: 1 });
        let check = |units: &[Unit], devices: &[Place], host, expected: &str| {
            let message = DeviceMap::new(units, devices, host, Objective::Time).expect_err(expected).to_string();
            assert_eq!(message, expected);
        };
        check(&[], &[place], None, "units: expected 1 to 65536, found 0");
        check(&[unit], &[], None, "devices: expected 1 to 65536, found 0");
        let none = Place { bytes: 0, speed: 1 };
        check(&[unit], &[place, none], None, "device 1: expected memory and speed above 0, found 0 bytes and speed 1");
        let expected =
            "20 bytes do not fit on 2 devices of 20 bytes together: 4 of 5 units do, and the next one needs 4 bytes";
        check(&[unit; 5], &[place; 2], None, expected);
        check(&[unit; 5], &[place; 2], Some(3), "4 bytes stay for the host, which has 3");
    }
}
