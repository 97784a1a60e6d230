//! `weightcast worker`.

use weightcast_launcher::{Environment, LaunchError, scheduled_rank};

use super::args::WorkerFlags;
use super::output::{fail, fail_with};
use crate::config::{WorkerEnvironment, host_name, variable};
use crate::device::LocalRank;
use crate::rpc::Token;
use crate::tls::Tls;
use crate::worker::{self, Ended, WorkerConfig};

/// How long the coordinator may be out of reach: a restart of it takes a second or two.
const COORDINATOR_DEADLINE: std::time::Duration = std::time::Duration::from_secs(10);

pub(super) fn run(flags: WorkerFlags) -> u8 {
    let placed = match place() {
        Ok(placed) => placed,
        Err(error) => return fail_with(&error, error.exit_code()),
    };
    let environment = match WorkerEnvironment::read(&|name| variable(name).or_else(|| placed(name))) {
        Ok(environment) => environment,
        Err(error) => return fail(&error),
    };
    super::arm_faults(&format!("rank{}", environment.rank));
    let tls = match flags.tls.files().map(Tls::open).transpose() {
        Ok(tls) => tls,
        Err(error) => return fail(&error),
    };
    let config = WorkerConfig {
        tls,
        rank: environment.rank,
        world: environment.world,
        coordinator: environment.coordinator,
        token: Token::at(environment.token_file),
        data_ip: environment.data_ip,
        host: host_name(),
        checkpoint_root: environment.checkpoint_root,
        device: environment.device,
        sharing: environment.sharing,
        local: LocalRank { index: environment.local_rank, count: environment.local_ranks },
        nccl_library: environment.nccl_library,
        join_deadline: environment.join_deadline,
        coordinator_deadline: COORDINATOR_DEADLINE,
    };
    // The session renews its lease on this thread; the weights move on the data thread.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail_with(&error, 70),
    };
    match runtime.block_on(worker::run(config)) {
        Ok(Ended::Finished) => 0,
        Ok(Ended::Preempted) => super::EXIT_PREEMPTED,
        Err(error) => fail_with(&error, error.exit_code()),
    }
}

/// The variables of a rank's place, from those of a scheduler that started it without a launcher (`srun weightcast worker`).
fn place() -> Result<impl Fn(&str) -> Option<String>, LaunchError> {
    let is_placed = variable("RANK").is_some();
    let scheduled = if is_placed { None } else { scheduled_rank(&Environment::of_this_process())? };
    Ok(move |name: &str| {
        let place = scheduled?;
        let number = match name {
            "RANK" => place.rank,
            "WORLD_SIZE" => place.world_size,
            "LOCAL_RANK" => place.local_rank,
            "LOCAL_WORLD_SIZE" => place.local_world_size,
            _ => return None,
        };
        Some(number.to_string())
    })
}
