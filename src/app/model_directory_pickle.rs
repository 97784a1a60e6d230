//! A reader of the pickles that `torch.save` writes. It builds a tree of plain values and calls nothing.
//!
//! candle's reader is not used for this: it copies what is referred to twice and frees recursively, so a small file can take
//! all memory or end the process. Here values are in one list and refer to each other by index; the only callables that are
//! accepted are those of tensors and ordered dicts, which become values, and any other is refused by name.

use std::collections::BTreeMap;

use super::model_directory_error::CkptError;
use crate::types::as_usize;

/// A longer pickle is none: tensors are not in it, and a name and a shape take 200 bytes each.
pub(super) const MAX_PICKLE_BYTES: u64 = 64 << 20;

/// Callables that become values and are not refused: dicts, and how torch rebuilds tensors.
const ORDERED_DICT: [&str; 2] = ["collections.OrderedDict", "collections.defaultdict"];
const TENSOR: [&str; 2] = ["torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"];

/// The index of a value.
pub(super) type Id = usize;

/// A value.
#[derive(Debug, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    /// `module.name`; it is only ever a name here.
    Class(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A tensor: what is rebuilt, and the arguments.
    Tensor(Id),
    /// A reference to data outside the pickle.
    Persistent(Id),
}

/// A whole pickle.
#[derive(Debug)]
pub(super) struct Pickle {
    values: Vec<Value>,
    root: Id,
}

impl Pickle {
    /// Reads a pickle of protocol 2 to 5.
    pub(super) fn parse(path: &str, bytes: &[u8]) -> Result<Self, CkptError> {
        let mut machine = Machine { path, bytes, at: 0, values: Vec::new(), stack: Vec::new(), memo: BTreeMap::new() };
        loop {
            let operation = machine.byte()?;
            if operation == b'.' {
                let root = machine.pop()?;
                return Ok(Self { values: machine.values, root });
            }
            machine.run(operation)?;
        }
    }

    pub(super) fn root(&self) -> &Value {
        self.get(self.root)
    }

    pub(super) fn get(&self, id: Id) -> &Value {
        self.values.get(id).unwrap_or(&Value::None)
    }

    /// The value under a text key of a dict; the last one, as Python has it.
    pub(super) fn field(&self, dict: &Value, key: &str) -> Option<&Value> {
        let Value::Dict(entries) = dict else { return None };
        let found = entries.iter().rev().find(|(name, _)| matches!(self.get(*name), Value::Text(text) if text == key));
        found.map(|(_, value)| self.get(*value))
    }

    /// What kind of value it is, for messages.
    pub(super) const fn kind(value: &Value) -> &'static str {
        match value {
            Value::None => "None",
            Value::Bool(_) => "a bool",
            Value::Int(_) => "an int",
            Value::Float(_) => "a float",
            Value::Text(_) => "a str",
            Value::Class(_) => "a class",
            Value::Tuple(_) => "a tuple",
            Value::List(_) => "a list",
            Value::Dict(_) => "a dict",
            Value::Tensor(_) => "a tensor",
            Value::Persistent(_) => "a storage",
        }
    }

    /// Plain values as JSON; nothing for tensors and what holds them. `room` is the number of values that may still come,
    /// `depth` that of levels: a value may stand in many places.
    pub(super) fn json(&self, value: &Value, depth: u8, room: &mut u32) -> Option<serde_json::Value> {
        *room = room.checked_sub(1)?;
        let depth = depth.checked_sub(1)?;
        Some(match value {
            Value::None => serde_json::Value::Null,
            Value::Bool(value) => (*value).into(),
            Value::Int(value) => (*value).into(),
            Value::Float(value) => (*value).into(),
            Value::Text(text) => text.as_str().into(),
            Value::Tuple(ids) | Value::List(ids) => {
                let items = ids.iter().map(|id| self.json(self.get(*id), depth, room));
                serde_json::Value::Array(items.collect::<Option<_>>()?)
            }
            Value::Dict(entries) => {
                let mut map = serde_json::Map::new();
                for (key, value) in entries {
                    let Value::Text(key) = self.get(*key) else { continue };
                    if let Some(value) = self.json(self.get(*value), depth, room) {
                        map.insert(key.clone(), value);
                    }
                }
                map.into()
            }
            Value::Class(_) | Value::Tensor(_) | Value::Persistent(_) => return None,
        })
    }
}

