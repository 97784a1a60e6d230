//! Input that cannot work: each job ends at once with 65 or 78, says which file and tensor are wrong, and leaves no process.
#![expect(clippy::disallowed_methods, reason = "a black-box test has its own clock, and damages files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use support::model::{FIRST, INDEX, Model, TENSOR};
use support::refusal::{CONFIG, DATA, expect_refused};
use support::{Ended, MODEL, Place, wait_until_holding};

/// Damages a copy of the model, and expects that neither a plan nor a job is made of it.
fn check(place: &Place, what: &str, damage: impl FnOnce(&Model), code: i32, words: &[&str]) {
    let model = Model::new(place);
    damage(&model);
    for command in [&["plan", "--ranks", "2"][..], &["launch", "--nproc-per-node", "2"]] {
        let ended = place.run(&[command, &["--model", &model.path()]].concat());
        expect_refused(what, &ended, code, words);
    }
    place.expect_no_process();
}

fn shift_offsets(header: &mut Value, by: i64) {
    for offset in header[TENSOR]["data_offsets"].as_array_mut().expect("offsets") {
        *offset = (offset.as_i64().expect("a number") + by).into();
    }
}

#[test]
fn damaged_weight_files_are_named() {
    let place = Place::new();
    let check = |what: &str, damage: &dyn Fn(&Model), names: &[&str]| check(&place, what, damage, DATA, names);
    let cut = |length: usize| move |model: &Model| model.edit(FIRST, |bytes| bytes.truncate(length));
    check("one byte short", &|model| model.edit(FIRST, |bytes| bytes.truncate(bytes.len() - 1)), &[FIRST]);
    check("cut in the data", &cut(1_000_000), &[FIRST]);
    check("cut in the header", &cut(100), &[FIRST, "truncated"]);
    check("cut in the length", &cut(5), &[FIRST, "truncated"]);
    check("empty", &cut(0), &[FIRST, "truncated"]);
    check("a byte too many", &|model| model.edit(FIRST, |bytes| bytes.push(0)), &[FIRST]);
    let length =
        |length: u64| move |model: &Model| model.edit(FIRST, |bytes| bytes[..8].copy_from_slice(&length.to_le_bytes()));
    check("header of 200 MB", &length(200_000_000), &[FIRST, "header of 200000000 bytes"]);
    check("header of 2^64 - 1 bytes", &length(u64::MAX), &[FIRST, "header of 18446744073709551615 bytes"]);
    check("header of no bytes", &length(0), &[FIRST]);
    check("header cut short", &length(64), &[FIRST, "header cannot be read"]);
    check("text for a file", &|model| model.edit(FIRST, |bytes| bytes.fill(b'x')), &[FIRST]);
}

#[test]
fn damaged_headers_are_named_with_their_tensor() {
    let place = Place::new();
    let check = |what: &str, change: &dyn Fn(&mut Value), names: &[&str]| {
        check(&place, what, |model| model.edit_header(change), DATA, &[&[FIRST, TENSOR][..], names].concat());
    };
    check("overlap", &|header| shift_offsets(header, -2), &["overlaps"]);
    check("hole", &|header| shift_offsets(header, 2), &["hole"]);
    check("beyond the end", &|header| shift_offsets(header, 1 << 30), &["outside the data"]);
    let offsets = |start: u64, end: u64| move |header: &mut Value| header[TENSOR]["data_offsets"] = json!([start, end]);
    check("reversed", &offsets(4096, 0), &["reversed"]);
    check("at the end of 64 bits", &offsets(u64::MAX - 1, u64::MAX), &["outside the data"]);
    check("negative", &|header| header[TENSOR]["data_offsets"] = json!([-1, 0]), &[]);
    check("unknown dtype", &|header| header[TENSOR]["dtype"] = "BF17".into(), &["BF17"]);
    check("no dtype", &|header| drop(header[TENSOR].as_object_mut().map(|entry| entry.remove("dtype"))), &["dtype"]);
    check("other size", &|header| header[TENSOR]["shape"] = json!([512, 191]), &["takes 195584 bytes"]);
    check("endless shape", &|header| header[TENSOR]["shape"] = json!([1_u64 << 40, 1_u64 << 40]), &[]);
}

