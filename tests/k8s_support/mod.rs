//! What tests of manifests share: the job of `k8s/job.toml` rendered, and ways to look into objects. Refuses to know: what any test
//! checks.

use serde_json::Value;
use weightcast::k8s::{file_name, parse};

use crate::support::{Ended, Place};

pub(crate) const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// What `k8s/base` is rendered with.
pub(crate) const BASE: [(&str, &str); 5] = [
    ("--namespace", "weightcast"),
    ("--image", "weightcast:0.1.0"),
    ("--nodes", "2"),
    ("--gpus-per-node", "8"),
    ("--mount", "weightcast-data=/data:ro"),
];

pub(crate) fn here() -> String {
    format!("/data={ROOT}/tests/data")
}

/// Renders the job of `k8s/job.toml`, with `more` over the flags of the base.
pub(crate) fn example(place: &Place, more: &[&str]) -> Ended {
    let (job, here) = (format!("{ROOT}/k8s/job.toml"), here());
    let base = BASE.iter().filter(|(flag, _)| !more.contains(flag)).flat_map(|(flag, value)| [*flag, *value]);
    let base: Vec<&str> = base.collect();
    place.run(&[&["k8s", "render", &job, "--here", &here, "--create-namespace"], &base[..], more].concat())
}

pub(crate) fn objects(ended: &Ended) -> Vec<Value> {
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    parse(&ended.stdout, "stdout").expect("it is YAML")
}

pub(crate) fn rendered(place: &Place, more: &[&str]) -> Vec<Value> {
    objects(&example(place, more))
}

pub(crate) fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

pub(crate) fn named<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = of_kind(objects, kind).into_iter().find(|object| object["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("{kind} {name}: {:?}", objects.iter().map(file_name).collect::<Vec<_>>()))
}

/// Every pod specification, wherever it stands.
pub(crate) fn pods(value: &Value) -> Vec<&Value> {
    match value {
        Value::Object(map) if map.contains_key("containers") => vec![value],
        Value::Object(map) => map.values().flat_map(pods).collect(),
        Value::Array(list) => list.iter().flat_map(pods).collect(),
        _ => Vec::new(),
    }
}

pub(crate) fn containers(objects: &[Value]) -> Vec<&Value> {
    let all = objects.iter().flat_map(pods);
    all.flat_map(|pod| pod["containers"].as_array().expect("a list")).collect()
}

pub(crate) fn texts(value: &Value) -> Vec<&str> {
    value.as_array().map_or_else(Vec::new, |list| list.iter().filter_map(Value::as_str).collect())
}

/// All manifests that there are: of all flavors, with everything.
pub(crate) fn everything(place: &Place) -> Vec<Value> {
    let all = ["--tls", "--monitoring", "--network-policy", "--queue", "team"];
    let flavors = ["jobset", "indexed-job", "trainjob"];
    let mut objects: Vec<Value> =
        flavors.iter().flat_map(|flavor| rendered(place, &[&["--flavor", flavor], &all[..]].concat())).collect();
    objects.extend(rendered(place, &["--gpus-per-node", "1", "--ranks-per-node", "2", "--nodes", "1"]));
    objects
}
