//! The examples of `docs/examples`, run: Slurm, Open MPI and ssh with stand-ins that start their commands here as the real ones do on
//! nodes, with the variables that these set. Two nodes of two ranks load a model and commit a checkpoint.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::{Command, Stdio};

use support::{Ended, MODEL, Place};

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/examples");

/// One launcher on each of two nodes, as `srun --ntasks-per-node=1` starts them: `SLURM_*` and nothing else.
const SRUN: &str = r#"#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
  SLURM_STEP_NODELIST='127.20.90.[1-2]' SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=2 SLURM_NODEID=$node SLURM_PROCID=$node \
    SLURM_LOCALID=0 SLURM_JOB_NODELIST='127.20.90.[1-2]' "$@" &
  tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do wait $task || code=$?; done
exit $code
"#;

/// One launcher for each rank, as Open MPI 4.1 starts them on two hosts.
const MPIRUN: &str = r#"#!/bin/bash
while [[ $1 == -* ]]; do shift 2; done
for rank in 0 1 2 3; do
  OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=$((rank % 2)) OMPI_COMM_WORLD_LOCAL_SIZE=2 "$@" &
  tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do wait $task || code=$?; done
exit $code
"#;

const SSH: &str = "#!/bin/bash\nshift\nexec \"$@\"\n";
const SCONTROL: &str = "#!/bin/bash\necho \"scontrol $*\" >&2\n";

/// Runs an example with stand-ins first in its path.
fn run(place: &Place, script: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Ended {
    let bin = place.path("bin");
    std::fs::create_dir_all(&bin).expect("a directory");
    for (name, text) in [("srun", SRUN), ("mpirun", MPIRUN), ("remote", SSH), ("scontrol", SCONTROL)] {
        let path = format!("{bin}/{name}");
        std::fs::write(&path, text).expect("it is written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("our own");
    }
    symlink(env!("CARGO_BIN_EXE_weightcast"), format!("{bin}/weightcast")).expect("a link");
    let job = place.path("job.toml");
    let checkpoints = place.path("checkpoints");
    let text = format!("[model]\nsource = \"{MODEL}\"\n[checkpoint]\ndirectory = \"{checkpoints}\"\nsave = true\n");
    std::fs::write(&job, text).expect("it is written");
    std::fs::write(place.path("hosts"), "127.20.91.1\n127.20.91.2\n").expect("it is written");

    // Three ports from here are ours too, with luck: other tests take theirs from the system, which goes round.
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port").port();
    let mut command = Command::new("bash");
    let path = std::env::var("PATH").expect("a path");
    command.arg(format!("{EXAMPLES}/{script}")).arg(&job).args(arguments).stdin(Stdio::null());
    for (name, value) in place.command(&[]).get_envs() {
        command.env(name, value.expect("they are set"));
    }
    command.env("PATH", format!("{bin}:{path}")).env("STATE_DIRECTORY", place.path("state"));
    command.env("COORDINATOR_HOST", "127.0.0.1").env("WEIGHTCAST_PORT", free.to_string());
    command.envs(variables.iter().copied());
    place.start_command(command).wait()
}

fn expect_checkpoint(place: &Place, ended: &Ended) {
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let verified = place.run(&["checkpoint", "verify", "--deep", &place.path("checkpoints")]);
    assert_eq!(verified.code, Some(0), "{}\n{}", verified.stderr, ended.stderr);
    place.expect_no_process();
}

#[test]
fn slurm() {
    let place = Place::new();
    let variables = [("SLURM_NNODES", "2"), ("SLURM_JOB_ID", "4711"), ("RANKS_PER_NODE", "2")];
    let ended = run(&place, "slurm.sbatch", &[], &variables);
    expect_checkpoint(&place, &ended);
}

#[test]
fn open_mpi() {
    let place = Place::new();
    let hosts = place.path("hosts");
    let ended = run(&place, "mpirun.sh", &[&hosts, "2"], &[]);
    expect_checkpoint(&place, &ended);
}

#[test]
fn hosts_over_ssh() {
    let place = Place::new();
    let hosts = place.path("hosts");
    let ended = run(&place, "ssh-hosts.sh", &[&hosts, "2"], &[("REMOTE_SHELL", "remote")]);
    expect_checkpoint(&place, &ended);
}

/// A job whose configuration cannot work ends with its code, and starts nothing.
#[test]
fn a_job_that_cannot_work_says_so() {
    let place = Place::new();
    let hosts = place.path("hosts");
    let ended = run(&place, "ssh-hosts.sh", &[&hosts, "0"], &[("REMOTE_SHELL", "remote")]);
    assert_eq!(ended.code, Some(64), "{}", ended.stderr);
    place.expect_no_process();
}
