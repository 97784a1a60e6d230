//! Launchers and jobs over several hosts, each a network namespace of its own with its name and address (`tests/net`): the places
//! of ranks as schedulers say them, and a whole job.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock and files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use support::{Ended, Job, MODEL, PATIENCE, Place, until};
use weightcast_test_net::{Host, Net, is_wanted};

/// What a rank says: its place, its own host, the name where rank 0 is, and the address that this name has on its host.
const WORDS: &str = "set -- $(getent ahostsv4 $MASTER_ADDR); echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE \
                     $GROUP_RANK/$GROUP_WORLD_SIZE on $(hostname), rank 0 at $MASTER_ADDR $1";
/// Bytes of the longest packet.
const PACKET_BYTES: u64 = 9000;

/// A launcher: the index of its host, and what its scheduler says.
type Launcher<'a> = (usize, &'a [(&'a str, &'a str)]);

fn hosts(net: &Net, names: &[&str]) -> Vec<Host> {
    names.iter().map(|name| net.host(name).unwrap_or_else(|error| panic!("{error}"))).collect()
}

fn net(seed: u64) -> Net {
    Net::new(seed).unwrap_or_else(|error| panic!("{error}"))
}

/// The place of a rank: its rank, its local rank, its launcher's, and its host.
fn said((rank, world): (u32, u32), local: (u32, u32), group: (u32, u32), (host, master): (&str, &str)) -> String {
    let name = host.split('.').next().expect("a name");
    format!(
        "[{rank}] {rank}/{world} {}/{} {}/{} on {name}, rank 0 at {master} 10.77.0.1",
        local.0, local.1, group.0, group.1
    )
}

