//! The shard index, `model.safetensors.index.json`: which tensor is in which file. Invariant: a
//! file name of an [`Index`] is one plain name, so that joined to the index's folder it stays there.

use super::json::{check_nesting, drive, malformed, one_line};
use super::limits::Limits;
use crate::error::{Error, Result};
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::collections::HashMap;
use std::fmt;

/// A checked shard index.
#[derive(Debug, Default)]
pub struct Index {
    files: Vec<String>,
    /// File number by tensor name.
    tensors: HashMap<String, usize>,
}

impl Index {
    /// File names, in order of first mention.
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// Tensors with the number of their file.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, usize)> {
        self.tensors.iter().map(|(name, &file)| (name.as_str(), file))
    }
}

/// Parses an index; `label` names it in messages.
pub fn parse(label: &str, bytes: &[u8], limits: &Limits) -> Result<Index> {
    check_nesting(label, bytes, limits.max_json_depth, usize::MAX)?;
    let mut reader = Reader { label, limits, index: Index::default(), seen: false, refused: None };
    if let Err(e) = drive(bytes, &mut reader) {
        return Err(reader.refused.take().unwrap_or_else(|| malformed(label, &e)));
    }
    if reader.index.files.is_empty() {
        return Err(Error::format(format!("{label}: weight_map is missing or empty")));
    }
    Ok(reader.index)
}

struct Reader<'a> {
    label: &'a str,
    limits: &'a Limits,
    index: Index,
    seen: bool,
    /// Our own complaint; the parser's errors carry text only.
    refused: Option<Error>,
}

impl Reader<'_> {
    fn refuse<E: de::Error>(&mut self, error: Error) -> E {
        self.refused = Some(error);
        E::custom("refused")
    }

    fn add(&mut self, tensor: String, file: String) -> Result<()> {
        let label = self.label;
        if !is_plain(&file) {
            return Err(Error::format(format!(
                "{label}: tensor {} is put in \"{}\", a plain file name in the same folder is needed",
                one_line(&tensor),
                one_line(&file)
            )));
        }
        if tensor.len() > self.limits.max_name_bytes {
            return Err(Error::limit(format!(
                "{label}: tensor name {} of {} bytes, at most {} allowed",
                one_line(&tensor),
                tensor.len(),
                self.limits.max_name_bytes
            )));
        }
        if self.index.tensors.len() >= self.limits.max_tensors {
            return Err(Error::limit(format!("{label}: more than {} tensors", self.limits.max_tensors)));
        }
        let number = match self.index.files.iter().position(|f| *f == file) {
            Some(number) => number,
            None if self.index.files.len() >= self.limits.max_shards => {
                return Err(Error::limit(format!("{label}: more than {} files", self.limits.max_shards)));
            }
            None => {
                self.index.files.push(file);
                self.index.files.len() - 1
            }
        };
        let shown = one_line(&tensor);
        match self.index.tensors.insert(tensor, number) {
            None => Ok(()),
            Some(_) => Err(Error::format(format!("{label}: tensor {shown} is listed twice"))),
        }
    }
}

/// One component, no way out of the folder, nothing a terminal would act on.
fn is_plain(file: &str) -> bool {
    !file.is_empty()
        && file.len() <= 255
        && !file.starts_with('.')
        && !file.chars().any(|c| c.is_control() || matches!(c, '/' | '\\' | ':'))
}

impl<'de> DeserializeSeed<'de> for &mut Reader<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Reader<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a shard index")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key != "weight_map" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if self.seen {
                let twice = Error::format(format!("{}: weight_map is listed twice", self.label));
                return Err(self.refuse(twice));
            }
            self.seen = true;
            map.next_value_seed(WeightMap(self))?;
        }
        Ok(())
    }
}

struct WeightMap<'s, 'a>(&'s mut Reader<'a>);

impl<'de> DeserializeSeed<'de> for WeightMap<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMap<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("file names by tensor name in weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        while let Some((tensor, file)) = map.next_entry::<String, String>()? {
            self.0.add(tensor, file).map_err(|e| self.0.refuse(e))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    fn index(text: &str) -> Result<Index> {
        parse("index", text.as_bytes(), &Limits::default())
    }

    #[test]
    fn files_are_numbered_once() {
        let i =
            index(r#"{"metadata":{"total_size":3},"weight_map":{"a":"x-1","b":"x-2","c":"x-1"}}"#).unwrap();
        assert_eq!(i.files(), ["x-1", "x-2"]);
        assert_eq!(i.tensors["c"], 0);
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for name in
            ["../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\\\b", "C:x", "a\\u0000b", "a\\nb"]
        {
            let e = index(&format!(r#"{{"weight_map":{{"t":"{name}"}}}}"#)).unwrap_err();
            assert_eq!(e.status, Status::E_FORMAT, "{name}: {e}");
            assert!(e.message.contains("plain file name") && !e.message.contains('\n'), "{name}: {e}");
        }
    }

    #[test]
    fn malformed_maps_are_refused() {
        for (text, status) in [
            ("", Status::E_FORMAT),
            ("[]", Status::E_FORMAT),
            ("{}", Status::E_FORMAT),
            (r#"{"weight_map":{}}"#, Status::E_FORMAT),
            (r#"{"weight_map":{"a":1}}"#, Status::E_FORMAT),
            (r#"{"weight_map":{"a":"x","a":"x"}}"#, Status::E_FORMAT),
            (r#"{"weight_map":{"a":"x"},"weight_map":{"a":"x"}}"#, Status::E_FORMAT),
        ] {
            assert_eq!(index(text).unwrap_err().status, status, "{text}");
        }
        let many: Vec<String> = (0..600).map(|i| format!("\"t{i}\":\"f{i}\"")).collect();
        let e = index(&format!("{{\"weight_map\":{{{}}}}}", many.join(","))).unwrap_err();
        assert_eq!(e.status, Status::E_LIMIT, "{e}");
    }
}