#[test]
fn keys_that_do_not_fit_are_listed() {
    let place = Place::new();
    let rename = |model: &Model| {
        model.edit_header_text(|text| text.replace(TENSOR, "model.layers.0.mlp.up_proj.bias"));
        model.edit(INDEX, |bytes| {
            let text = String::from_utf8(bytes.clone()).expect("text");
            *bytes = text.replace(TENSOR, "model.layers.0.mlp.up_proj.bias").into_bytes();
        });
    };
    let transpose = |model: &Model| model.edit_header(|header| header[TENSOR]["shape"] = json!([192, 512]));
    // What happened: a matrix of int16, as wide as the bfloat16 that it should be, was loaded as it was.
    let dtype = |model: &Model| model.edit_header(|header| header[TENSOR]["dtype"] = "I16".into());
    let words = ["1 of another type", TENSOR, "expected floating point, found I16"];
    check(&place, "integers for weights", dtype, DATA, &words);
    let extra = |model: &Model| {
        model
            .edit_header(|header| header["model.extra"] = json!({"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}));
        model.edit_json(INDEX, |index| index["weight_map"]["model.extra"] = FIRST.into());
    };
    check(&place, "a tensor more", extra, DATA, &["1 unexpected", "model.extra"]);
    check(&place, "other shape", transpose, DATA, &[TENSOR, "expected [512, 192], found [192, 512]"]);
    let names = ["1 missing", TENSOR, "1 unexpected", "model.layers.0.mlp.up_proj.bias"];
    check(&place, "renamed", rename, DATA, &names);
    let other = "model.layers.0.mlp.gate_proj.weight";
    let twice = |model: &Model| model.edit_header_text(|text| text.replace(TENSOR, other));
    check(&place, "duplicate key", twice, DATA, &[FIRST, other, "twice"]);
    let stored_twice = |model: &Model| {
        std::fs::remove_file(model.directory.join(INDEX)).expect("removable");
        std::fs::copy(model.directory.join(FIRST), model.directory.join("more.safetensors")).expect("a copy");
    };
    check(&place, "in two files", stored_twice, DATA, &["stands in two files", FIRST, "more.safetensors"]);
    let config = |field: &'static str, value: Value| {
        move |model: &Model| model.edit_json("config.json", |config| config[field] = value)
    };
    check(&place, "a layer more", config("num_hidden_layers", 7.into()), DATA, &["9 missing", "model.layers.6."]);
    check(&place, "a layer less", config("num_hidden_layers", 5.into()), DATA, &["9 unexpected", "model.layers.5."]);
    check(&place, "other width", config("intermediate_size", 513.into()), DATA, &["of another shape", TENSOR]);
    check(&place, "no layers", config("num_hidden_layers", 0.into()), DATA, &["config.json", "num_hidden_layers"]);
    let endless = config("num_hidden_layers", u64::MAX.into());
    check(&place, "endless layers", endless, DATA, &["config.json", "num_hidden_layers"]);
    let unknown = config("architectures", json!(["NoSuchForCausalLM"]));
    check(&place, "unknown architecture", unknown, DATA, &["config.json", "NoSuchForCausalLM"]);
    let broken = |model: &Model| model.edit("config.json", |bytes| bytes.truncate(50));
    check(&place, "half a config.json", broken, DATA, &["config.json"]);
}

#[test]
fn an_index_that_does_not_fit_is_named() {
    let place = Place::new();
    let map = |value: Value| move |model: &Model| model.edit_json(INDEX, |index| index["weight_map"][TENSOR] = value);
    let missing = map("model-00009-of-00003.safetensors".into());
    check(&place, "missing file", missing, DATA, &[INDEX, "model-00009-of-00003.safetensors"]);
    let removed = |model: &Model| std::fs::remove_file(model.directory.join(FIRST)).expect("removable");
    check(&place, "removed file", removed, DATA, &[FIRST]);
    let other = map("model-00002-of-00003.safetensors".into());
    check(&place, "another file", other, DATA, &[INDEX, TENSOR, "model-00002"]);
    check(&place, "outside the directory", map("../../etc/passwd".into()), DATA, &["../../etc/passwd"]);
    check(&place, "no name", map(7.into()), DATA, &[INDEX]);
    let forgotten = |model: &Model| {
        model.edit_json(INDEX, |index| drop(index["weight_map"].as_object_mut().map(|map| map.remove(TENSOR))));
    };
    check(&place, "forgotten tensor", forgotten, DATA, &[INDEX, TENSOR, FIRST]);
    check(&place, "half an index", |model| model.edit(INDEX, |bytes| bytes.truncate(1000)), DATA, &[INDEX]);
}

#[test]
fn without_a_model_or_a_checkpoint_nothing_starts() {
    let place = Place::new();
    let launch = |flags: &[&str]| place.run(&[&["launch", "--nproc-per-node", "2"], flags].concat());
    let [empty, nothing] = [place.path("empty"), place.path("nothing")];
    std::fs::create_dir(&empty).expect("a new directory");
    expect_refused("no such model", &launch(&["--model", &nothing]), DATA, &[&nothing]);
    expect_refused("empty model directory", &launch(&["--model", &empty]), DATA, &[&empty]);
    for root in [&empty, &nothing] {
        let ended = launch(&["--resume", "must", "--checkpoint-dir", root]);
        expect_refused("nothing to resume", &ended, DATA, &["no checkpoint in", root]);
    }
    expect_refused("resume from nowhere", &launch(&["--resume", "must"]), CONFIG, &["checkpoint.directory"]);
    let file = place.path("job.toml");
    std::fs::write(&file, "[load]\nreader-treads = 3\n").expect("writable");
    expect_refused("a key with a typing error", &launch(&[&file]), CONFIG, &[&file, "reader-treads", "line 2"]);
    place.expect_no_process();
}

#[test]
fn a_checkpoint_target_that_is_no_directory_is_named() {
    let place = Place::new();
    let file = place.path("a-file");
    std::fs::write(&file, "in the way").expect("writable");
    let below = format!("{file}/below");
    for (target, code) in [(&*file, CONFIG), (&below, CONFIG), ("/proc/no-such-directory", DATA)] {
        let flags = ["launch", "--nproc-per-node", "2", "--model", MODEL, "--save", "--checkpoint-dir", target];
        expect_refused("no directory", &place.run(&flags), code, &[target]);
        place.expect_no_process();
    }
    assert_eq!(std::fs::read(&file).expect("it stays"), b"in the way");
}

/// Runs a job that saves into a file system of its own, which this process does not see, and lists what was committed.
fn save_within(place: &Place, options: &str) -> (Ended, Value) {
    let script = r#"
        mount -t tmpfs -o "$OPTIONS" none "$DISK" || exit 99
        test -z "$READ_ONLY" || mount -o remount,ro "$DISK" || exit 99
        "$PROGRAM" launch --nproc-per-node 2 --model "$MODEL" --save --checkpoint-dir "$DISK/root"
        code=$?
        "$PROGRAM" checkpoint list --json "$DISK/root" > "$LISTED"
        exit $code"#;
    let [disk, listed] = ["disk", "listed"].map(|name| place.path(name));
    std::fs::create_dir_all(&disk).expect("a new directory");
    let mut command = place.command(&[]);
    let program = command.get_program().to_owned();
    let mut outer = Command::new("unshare");
    outer.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]);
    outer.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    outer.env("PROGRAM", program).env("MODEL", MODEL).env("DISK", &disk).env("LISTED", &listed);
    let (options, read_only) = if options == "ro" { ("size=1m", "1") } else { (options, "") };
    outer.env("OPTIONS", options).env("READ_ONLY", read_only);
    command = outer;
    let ended = place.start_command(command).wait();
    let listed = std::fs::read(&listed).unwrap_or_default();
    (ended, serde_json::from_slice(&listed).unwrap_or_default())
}

