//! `k8s/` and `docs/examples` in the repository: the base, the components and the overlays are what `weightcast k8s render` prints, and
//! what people wrote uses flags that exist. `tests/interop/k8s.sh` holds what kubectl makes of them against the same.
//!
//! `WEIGHTCAST_UPDATE_K8S=1` writes what is rendered anew.
#![expect(clippy::disallowed_methods, reason = "a test reads and writes its files")]

#[expect(dead_code, reason = "each test file uses its part")]
mod k8s_support;
#[expect(dead_code, reason = "each test file uses its part")]
mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::CommandFactory as _;
use k8s_support::{ROOT, example, named, objects, of_kind, rendered};
use serde_json::Value;
use support::Place;
use weightcast::cli::Arguments;
use weightcast::k8s::{file_name, parse};

/// The components that are what a flag of `render` adds to the base.
const COMPONENTS: [(&str, &[&str]); 5] = [
    ("cert-manager", &["--tls"]),
    ("monitoring", &["--monitoring"]),
    ("network-policy", &["--network-policy"]),
    ("indexed-job", &["--flavor", "indexed-job"]),
    ("kubeflow-trainer", &["--flavor", "trainjob"]),
];

/// The overlays: the base with other flags.
const OVERLAYS: [(&str, &[&str]); 2] = [
    ("one-node", &["--nodes", "1"]),
    ("several-nodes", &["--nodes", "4", "--tls", "--monitoring", "--network-policy", "--queue", "weightcast"]),
];

/// The YAML files below `k8s/`, with what they hold.
fn checked_in() -> Vec<(PathBuf, Vec<Value>)> {
    fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "yaml") {
                found.push(path);
            }
        }
    }
    let mut files = Vec::new();
    walk(&PathBuf::from(ROOT).join("k8s"), &mut files);
    files.sort();
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).expect("it is read");
        // A patch is a list; it is looked at as the value of a key.
        let text = if text.contains("\n- op:") || text.starts_with("- op:") {
            let indented: String = text.lines().map(|line| format!("  {line}\n")).collect();
            format!("patch:\n{indented}")
        } else {
            text
        };
        let parsed = parse(&text, &path.display().to_string()).expect("it is YAML");
        (path, parsed)
    };
    files.into_iter().map(read).collect()
}

/// Every text in a value.
fn all_texts(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => vec![text],
        Value::Array(list) => list.iter().flat_map(all_texts).collect(),
        Value::Object(map) => map.values().flat_map(all_texts).collect(),
        _ => Vec::new(),
    }
}

