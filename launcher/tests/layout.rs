//! The layout is a function of flags and environment: one table per scheduler, and one job of real processes.

#[expect(dead_code, reason = "each test file uses its part")]
mod common;

use clap::Parser;
use weightcast_launcher::{
    Environment, Launch, LaunchArgs, LaunchError, Layout, ScheduledRank, resolve, scheduled_rank,
};

#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    launch: LaunchArgs,
}

fn parse(flags: &[&str]) -> LaunchArgs {
    Arguments::try_parse_from(["launch"].iter().chain(flags)).expect("the flags exist").launch
}

fn layout_on(host: &str, flags: &[&str], variables: &[(&str, &str)]) -> Result<Layout, LaunchError> {
    let mut environment = Environment::of_variables(variables.iter().copied());
    (environment.hostname, environment.processors, environment.gpus) = (host.to_owned(), 16, 8);
    resolve(&parse(flags), &environment)
}

fn layout(flags: &[&str], variables: &[(&str, &str)]) -> Layout {
    layout_on("host", flags, variables).expect("it resolves")
}

/// (nnodes, node rank, ranks here, first rank, world size)
fn numbers(layout: &Layout) -> (u32, Option<u32>, u32, u32, u32) {
    (layout.nnodes, layout.node_rank, layout.nproc_per_node, layout.first_rank, layout.world_size)
}

#[test]
fn the_default_is_one_rank_on_one_node() {
    let one = layout(&["x.py"], &[]);
    assert_eq!(numbers(&one), (1, Some(0), 1, 0, 1));
    assert_eq!((one.master_addr.as_deref(), one.master_port, one.endpoint), (Some("127.0.0.1"), None, None));
}

#[test]
fn both_spellings_of_flags_and_all_words_for_ranks() {
    for (flag, ranks) in [("4", 4), ("auto", 8), ("gpu", 8), ("cpu", 16)] {
        assert_eq!(layout(&["--nproc-per-node", flag, "x.py"], &[]).nproc_per_node, ranks);
        assert_eq!(layout(&["--nproc_per_node", flag, "x.py"], &[]).nproc_per_node, ranks);
        assert_eq!(layout(&["x.py"], &[("PET_NPROC_PER_NODE", flag)]).nproc_per_node, ranks);
    }
    let long = [
        "--nnodes=2",
        "--node_rank=1",
        "--master_addr=a",
        "--master_port=7",
        "--rdzv_endpoint=b:8",
        "--rdzv_id=j",
        "x",
    ];
    let short = [
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=a",
        "--master-port=7",
        "--rdzv-endpoint=b:8",
        "--rdzv-id=j",
        "x",
    ];
    assert_eq!(layout(&long, &[]), layout(&short, &[]));
}

#[test]
fn the_variables_of_kubeflow_trainer() {
    // As Trainer 2.3 injects them.
    let trainer = [
        ("PET_NNODES", "3"),
        ("PET_NPROC_PER_NODE", "auto"),
        ("PET_NODE_RANK", "1"),
        ("PET_MASTER_ADDR", "tj1-node-0-0.tj1"),
        ("PET_MASTER_PORT", "29500"),
        ("JOB_COMPLETION_INDEX", "1"),
    ];
    let layout = layout(&["x.py"], &trainer);
    assert_eq!(numbers(&layout), (3, Some(1), 8, 8, 24));
    assert_eq!((layout.master_addr.as_deref(), layout.master_port), (Some("tj1-node-0-0.tj1"), Some(29500)));
    assert_eq!(layout.endpoint.expect("three nodes meet").host, "tj1-node-0-0.tj1");
}

#[test]
fn flags_win_over_pet_and_pet_over_the_scheduler() {
    let variables =
        [("PET_NNODES", "3"), ("PET_NODE_RANK", "2"), ("JOB_COMPLETION_INDEX", "1"), ("PET_MASTER_ADDR", "p")];
    assert_eq!(layout(&["x"], &variables).node_rank, Some(2));
    let flags = layout(&["--node-rank=0", "--master-addr=f", "x"], &variables);
    assert_eq!((flags.node_rank, flags.master_addr.as_deref()), (Some(0), Some("f")));
    let alone = layout(
        &["--standalone", "--nproc-per-node=2", "x"],
        &[("SLURM_STEP_NODELIST", "n[1-2]"), ("SLURM_NODEID", "1")],
    );
    assert_eq!(numbers(&alone), (1, Some(0), 2, 0, 2));
}

