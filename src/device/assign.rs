//! Which device a rank gets.
//!
//! Owns: the rule. Refuses to know: where a wish and a local rank come from.
//!
//! `DA-1`: rank `l` of a host gets device `l` modulo the devices that the driver shows. Without sharing no two ranks get
//! the same one: with `cuda` that is an error, with `auto` the weights stay on the host.

use super::{Device, DeviceContext, DeviceError, Probe};
use crate::types::{DeviceWish, Sharing};

/// A rank among those of its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalRank {
    /// Its index, from 0.
    pub index: u32,
    /// The ranks of this host.
    pub count: u32,
}

/// The device of a rank (`DA-1`).
///
/// # Errors
/// With [`DeviceWish::Cuda`]: [`DeviceError::NoDriver`] when there is no device, [`DeviceError::TooFewDevices`] when ranks
/// would have to share one and [`Sharing::Refused`].
pub fn assign(wish: DeviceWish, sharing: Sharing, local: LocalRank, probe: &Probe) -> Result<Device, DeviceError> {
    let count = probe.devices.iter().filter(|info| info.device != Device::Host).count();
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    let fits = local.count <= count || sharing == Sharing::Allowed;
    match wish {
        DeviceWish::Auto if count > 0 && fits => Ok(Device::Cuda { ordinal: local.index % count }),
        DeviceWish::Cpu | DeviceWish::Auto => Ok(Device::Host),
        DeviceWish::Cuda if count == 0 => {
            let reason = probe.no_gpu_reason.clone();
            Err(DeviceError::NoDriver { reason: reason.unwrap_or_else(|| "there is no CUDA device".to_owned()) })
        }
        DeviceWish::Cuda if fits => Ok(Device::Cuda { ordinal: local.index % count }),
        DeviceWish::Cuda => Err(DeviceError::TooFewDevices { ranks: local.count, count }),
    }
}

/// The bytes that are free on the fullest of the CUDA devices that `ranks` ranks of this host use, and their number.
/// Opens the devices for a moment, so the figure is what is free beside one context.
///
/// # Errors
/// [`DeviceError`] of the first device that cannot be opened.
pub fn free_bytes(ranks: u32, probe: &Probe) -> Result<Option<(u64, u32)>, DeviceError> {
    let used =
        probe.devices.iter().filter(|info| info.device != Device::Host).take(crate::types::as_usize(ranks.into()));
    let mut least: Option<(u64, u32)> = None;
    for info in used {
        let Some(memory) = DeviceContext::open(info.device)?.memory_info()? else { continue };
        let (bytes, count) = least.unwrap_or((u64::MAX, 0));
        least = Some((bytes.min(memory.free_bytes), count + 1));
    }
    Ok(least)
}

#[cfg(test)]
mod tests {
    use super::super::DeviceInfo;
    use super::*;

    fn machine(gpus: u32) -> Probe {
        let info = |device| DeviceInfo { device, name: String::new(), total_bytes: 0, compute_capability: None };
        let gpus_info = (0..gpus).map(|ordinal| info(Device::Cuda { ordinal }));
        let devices = std::iter::once(info(Device::Host)).chain(gpus_info).collect();
        Probe { devices, no_gpu_reason: (gpus == 0).then(|| "none here".to_owned()) }
    }

    /// DA-1, every row by hand.
    #[test]
    fn da_1_ranks_get_devices() {
        use DeviceWish::{Auto, Cpu, Cuda};
        let found = |wish, sharing, index, count, gpus| {
            assign(wish, sharing, LocalRank { index, count }, &machine(gpus)).map(|device| device.to_string())
        };
        let on = |name: &str| Ok(name.to_owned());
        assert_eq!(found(Auto, Sharing::Refused, 0, 1, 0), on("host"));
        assert_eq!(found(Auto, Sharing::Refused, 3, 4, 4), on("cuda:3"));
        assert_eq!(found(Auto, Sharing::Refused, 1, 2, 8), on("cuda:1"));
        assert_eq!(found(Auto, Sharing::Refused, 3, 4, 2), on("host"));
        assert_eq!(found(Auto, Sharing::Allowed, 3, 4, 2), on("cuda:1"));
        assert_eq!(found(Cpu, Sharing::Allowed, 0, 1, 2), on("host"));
        assert_eq!(found(Cuda, Sharing::Refused, 1, 2, 2), on("cuda:1"));
        assert_eq!(found(Cuda, Sharing::Allowed, 2, 3, 1), on("cuda:0"));
        let few = DeviceError::TooFewDevices { ranks: 3, count: 1 };
        assert_eq!(found(Cuda, Sharing::Refused, 0, 3, 1), Err(few));
        let none = DeviceError::NoDriver { reason: "none here".to_owned() };
        assert_eq!(found(Cuda, Sharing::Allowed, 0, 1, 0), Err(none));
    }
}