/// Starts the launchers on their hosts with `flags`, and expects these lines of their ranks. Rank 0 is on the first host.
fn expect_ranks(names: &[&str], flags: &[&str], launchers: &[Launcher<'_>], expected: &[String]) {
    if !is_wanted() {
        return;
    }
    let (net, place) = (net(1), Place::new());
    let hosts = hosts(&net, names);
    let token = place.path("token");
    std::fs::write(&token, "a-token-of-the-test\n").expect("it is written");
    let arguments = [&["launch", "--rdzv-token-file", &token], flags, &["--no-python", "sh", "-c", WORDS]].concat();
    let start = |(host, variables): &Launcher<'_>| {
        let mut command = hosts[*host].adopt(place.command(&arguments));
        place.start_command({
            command.envs(variables.iter().copied());
            command
        })
    };
    let started: Vec<Job> = launchers.iter().map(start).collect();
    let ended: Vec<Ended> = started.into_iter().map(Job::wait).collect();
    for ended in &ended {
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
    let mut lines: Vec<String> = ended.iter().flat_map(|ended| ended.stdout.lines().map(str::to_owned)).collect();
    lines.sort();
    assert_eq!(lines, expected);
    place.expect_no_process();
}

/// Launchers that start two ranks on each of two hosts.
fn two_by_two(names: [&str; 2], master: &str) -> Vec<String> {
    let host = |rank: u32| if rank < 2 { names[0] } else { names[1] };
    (0..4).map(|rank| said((rank, 4), (rank % 2, 2), (rank / 2, 2), (host(rank), master))).collect()
}

/// Launchers that start one rank each, two on each of two hosts.
fn four_alone(names: [&str; 2], master: &str) -> Vec<String> {
    let host = |rank: u32| if rank < 2 { names[0] } else { names[1] };
    (0..4).map(|rank| said((rank, 4), (rank % 2, 2), (rank, 4), (host(rank), master))).collect()
}

/// As the pods of `k8s/` are started; where the others are follows from the pod's host name.
#[test]
fn jobset() {
    let names = ["wc-workers-0-0.wc", "wc-workers-0-1.wc"];
    let shared = [("WEIGHTCAST_COORDINATOR", "wc-coordinator-0-0.wc"), ("JOBSET_NAME", "wc")];
    let pod = |index: &'static str| [("JOB_COMPLETION_INDEX", index), shared[0], shared[1]];
    let launchers: [Launcher<'_>; 2] = [(1, &pod("1")), (0, &pod("0"))];
    expect_ranks(&names, &["--nnodes=2", "--nproc-per-node=2"], &launchers, &two_by_two(names, names[0]));
}

/// As Trainer 2.3 injects them.
#[test]
fn kubeflow_trainer() {
    let names = ["tj1-node-0-0.tj1", "tj1-node-0-1.tj1"];
    let pod = |rank: &'static str| {
        [
            ("PET_NNODES", "2"),
            ("PET_NPROC_PER_NODE", "2"),
            ("PET_NODE_RANK", rank),
            ("PET_MASTER_ADDR", names[0]),
            ("PET_MASTER_PORT", "29500"),
            ("JOB_COMPLETION_INDEX", rank),
        ]
    };
    let launchers: [Launcher<'_>; 2] = [(1, &pod("1")), (0, &pod("0"))];
    expect_ranks(&names, &[], &launchers, &two_by_two(names, names[0]));
}

#[test]
fn leader_worker_set() {
    let names = ["lws-0.lws.default", "lws-0-1.lws.default"];
    let pod =
        |index: &'static str| [("LWS_LEADER_ADDRESS", names[0]), ("LWS_GROUP_SIZE", "2"), ("LWS_WORKER_INDEX", index)];
    let launchers: [Launcher<'_>; 2] = [(1, &pod("1")), (0, &pod("0"))];
    expect_ranks(&names, &["--nproc-per-node=2"], &launchers, &two_by_two(names, names[0]));
}

/// `srun --ntasks-per-node=1` on three nodes of a list with a gap.
#[test]
fn slurm_with_one_launcher_per_node() {
    let names = ["node07", "node08", "node11"];
    let task = |node: &'static str| {
        [
            ("SLURM_STEP_NODELIST", "node[07-08,11]"),
            ("SLURM_STEP_NUM_NODES", "3"),
            ("SLURM_STEP_NUM_TASKS", "3"),
            ("SLURM_NODEID", node),
            ("SLURM_PROCID", node),
            ("SLURM_LOCALID", "0"),
            ("SLURM_JOB_ID", "4711"),
        ]
    };
    let launchers: [Launcher<'_>; 3] = [(2, &task("2")), (0, &task("0")), (1, &task("1"))];
    let expected: Vec<String> =
        (0_u32..3).zip(names).map(|(rank, host)| said((rank, 3), (0, 1), (rank, 3), (host, names[0]))).collect();
    expect_ranks(&names, &["--nproc-per-node=1"], &launchers, &expected);
}

/// `srun --ntasks-per-node=2`: nothing but `SLURM_*`.
#[test]
fn slurm_with_one_launcher_per_rank() {
    let names = ["n1", "n2"];
    let task = |rank: &'static str, node: &'static str, local: &'static str| {
        [
            ("SLURM_STEP_NODELIST", "n[1-2]"),
            ("SLURM_NNODES", "2"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x2)"),
            ("SLURM_NODEID", node),
            ("SLURM_PROCID", rank),
            ("SLURM_LOCALID", local),
            ("SLURM_JOB_ID", "4712"),
        ]
    };
    let launchers: [Launcher<'_>; 4] =
        [(1, &task("3", "1", "1")), (0, &task("0", "0", "0")), (1, &task("2", "1", "0")), (0, &task("1", "0", "1"))];
    expect_ranks(&names, &[], &launchers, &four_alone(names, "n1"));
}

/// Open MPI does not say on which host rank 0 is: a flag does.
#[test]
fn open_mpi() {
    let names = ["m1", "m2"];
    let task = |rank: &'static str, local: &'static str| {
        [
            ("OMPI_COMM_WORLD_RANK", rank),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", local),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ]
    };
    let launchers: [Launcher<'_>; 4] =
        [(0, &task("0", "0")), (0, &task("1", "1")), (1, &task("2", "0")), (1, &task("3", "1"))];
    expect_ranks(&names, &["--rdzv-endpoint=m1:29403"], &launchers, &four_alone(names, "m1"));
}

/// The coordinator on one host, a rank on each of two others, one checkpoint, and every byte between ranks through the net.
#[test]
fn a_job_on_three_hosts() {
    if !is_wanted() {
        return;
    }
    let (net, place) = (net(2), Place::new());
    let hosts = hosts(&net, &["a", "b", "c"]);
    let (state, checkpoints) = (place.path("state"), place.path("checkpoints"));
    let arguments =
        ["coordinator", "--ranks", "2", "--listen", "10.77.0.3:29400", "--insecure", "--json", "--state-dir"];
    let job = [&state, "--model", MODEL, "--quantize", "nf4", "--checkpoint-dir", &checkpoints, "--save"];
    let mut coordinator = place.start_command(hosts[2].adopt(place.command(&[&arguments[..], &job].concat())));
    until("the coordinator listens", PATIENCE, || {
        let said = coordinator.said();
        assert!(!coordinator.is_over(), "{said}");
        said.contains("listens on 10.77.0.3:29400")
    });
    let token = format!("{state}/token");
    let launch = |node: usize| {
        let node_rank = node.to_string();
        let place_of_node = ["launch", "--nnodes", "2", "--node-rank", &node_rank, "--nproc-per-node", "1"];
        let job = ["--coordinator", "c:29400", "--token-file", &token];
        place.start_command(hosts[node].adopt(place.command(&[&place_of_node[..], &job].concat())))
    };
    let nodes = [launch(1), launch(0)];
    for node in nodes {
        let ended = node.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        ended.expect_quiet();
    }
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.expect_quiet();
    let report = ended.json();
    let loads = report["loads"].as_array().expect("loads");
    let sent: u64 = loads.iter().filter_map(|load| load["sent_bytes"].as_u64()).sum();
    assert!(loads.len() == 2 && sent > 0, "{report}");
    assert!(net.counts().forwarded * PACKET_BYTES > sent, "{sent} bytes in {:?}", net.counts());
    let verified = place.run(&["checkpoint", "verify", "--deep", &checkpoints]);
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
    place.expect_no_process();
}
