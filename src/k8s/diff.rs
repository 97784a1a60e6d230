//! How manifests differ, key by key.
//!
//! Owns: which object of the one side is which of the other, and which element of a list. Refuses to know: kinds, and the defaults
//! that a cluster fills in.

use std::collections::BTreeMap;
use std::fmt;

use super::Object;

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Kind and name.
    pub object: String,
    /// The key, such as `spec.replicatedJobs[workers].template`; empty for the whole object.
    pub key: String,
    /// What is rendered; absent where there is nothing.
    pub rendered: Option<String>,
    /// What stands there; absent where there is nothing.
    pub found: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = if self.key.is_empty() { String::new() } else { format!(" {}", self.key) };
        match (&self.found, &self.rendered) {
            (Some(found), Some(rendered)) => write!(f, "~ {}{key}: {found} -> {rendered}", self.object),
            (None, Some(rendered)) => write!(f, "+ {}{key}: {rendered}", self.object),
            (found, None) => write!(f, "- {}{key}: {}", self.object, found.as_deref().unwrap_or("")),
        }
    }
}

/// How `rendered` differs from `found`; objects are matched by kind, namespace and name.
#[must_use]
pub fn differences(rendered: &[Object], found: &[Object]) -> Vec<Difference> {
    let by_name = |objects: &[Object]| objects.iter().map(|object| (title(object), object.clone())).collect();
    let (mut ours, mut theirs): (BTreeMap<String, Object>, BTreeMap<String, Object>) =
        (by_name(rendered), by_name(found));
    let mut all = Vec::new();
    for (object, value) in &mut ours {
        match theirs.remove(object) {
            Some(other) => compare(object, String::new(), (Some(value), Some(&other)), &mut all),
            None => all.push(whole(object, Some("present"), None)),
        }
    }
    all.extend(theirs.keys().map(|object| whole(object, None, Some("present"))));
    all
}

fn whole(object: &str, rendered: Option<&str>, found: Option<&str>) -> Difference {
    let text = |side: Option<&str>| side.map(str::to_owned);
    Difference { object: object.to_owned(), key: String::new(), rendered: text(rendered), found: text(found) }
}

fn title(object: &Object) -> String {
    let text = |pointer: &str| object.pointer(pointer).and_then(Object::as_str).unwrap_or("");
    let namespace = text("/metadata/namespace");
    let slash = if namespace.is_empty() { "" } else { "/" };
    format!("{} {namespace}{slash}{}", text("/kind"), text("/metadata/name"))
}

/// (rendered, found), one of which may be absent.
type Sides<'a> = (Option<&'a Object>, Option<&'a Object>);

fn compare(object: &str, key: String, sides: Sides<'_>, all: &mut Vec<Difference>) {
    match sides {
        (Some(one), Some(other)) if one == other => {}
        (Some(Object::Object(one)), Some(Object::Object(other))) => {
            let added = other.keys().filter(|name| !one.contains_key(*name));
            for name in one.keys().chain(added) {
                let dot = if key.is_empty() { "" } else { "." };
                compare(object, format!("{key}{dot}{name}"), (one.get(name), other.get(name)), all);
            }
        }
        (Some(Object::Array(one)), Some(Object::Array(other))) => {
            let (one, other) = (elements(one), elements(other));
            let added = other.iter().filter(|(name, _)| one.iter().all(|(known, _)| known != name));
            for (name, _) in one.iter().chain(added) {
                let side = |list: &[(String, &Object)]| {
                    list.iter().find(|(known, _)| known == name).map(|(_, value)| (*value).clone())
                };
                let (mine, theirs) = (side(&one), side(&other));
                compare(object, format!("{key}[{name}]"), (mine.as_ref(), theirs.as_ref()), all);
            }
        }
        (rendered, found) => {
            let text = |side: Option<&Object>| side.map(ToString::to_string);
            all.push(Difference { object: object.to_owned(), key, rendered: text(rendered), found: text(found) });
        }
    }
}

/// The elements of a list by their names where all have one and no two the same, else by their places.
fn elements(list: &[Object]) -> Vec<(String, &Object)> {
    let name = |value: &Object| value.get("name").and_then(Object::as_str).map(str::to_owned);
    let names: Vec<String> = list.iter().filter_map(name).collect();
    let mut distinct = names.clone();
    distinct.sort();
    distinct.dedup();
    if distinct.len() == list.len() {
        return names.into_iter().zip(list).collect();
    }
    list.iter().enumerate().map(|(place, value)| (place.to_string(), value)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_are_named() {
        let job = |spec: Object| json!({"kind": "Job", "metadata": {"name": "j", "namespace": "n"}, "spec": spec});
        let ours = job(json!({"a": 1, "env": [{"name": "X", "value": "1"}, {"name": "Y", "value": "2"}], "l": [1, 2]}));
        let theirs =
            job(json!({"a": 2, "env": [{"name": "Y", "value": "2"}, {"name": "Z", "value": "3"}], "l": [1, 2]}));
        let lone = json!({"kind": "Secret", "metadata": {"name": "s"}});
        assert_eq!(differences(std::slice::from_ref(&ours), std::slice::from_ref(&ours)), []);
        let found: Vec<String> = differences(&[ours], &[theirs, lone]).iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "~ Job n/j spec.a: 2 -> 1",
                r#"+ Job n/j spec.env[X]: {"name":"X","value":"1"}"#,
                r#"- Job n/j spec.env[Z]: {"name":"Z","value":"3"}"#,
                "- Secret s: present",
            ]
        );
    }
}
