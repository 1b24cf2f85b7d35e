//! JSON from strangers, over `serde_json`: bounded in size and depth, duplicate keys refused (two
//! readers that each take another of two equal keys is how checks are slipped past).
//! Not for tensor headers or shard indices, which are read without building values.

use crate::error::{Error, Result};
use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;

/// Most characters of a foreign string that a message repeats.
const SHOWN: usize = 80;

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names are JSON's own")]
pub enum Value {
    Null,
    Bool(bool),
    /// A whole number that is not negative.
    Uint(u64),
    /// A negative whole number.
    Int(i64),
    /// Any other number; finite.
    Float(f64),
    String(String),
    Array(Vec<Value>),
    Object(Object),
}

/// A JSON object without duplicate keys.
pub type Object = BTreeMap<String, Value>;

impl Value {
    /// As a number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::Uint(n) => Some(n as f64),
            Value::Int(n) => Some(n as f64),
            Value::Float(n) => Some(n),
            _ => None,
        }
    }

    /// As a whole number that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        if let Value::Uint(n) = *self { Some(n) } else { None }
    }

    /// As text.
    pub fn as_str(&self) -> Option<&str> {
        if let Value::String(s) = self { Some(s) } else { None }
    }
}

/// One line, shortened: for messages.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("null"),
            Value::Bool(b) => write!(f, "{b}"),
            Value::Uint(n) => write!(f, "{n}"),
            Value::Int(n) => write!(f, "{n}"),
            Value::Float(n) => write!(f, "{n:?}"),
            Value::String(s) => write!(f, "\"{}\"", one_line(s)),
            Value::Array(a) => write!(f, "an array of {}", a.len()),
            Value::Object(o) => match o.keys().next() {
                Some(key) => write!(f, "an object with \"{}\"", one_line(key)),
                None => f.write_str("an empty object"),
            },
        }
    }
}

/// Foreign text on one line, control characters escaped, shortened.
pub fn one_line(text: &str) -> String {
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == SHOWN {
            out.push('…');
            break;
        }
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// Parses an object; `label` names it in messages.
pub fn parse(label: &str, bytes: &[u8], max_depth: usize) -> Result<Object> {
    check_nesting(label, bytes, max_depth, usize::MAX)?;
    match drive(bytes, AnyValue) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(Error::format(format!("{label}: {other} stored, an object needed"))),
        Err(e) => Err(malformed(label, &e)),
    }
}

/// Refuses text with more than `max_depth` brackets open at once, or more than `max_items` items in a
/// row in an array; without recursion and before a parser that recurses and allocates sees it.
pub(super) fn check_nesting(label: &str, bytes: &[u8], max_depth: usize, max_items: usize) -> Result<()> {
    let (mut depth, mut items) = (0usize, 0usize);
    let (mut in_array, mut in_string, mut escaped) = (false, false, false);
    for &b in bytes {
        if in_string {
            (in_string, escaped) = match b {
                _ if escaped => (true, false),
                b'\\' => (true, true),
                b'"' => (false, false),
                _ => (true, false),
            };
            continue;
        }
        match b {
            b'"' => in_string = true,
            b'[' | b'{' => (depth, in_array, items) = (depth.saturating_add(1), b == b'[', 1),
            b']' | b'}' => (depth, in_array) = (depth.saturating_sub(1), false),
            b',' if in_array => items = items.saturating_add(1),
            _ => {}
        }
        if depth > max_depth {
            return Err(Error::limit(format!("{label}: nested deeper than {max_depth} levels")));
        }
        if items > max_items {
            return Err(Error::limit(format!("{label}: an array of more than {max_items} items")));
        }
    }
    Ok(())
}

/// Runs a seed over a whole text.
pub(super) fn drive<'a, S: DeserializeSeed<'a>>(
    bytes: &'a [u8],
    seed: S,
) -> std::result::Result<S::Value, serde_json::Error> {
    let mut de = serde_json::Deserializer::from_slice(bytes);
    let value = seed.deserialize(&mut de)?;
    de.end()?;
    Ok(value)
}

/// A parser's complaint, on one line.
pub(super) fn malformed(label: &str, e: &serde_json::Error) -> Error {
    Error::format(format!("{label}: {}", one_line(&e.to_string())))
}

/// Builds [`Value`]s.
struct AnyValue;

impl<'de> DeserializeSeed<'de> for AnyValue {
    type Value = Value;

    fn deserialize<D: de::Deserializer<'de>>(self, d: D) -> std::result::Result<Value, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, b: bool) -> std::result::Result<Value, E> {
        Ok(Value::Bool(b))
    }

    fn visit_u64<E>(self, n: u64) -> std::result::Result<Value, E> {
        Ok(Value::Uint(n))
    }

    fn visit_i64<E>(self, n: i64) -> std::result::Result<Value, E> {
        Ok(u64::try_from(n).map_or(Value::Int(n), Value::Uint))
    }

    fn visit_f64<E>(self, n: f64) -> std::result::Result<Value, E> {
        Ok(Value::Float(n))
    }

    fn visit_str<E>(self, s: &str) -> std::result::Result<Value, E> {
        Ok(Value::String(s.to_owned()))
    }

    fn visit_string<E>(self, s: String) -> std::result::Result<Value, E> {
        Ok(Value::String(s))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(AnyValue)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Value, A::Error> {
        let mut object = Object::new();
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(de::Error::custom(format_args!("duplicate key \"{}\"", one_line(&key))));
            }
            let value = map.next_value_seed(AnyValue)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    fn refused(text: &[u8]) -> Error {
        parse("x.json", text, 64).unwrap_err()
    }

    #[test]
    fn values_keep_their_kind() {
        let o = parse("x", br#"{"a":1,"b":-2,"c":1.5,"d":null,"e":["\n"],"f":18446744073709551615}"#, 64)
            .unwrap();
        assert_eq!(o["a"], Value::Uint(1));
        assert_eq!(o["b"], Value::Int(-2));
        assert_eq!(o["c"], Value::Float(1.5));
        assert_eq!(o["d"], Value::Null);
        assert_eq!(o["e"], Value::Array(vec![Value::String("\n".into())]));
        assert_eq!(o["f"].as_u64(), Some(u64::MAX));
    }

    #[test]
    fn hostile_text_is_an_error() {
        let deep = "[".repeat(10_000);
        let deep_objects = r#"{"a":"#.repeat(10_000);
        for text in [deep.as_bytes(), deep_objects.as_bytes()] {
            assert_eq!(refused(text).status, Status::E_LIMIT);
        }
        for text in [
            &b""[..],
            b"{",
            b"[]",
            b"{} x",
            b"{\"a\":\"\xff\"}",
            b"{\"a\":1,\"a\":1}",
            b"{\"a\":{\"b\":1,\"\\u0062\":2}}",
            b"{\"a\":1e999}",
            b"{\"a\":NaN}",
        ] {
            let e = refused(text);
            assert_eq!(e.status, Status::E_FORMAT, "{e}");
            assert!(e.message.starts_with("x.json: ") && !e.message.contains('\n'), "{e}");
        }
    }

    #[test]
    fn brackets_in_strings_are_not_depth() {
        let text = format!("{{\"a\":\"{}\\\"[\"}}", "[{".repeat(100));
        assert!(parse("x", text.as_bytes(), 1).is_ok());
    }
}
