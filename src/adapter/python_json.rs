//! JSON text as Python's `json.dumps(value, indent=2, sort_keys=True)` writes it, which is how PEFT writes.
//!
//! Refuses to know: what the value means. Keys are sorted at every depth and everything beyond ASCII is escaped.

use std::fmt::Write as _;

use serde_json::{Map, Value};

/// The text, without a newline at its end.
pub(super) fn dumps(value: &Value) -> String {
    let text = serde_json::to_string_pretty(&sorted(value)).expect("a value always becomes text");
    if text.is_ascii() {
        return text;
    }
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_ascii() {
            escaped.push(character);
        } else {
            // Beyond ASCII only inside strings, where JSON takes UTF-16 units.
            for unit in character.encode_utf16(&mut [0; 2]) {
                write!(escaped, "\\u{unit:04x}").expect("a string takes everything");
            }
        }
    }
    escaped
}

fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(&String, &Value)> = map.iter().collect();
            entries.sort_unstable_by_key(|(key, _)| *key);
            Value::Object(entries.into_iter().map(|(key, value)| (key.clone(), sorted(value))).collect::<Map<_, _>>())
        }
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}
