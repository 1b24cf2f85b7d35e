//! The metadata of a router file: JSON texts inside `__metadata__`. Invariant: what these functions
//! return fits a model of the given layers and neurons.

use super::router::AttnUnit;
use crate::error::{Error, Result, Status};
use crate::format::json::{self, Value};
use crate::format::{Fields, Limits, TensorSource};
use crate::model::Fingerprint;

/// The version this library reads.
const VERSION: &str = "1";

/// Batch sizes, ascending, and `[batch size][layer]` neurons kept.
pub(super) type KTable = (Vec<u32>, Vec<Vec<u32>>);

/// Refuses files that are no router files, or of another version.
pub(super) fn check_version(source: &dyn TensorSource) -> Result<()> {
    match source.metadata("format") {
        Some("polar-routers") => {}
        Some(other) => {
            return Err(Error::format(format!(
                "router file: metadata \"format\" is \"{}\", needed is \"polar-routers\"",
                json::one_line(other)
            )));
        }
        None => return Err(Error::format("router file: metadata \"format\" is missing; not a router file")),
    }
    match source.metadata("version") {
        Some(VERSION) => Ok(()),
        other => Err(Error::new(
            Status::E_UNSUPPORTED,
            format!(
                "router file: version is \"{}\", supported is \"{VERSION}\"",
                json::one_line(other.unwrap_or(""))
            ),
        )),
    }
}

/// Refuses routers of another model: config numbers first, because they say more than a hash.
pub(super) fn check_base_model(
    source: &dyn TensorSource,
    limits: &Limits,
    model: &Fingerprint,
) -> Result<()> {
    let object = parse(source, limits, "base_model")?
        .ok_or_else(|| Error::format("router file: metadata \"base_model\" is missing"))?;
    let base = Fields::new("router file: base_model", &object);
    let other_model = |name: &str, routers: &str, ours: &str| {
        Error::model(format!(
            "router file is for another model: its {name} is {routers}, the model's is {ours}"
        ))
    };
    let family = base.need_text("model_type")?;
    if family != model.model_type {
        return Err(other_model("model_type", &json::one_line(family), &model.model_type));
    }
    for (name, ours) in &model.numbers {
        let theirs = base.need_count(name, u32::MAX)?;
        if theirs != *ours {
            return Err(other_model(name, &theirs.to_string(), &ours.to_string()));
        }
    }
    let hashes = Fields::new("router file: base_model.tensors", base.need_object("tensors")?);
    for (role, ours) in &model.tensors {
        let theirs = hashes.need_text(role)?;
        let ours = format!("{ours:016x}");
        if theirs != ours {
            return Err(other_model(&format!("hash of {role}"), &json::one_line(theirs), &ours));
        }
    }
    Ok(())
}

/// What an attention router's rows are, and the default density of each layer.
pub(super) fn attention(
    source: &dyn TensorSource,
    limits: &Limits,
    layers: usize,
) -> Result<Option<(AttnUnit, Vec<f32>)>> {
    let Some(object) = parse(source, limits, "attention")? else { return Ok(None) };
    let fields = Fields::new("router file: attention", &object);
    let unit = match fields.need_text("unit")? {
        "head" => AttnUnit::Head,
        "kv_head" => AttnUnit::KvHead,
        other => {
            let value = Value::String(other.to_owned());
            return Err(fields.wrong("unit", &value, "\"head\" or \"kv_head\""));
        }
    };
    let values = fields.array("density")?.ok_or_else(|| fields.missing("density"))?;
    check_layers("attention.density", values.len(), layers)?;
    let mut density = Vec::new();
    for (layer, value) in values.iter().enumerate() {
        let d = value.as_f64().unwrap_or(f64::NAN) as f32;
        if !(d > 0.0 && d <= 1.0) {
            return Err(Error::model(format!(
                "router file: attention.density of layer {layer} is {value}, needed is above 0, at most 1"
            )));
        }
        // Layer 0 is dense (§3.2 of the paper), whatever a file says.
        density.push(if layer == 0 { 1.0 } else { d });
    }
    Ok(Some((unit, density)))
}

/// Neurons per layer by batch size.
pub(super) fn mlp(
    source: &dyn TensorSource,
    limits: &Limits,
    layers: usize,
    ffn_size: u32,
) -> Result<Option<KTable>> {
    let Some(object) = parse(source, limits, "mlp")? else { return Ok(None) };
    let fields = Fields::new("router file: mlp", &object);
    let by_batch = fields.need_object("k")?;
    if by_batch.len() > limits.max_router_batches {
        return Err(Error::limit(format!(
            "router file: mlp.k has {} batch sizes, at most {} allowed",
            by_batch.len(),
            limits.max_router_batches
        )));
    }
    let mut rows = Vec::new();
    for (key, value) in by_batch {
        // The canonical spelling only, so that one size has one key.
        let batch =
            key.parse::<u32>().ok().filter(|b| *b >= 1 && b.to_string() == *key).ok_or_else(|| {
                let shown = json::one_line(key);
                Error::format(format!(
                    "router file: mlp.k has batch size \"{shown}\", needed is a whole number above 0"
                ))
            })?;
        let Value::Array(values) = value else {
            return Err(Error::format(format!("router file: mlp.k[{batch}] is {value}, needed is an array")));
        };
        check_layers(&format!("mlp.k[{batch}]"), values.len(), layers)?;
        let mut row = Vec::new();
        for (layer, value) in values.iter().enumerate() {
            match value.as_u64().and_then(|k| u32::try_from(k).ok()) {
                Some(k) if (1..=ffn_size).contains(&k) => row.push(k),
                _ => {
                    return Err(Error::model(format!(
                        "router file: mlp.k[{batch}] of layer {layer} is {value}, needed is 1 to {ffn_size}"
                    )));
                }
            }
        }
        rows.push((batch, row));
    }
    if rows.is_empty() {
        return Err(Error::format("router file: mlp.k has no batch size"));
    }
    rows.sort_by_key(|(batch, _)| *batch);
    Ok(Some(rows.into_iter().unzip()))
}

fn check_layers(name: &str, stored: usize, layers: usize) -> Result<()> {
    if stored == layers {
        return Ok(());
    }
    Err(Error::model(format!("router file: {name} has {stored} layers, the model has {layers}")))
}

fn parse(source: &dyn TensorSource, limits: &Limits, key: &str) -> Result<Option<json::Object>> {
    let Some(text) = source.metadata(key) else { return Ok(None) };
    let label = format!("router file: metadata {key}");
    json::parse(&label, text.as_bytes(), limits.max_json_depth).map(Some)
}
