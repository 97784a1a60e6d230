//! The direct children of a process, from /proc.
//!
//! Owns: reading `/proc/<pid>/task/*/children`, and `/proc/*/stat` on kernels without it.
//! Refuses to know: names of processes. Only direct children are listed: the id of a child cannot be reused before its
//! parent has reaped it, so that a nanny that signals its own children can never hit a stranger.

use std::fs;

use rustix::process::{Pid, getpid};

/// The direct children of this process, zombies included. Best effort: a child that forks at this moment may be missed, so
/// callers repeat until `wait` says that there is none.
pub(crate) fn children_of_this_process() -> Vec<Pid> {
    listed_by_the_kernel().unwrap_or_else(found_in_stat)
}

fn listed_by_the_kernel() -> Option<Vec<Pid>> {
    let mut children = Vec::new();
    for task in fs::read_dir("/proc/self/task").ok()? {
        // A thread that ended meanwhile has no file; its children have another thread as their parent.
        let Ok(text) = task.and_then(|task| fs::read_to_string(task.path().join("children"))) else { continue };
        children.extend(text.split_ascii_whitespace().filter_map(|word| Pid::from_raw(word.parse().ok()?)));
    }
    let supported = fs::exists(format!("/proc/self/task/{}/children", getpid().as_raw_nonzero())).unwrap_or(false);
    supported.then_some(children)
}

fn found_in_stat() -> Vec<Pid> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let this = getpid().as_raw_nonzero().get();
    let parent_is_this = |pid: &i32| {
        fs::read_to_string(format!("/proc/{pid}/stat")).ok().and_then(|text| parent_in_stat(&text)) == Some(this)
    };
    let ids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    ids.filter(parent_is_this).filter_map(Pid::from_raw).collect()
}

/// The parent's id in the text of `/proc/<pid>/stat`. The command's name stands in parentheses and may itself hold
/// parentheses and spaces, so the fields are counted from the last closing one.
fn parent_in_stat(text: &str) -> Option<i32> {
    text.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_is_found_behind_a_hostile_name() {
        assert_eq!(parent_in_stat("42 (a) S 7 (b) c) S 17 42 42 0"), Some(17));
        assert_eq!(parent_in_stat("42"), None);
    }

    #[test]
    fn both_ways_find_a_real_child() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep starts");
        let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("an id of a process");
        let (fast, slow) = (children_of_this_process(), found_in_stat());
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
        assert!(fast.contains(&id), "{fast:?} lacks {id:?}");
        assert!(slow.contains(&id), "{slow:?} lacks {id:?}");
    }
}