#[test]
fn one_node_takes_an_address_from_flags_only() {
    let variables =
        [("MASTER_ADDR", "far"), ("MASTER_PORT", "29500"), ("SLURM_STEP_NODELIST", "n[1-2]"), ("SLURM_NODEID", "1")];
    let alone = layout(&["--nnodes=1", "x"], &variables);
    assert_eq!((alone.master_addr.as_deref(), alone.master_port), (Some("127.0.0.1"), None));
    let told = layout(&["--nnodes=1", "--master-addr=me", "--master-port=7", "x"], &variables);
    assert_eq!((told.master_addr.as_deref(), told.master_port), (Some("me"), Some(7)));
    let several = layout(&["--nnodes=2", "--node-rank=1", "x"], &variables[..2]);
    assert_eq!((several.master_addr.as_deref(), several.master_port), (Some("far"), Some(29500)));
}

#[test]
fn a_jobset_pod_finds_its_first_sibling() {
    let variables =
        [("JOB_COMPLETION_INDEX", "3"), ("WEIGHTCAST_COORDINATOR", "wc-coordinator-0-0.wc"), ("JOBSET_NAME", "wc")];
    let layout =
        layout_on("wc-workers-0-3", &["--nnodes=4", "--nproc-per-node=8", "x"], &variables).expect("it resolves");
    assert_eq!(numbers(&layout), (4, Some(3), 8, 24, 32));
    assert_eq!((layout.master_addr.as_deref(), layout.run_id.as_str()), (Some("wc-workers-0-0.wc"), "wc"));
    // Without the number of nodes, one node would be a silent mistake.
    let error = layout_on("wc-workers-0-3", &["x"], &variables).expect_err("the number of nodes is not known");
    assert_eq!((error.exit_code(), error.to_string().contains("--nnodes")), (78, true), "{error}");
    // Without a subdomain, falling back to localhost would be another.
    let error =
        layout_on("h-0-3", &["--nnodes=4", "x"], &[("JOB_COMPLETION_INDEX", "3")]).expect_err("no address is known");
    assert!(matches!(error, LaunchError::Unknown { .. }), "{error}");
}

#[test]
fn a_leader_worker_set() {
    let variables = [("LWS_LEADER_ADDRESS", "lws-0.lws.default"), ("LWS_GROUP_SIZE", "2"), ("LWS_WORKER_INDEX", "1")];
    let layout = layout(&["--nproc-per-node=gpu", "x"], &variables);
    assert_eq!(numbers(&layout), (2, Some(1), 8, 8, 16));
    assert_eq!(layout.master_addr.as_deref(), Some("lws-0.lws.default"));
}

