//! The launcher's command line.
//!
//! Owns: the flags, in both spellings (`--nproc-per-node`, `--nproc_per_node`), as text. What they mean, together with their
//! `PET_*` twins and the scheduler, is decided by `layout` and `config`, so that flag and twin are parsed by one function.

use std::ffi::OsString;
use std::path::PathBuf;

/// The flags of a launch. Each is also read from the environment: `--a-b` from `PET_A_B`; the flag wins.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct LaunchArgs {
    /// Number of nodes, or the smallest and the largest number: `MIN:MAX` [default: 1]
    #[arg(long, value_name = "MIN[:MAX]")]
    pub nnodes: Option<String>,
    /// Ranks on each node: a number, `gpu`, `cpu`, or `auto` (GPUs if there are any) [default: 1]
    #[arg(long, alias = "nproc_per_node", value_name = "N|auto|cpu|gpu")]
    pub nproc_per_node: Option<String>,
    /// Ranks of each node where neither flag, environment nor scheduler says, as a program that embeds the launcher has it; 1
    /// without.
    #[arg(skip)]
    pub default_nproc_per_node: Option<u32>,
    /// Whether the ranks meet at a coordinator of their own, as those of a program that embeds the launcher may: then the launchers of
    /// nodes that know their rank need not meet, and the end of one is no matter of the others.
    #[arg(skip)]
    pub has_coordinator: bool,
    /// Which node this is, from 0
    #[arg(long, alias = "node_rank", value_name = "N")]
    pub node_rank: Option<String>,
    /// Where the nodes of the job meet: served by the launcher whose address this is
    #[arg(long, alias = "rdzv_endpoint", value_name = "HOST[:PORT]")]
    pub rdzv_endpoint: Option<String>,
    /// The id of the job, the same on all nodes
    #[arg(long, alias = "rdzv_id", value_name = "ID")]
    pub rdzv_id: Option<String>,
    /// Accepted for torchrun's sake: `c10d` and `static` both mean the launcher's own rendezvous
    #[arg(long, alias = "rdzv_backend", value_name = "NAME")]
    pub rdzv_backend: Option<String>,
    /// Options of the rendezvous: `join_timeout=SECONDS,last_call_timeout=SECONDS,silence_timeout=SECONDS`
    #[arg(long, alias = "rdzv_conf", value_name = "K=V,...")]
    pub rdzv_conf: Option<String>,
    /// A file whose content every node must know; without it the rendezvous serves loopback addresses only
    #[arg(long, alias = "rdzv_token_file", value_name = "PATH")]
    pub rdzv_token_file: Option<PathBuf>,
    /// Allow a rendezvous without a token on addresses that others can reach
    #[arg(long, alias = "rdzv_insecure")]
    pub rdzv_insecure: bool,
    /// One node, whatever the environment says
    #[arg(long)]
    pub standalone: bool,
    /// How often all ranks are started again after a failure [default: 0]
    #[arg(long, alias = "max_restarts", value_name = "N")]
    pub max_restarts: Option<String>,
    /// Accepted for torchrun's sake, and without effect: the end of a rank is an event here, not looked for at intervals
    #[arg(long, alias = "monitor_interval", value_name = "SECONDS")]
    pub monitor_interval: Option<String>,
    /// Where the streams of the ranks and the report are written: `DIR/<run-id>/attempt_<k>/<local-rank>/stdout.log`
    #[arg(long, alias = "log_dir", value_name = "DIR")]
    pub log_dir: Option<PathBuf>,
    /// Streams written to files only, not shown: 0 none, 1 stdout, 2 stderr, 3 both; or by local rank: `0:1,1:3`
    #[arg(long, short = 'r', value_name = "STREAMS")]
    pub redirects: Option<String>,
    /// Streams written to files and shown, in the same form
    #[arg(long, short = 't', value_name = "STREAMS")]
    pub tee: Option<String>,
    /// What stands before each line: may hold `${rank}`, `${local_rank}`, `${role_name}` [default: `[${rank}] `]
    #[arg(long, alias = "log_line_prefix_template", value_name = "TEMPLATE")]
    pub log_line_prefix_template: Option<String>,
    /// Show the lines of these local ranks only: `0,2`
    #[arg(long, alias = "local_ranks_filter", value_name = "LIST")]
    pub local_ranks_filter: Option<String>,
    /// How long the ranks may take to end after SIGTERM before they are killed [default: 30]
    #[arg(long, alias = "shutdown_timeout", value_name = "SECONDS")]
    pub shutdown_timeout: Option<String>,
    /// The same when they are ended because another rank failed [default: 0.5]
    #[arg(long, alias = "failure_grace", value_name = "SECONDS")]
    pub failure_grace: Option<String>,
    /// The address at which rank 0 can be reached
    #[arg(long, alias = "master_addr", value_name = "HOST")]
    pub master_addr: Option<String>,
    /// The port that rank 0 may use [default: a free one]
    #[arg(long, alias = "master_port", value_name = "PORT")]
    pub master_port: Option<String>,
    /// The address of this node as the others see it [default: as the rendezvous sees it]
    #[arg(long, alias = "local_addr", value_name = "HOST")]
    pub local_addr: Option<String>,
    /// The program is an executable, not a Python script
    #[arg(long, alias = "no_python")]
    pub no_python: bool,
    /// The program is a Python module, run as `python3 -m`
    #[arg(long, short = 'm')]
    pub module: bool,
    /// The name of the role of these ranks [default: default]
    #[arg(long, value_name = "NAME")]
    pub role: Option<String>,
    /// A file that gets the report in case of failure, cut to 4 KiB [default: /dev/termination-log where it exists]
    #[arg(long, alias = "termination_log", value_name = "PATH")]
    pub termination_log: Option<PathBuf>,
    /// The program of each rank, and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM")]
    pub command: Vec<OsString>,
}
