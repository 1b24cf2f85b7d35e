//! Typed access to the fields of a JSON object. Every complaint names the file, the field and the
//! value. `null` counts as absent, as it does for Hugging Face configs.

use super::json::{Object, Value};
use crate::error::{Error, Result, Status};

/// An object with the name messages give it.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a> {
    label: &'a str,
    object: &'a Object,
    /// Complaints have this class.
    status: Status,
}

impl<'a> Fields<'a> {
    /// Fields of `object`; `label` is the file, or the file and the path to the object.
    pub fn new(label: &'a str, object: &'a Object) -> Fields<'a> {
        Fields { label, object, status: Status::E_FORMAT }
    }

    /// The name in messages.
    pub fn label(&self) -> &'a str {
        self.label
    }

    /// The field, unless absent or null.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|v| **v != Value::Null)
    }

    /// Whether the field is written, even as null.
    pub fn is_written(&self, name: &str) -> bool {
        self.object.contains_key(name)
    }

    /// A complaint about a field's value.
    pub fn wrong(&self, name: &str, value: &Value, needed: &str) -> Error {
        Error::new(self.status, format!("{}: {name} is {value}, needed is {needed}", self.label))
    }

    /// A complaint about a missing field.
    pub fn missing(&self, name: &str) -> Error {
        Error::new(self.status, format!("{}: {name} is missing", self.label))
    }

    /// A whole number of 1 to `max`.
    pub fn count(&self, name: &str, max: u32) -> Result<Option<u32>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if n > u64::from(max) => {
                Err(Error::limit(format!("{}: {name} is {n}, at most {max} allowed", self.label)))
            }
            Some(n) if n >= 1 => Ok(Some(n as u32)),
            _ => Err(self.wrong(name, value, "a whole number above 0")),
        }
    }

    /// A whole number of 1 to `max` that must be there.
    pub fn need_count(&self, name: &str, max: u32) -> Result<u32> {
        self.count(name, max)?.ok_or_else(|| self.missing(name))
    }

    /// A number above 0.
    pub fn positive(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            // Above 0 also as an f32: every use is one.
            Some(n) if n as f32 > 0.0 && (n as f32).is_finite() => Ok(Some(n)),
            _ => Err(self.wrong(name, value, "a number above 0")),
        }
    }

    /// A number above 0 that must be there.
    pub fn need_positive(&self, name: &str) -> Result<f64> {
        self.positive(name)?.ok_or_else(|| self.missing(name))
    }

    /// True or false.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(value) => Err(self.wrong(name, value, "true or false")),
        }
    }

    /// Text.
    pub fn text(&self, name: &str) -> Result<Option<&'a str>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(value) => Err(self.wrong(name, value, "a string")),
        }
    }

    /// Text that must be there.
    pub fn need_text(&self, name: &str) -> Result<&'a str> {
        self.text(name)?.ok_or_else(|| self.missing(name))
    }

    /// An array.
    pub fn array(&self, name: &str) -> Result<Option<&'a [Value]>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(a)) => Ok(Some(a)),
            Some(value) => Err(self.wrong(name, value, "an array")),
        }
    }

    /// An object.
    pub fn object(&self, name: &str) -> Result<Option<&'a Object>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(o)) => Ok(Some(o)),
            Some(value) => Err(self.wrong(name, value, "an object")),
        }
    }

    /// An object that must be there.
    pub fn need_object(&self, name: &str) -> Result<&'a Object> {
        self.object(name)?.ok_or_else(|| self.missing(name))
    }
}
