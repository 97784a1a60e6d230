//! Flags that say what a model is to run on: `--gpus`, `--max-memory`, `--storage-mb-per-second`.

use std::path::Path;

use clap::Args;

use crate::config::{ConfigError, available_memory_bytes};
use crate::device::{Device, probe};
use crate::estimate::{LOCAL_BYTES_PER_SECOND, Storage, Surroundings};
use crate::store::is_remote;
use crate::types::{as_f64, as_usize};

/// The machine.
#[derive(Clone, Debug, Default, PartialEq, Args)]
#[command(next_help_heading = "Estimate")]
pub(super) struct MachineFlags {
    /// Memory of each device in GiB, one rank each, such as 24,12; "auto" for the CUDA devices of this host, "none" for none
    #[arg(long, value_name = "GIB", value_delimiter = ',', value_parser = gpu, allow_hyphen_values = true)]
    gpus: Vec<Gpu>,
    /// Memory of each device and of the host, as accelerate has it, such as 0=20GiB,1=10GiB,cpu=64GiB
    #[arg(long, value_name = "MAP", value_delimiter = ',', value_parser = share, conflicts_with = "gpus")]
    max_memory: Vec<Share>,
    /// What the storage of the model's files gives, in MB per second
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    storage_mb_per_second: Option<u64>,
    /// Processors of the host; this host's by default
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    processors: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Gpu {
    Bytes(u64),
    Auto,
    None,
}

/// A part of `--max-memory`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Share {
    /// The device; nothing for the host.
    device: Option<u64>,
    bytes: u64,
}

/// GiB in bytes.
fn gibibytes(text: &str) -> Result<u64, String> {
    number(text, as_f64(1 << 30)).ok_or_else(|| format!("expected GiB above 0, such as 24 or 11.5, found {text:?}"))
}

fn number(text: &str, unit: f64) -> Option<u64> {
    let held = text.trim().parse::<f64>().ok()? * unit;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive and below 2^50, as checked")]
    (1.0..as_f64(1 << 50)).contains(&held).then_some(held as u64)
}

fn gpu(text: &str) -> Result<Gpu, String> {
    match text {
        "auto" => Ok(Gpu::Auto),
        "none" => Ok(Gpu::None),
        _ => gibibytes(text).map(Gpu::Bytes),
    }
}

fn share(text: &str) -> Result<Share, String> {
    let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("GB", 1_000_000_000), ("MB", 1_000_000)];
    let parse = || {
        let (device, size) = text.split_once('=')?;
        let device = if device.trim() == "cpu" { None } else { Some(device.trim().parse().ok()?) };
        let (size, unit) = units.iter().find_map(|(name, unit)| Some((size.trim().strip_suffix(name)?, *unit)))?;
        Some(Share { device, bytes: number(size, as_f64(unit))? })
    };
    parse().ok_or_else(|| {
        format!("expected a device or cpu with its memory, such as 0=20GiB or cpu=64GiB, found {text:?}")
    })
}

/// What the flags describe.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Machine {
    /// The memory of each device in bytes.
    pub(super) device_bytes: Vec<u64>,
    /// The host's, where it is known.
    pub(super) host_bytes: Option<u64>,
    /// What was found on this host, in words, when it was looked at.
    pub(super) found: Option<String>,
}

impl MachineFlags {
    /// Whether any says something about memory.
    pub(super) const fn is_given(&self) -> bool {
        !self.gpus.is_empty() || !self.max_memory.is_empty()
    }

    /// The machine: as the flags say; where none does and it is needed (`look`), this host.
    pub(super) fn machine(&self, look: bool) -> Result<Machine, ConfigError> {
        if !self.max_memory.is_empty() {
            return self.shares();
        }
        match self.gpus.as_slice() {
            [] if look => Ok(this_host(true)),
            [] => Ok(Machine::default()),
            [Gpu::Auto] => Ok(this_host(true)),
            [Gpu::None] => Ok(this_host(false)),
            several => {
                let bytes = several.iter().map(|gpu| if let Gpu::Bytes(bytes) = gpu { Some(*bytes) } else { None });
                let device_bytes = bytes.collect::<Option<Vec<u64>>>().ok_or_else(|| ConfigError::Value {
                    key: "gpus",
                    expected: "GiB of each device, or auto or none alone",
                    found: "both".to_owned(),
                })?;
                Ok(Machine { device_bytes, ..Machine::default() })
            }
        }
    }

