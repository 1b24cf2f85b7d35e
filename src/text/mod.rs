//! Text to tokens and back, over the Hugging Face `tokenizers` crate and its `tokenizer.json`.
//! Invariant: a file that makes the crate fail or panic is an error of the call, nothing more.
//! Not for chat templates: those are programs, and the host knows its own.

use crate::error::{Error, Result};
use crate::format::Limits;
use crate::format::json::one_line;
use crate::sys::file::{File, show};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// A tokenizer. Any thread may use it at any time.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Loads `tokenizer.json`, given itself or its folder.
    pub fn load(path: &Path, limits: &Limits) -> Result<Tokenizer> {
        let in_folder = path.join("tokenizer.json");
        let is_folder = path.is_dir();
        if is_folder && in_folder.symlink_metadata().is_err() {
            return Err(Error::format(format!("{}: no tokenizer.json in this folder", show(path))));
        }
        let file = File::open(if is_folder { &in_folder } else { path })?;
        Tokenizer::from_bytes(file.name(), &file.read_all(limits.max_tokenizer_bytes)?)
    }

    /// From the bytes of a `tokenizer.json`; `label` names it in messages.
    pub fn from_bytes(label: &str, bytes: &[u8]) -> Result<Tokenizer> {
        let inner = contain(label, || {
            let mut inner = tokenizers::Tokenizer::from_bytes(bytes)?;
            // Both belong to training batches, and a hostile padding length is any number of bytes.
            inner.with_padding(None);
            inner.with_truncation(None)?;
            Ok(inner)
        })?;
        Ok(Tokenizer { inner })
    }

    /// Token ids of a text; `add_special` adds what the model expects around it, e.g. a first token.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        contain("tokenizer: encode", || Ok(self.inner.encode_fast(text, add_special)?.get_ids().to_vec()))
    }

    /// Text of token ids; `skip_special` leaves out tokens that are not text. Ids without a token
    /// give no text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        contain("tokenizer: decode", || self.inner.decode(ids, skip_special))
    }

    /// Tokens in the vocabulary, added ones included. The model's may be larger (padding).
    pub fn vocab_size(&self) -> usize {
        contain("tokenizer: vocab_size", || Ok(self.inner.get_vocab_size(true))).unwrap_or(0)
    }

    /// The token of an id, as the vocabulary spells it (not text: use [`Tokenizer::decode`]).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        contain("tokenizer: id_to_token", || Ok(self.inner.id_to_token(id))).ok().flatten()
    }

    /// The id of a token, as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        contain("tokenizer: token_to_id", || Ok(self.inner.token_to_id(token))).ok().flatten()
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").finish_non_exhaustive()
    }
}

/// Runs foreign code whose input is foreign too. Sound to continue after a panic: the crate keeps no
/// state but caches behind locks, and a poisoned lock panics again, into here.
fn contain<T>(what: &str, f: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(Error::format(format!("{what}: {}", one_line(&e.to_string())))),
        Err(payload) => {
            // Dropping a payload may run foreign code that panics again.
            std::mem::forget(payload);
            Err(Error::format(format!("{what}: the tokenizer library failed on it")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    const WORDS: &str = r#"{"version":"1.0","truncation":null,
        "padding":{"strategy":{"Fixed":1152921504606846976},"direction":"Right","pad_to_multiple_of":null,
                   "pad_id":0,"pad_type_id":0,"pad_token":"<s>"},
        "added_tokens":[{"id":0,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,
                         "normalized":false,"special":true}],
        "normalizer":null,"pre_tokenizer":{"type":"Whitespace"},
        "post_processor":{"type":"TemplateProcessing",
            "single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],
            "pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],
            "special_tokens":{"<s>":{"id":"<s>","ids":[0],"tokens":["<s>"]}}},
        "decoder":null,
        "model":{"type":"WordLevel","vocab":{"<s>":0,"polar":1,"sparsity":2,"?":3},"unk_token":"?"}}"#;

    #[test]
    fn words_round_trip() {
        let t = Tokenizer::from_bytes("t", WORDS.as_bytes()).unwrap();
        assert_eq!(t.encode("polar sparsity", true).unwrap(), [0, 1, 2]);
        assert_eq!(t.encode("sparsity x", false).unwrap(), [2, 3]);
        assert_eq!(t.decode(&[0, 1, 2], true).unwrap(), "polar sparsity");
        assert_eq!(t.decode(&[0, 1, 999], false).unwrap(), "<s> polar");
        assert_eq!((t.vocab_size(), t.id_to_token(1), t.id_to_token(9)), (4, Some("polar".into()), None));
        assert_eq!(t.token_to_id("?"), Some(3));
    }

    #[test]
    fn malformed_files_are_errors() {
        let deep = "[".repeat(100_000);
        for text in
            ["", "{}", "[]", "nonsense", r#"{"model":{"type":"BPE"}}"#, &deep, &WORDS[..WORDS.len() / 2]]
        {
            let e = Tokenizer::from_bytes("t.json", text.as_bytes()).unwrap_err();
            assert_eq!(e.status, Status::E_FORMAT, "{e}");
            assert!(e.message.starts_with("t.json: ") && !e.message.contains('\n'), "{e}");
        }
    }

    #[test]
    fn panics_inside_are_contained() {
        let e = contain::<()>("x", || panic!("inside")).unwrap_err();
        assert_eq!(e.status, Status::E_FORMAT);
    }
}
