//! Recommended jobs: what they ask for, that they run unchanged here, and that they are refused with the reason elsewhere.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own files")]

use weightcast::config::QuantizationFormat;
use weightcast::plan::Placement;
use weightcast::types::DeviceWish;

fn cli(arguments: &[&str]) -> (Option<i32>, String, String) {
    weightcast(&[&["plan"], arguments].concat())
}

/// With a directory of its own for what tells of running jobs, and without a hub.
fn weightcast(arguments: &[&str]) -> (Option<i32>, String, String) {
    let runtime = tempfile::tempdir().expect("a directory");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_weightcast"));
    command.args(arguments).env("XDG_RUNTIME_DIR", runtime.path()).env("HF_HUB_OFFLINE", "1");
    let output = command.output().expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// What is recommended is a job that `JobConfig` reads, and that asks for what was said.
#[test]
fn a_recommendation_is_a_job_file() {
    let place = tempfile::tempdir().expect("a directory");
    for (gpus, placement, format, split) in [
        ("24,24", Placement::Replicate, QuantizationFormat::None, 0),
        ("12,8", Placement::Layers, QuantizationFormat::None, 2),
        ("8", Placement::Replicate, QuantizationFormat::Nf4, 0),
    ] {
        let path = place.path().join(format!("{gpus}.toml"));
        let file = path.display().to_string();
        let arguments = ["llama-2-7b", "--gpus", gpus, "--inference", "--recommend", "-o", &file];
        let (code, stdout, stderr) = cli(&arguments);
        assert_eq!(code, Some(0), "{stderr}");
        assert!(stdout.contains("batch ") && stdout.contains("llama.cpp: -ngl 33"), "{stdout}");
        let job = weightcast::config::JobConfig::read(&path).expect("a job");
        assert_eq!(job.model.source.as_deref(), Some("meta-llama/Llama-2-7b-hf"));
        assert_eq!((job.load.placement, job.quantization.format, job.load.split.len()), (placement, format, split));
        assert!(job.quantization_rule().is_ok());
        // A file that is there stays.
        assert_eq!(cli(&arguments).0, Some(78));
    }
    let (code, _, stderr) = cli(&["llama-2-70b", "--gpus", "8", "--inference", "--recommend"]);
    assert_eq!(code, Some(78));
    assert!(stderr.contains("does not fit in any placement or quantization: "), "{stderr}");
}

/// The jobs for machines that are not here say so when they are started, before anything is fetched.
#[test]
fn a_recommended_job_for_another_machine_is_refused_with_the_reason() {
    let place = tempfile::tempdir().expect("a directory");
    for (model, gpus, devices) in
        [("llama-2-70b", "24,24", 2), ("llama-2-7b", "8", 1), ("mixtral-8x7b", "24,24,24,24", 4)]
    {
        let path = place.path().join(format!("{model}.toml"));
        let file = path.display().to_string();
        let (code, _, stderr) = cli(&[model, "--gpus", gpus, "--recommend", "-o", &file]);
        assert_eq!(code, Some(0), "{stderr}");
        let job = weightcast::config::JobConfig::read(&path).expect("a job");
        assert_eq!(job.job.ranks_per_node.map(std::num::NonZeroU32::get), Some(devices));
        let (code, _, stderr) = weightcast(&["launch", &file]);
        assert_eq!(code, Some(78), "{stderr}");
        assert!(stderr.contains("load.device: ") && stderr.contains("NVIDIA"), "{stderr}");
    }
}

/// For a machine like this one, the job runs as it was written: all ranks, and to the end.
#[test]
fn a_recommended_job_runs_unchanged() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-llama");
    let words = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/devils-dictionary.jsonl");
    let place = tempfile::tempdir().expect("a directory");
    let data = place.path().join("some.jsonl");
    let text = std::fs::read_to_string(words).expect("the data");
    let some: String = text.lines().take(40).flat_map(|line| [line, "\n"]).collect();
    std::fs::write(&data, some).expect("written");
    let (path, data) = (place.path().join("job.toml"), data.display().to_string());
    let file = path.display().to_string();
    let asked = ["--model", model, "--gpus", "none", "--ranks", "2", "--train", "qlora", "--sequence", "64"];
    let (code, stdout, stderr) = cli(&[&asked[..], &["--data", &data, "--recommend", "-o", &file]].concat());
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("this host without devices, ") && stdout.contains("batch 16 over all ranks, 8 at a time"));
    let job = weightcast::config::JobConfig::read(&path).expect("a job");
    assert_eq!((job.load.device, job.quantization.format), (DeviceWish::Cpu, QuantizationFormat::Nf4));
    let (code, _, stderr) = weightcast(&["launch", &file]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("on 2 ranks") && stderr.contains("committed step-"), "{stderr}");
    assert!(place.path().join("job-checkpoints").is_dir());
}