#[test]
fn a_slurm_step_with_one_launcher_per_node() {
    let variables = [
        ("SLURM_STEP_NODELIST", "node[07-08,11],gpu-a"),
        ("SLURM_STEP_NUM_NODES", "4"),
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("SLURM_NNODES", "9"),
        ("SLURM_NTASKS", "72"),
        ("SLURM_NODEID", "2"),
        ("SLURM_PROCID", "2"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_JOB_ID", "4711"),
    ];
    let layout = layout(&["--nproc-per-node=8", "x"], &variables);
    assert_eq!(numbers(&layout), (4, Some(2), 8, 16, 32));
    assert_eq!((layout.master_addr.as_deref(), layout.run_id.as_str()), (Some("node07"), "4711"));
}

/// Two jobs, or two steps of one, met at one port when they had the same first node, and the second was refused. By hand: 4711 is
/// 48 times 98 and 7.
#[test]
fn slurm_jobs_that_share_a_node_meet_at_ports_of_their_own() {
    let port = |job: &str, step: &str| {
        let place = [("SLURM_STEP_NODELIST", "n[1-2]"), ("SLURM_STEP_NUM_NODES", "2"), ("SLURM_NODEID", "0")];
        let layout = layout(&["x"], &[&place[..], &[("SLURM_JOB_ID", job), ("SLURM_STEP_ID", step)]].concat());
        layout.endpoint.expect("two nodes").port
    };
    assert_eq!(
        [port("4711", "0"), port("4711", "1"), port("4712", "0"), port("4703", "0")],
        [29_409, 29_410, 29_410, 29_499]
    );
}

#[test]
fn a_slurm_step_with_one_launcher_per_rank() {
    let variables = [
        ("SLURM_STEP_NODELIST", "n[1-2]"),
        ("SLURM_NNODES", "2"),
        ("SLURM_NTASKS", "7"),
        ("SLURM_PROCID", "5"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NODEID", "1"),
        ("SLURM_STEP_TASKS_PER_NODE", "4,3"),
    ];
    let layout = layout(&["x"], &variables);
    assert_eq!(numbers(&layout), (7, Some(5), 1, 5, 7));
    assert_eq!((layout.first_local_rank, layout.local_world_size), (1, 3));
    let error = layout_on("h", &["--nproc-per-node=4", "x"], &variables).expect_err("ranks would multiply");
    assert_eq!(error.exit_code(), 64);
}

#[test]
fn a_slurm_batch_script_outside_of_a_step_is_alone() {
    let variables =
        [("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0"), ("SLURM_NODEID", "0"), ("SLURM_JOB_NODELIST", "n[1-8]")];
    assert_eq!(numbers(&layout(&["--nproc-per-node=4", "x"], &variables)), (1, Some(0), 4, 0, 4));
}

#[test]
fn open_mpi_starts_one_launcher_per_rank() {
    let variables = [
        ("OMPI_COMM_WORLD_RANK", "3"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "3"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ("PMIX_NAMESPACE", "1234@0"),
    ];
    let layout = layout(&["x"], &variables);
    assert_eq!(numbers(&layout), (4, Some(3), 1, 3, 4));
    assert_eq!((layout.first_local_rank, layout.local_world_size), (3, 4));
    assert_eq!(layout.master_addr.as_deref(), Some("127.0.0.1"));
    // On two hosts the address of rank 0 is not in the environment.
    let spread = [variables[0], variables[1], ("OMPI_COMM_WORLD_LOCAL_RANK", "1"), ("OMPI_COMM_WORLD_LOCAL_SIZE", "2")];
    assert!(matches!(layout_on("h", &["x"], &spread), Err(LaunchError::Unknown { .. })));
}

/// A process that is a rank itself needs no address of the others: Open MPI on two hosts says enough.
#[test]
fn a_scheduler_may_start_ranks_themselves() {
    let place = |variables: &[(&str, &str)]| scheduled_rank(&Environment::of_variables(variables.iter().copied()));
    let slurm = [
        ("SLURM_STEP_NODELIST", "n[1-2]"),
        ("SLURM_STEP_NUM_NODES", "2"),
        ("SLURM_STEP_NUM_TASKS", "3"),
        ("SLURM_PROCID", "1"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NODEID", "0"),
        ("SLURM_STEP_TASKS_PER_NODE", "2,1"),
    ];
    let expected = ScheduledRank { rank: 1, world_size: 3, local_rank: 1, local_world_size: 2 };
    assert_eq!(place(&slurm).expect("as srun sets them"), Some(expected));
    let open_mpi = [
        ("OMPI_COMM_WORLD_RANK", "3"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
    ];
    let expected = ScheduledRank { rank: 3, world_size: 4, local_rank: 1, local_world_size: 2 };
    assert_eq!(place(&open_mpi).expect("as mpirun sets them"), Some(expected));
    let batch_script = [("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0"), ("SLURM_JOB_NODELIST", "n[1-8]")];
    assert_eq!(place(&batch_script).expect("not a step"), None);
    assert_eq!(place(&[("PMI_RANK", "x")]).expect_err("no number").exit_code(), 64);
}

#[test]
fn hydra_and_other_users_of_pmi() {
    let variables = [("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "1"), ("MPI_LOCALNRANKS", "2")];
    assert_eq!(numbers(&layout(&["x"], &variables)), (2, Some(1), 1, 1, 2));
}

#[test]
fn elastic_ranges_and_endpoints() {
    let elastic = layout(&["--nnodes=2:4", "--rdzv-endpoint=[fd00::1]:77", "x"], &[]);
    assert_eq!((elastic.nnodes_min, elastic.nnodes, elastic.node_rank), (2, 4, None));
    assert_eq!(elastic.endpoint.expect("nodes meet").to_string(), "[fd00::1]:77");
    let endpoint =
        |text: &str| layout(&["--nnodes=2", "--rdzv-endpoint", text, "x"], &[]).endpoint.expect("nodes meet");
    assert_eq!((endpoint("h").port, endpoint("h:1").port, endpoint("fd00::1").host.as_str()), (29400, 1, "fd00::1"));
}

#[test]
fn wrong_values_are_usage_errors_that_name_their_origin() {
    for (flags, variables, origin) in [
        (vec!["--nnodes=3:2", "x"], vec![], "--nnodes"),
        (vec!["--nnodes=0", "x"], vec![], "--nnodes"),
        (vec!["x"], vec![("PET_NPROC_PER_NODE", "0")], "PET_NPROC_PER_NODE"),
        (vec!["--master-port=99999", "x"], vec![], "--master-port"),
        (vec!["--nnodes=2", "--node-rank=2", "--master-addr=a", "x"], vec![], "node rank 2"),
        (vec!["--standalone", "--nnodes=2", "x"], vec![], "--standalone"),
        (vec!["x"], vec![("JOB_COMPLETION_INDEX", "one")], "JOB_COMPLETION_INDEX"),
        (vec!["x"], vec![("SLURM_STEP_NODELIST", "n[1-")], "SLURM_STEP_NODELIST"),
    ] {
        let error = layout_on("h", &flags, &variables).expect_err(origin);
        assert_eq!(error.exit_code(), 64, "{error}");
        assert!(error.to_string().contains(origin), "{error}");
    }
}

#[test]
fn every_flag_is_checked_before_anything_starts() {
    for flag in [
        "--max-restarts=x",
        "--shutdown-timeout=-1",
        "--redirects=5",
        "--tee=a",
        "--local-ranks-filter=a",
        "--monitor-interval=x",
    ] {
        let error = Launch::from_args(&parse(&[flag, "x.py"]), &Environment::of_variables([])).expect_err(flag);
        assert_eq!(error.exit_code(), 64, "{error}");
    }
    let variables =
        [("PET_MAX_RESTARTS", "2"), ("PET_SHUTDOWN_TIMEOUT", "1.5"), ("PET_LOG_DIR", "/l"), ("PET_TEE", "3")];
    let launch = Launch::from_args(&parse(&["x.py"]), &Environment::of_variables(variables)).expect("it is valid");
    assert_eq!((launch.max_restarts, launch.grace.shutdown.as_millis()), (2, 1500));
    assert_eq!(launch.log.dir.as_deref(), Some(std::path::Path::new("/l")));
}

/// Real launchers with a scheduler's variables, and their ranks: what each rank says of itself.
mod processes {
    use super::common::{Marked, Running};

    const WORDS: &str =
        "echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $GROUP_RANK/$GROUP_WORLD_SIZE $MASTER_ADDR";

    /// Starts a launcher for each element of `launchers`, with `flags`, and gives the lines of all ranks in order. All are on this
    /// host, whatever the variables say; each test has a loopback address of its own, because the port where launchers meet is
    /// the same where the scheduler says none.
    fn ranks(flags: &[&str], launchers: &[Vec<(&str, String)>]) -> Vec<String> {
        let marked = Marked::new();
        let start = |variables: &Vec<(&str, String)>| {
            let arguments = [&["--no-python"], flags, &["sh", "-c", WORDS]].concat();
            let mut command = marked.launcher(&arguments);
            command.envs(variables.iter().map(|(name, value)| (*name, value)));
            Running::start(command)
        };
        let running: Vec<Running> = launchers.iter().map(start).collect();
        let finished: Vec<_> = running.into_iter().map(Running::finish).collect();
        assert!(finished.iter().all(|launcher| launcher.code == Some(0)), "{finished:#?}");
        let mut lines: Vec<String> = finished.iter().flat_map(|one| one.stdout.lines().map(str::to_owned)).collect();
        lines.sort();
        marked.assert_nothing_left();
        lines
    }

    fn of(pairs: &[(&'static str, &str)]) -> Vec<(&'static str, String)> {
        pairs.iter().map(|(name, value)| (*name, (*value).to_owned())).collect()
    }

    /// Two nodes of two ranks.
    fn two_by_two(master: &str) -> Vec<String> {
        (0..4).map(|rank| format!("[{rank}] {rank}/4 {}/2 {}/2 {master}", rank % 2, rank / 2)).collect()
    }

    /// As the pods of `k8s/` are started: JobSet 0.12 says the coordinator's name by an annotation, the Job controller the index.
    #[test]
    fn jobset() {
        let pod = |index: &str| {
            of(&[
                ("JOB_COMPLETION_INDEX", index),
                ("WEIGHTCAST_COORDINATOR", "wc-coordinator-0-0.wc"),
                ("JOBSET_NAME", "wc"),
            ])
        };
        let flags = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-endpoint=127.19.1.1:29403"];
        assert_eq!(ranks(&flags, &[pod("0"), pod("1")]), two_by_two("127.19.1.1"));
    }

    /// As Trainer 2.3 injects them; the master's name resolves here.
    #[test]
    fn kubeflow_trainer() {
        let pod = |rank: &str| {
            of(&[
                ("PET_NNODES", "2"),
                ("PET_NPROC_PER_NODE", "2"),
                ("PET_NODE_RANK", rank),
                ("PET_MASTER_ADDR", "127.19.2.1"),
                ("PET_MASTER_PORT", "29500"),
                ("JOB_COMPLETION_INDEX", rank),
            ])
        };
        assert_eq!(ranks(&[], &[pod("1"), pod("0")]), two_by_two("127.19.2.1"));
    }

    #[test]
    fn leader_worker_set() {
        let pod = |index: &str| {
            of(&[("LWS_LEADER_ADDRESS", "127.19.3.1"), ("LWS_GROUP_SIZE", "2"), ("LWS_WORKER_INDEX", index)])
        };
        assert_eq!(ranks(&["--nproc-per-node=2"], &[pod("1"), pod("0")]), two_by_two("127.19.3.1"));
    }

    /// `srun --ntasks-per-node=1`: `SLURM_*` alone, with as many ranks as a flag says.
    #[test]
    fn slurm_with_one_launcher_per_node() {
        let task = |node: &str| {
            of(&[
                ("SLURM_STEP_NODELIST", "127.19.4.[1-2]"),
                ("SLURM_STEP_NUM_NODES", "2"),
                ("SLURM_STEP_NUM_TASKS", "2"),
                ("SLURM_NNODES", "2"),
                ("SLURM_NODEID", node),
                ("SLURM_PROCID", node),
                ("SLURM_LOCALID", "0"),
                ("SLURM_JOB_ID", "4711"),
            ])
        };
        assert_eq!(ranks(&["--nproc-per-node=2"], &[task("1"), task("0")]), two_by_two("127.19.4.1"));
    }

    /// `srun --ntasks-per-node=2`: nothing but `SLURM_*`. Each launcher has one rank, and knows its place on the node.
    #[test]
    fn slurm_with_one_launcher_per_rank() {
        let task = |rank: u32| {
            let (node, local) = ((rank / 2).to_string(), (rank % 2).to_string());
            let rank = rank.to_string();
            of(&[
                ("SLURM_STEP_NODELIST", "127.19.5.[1-2]"),
                ("SLURM_NNODES", "2"),
                ("SLURM_NTASKS", "4"),
                ("SLURM_STEP_TASKS_PER_NODE", "2(x2)"),
                ("SLURM_NODEID", &node),
                ("SLURM_PROCID", &rank),
                ("SLURM_LOCALID", &local),
                ("SLURM_JOB_ID", "4712"),
            ])
        };
        let expected: Vec<String> =
            (0..4).map(|rank| format!("[{rank}] {rank}/4 {}/2 {rank}/4 127.19.5.1", rank % 2)).collect();
        assert_eq!(ranks(&[], &[task(3), task(0), task(2), task(1)]), expected);
    }

    /// `mpirun -np 2` on one host, as Open MPI 4.1 says it.
    #[test]
    fn open_mpi_on_one_host() {
        let task = |rank: &str| {
            of(&[
                ("OMPI_COMM_WORLD_RANK", rank),
                ("OMPI_COMM_WORLD_SIZE", "2"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", rank),
                ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
                ("PMIX_NAMESPACE", "1234@0"),
            ])
        };
        let expected = ["[0] 0/2 0/2 0/2 127.0.0.1", "[1] 1/2 1/2 1/2 127.0.0.1"];
        assert_eq!(ranks(&[], &[task("1"), task("0")]), expected);
    }

    /// `mpirun` on two hosts does not say where rank 0 is: a flag does.
    #[test]
    fn open_mpi_on_two_hosts() {
        let task = |rank: u32| {
            let (local, rank) = ((rank % 2).to_string(), rank.to_string());
            of(&[
                ("OMPI_COMM_WORLD_RANK", &rank),
                ("OMPI_COMM_WORLD_SIZE", "4"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", &local),
                ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ])
        };
        let expected: Vec<String> =
            (0..4).map(|rank| format!("[{rank}] {rank}/4 {}/2 {rank}/4 127.19.6.1", rank % 2)).collect();
        let flags = ["--rdzv-endpoint=127.19.6.1:29403"];
        assert_eq!(ranks(&flags, &[task(0), task(1), task(2), task(3)]), expected);
    }
}
