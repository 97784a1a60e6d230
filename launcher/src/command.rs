//! The program of the ranks and the environment that each of them gets.
//!
//! Owns: torchrun's environment contract, and the rule that a bare script is a Python script.

use std::ffi::OsString;

use crate::args::LaunchArgs;
use crate::environment::Environment;
use crate::error::LaunchError;
use crate::layout::Layout;
use crate::settings::is_on;

/// A variable that must never reach a rank: torch would look for a TCP store of the launcher, which does not exist, and hang.
pub(crate) const FORBIDDEN_VARIABLE: &str = "TORCHELASTIC_USE_AGENT_STORE";

/// What each rank runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankCommand {
    /// The program: a path, or a name to be found along `PATH`.
    pub program: OsString,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Variables for every rank, beside those of the contract and of the launcher's own environment; they win over both.
    pub environment: Vec<(OsString, OsString)>,
}

impl RankCommand {
    /// The command of the flags: `script.py args` runs `python3 -u script.py args`, with `--module` `python3 -u -m`, with
    /// `--no-python` the program itself. `PYTHON_EXEC` names another interpreter, as for torchrun.
    ///
    /// # Errors
    /// [`LaunchError::Usage`] when there is no program, or an unknown flag stands in its place.
    pub fn from_args(args: &LaunchArgs, environment: &Environment) -> Result<Self, LaunchError> {
        let usage = |message: String| LaunchError::Usage { message };
        let Some((program, arguments)) = args.command.split_first() else {
            return Err(usage("no program to launch".to_owned()));
        };
        if program.to_str().is_some_and(|text| text.starts_with('-')) {
            return Err(usage(format!("unknown flag {}", program.display())));
        }
        let no_python = is_on("--no-python", args.no_python, environment)?;
        let module = is_on("--module", args.module, environment)?;
        if no_python && module {
            return Err(usage("--module needs Python, which --no-python excludes".to_owned()));
        }
        if no_python {
            return Ok(Self { program: program.clone(), args: arguments.to_vec(), environment: Vec::new() });
        }
        let python = environment.get("PYTHON_EXEC").unwrap_or("python3");
        // -u: lines of a rank appear when they are printed, not when a buffer is full.
        let mut python_arguments = vec![OsString::from("-u")];
        python_arguments.extend(module.then(|| OsString::from("-m")));
        python_arguments.extend(args.command.iter().cloned());
        Ok(Self { program: python.into(), args: python_arguments, environment: Vec::new() })
    }
}

/// The place of this launcher's ranks in one attempt, with nothing left open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Assignment {
    pub(crate) node_rank: u32,
    pub(crate) nnodes: u32,
    pub(crate) first_rank: u32,
    pub(crate) world_size: u32,
    pub(crate) master_addr: String,
    pub(crate) master_port: u16,
    /// How often the ranks were started before.
    pub(crate) restart_count: u32,
}

/// The variables of torchrun's contract for the rank with index `index` among those of this launcher.
pub(crate) fn rank_variables(
    layout: &Layout,
    assignment: &Assignment,
    index: u32,
    max_restarts: u32,
) -> Vec<(&'static str, String)> {
    let rank = (assignment.first_rank + index).to_string();
    let world_size = assignment.world_size.to_string();
    vec![
        ("RANK", rank.clone()),
        ("LOCAL_RANK", (layout.first_local_rank + index).to_string()),
        ("WORLD_SIZE", world_size.clone()),
        ("LOCAL_WORLD_SIZE", layout.local_world_size.to_string()),
        ("GROUP_RANK", assignment.node_rank.to_string()),
        ("GROUP_WORLD_SIZE", assignment.nnodes.to_string()),
        // All ranks of a launch have one role, so the place in the role is the place in the world.
        ("ROLE_RANK", rank),
        ("ROLE_WORLD_SIZE", world_size),
        ("ROLE_NAME", layout.role.clone()),
        ("MASTER_ADDR", assignment.master_addr.clone()),
        ("MASTER_PORT", assignment.master_port.to_string()),
        ("TORCHELASTIC_RESTART_COUNT", assignment.restart_count.to_string()),
        ("TORCHELASTIC_MAX_RESTARTS", max_restarts.to_string()),
        ("TORCHELASTIC_RUN_ID", layout.run_id.clone()),
    ]
}