    fn shares(&self) -> Result<Machine, ConfigError> {
        let refuse = |expected, found: String| Err(ConfigError::Value { key: "max-memory", expected, found });
        let mut machine = Machine::default();
        let mut devices = self.max_memory.clone();
        devices.sort_by_key(|share| share.device);
        for share in devices {
            match share.device {
                None if machine.host_bytes.is_some() => return refuse("cpu once", "cpu twice".to_owned()),
                None => machine.host_bytes = Some(share.bytes),
                Some(number) if as_usize(number) == machine.device_bytes.len() => {
                    machine.device_bytes.push(share.bytes)
                }
                Some(number) => return refuse("each device once, from 0 on", number.to_string()),
            }
        }
        Ok(machine)
    }

    /// The machine with what the model's files at `source` are read from.
    pub(super) fn surroundings(&self, machine: &Machine, source: &str) -> Surroundings {
        let here = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let given = self.storage_mb_per_second.map(|megabytes| megabytes * 1_000_000);
        let storage = match given {
            None if is_remote(Path::new(source)) => Storage::Remote,
            given => Storage::Files { bytes_per_second: given.unwrap_or(LOCAL_BYTES_PER_SECOND) },
        };
        Surroundings {
            device_bytes: machine.device_bytes.clone(),
            host_bytes: machine.host_bytes,
            processors: self.processors.unwrap_or_else(|| u32::try_from(here()).unwrap_or(1)),
            storage,
        }
    }
}

fn this_host(with_devices: bool) -> Machine {
    let host_bytes = available_memory_bytes();
    let memory =
        host_bytes.map_or_else(|| "memory unknown".to_owned(), |bytes| format!("{} free", super::output::bytes(bytes)));
    if !with_devices {
        return Machine {
            host_bytes,
            found: Some(format!("this host without devices, {memory}")),
            ..Machine::default()
        };
    }
    let probe = probe();
    let gpus = probe.devices.iter().filter(|info| info.device != Device::Host);
    let device_bytes: Vec<u64> = gpus.map(|info| info.total_bytes).collect();
    let found = Some(format!("this host: {}, {memory}", super::devices::describe()));
    Machine { device_bytes, host_bytes, found }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gibibytes_are_read_and_refused() {
        assert_eq!(gibibytes("24"), Ok(24 << 30));
        assert_eq!(gibibytes("11.5"), Ok(23 << 29));
        for text in ["0", "-1", "NaN", "inf", "", "24GB"] {
            let message = gibibytes(text).expect_err("no memory");
            assert!(message.contains("expected GiB above 0"), "{message}");
        }
    }

    /// Units as accelerate reads them: GB are 10^9 bytes, GiB 2^30.
    #[test]
    fn a_map_of_memory_is_read_and_refused() {
        let machine = |parts: &[&str]| {
            let max_memory = parts.iter().map(|part| share(part)).collect::<Result<_, _>>()?;
            let flags = MachineFlags { max_memory, ..MachineFlags::default() };
            flags.machine(true).map_err(|error| error.to_string())
        };
        let found = machine(&["cpu=64GB", "1=512MiB", "0=1.5GiB"]).expect("a map");
        assert_eq!(found.device_bytes, [3 << 29, 512 << 20]);
        assert_eq!(found.host_bytes, Some(64_000_000_000));
        for (parts, expected) in [
            (&["0=20"] as &[&str], "such as 0=20GiB"),
            (&["gpu0=20GiB"], "such as 0=20GiB"),
            (&["0=-1GiB"], "such as 0=20GiB"),
            (&["1=20GiB"], "each device once, from 0 on, found 1"),
            (&["0=20GiB", "0=20GiB"], "each device once, from 0 on, found 0"),
            (&["cpu=1GiB", "cpu=2GiB"], "cpu once, found cpu twice"),
        ] {
            let message = machine(parts).expect_err("no map");
            assert!(message.contains(expected), "{message}");
        }
    }
}
