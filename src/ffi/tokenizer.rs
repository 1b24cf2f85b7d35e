//! Text to tokens and back, in builds with the feature `text`; elsewhere these answer
//! `POLAR_E_UNSUPPORTED`.

use super::constants::{POLAR_DECODE_KEEP_SPECIAL, POLAR_ENCODE_NO_SPECIAL, polar_status, polar_text_flags};
use super::guard::{guard, guard_free};
use super::handle;
use super::types::{polar_context, polar_error, polar_tokenizer};
use super::{convert, copy};
use crate::error::{Error, Result, Status, try_with_capacity};
use std::ffi::c_char;

/// Loads `tokenizer.json`; `path` is that file or the folder it is in, without need of a terminator.
///
/// Threads: any. Ownership: `*out` is the caller's, to be freed with `polar_tokenizer_free`.
/// Errors: `POLAR_E_INVALID`, `POLAR_E_IO`, `POLAR_E_FORMAT`, `POLAR_E_LIMIT`, `POLAR_E_NOMEM`,
/// `POLAR_E_UNSUPPORTED` (a build without tokenizers).
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_tokenizer_load(
    ctx: *mut polar_context,
    path: *const c_char,
    path_len: usize,
    out: *mut *mut polar_tokenizer,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let ctx = call.context(ctx)?;
        let out = copy::out(out, "out")?;
        let path = copy::path(path, path_len)?;
        out.write(handle::create(load(ctx, path)?)?);
        Ok(Status::OK)
    })
}

/// Frees a tokenizer. NULL does nothing.
///
/// Threads: must not race with a call on this tokenizer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polar_tokenizer_free(tokenizer: *mut polar_tokenizer) {
    guard_free(|| handle::free(tokenizer));
}

/// Turns UTF-8 text into tokens, with the special tokens that start or end a text unless `flags` has
/// `POLAR_ENCODE_NO_SPECIAL`. `*n` is how many there are; if `cap` is smaller, `POLAR_TRUNCATED` and
/// nothing is written: `cap` 0 asks for the size.
///
/// Threads: any, at any time. Errors: `POLAR_E_INVALID` (also text that is not UTF-8),
/// `POLAR_E_NOMEM`, `POLAR_E_UNSUPPORTED`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_tokenizer_encode(
    tokenizer: *const polar_tokenizer,
    text: *const c_char,
    text_len: usize,
    flags: polar_text_flags,
    tokens: *mut i32,
    cap: usize,
    n: *mut usize,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let tokenizer = call.tokenizer(tokenizer)?;
        let text = copy::text(text, text_len, "text")?;
        convert::flags("flags", flags, POLAR_ENCODE_NO_SPECIAL)?;
        let tokens = copy::slice_mut(tokens, cap, "tokens")?;
        let n = copy::out(n, "n")?;
        let ids = encode(tokenizer, text, flags & POLAR_ENCODE_NO_SPECIAL == 0)?;
        n.write(ids.len());
        let Some(tokens) = tokens.get_mut(..ids.len()) else { return Ok(Status::TRUNCATED) };
        for (to, from) in tokens.iter_mut().zip(ids) {
            *to = i32::try_from(from).map_err(|_| Error::format("token id above 2^31"))?;
        }
        Ok(Status::OK)
    })
}

/// Turns tokens into terminated UTF-8 text, without special tokens unless `flags` has
/// `POLAR_DECODE_KEEP_SPECIAL`. `*len` is the length without terminator; if `cap` is not larger,
/// `POLAR_TRUNCATED` and no text is written: `cap` 0 asks for the size. Tokens that end inside a
/// character leave a replacement character (U+FFFD) there; a token outside the vocabulary gives no text.
///
/// Threads: any, at any time. Errors: `POLAR_E_INVALID` (also a negative token), `POLAR_E_NOMEM`,
/// `POLAR_E_UNSUPPORTED`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_tokenizer_decode(
    tokenizer: *const polar_tokenizer,
    tokens: *const i32,
    n_tokens: usize,
    flags: polar_text_flags,
    text: *mut c_char,
    cap: usize,
    len: *mut usize,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let tokenizer = call.tokenizer(tokenizer)?;
        convert::flags("flags", flags, POLAR_DECODE_KEEP_SPECIAL)?;
        let tokens = copy::slice(tokens, n_tokens, "tokens")?;
        let out = copy::slice_mut(text.cast::<u8>(), cap, "text")?;
        let len = copy::out(len, "len")?;
        let mut ids = try_with_capacity(tokens.len(), "tokens")?;
        for &token in tokens {
            ids.push(u32::try_from(token).map_err(|_| Error::invalid(format!("token {token} is negative")))?);
        }
        let text = decode(tokenizer, &ids, flags & POLAR_DECODE_KEEP_SPECIAL == 0)?;
        len.write(text.len());
        let fits = text.len() < out.len();
        let text = if fits { text.as_bytes() } else { &[] };
        for (to, &from) in out.iter_mut().zip(text.iter().chain(&[0])) {
            *to = from;
        }
        Ok(if fits { Status::OK } else { Status::TRUNCATED })
    })
}

#[cfg(feature = "text")]
mod with_text {
    use super::{Result, handle};
    use crate::text::Tokenizer;
    use std::path::Path;
    use std::sync::Arc;

    pub(super) fn load(ctx: &handle::Context, path: &Path) -> Result<handle::Tokenizer> {
        let tokenizer = Tokenizer::load(path, ctx.context.limits())?;
        Ok(handle::Tokenizer { tokenizer, log: Arc::clone(&ctx.log) })
    }

    pub(super) fn encode(t: &handle::Tokenizer, text: &str, special: bool) -> Result<Vec<u32>> {
        t.tokenizer.encode(text, special)
    }

    pub(super) fn decode(t: &handle::Tokenizer, ids: &[u32], skip_special: bool) -> Result<String> {
        t.tokenizer.decode(ids, skip_special)
    }
}
#[cfg(feature = "text")]
use with_text::{decode, encode, load};

#[cfg(not(feature = "text"))]
mod without_text {
    use super::{Error, Result, handle};
    use std::path::Path;

    fn missing<T>() -> Result<T> {
        Err(Error::unsupported("this build has no tokenizers (feature `text`)"))
    }

    pub(super) fn load(_: &handle::Context, _: &Path) -> Result<handle::Tokenizer> {
        missing()
    }

    pub(super) fn encode(_: &handle::Tokenizer, _: &str, _: bool) -> Result<Vec<u32>> {
        missing()
    }

    pub(super) fn decode(_: &handle::Tokenizer, _: &[u32], _: bool) -> Result<String> {
        missing()
    }
}
#[cfg(not(feature = "text"))]
use without_text::{decode, encode, load};