#[test]
fn a_full_disk_is_an_error_and_no_checkpoint() {
    let place = Place::new();
    let root = place.path("disk/root");
    let cases: [(&str, &[&str]); 4] = [
        ("size=64k", &["no space left", "shard-0000"]),
        ("size=3m", &["no space left", "shard-0000"]),
        ("size=64m,nr_inodes=4", &["no space left"]),
        ("ro", &["cannot create", "Read-only"]),
    ];
    for (options, words) in cases {
        let (ended, listed) = save_within(&place, options);
        if ended.code == Some(99) || ended.stderr.contains("unshare failed") {
            println!("skipped: neither root nor a user namespace may mount here: {}", ended.stderr);
            return;
        }
        expect_refused(options, &ended, CONFIG, &[&[&*root], words].concat());
        assert_eq!(listed, json!([]), "{options}");
        place.expect_no_process();
    }
}

/// What happened: SIGXFSZ ended the rank, which said nothing, with 153.
#[test]
fn a_limit_on_the_size_of_files_is_an_error_and_no_checkpoint() {
    let place = Place::new();
    let root = place.path("root");
    let flags = ["launch", "--nproc-per-node", "2", "--model", MODEL, "--save", "--checkpoint-dir", &root];
    let job = place.command(&flags);
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -f 512 && exec \"$0\" \"$@\""]).arg(job.get_program()).args(job.get_args());
    limited.envs(job.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let ended = place.start_command(limited).wait();
    expect_refused("ulimit -f", &ended, CONFIG, &["no space left", "shard-0000", &root]);
    place.expect_no_process();
    assert_eq!(place.finish(&["checkpoint", "list", "--json", &root]), json!([]));
}

