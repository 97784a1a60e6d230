//! The launcher's contract on one node, through its command line: environment, exit codes, logs, reports, restarts, signals.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use common::{Finished, Marked, Running, now};
use rustix::process::Signal;
use weightcast_launcher::{Report, Verdict};

fn exit_code(ranks: u32, flags: &[&str], script: &str) -> Option<i32> {
    let marked = Marked::new();
    let finished = marked.run(marked.shell(ranks, flags, script));
    marked.assert_nothing_left();
    finished.code
}

#[test]
fn each_rank_gets_torchruns_environment() {
    let marked = Marked::new();
    let script = "env > $TMPDIR/$RANK.env";
    let mut command = marked.shell(2, &["--max-restarts=3", "--rdzv_id=job7", "--role", "trainer"], script);
    command.env("TORCHELASTIC_USE_AGENT_STORE", "True");
    assert_eq!(marked.run(command).code, Some(0));
    for rank in ["0", "1"] {
        let text = fs::read_to_string(marked.dir.path().join(format!("{rank}.env"))).expect("the rank wrote it");
        let variables: BTreeMap<&str, &str> = text.lines().filter_map(|line| line.split_once('=')).collect();
        let expected = [
            ("RANK", rank),
            ("LOCAL_RANK", rank),
            ("WORLD_SIZE", "2"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("GROUP_RANK", "0"),
            ("GROUP_WORLD_SIZE", "1"),
            ("ROLE_RANK", rank),
            ("ROLE_WORLD_SIZE", "2"),
            ("ROLE_NAME", "trainer"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("TORCHELASTIC_RESTART_COUNT", "0"),
            ("TORCHELASTIC_MAX_RESTARTS", "3"),
            ("TORCHELASTIC_RUN_ID", "job7"),
        ];
        for (name, value) in expected {
            assert_eq!(variables.get(name), Some(&value), "{name} of rank {rank}");
        }
        let port: u16 = variables.get("MASTER_PORT").and_then(|port| port.parse().ok()).expect("a port");
        assert!(port >= 1024, "{port}");
        assert!(variables.contains_key("TORCHELASTIC_ERROR_FILE"));
        assert!(!variables.contains_key("TORCHELASTIC_USE_AGENT_STORE"), "torch would hang");
    }
    marked.assert_nothing_left();
}

#[test]
fn the_exit_code_is_that_of_the_first_failed_rank() {
    assert_eq!(exit_code(2, &[], "true"), Some(0));
    assert_eq!(exit_code(3, &[], "if [ $RANK = 1 ]; then exit 3; fi; sleep 1000"), Some(3));
    assert_eq!(exit_code(2, &[], "if [ $RANK = 1 ]; then kill -KILL $$; fi; sleep 1000"), Some(137));
    assert_eq!(exit_code(2, &[], "if [ $RANK = 0 ]; then kill -SEGV $$; fi; sleep 1000"), Some(139));
}

#[test]
fn wrong_usage_is_64_and_a_missing_program_127() {
    let code = |arguments: &[&str]| {
        let marked = Marked::new();
        let finished = marked.run(marked.launcher(arguments));
        marked.assert_nothing_left();
        finished
    };
    assert_eq!(code(&["--nproc-per-node=x", "--no-python", "true"]).code, Some(64));
    assert_eq!(code(&["--no-such-flag", "true"]).code, Some(64));
    assert_eq!(code(&[]).code, Some(64));
    assert_eq!(code(&["--help"]).code, Some(0));
    let missing = code(&["--no-python", "/no/such/program"]);
    assert_eq!(missing.code, Some(127));
    assert!(missing.stderr.contains("could not be started: No such file or directory"), "{}", missing.stderr);
    assert_eq!(code(&["--no-python", "/etc/passwd"]).code, Some(126));
}

#[test]
fn a_script_is_run_by_python_unless_told_otherwise() {
    let marked = Marked::new();
    let python = marked.dir.path().join("python");
    fs::write(&python, "#!/bin/sh\necho \"args: $*\"\n").expect("it is writable");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&python, mode).expect("it is ours");
    let output = |arguments: &[&str]| {
        let mut command = marked.launcher(arguments);
        command.env("PYTHON_EXEC", &python);
        marked.run(command).stdout
    };
    assert_eq!(output(&["train.py", "--lr", "1"]), "[0] args: -u train.py --lr 1\n");
    assert_eq!(output(&["-m", "pkg.train", "-x"]), "[0] args: -u -m pkg.train -x\n");
    marked.assert_nothing_left();
}

#[test]
fn streams_go_to_files_and_to_the_terminal_with_a_prefix() {
    let marked = Marked::new();
    let logs = marked.dir.path().join("logs");
    let flags = ["--log_dir", logs.to_str().expect("a plain path"), "--rdzv-id", "job/1", "--redirects", "1:3"];
    let script = "echo out $RANK; echo err $RANK >&2; printf 'no end'";
    let finished = marked.run(marked.shell(2, &flags, script));
    assert_eq!(finished.code, Some(0));
    // Rank 1 is redirected, so only rank 0 is shown.
    assert_eq!(finished.stdout, "[0] out 0\n[0] no end\n");
    assert_eq!(finished.stderr, "[0] err 0\n");
    for rank in 0..2 {
        let dir = logs.join(format!("job_1/attempt_0/{rank}"));
        let read = |name: &str| fs::read_to_string(dir.join(name)).expect("it was written");
        assert_eq!((read("stdout.log"), read("stderr.log")), (format!("out {rank}\nno end"), format!("err {rank}\n")));
    }
    let report = read_report(&logs.join("job_1/attempt_0/report.json"));
    assert!(report.exit_code == 0 && report.root_cause.is_none() && report.other_ranks.len() == 2, "{report:?}");
    marked.assert_nothing_left();
}

#[test]
fn prefix_and_filter_follow_their_flags() {
    let marked = Marked::new();
    let flags = ["--log-line-prefix-template", "${role_name}/${local_rank}: ", "--local_ranks_filter=1"];
    let finished = marked.run(marked.shell(3, &flags, "echo hello"));
    assert_eq!(finished.stdout, "default/1: hello\n");
    marked.assert_nothing_left();
}

#[test]
fn the_report_names_the_root_cause_first_and_the_victims_as_such() {
    let marked = Marked::new();
    let (logs, last_words) = (marked.dir.path().join("logs"), marked.dir.path().join("termination-log"));
    let flags = [
        "--log-dir",
        logs.to_str().expect("a plain path"),
        "--rdzv-id=j",
        "--termination-log",
        last_words.to_str().expect("a plain path"),
    ];
    let script = "if [ $RANK = 1 ]; then
            seq 1 30 | sed 's/^/line /' >&2
            echo '{\"message\": {\"message\": \"ValueError: no\"}}' > $TORCHELASTIC_ERROR_FILE
            exit 9
        fi
        exec sleep 1000";
    let finished = marked.run(marked.shell(3, &flags, script));
    assert_eq!(finished.code, Some(9));
    let report = read_report(&logs.join("j/attempt_0/report.json"));
    let cause = report.root_cause.as_ref().expect("rank 1 failed");
    assert_eq!((cause.rank, cause.verdict, report.exit_code), (1, Verdict::Failed, 9));
    assert_eq!(cause.stderr_tail, (11..=30).map(|n| format!("line {n}")).collect::<Vec<_>>());
    assert_eq!(cause.error_file.as_deref(), Some("ValueError: no"));
    assert!(cause.pid.is_some() && cause.started_ns < Some(cause.ended_ns));
    assert!(report.other_ranks.iter().all(|rank| rank.verdict == Verdict::EndedByLauncher), "{report:?}");
    let text = &finished.stderr[finished.stderr.find("root cause: rank 1").expect(&finished.stderr)..];
    assert!(
        text.contains("exited with code 9") && text.contains("line 30") && text.contains("/1/stderr.log"),
        "{text}"
    );
    let cut = fs::read(&last_words).expect("it was written");
    assert!(cut.len() <= 4096);
    let cut: Report = serde_json::from_slice(&cut).expect("it is JSON");
    assert_eq!(cut.root_cause.map(|cause| cause.rank), Some(1));
    marked.assert_nothing_left();
}

#[test]
fn all_ranks_are_started_again_after_a_failure() {
    let marked = Marked::new();
    let logs = marked.dir.path().join("logs");
    let flags = ["--max-restarts", "2", "--log-dir", logs.to_str().expect("a plain path"), "--rdzv-id=j"];
    let script = "echo start $RANK $TORCHELASTIC_RESTART_COUNT
        if [ $TORCHELASTIC_RESTART_COUNT = 2 ]; then exit 0; fi
        if [ $RANK = 1 ]; then exit 5; fi; exec sleep 1000";
    let finished = marked.run(marked.shell(2, &flags, script));
    assert_eq!(finished.code, Some(0), "{finished:?}");
    for (attempt, code) in [(0, 5), (1, 5), (2, 0)] {
        assert_eq!(read_report(&logs.join(format!("j/attempt_{attempt}/report.json"))).exit_code, code);
        let text = fs::read_to_string(logs.join(format!("j/attempt_{attempt}/1/stdout.log"))).expect("it was written");
        assert_eq!(text, format!("start 1 {attempt}\n"));
    }
    marked.assert_nothing_left();
}

#[test]
fn an_error_file_belongs_to_its_attempt_and_nothing_temporary_stays() {
    let marked = Marked::new();
    let script = "if [ $TORCHELASTIC_RESTART_COUNT = 0 ]; then echo stale > $TORCHELASTIC_ERROR_FILE; fi; exit 5";
    let finished = marked.run(marked.shell(1, &["--max-restarts=1"], script));
    assert_eq!(finished.stderr.matches("it reported: stale").count(), 1, "{}", finished.stderr);
    assert_eq!(fs::read_dir(marked.dir.path()).expect("it exists").count(), 0);
    marked.assert_nothing_left();
}

#[test]
fn exit_codes_survive_a_parent_that_ignores_its_children() {
    let marked = Marked::new();
    let inner = marked.shell(1, &[], "exit 7");
    let mut outer = std::process::Command::new("env");
    outer.arg("--ignore-signal=CHLD").arg(inner.get_program()).args(inner.get_args());
    outer.env_clear().envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    outer.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    assert_eq!(marked.run(outer).code, Some(7));
    marked.assert_nothing_left();
}

#[test]
fn some_exit_codes_are_final_and_restarts_are_limited() {
    let starts = |flags: &[&str], code: i32| {
        let marked = Marked::new();
        let finished = marked.run(marked.shell(1, flags, &format!("echo start; exit {code}")));
        assert_eq!(finished.code, Some(code), "{finished:?}");
        marked.assert_nothing_left();
        finished.stdout.matches("start").count()
    };
    assert_eq!(starts(&["--max-restarts=1"], 5), 2);
    for code in [64, 75, 78, 93] {
        assert_eq!(starts(&["--max-restarts=1"], code), 1, "{code}");
    }
}

#[test]
fn sigterm_is_handed_on_and_the_ranks_decide() {
    let marked = Marked::new();
    // The program stands behind a shell, as with `bash run.sh`; the whole group gets the signal.
    let script = "trap 'echo drained $RANK; exit 75' TERM; echo ready; while :; do sleep 0.01; done";
    let mut running = Running::start(marked.shell(2, &[], script));
    running.await_lines(2, "ready");
    running.signal(Signal::TERM);
    let Finished { code, stdout, stderr } = running.finish();
    assert_eq!(code, Some(75), "{stderr}");
    assert_eq!(stdout.matches("drained").count(), 2, "{stdout}");
    assert!(!stderr.contains("root cause"), "{stderr}");
    marked.assert_nothing_left();
}

#[test]
fn ranks_that_ignore_sigterm_are_killed_after_the_timeout() {
    let marked = Marked::new();
    let script = "trap '' TERM; echo ready; while :; do sleep 0.01; done";
    let mut running = Running::start(marked.shell(2, &["--shutdown-timeout=0.2"], script));
    running.await_lines(2, "ready");
    let start = now();
    running.signal(Signal::TERM);
    assert_eq!(running.finish().code, Some(137));
    assert!((Duration::from_millis(200)..Duration::from_secs(2)).contains(&start.elapsed()), "{:?}", start.elapsed());
    marked.assert_nothing_left();
}

#[test]
fn the_second_interrupt_kills() {
    let marked = Marked::new();
    let script = "trap 'echo asked' INT; echo ready; while :; do sleep 0.01; done";
    let mut running = Running::start(marked.shell(1, &[], script));
    running.await_lines(1, "ready");
    running.signal(Signal::INT);
    running.await_lines(1, "asked");
    running.signal(Signal::INT);
    assert_eq!(running.finish().code, Some(137));
    marked.assert_nothing_left();
}

#[test]
fn a_terminal_that_nobody_reads_holds_no_rank_up() {
    let marked = Marked::new();
    let logs = marked.dir.path().join("logs");
    // 4 MB, far beyond the capacity of all pipes between the rank and this test, which reads nothing.
    let script = "yes 0123456789012345678901234567890 | head -c 4000000; echo done > $TMPDIR/done";
    let mut command = marked.shell(1, &["--log-dir", logs.to_str().expect("a plain path"), "--rdzv-id=j"], script);
    let mut child = command.spawn().expect("the launcher starts");
    let ended = common::wait_until(common::PATIENCE, || child.try_wait().expect("it is our child").is_some());
    if !ended {
        child.kill().expect("it is our child");
    }
    assert!(ended && marked.dir.path().join("done").exists());
    assert_eq!(fs::metadata(logs.join("j/attempt_0/0/stdout.log")).expect("it was written").len(), 4_000_000);
    marked.assert_nothing_left();
}

#[test]
fn a_closed_terminal_ends_nothing() {
    let marked = Marked::new();
    let script = "echo ready; while [ ! -e $TMPDIR/go ]; do sleep 0.01; done; seq 1 1000; echo done > $TMPDIR/done";
    let mut command = marked.shell(1, &[], script);
    let mut child = command.spawn().expect("the launcher starts");
    drop((child.stdout.take(), child.stderr.take()));
    fs::write(marked.dir.path().join("go"), "").expect("it is writable");
    assert_eq!(child.wait().expect("it is our child").code(), Some(0));
    assert!(marked.dir.path().join("done").exists());
    marked.assert_nothing_left();
}

fn read_report(path: &std::path::Path) -> Report {
    serde_json::from_slice(&fs::read(path).expect("the report was written")).expect("it is JSON")
}
