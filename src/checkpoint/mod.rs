//! Checkpoints: each rank writes its shard, the coordinator seals and publishes; reading finds, checks and plans a resume.
//!
//! Owns: names in a checkpoint root, the shard file's layout, the commit, the choice of what to resume from.
//! Refuses to know: ranks' processes, RPC, training. The format is docs/FORMAT.md.
//!
//! Invariants:
//! - `CK-1`: a step directory exists only with a complete, synced content: the rename is the commit.
//!   In a store that does not rename, the creation of the manifest is (`claimed`).
//! - `CK-2`: nothing is ever written into a committed directory.
//! - `CK-3`: no byte of a shard is used before its block digest held.

mod catalog;
mod claimed;
mod commit;
mod edges;
mod error;
mod layout;
mod names;
mod prune;
mod read;
mod resume;
mod verify;
mod write;

pub use catalog::{Checkpoint, Listed, Skipped, list, newest, open};
pub use commit::{begin, commit};
pub use error::CheckpointError;
pub(crate) use names::table_name;
pub use names::{LATEST, parse_step_name, step_name};
pub use prune::{Delete, Pruned, prune, retain};
pub use read::VerifiedFile;
pub use resume::{plan_resume, plan_state};
pub use verify::{Depth, Verified, verify};
pub(crate) use write::data_bytes;
pub use write::{WriteRequest, write_shard};