enum Slot {
    Mark,
    Value(Id),
}

struct Machine<'a> {
    path: &'a str,
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Slot>,
    memo: BTreeMap<u32, Id>,
}

impl Machine<'_> {
    fn error(&self, what: impl Into<String>) -> CkptError {
        CkptError::Pickle { path: self.path.to_owned(), at: self.at, what: what.into() }
    }

    fn take(&mut self, count: usize) -> Result<&[u8], CkptError> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| self.error("it ends within a value"))?;
        let taken = self.bytes.get(self.at..end).unwrap_or_default();
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CkptError> {
        Ok(*self.take(N)?.first_chunk().expect("as many bytes were taken"))
    }

    fn byte(&mut self) -> Result<u8, CkptError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn length(&mut self) -> Result<usize, CkptError> {
        Ok(as_usize(u64::from(u32::from_le_bytes(self.array()?))))
    }

    fn text(&mut self, len: usize) -> Result<String, CkptError> {
        let text = self.take(len)?.to_vec();
        String::from_utf8(text).map_err(|_| self.error("a str is not UTF-8"))
    }

    fn line(&mut self) -> Result<String, CkptError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let len = rest.iter().position(|byte| *byte == b'\n').ok_or_else(|| self.error("it ends within a name"))?;
        let line = self.text(len)?;
        self.at += 1;
        Ok(line)
    }

    fn push(&mut self, value: Value) {
        self.stack.push(Slot::Value(self.values.len()));
        self.values.push(value);
    }

    fn pop(&mut self) -> Result<Id, CkptError> {
        match self.stack.pop() {
            Some(Slot::Value(id)) => Ok(id),
            _ => Err(self.error("a value is missing")),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, CkptError> {
        let mut values = Vec::new();
        loop {
            match self.stack.pop() {
                Some(Slot::Value(id)) => values.push(id),
                Some(Slot::Mark) => break,
                None => return Err(self.error("a mark is missing")),
            }
        }
        values.reverse();
        Ok(values)
    }

    fn last(&mut self) -> Result<Id, CkptError> {
        match self.stack.last() {
            Some(Slot::Value(id)) => Ok(*id),
            _ => Err(self.error("a value is missing")),
        }
    }

    fn tuple(&mut self, count: usize) -> Result<(), CkptError> {
        let mut values = Vec::with_capacity(count);
        for _ in 0..count {
            values.push(self.pop()?);
        }
        values.reverse();
        self.push(Value::Tuple(values));
        Ok(())
    }

    fn put(&mut self, key: u32) -> Result<(), CkptError> {
        let id = self.last()?;
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<(), CkptError> {
        let id = *self.memo.get(&key).ok_or_else(|| self.error(format!("memo {key} is empty")))?;
        self.stack.push(Slot::Value(id));
        Ok(())
    }

    fn extend_list(&mut self, items: Vec<Id>) -> Result<(), CkptError> {
        let list = self.last()?;
        match self.values.get_mut(list) {
            Some(Value::List(list)) => list.extend(items),
            _ => return Err(self.error("items are appended to what is no list")),
        }
        Ok(())
    }

    fn extend_dict(&mut self, items: &[Id]) -> Result<(), CkptError> {
        let dict = self.last()?;
        let (pairs, rest) = items.as_chunks::<2>();
        match self.values.get_mut(dict) {
            Some(Value::Dict(dict)) if rest.is_empty() => dict.extend(pairs.iter().map(|[key, value]| (*key, *value))),
            _ => return Err(self.error("items are set in what is no dict")),
        }
        Ok(())
    }

    /// A call becomes a value, or is refused. Nothing is called.
    fn reduce(&mut self) -> Result<(), CkptError> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let name = match self.values.get(callable) {
            Some(Value::Class(name)) => name.clone(),
            _ => return Err(self.error("what is called is no name")),
        };
        if ORDERED_DICT.contains(&name.as_str()) {
            self.push(Value::Dict(Vec::new()));
        } else if name == TENSOR[1] {
            // A parameter is its first argument, a tensor.
            let tensor = match self.values.get(arguments) {
                Some(Value::Tuple(arguments)) => arguments.first().copied(),
                _ => None,
            };
            let tensor = tensor.ok_or_else(|| self.error("a parameter has no tensor"))?;
            self.stack.push(Slot::Value(tensor));
        } else if name == TENSOR[0] {
            self.push(Value::Tensor(arguments));
        } else {
            return Err(CkptError::Call { path: self.path.to_owned(), callable: name });
        }
        Ok(())
    }

    /// Attributes of a dict (torch's `_metadata`) say nothing about its tensors; an object of any other kind is refused.
    fn build(&mut self) -> Result<(), CkptError> {
        let (_, object) = (self.pop()?, self.last()?);
        match self.values.get(object) {
            Some(Value::Dict(_)) => Ok(()),
            _ => Err(self.error("attributes are set on what is no dict")),
        }
    }

    fn class(&mut self, module: &str, name: &str) {
        self.push(Value::Class(format!("{module}.{name}")));
    }

    fn run(&mut self, operation: u8) -> Result<(), CkptError> {
        match operation {
            0x80 => _ = self.byte()?,
            0x95 => _ = self.take(8)?,
            b'(' => self.stack.push(Slot::Mark),
            b'N' => self.push(Value::None),
            0x88 | 0x89 => self.push(Value::Bool(operation == 0x88)),
            b'K' | b'M' | b'J' | 0x8a => self.integer(operation)?,
            b'G' => {
                let value = f64::from_be_bytes(self.array()?);
                self.push(Value::Float(value));
            }
            b'X' | 0x8c => {
                let len = if operation == b'X' { self.length()? } else { usize::from(self.byte()?) };
                let text = self.text(len)?;
                self.push(Value::Text(text));
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.class(&module, &name);
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.values.get(module), self.values.get(name)) {
                    (Some(Value::Text(module)), Some(Value::Text(name))) => {
                        let (module, name) = (module.clone(), name.clone());
                        self.class(&module, &name);
                    }
                    _ => return Err(self.error("a class has no name")),
                }
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Value::Persistent(id));
            }
            b')' | 0x85..=0x87 => self.tuple(usize::from(operation.saturating_sub(0x84)))?,
            b'R' | 0x81 => self.reduce()?,
            b'b' => self.build()?,
            _ => return self.run_container(operation),
        }
        Ok(())
    }

    fn integer(&mut self, operation: u8) -> Result<(), CkptError> {
        let value = match operation {
            b'K' => i64::from(self.byte()?),
            b'M' => i64::from(u16::from_le_bytes(self.array()?)),
            b'J' => i64::from(i32::from_le_bytes(self.array()?)),
            _ => {
                let len = usize::from(self.byte()?);
                if len > 8 {
                    return Err(self.error("an int has more than 64 bits"));
                }
                let bytes = self.take(len)?;
                // Two's complement: the sign fills the upper bytes.
                let fill = if bytes.last().is_some_and(|byte| *byte >= 0x80) { 0xff } else { 0 };
                let mut wide = [fill; 8];
                wide.iter_mut().zip(bytes).for_each(|(wide, byte)| *wide = *byte);
                i64::from_le_bytes(wide)
            }
        };
        self.push(Value::Int(value));
        Ok(())
    }

    fn run_container(&mut self, operation: u8) -> Result<(), CkptError> {
        match operation {
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Tuple(items));
            }
            b']' => self.push(Value::List(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            b'a' => {
                let item = self.pop()?;
                self.extend_list(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.extend_list(items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.extend_dict(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.extend_dict(&items)?;
            }
            b'q' | b'r' | 0x94 => {
                let key = match operation {
                    b'q' => u32::from(self.byte()?),
                    b'r' => u32::from_le_bytes(self.array()?),
                    _ => u32::try_from(self.memo.len()).map_err(|_| self.error("the memo is full"))?,
                };
                self.put(key)?;
            }
            b'h' => {
                let key = u32::from(self.byte()?);
                self.recall(key)?;
            }
            b'j' => {
                let key = u32::from_le_bytes(self.array()?);
                self.recall(key)?;
            }
            _ => return Err(self.error(format!("operation 0x{operation:02x} is not one that torch.save writes"))),
        }
        Ok(())
    }
}
