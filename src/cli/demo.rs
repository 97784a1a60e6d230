//! `weightcast demo`.

use std::path::{Path, PathBuf};

use super::args::DemoFlags;
use super::output::{data, fail, say};
use crate::app::demo;
use crate::store::{LocalStore, Store};

/// The model in the project's own directory, from which the demo is run.
const MODEL: &str = "tests/data/tiny-llama";

pub(super) fn run(flags: &DemoFlags) -> u8 {
    let model = flags.model.clone().unwrap_or_else(|| PathBuf::from(MODEL));
    if !model.exists() {
        say(&format!(
            "error: no model at {}: run the demo in the project's directory, or name one with --model",
            model.display()
        ));
        return 65;
    }
    let name = format!("weightcast-demo-{}", std::process::id());
    let (work, temporary) = match &flags.directory {
        Some(directory) => (directory.clone(), false),
        None => (std::env::temp_dir().join(&name), true),
    };
    if let Err(error) = LocalStore::new(&work).create_dir("") {
        return fail(&error);
    }
    let result = demo::run(&model, &work, &mut |line| data(&line));
    if temporary && result.is_ok() {
        // What is left of a demo that failed is evidence.
        let _ = LocalStore::new(work.parent().unwrap_or_else(|| Path::new("/"))).remove(&name);
    }
    match result {
        Ok(()) => {
            data("Done: the job survived the loss of all its processes, and nothing was lost.");
            0
        }
        Err(error) => {
            say(&format!("logs and checkpoints are in {}", work.display()));
            fail(&error)
        }
    }
}
