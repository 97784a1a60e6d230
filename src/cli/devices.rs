//! The devices of this host in words.

use crate::device::{Device, probe};

/// The GPUs, or plainly why there is none.
pub(super) fn describe() -> String {
    let probe = probe();
    let gpus: Vec<String> = probe
        .devices
        .iter()
        .filter(|info| info.device != Device::Host)
        .map(|info| format!("{} {}", info.device, info.name))
        .collect();
    match (gpus.is_empty(), probe.no_gpu_reason) {
        (false, _) => gpus.join(", "),
        (true, Some(reason)) => format!("no GPU: {reason}"),
        (true, None) => "no GPU".to_owned(),
    }
}