#[test]
fn a_hub_out_of_reach_and_an_empty_cache_are_named() {
    let place = Place::new();
    // A port that was free a moment ago, so nobody answers.
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    let endpoint = format!("http://{}", closed.expect("a free port"));
    let cache = place.path("cache");
    let launch = |variable: &str, value: &str, model: &str| {
        let mut command = place.command(&["launch", "--nproc-per-node", "2", "--model", model]);
        for proxy in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE", "HF_TOKEN"] {
            command.env_remove(proxy);
        }
        command.env("HF_HUB_CACHE", &cache).env("HF_ENDPOINT", &endpoint).env(variable, value);
        place.start_command(command).wait()
    };
    let unreachable = launch("HF_HUB_OFFLINE", "", "org/name");
    expect_refused("hub unreachable", &unreachable, CONFIG, &[&endpoint, "org/name", "cannot be reached"]);
    let offline = launch("HF_HUB_OFFLINE", "1", "org/name@v2");
    expect_refused("offline, empty cache", &offline, DATA, &["org/name@v2", &cache, "HF_HUB_OFFLINE"]);
    let bad = launch("HF_ENDPOINT", "localhost", "org/name");
    expect_refused("no address", &bad, DATA, &["HF_ENDPOINT", "localhost"]);
    expect_refused("no such id", &launch("HF_HUB_OFFLINE", "1", "a b/c"), DATA, &["a b/c"]);
    place.expect_no_process();
}

/// The coordinator takes any free port; a port that is asked for is that of the nodes' rendezvous.
#[test]
fn a_port_that_is_taken_is_named() {
    let place = Place::new();
    let stranger = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let taken: SocketAddr = stranger.local_addr().expect("it is bound");
    std::thread::spawn(move || stranger.incoming().for_each(drop));
    let flags = ["launch", "--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", &taken.to_string()];
    let ended = place.run(&[&flags[..], &["--no-python", "/bin/true"]].concat());
    // What happened: the launcher waited for ten minutes for the stranger to become a rendezvous.
    expect_refused("rendezvous", &ended, CONFIG, &[&taken.to_string(), "port is taken"]);
    place.expect_no_process();
}

/// Workers that do not belong to a job are refused, and the job does not notice.
#[test]
fn a_worker_of_another_world_or_without_the_token_is_refused() {
    let place = Place::new();
    let root = place.path("root");
    let flags = ["launch", "--nproc-per-node", "2", "--model", MODEL, "--hold", "--checkpoint-dir", &root];
    let mut job = place.start(&flags);
    wait_until_holding(&place, &mut job);
    let run_file = |directory: &Path| std::fs::read(directory.join("run.json")).ok();
    let runs = std::fs::read_dir(place.path("run/weightcast")).expect("the runtime directory");
    let run = runs.filter_map(|entry| run_file(&entry.ok()?.path())).next().expect("a run file");
    let run: Value = serde_json::from_slice(&run).expect("JSON");
    let [coordinator, token] = ["coordinator", "token_file"].map(|key| run[key].as_str().expect("text").to_owned());
    let [wrong, empty, missing] = ["wrong", "empty", "missing"].map(|name| place.path(name));
    std::fs::write(&wrong, "0123456789abcdef").expect("writable");
    std::fs::write(&empty, "").expect("writable");

    let worker = |rank: &str, world: &str, token: &str| {
        let mut command = place.command(&["worker"]);
        command.env("RANK", rank).env("WORLD_SIZE", world);
        command.env("WEIGHTCAST_COORDINATOR", &coordinator).env("WEIGHTCAST_TOKEN_FILE", token);
        place.start_command(command).wait()
    };
    let check = |what: &str, ended: &Ended, names: &[&str]| expect_refused(what, ended, CONFIG, names);
    check("rank 5 of 5, by itself", &worker("5", "5", &token), &["RANK", "below WORLD_SIZE", "5"]);
    check("rank 1 of 5", &worker("1", "5", &token), &["started for a world of 5, this job has 2"]);
    check("rank 4 of 5", &worker("4", "5", &token), &["rank 4 does not exist in a world of 2"]);
    check("rank 1 again", &worker("1", "2", &token), &["rank 1 is taken by process"]);
    check("no rank", &worker("", "2", &token), &["RANK"]);
    let mut elsewhere = place.command(&["worker"]);
    elsewhere.env("RANK", "1").env("WORLD_SIZE", "2").env("WEIGHTCAST_DATA_ADDRESS", "192.0.2.1");
    elsewhere.env("WEIGHTCAST_COORDINATOR", &coordinator).env("WEIGHTCAST_TOKEN_FILE", &token);
    check("another host's address", &place.start_command(elsewhere).wait(), &["192.0.2.1"]);
    check("wrong token", &worker("1", "2", &wrong), &["wrong job token"]);
    check("empty token", &worker("1", "2", &empty), &[&empty]);
    expect_refused("missing token", &worker("1", "2", &missing), DATA, &[&missing]);
    let status = |token: &str| place.run(&["status", "--coordinator", &coordinator, "--token-file", token]);
    check("status with a wrong token", &status(&wrong), &["wrong job token"]);
    assert_eq!(status(&token).code, Some(0));

    let after = wait_until_holding(&place, &mut job);
    assert_eq!(after["ranks"].as_array().map(Vec::len), Some(2));
    assert_eq!(place.run(&["drain"]).code, Some(0));
    let ended = job.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    place.expect_no_process();
}