/// The rendered files of a directory and those of the repository are the same bytes.
fn expect_same(rendered: &Path, checked_in: &Path, names: &[String]) {
    let is_updated = std::env::var_os("WEIGHTCAST_UPDATE_K8S").is_some();
    for name in names {
        let text = std::fs::read_to_string(rendered.join(name)).expect(name);
        let path = checked_in.join(name);
        if is_updated {
            std::fs::create_dir_all(checked_in).expect("a directory");
            std::fs::write(&path, &text).expect("it is written");
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(found == text, "{} is not what is rendered: WEIGHTCAST_UPDATE_K8S=1 writes it anew", path.display());
    }
}

/// K8-3: `k8s/base` cannot drift from the program, nor can the components' resources.
#[test]
fn the_base_and_the_components_are_what_is_rendered() {
    let place = Place::new();
    let base = rendered(&place, &[]);
    let mut names: Vec<String> = base.iter().map(file_name).collect();
    let directory = place.path("base/");
    assert_eq!(example(&place, &["-o", &directory]).code, Some(0));
    names.push("kustomization.yaml".to_owned());
    let of_base = PathBuf::from(ROOT).join("k8s/base");
    expect_same(Path::new(&directory), &of_base, &names);
    let mut listed: Vec<String> = std::fs::read_dir(&of_base)
        .expect("a directory")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    listed.sort();
    names.sort();
    assert_eq!(listed, names);

    let base_set = named(&base, "JobSet", "weightcast");
    for (component, flags) in COMPONENTS {
        let directory = place.path(&format!("{component}/"));
        assert_eq!(example(&place, &[flags, &["-o", &directory]].concat()).code, Some(0));
        let all = rendered(&place, flags);
        let is_new = |object: &&Value| !base.iter().any(|known| file_name(known) == file_name(object));
        let mut names: Vec<String> = all.iter().filter(is_new).map(file_name).collect();
        assert!(!names.is_empty(), "{component}");
        if let Some(set) = of_kind(&all, "JobSet").first().filter(|set| **set != base_set) {
            names.push(write_patch(&directory, (base_set, set)));
        }
        expect_same(Path::new(&directory), &PathBuf::from(ROOT).join("k8s/components").join(component), &names);
    }
    let ended = example(&place, &["--diff", "--against", &of_base.display().to_string()]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{}", ended.stderr);
}

/// What turns one value into another, as RFC 6902 has it: a list changes between what its ends have in common. A text that is
/// replaced or removed is tested before, so that a patch of something else fails and does not do harm.
fn patch((from, to): (&Value, &Value), path: &str, operations: &mut Vec<Value>) {
    let test = |operations: &mut Vec<Value>, path: &str, value: &Value| {
        if !value.is_object() && !value.is_array() {
            operations.push(serde_json::json!({"op": "test", "path": path, "value": value}));
        }
    };
    match (from, to) {
        (from, to) if from == to => {}
        (Value::Object(one), Value::Object(other)) => {
            for (key, value) in one {
                let path = format!("{path}/{}", key.replace('~', "~0").replace('/', "~1"));
                match other.get(key) {
                    Some(changed) => patch((value, changed), &path, operations),
                    None => operations.push(serde_json::json!({"op": "remove", "path": path})),
                }
            }
            for (key, value) in other.iter().filter(|(key, _)| !one.contains_key(*key)) {
                let path = format!("{path}/{}", key.replace('~', "~0").replace('/', "~1"));
                operations.push(serde_json::json!({"op": "add", "path": path, "value": value}));
            }
        }
        (Value::Array(one), Value::Array(other)) => {
            let start = one.iter().zip(other).take_while(|(a, b)| a == b).count();
            let (one_rest, other_rest) = (&one[start..], &other[start..]);
            let end = one_rest.iter().rev().zip(other_rest.iter().rev()).take_while(|(a, b)| a == b).count();
            let (one_rest, other_rest) = (&one_rest[..one_rest.len() - end], &other_rest[..other_rest.len() - end]);
            let common = one_rest.len().min(other_rest.len());
            for place in 0..common {
                patch((&one_rest[place], &other_rest[place]), &format!("{path}/{}", start + place), operations);
            }
            for (place, value) in one_rest.iter().enumerate().skip(common).rev() {
                let path = format!("{path}/{}", start + place);
                test(operations, &path, value);
                operations.push(serde_json::json!({"op": "remove", "path": path}));
            }
            for (place, value) in other_rest.iter().enumerate().skip(common) {
                let place = if end == 0 { "-".to_owned() } else { (start + place).to_string() };
                operations.push(serde_json::json!({"op": "add", "path": format!("{path}/{place}"), "value": value}));
            }
        }
        (from, to) => {
            test(operations, path, from);
            operations.push(serde_json::json!({"op": "replace", "path": path, "value": to}));
        }
    }
}

/// Writes the patch of an object into a directory, and gives its name.
fn write_patch(directory: &str, (from, to): (&Value, &Value)) -> String {
    let mut operations = Vec::new();
    patch((from, to), "", &mut operations);
    let name = format!("patch-{}", file_name(to));
    std::fs::create_dir_all(directory).expect("a directory");
    let text = weightcast::k8s::write(&[Value::Array(operations)]);
    std::fs::write(Path::new(directory).join(&name), text).expect("it is written");
    name
}

/// The overlays are the base, its components and patches; together they are what other flags render. (`tests/interop/k8s.sh` holds
/// what kubectl makes of them against the same.)
#[test]
fn the_overlays_are_what_is_rendered() {
    let place = Place::new();
    let overlays = PathBuf::from(ROOT).join("k8s/overlays");
    for (overlay, flags) in OVERLAYS {
        let wanted = rendered(&place, flags);
        // Their components stand before their patches.
        let more: Vec<&str> = flags.iter().copied().skip(2).collect();
        let (base, directory) = (rendered(&place, &more), place.path(overlay));
        let changed =
            wanted.iter().filter_map(|to| Some((base.iter().find(|from| file_name(from) == file_name(to))?, to)));
        let changed = changed.filter(|(from, to)| from != to);
        let names: Vec<String> = changed.map(|pair| write_patch(&directory, pair)).collect();
        expect_same(Path::new(&directory), &overlays.join(overlay), &names);
        expect_listed(&overlays.join(overlay), &names);
    }
    // The smoke test has a job of its own, whose model is made first.
    let (model, smoke) = (place.path("model"), overlays.join("cpu-smoke"));
    assert_eq!(place.run(&["model", "new", "--params", "1M", &model]).code, Some(0));
    let (job, here) = (smoke.join("job.toml").display().to_string(), format!("/checkpoints/model={model}"));
    let flags =
        ["--namespace", "weightcast", "--create-namespace", "--image", "weightcast:0.1.0", "--ranks-per-node", "2"];
    let wanted = objects(&place.run(&[&["k8s", "render", &job, "--here", &here], &flags[..]].concat()));
    let (base, directory) = (rendered(&place, &[]), place.path("cpu-smoke"));
    let changed = wanted.iter().filter_map(|to| Some((base.iter().find(|from| file_name(from) == file_name(to))?, to)));
    let names: Vec<String> =
        changed.filter(|(from, to)| from != to).map(|pair| write_patch(&directory, pair)).collect();
    expect_same(Path::new(&directory), &smoke, &names);
    expect_listed(&smoke, &names);
}

/// The kustomization of a directory names these files, and no other patch is there.
fn expect_listed(directory: &Path, names: &[String]) {
    let kustomization = std::fs::read_to_string(directory.join("kustomization.yaml")).expect("a kustomization");
    for name in names {
        assert!(kustomization.contains(&format!("path: {name}\n")), "{}: {name}", directory.display());
    }
    assert_eq!(kustomization.matches("path: patch-").count(), names.len(), "{}", directory.display());
}

fn long_flags(subcommand: &str) -> BTreeSet<String> {
    let command = Arguments::command();
    let command = command.find_subcommand(subcommand).expect(subcommand);
    let of_argument = |argument: &clap::Arg| {
        let aliases = argument.get_all_aliases().unwrap_or_default().into_iter().map(str::to_owned);
        argument.get_long().map(str::to_owned).into_iter().chain(aliases).collect::<Vec<_>>()
    };
    command.get_arguments().flat_map(of_argument).chain(["help".to_owned()]).collect()
}

/// K8-2 for files that people write: patches of components and overlays, and the examples of schedulers.
#[test]
fn patches_and_examples_use_flags_that_exist() {
    let known: BTreeSet<String> = long_flags("coordinator").union(&long_flags("launch")).cloned().collect();
    let mut seen = 0;
    for (path, documents) in checked_in() {
        for text in documents.iter().flat_map(all_texts).filter(|text| text.starts_with("--")) {
            let flag = text.trim_start_matches("--").split('=').next().unwrap_or_default();
            assert!(known.contains(flag), "{}: {text}", path.display());
            seen += 1;
        }
    }
    assert!(seen > 20, "{seen}");
    let mut examples = 0;
    for entry in std::fs::read_dir(PathBuf::from(ROOT).join("docs/examples")).expect("a directory") {
        let path = entry.expect("an entry").path();
        let script = std::fs::read_to_string(&path).expect("a script").replace("\\\n", " ");
        for line in script.lines().filter(|line| !line.trim_start().starts_with('#')) {
            let Some((_, line)) = line.split_once("weightcast ") else { continue };
            let mut words = line.split_whitespace();
            let subcommand = words.next().unwrap_or_default();
            let known = long_flags(subcommand);
            for word in words.filter(|word| word.starts_with("--")) {
                let flag = word.trim_start_matches("--").split('=').next().unwrap_or_default();
                assert!(known.contains(flag), "{}: {subcommand} {word}", path.display());
                examples += 1;
            }
        }
    }
    assert!(examples > 15, "{examples}");
}
