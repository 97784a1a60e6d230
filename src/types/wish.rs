//! What a job asks of devices and of the data plane, before anybody has looked whether it is there.

use serde::{Deserialize, Serialize};

/// Where the ranks' weights are to lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceWish {
    /// On CUDA devices where there is one for every rank of a host, else on the host.
    #[default]
    Auto,
    /// In host memory.
    Cpu,
    /// On CUDA devices; it is an error if there are too few.
    Cuda,
}

impl DeviceWish {
    /// The name in job files, flags and the environment.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

impl std::str::FromStr for DeviceWish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = [Self::Auto, Self::Cpu, Self::Cuda].into_iter().find(|wish| wish.name() == text);
        found.ok_or_else(|| "expected auto, cpu or cuda".to_owned())
    }
}

/// Whether several ranks may share one CUDA device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// Each rank has a device of its own.
    #[default]
    Refused,
    /// With fewer devices than ranks they share.
    Allowed,
}

/// What moves pieces between ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendWish {
    /// NCCL where every rank has a CUDA device of its own and can load the library, else TCP.
    #[default]
    Auto,
    /// NCCL; it is an error if a rank cannot.
    Nccl,
    /// TCP, through host memory.
    Tcp,
}

impl std::str::FromStr for BackendWish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "nccl" => Ok(Self::Nccl),
            "tcp" => Ok(Self::Tcp),
            _ => Err("expected auto, nccl or tcp".to_owned()),
        }
    }
}
