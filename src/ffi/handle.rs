//! Opaque handles. C sees a marker type; behind it lies an object with a magic word in front, so
//! that NULL, a foreign pointer and most uses after free are errors instead of chaos.

use super::guard::Call;
use super::op_types::polar_op_library;
use super::types::{polar_context, polar_engine, polar_model, polar_routers, polar_tokenizer};
use crate::engine;
use crate::engine::ops::OpLibrary;
use crate::error::{Error, Result};
use crate::log::Log;
#[cfg(feature = "text")]
use crate::text;
use std::alloc::{Layout, alloc};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A marker type and what is behind it.
pub(super) trait Handle {
    /// The object.
    type Value;
    /// Marks a live one.
    const MAGIC: u64;
    /// Its name, for messages.
    const NAME: &'static str;
}

/// Behind `polar_context`. Models keep what they need of it alive, so it may be freed first.
pub(super) struct Context {
    pub(super) context: engine::Context,
    pub(super) log: Arc<Log>,
}

/// Behind `polar_model`.
pub(super) struct Model {
    pub(super) model: engine::Model,
    pub(super) log: Arc<Log>,
}

/// Behind `polar_routers`.
pub(super) struct Routers {
    pub(super) routers: engine::Routers,
    pub(super) log: Arc<Log>,
}

/// Behind `polar_engine`.
pub(super) struct Engine {
    pub(super) engine: engine::Engine,
    pub(super) vocab_size: usize,
    pub(super) log: Arc<Log>,
}

/// Behind `polar_tokenizer`.
pub(super) struct Tokenizer {
    #[cfg(feature = "text")]
    pub(super) tokenizer: text::Tokenizer,
    pub(super) log: Arc<Log>,
}

macro_rules! handles {
    ($($marker:ident => $value:ident, $magic:literal;)*) => {$(
        impl Handle for $marker {
            type Value = $value;
            const MAGIC: u64 = u64::from_ne_bytes(*$magic);
            const NAME: &'static str = stringify!($marker);
        }
    )*};
}

handles! {
    polar_context => Context, b"polarCTX";
    polar_model => Model, b"polarMOD";
    polar_routers => Routers, b"polarROU";
    polar_engine => Engine, b"polarENG";
    polar_tokenizer => Tokenizer, b"polarTOK";
    polar_op_library => OpLibrary, b"polarOPS";
}

#[repr(C)]
struct Object<T> {
    magic: AtomicU64,
    value: T,
}

/// What the magic word of a freed object becomes.
const FREED: u64 = u64::from_ne_bytes(*b"polar---");

/// Puts `value` behind a new handle.
pub(super) fn create<H: Handle>(value: H::Value) -> Result<*mut H> {
    let layout = Layout::new::<Object<H::Value>>();
    // SAFETY: the layout is not empty, since it holds the magic word.
    let object = unsafe { alloc(layout) }.cast::<Object<H::Value>>();
    if object.is_null() {
        return Err(Error::no_memory("handle"));
    }
    // SAFETY: freshly allocated with this layout.
    unsafe { object.write(Object { magic: AtomicU64::new(H::MAGIC), value }) };
    Ok(object.cast())
}

/// The object behind a handle.
fn get<'a, H: Handle>(handle: *const H) -> Result<&'a H::Value> {
    let object = handle.cast::<Object<H::Value>>();
    if object.is_null() {
        return Err(Error::invalid(format!("{} is NULL", H::NAME)));
    }
    // SAFETY: not NULL; the caller says it is a handle of ours that no one frees during the call. If
    // it is not, the alignment and the magic word tell, unless the memory is gone altogether.
    let live = object.is_aligned() && unsafe { &(*object).magic }.load(Ordering::Acquire) == H::MAGIC;
    if !live {
        return Err(Error::invalid(format!("not a live {}", H::NAME)));
    }
    // SAFETY: live, and shared access only: every `Value` is `Sync`.
    Ok(unsafe { &(*object).value })
}

/// Frees what is behind a handle. NULL, foreign and freed handles are left alone.
pub(super) fn free<H: Handle>(handle: *mut H) {
    let object = handle.cast::<Object<H::Value>>();
    if object.is_null() || !object.is_aligned() {
        return;
    }
    // SAFETY: as in `get`.
    let magic = unsafe { &(*object).magic };
    if magic.compare_exchange(H::MAGIC, FREED, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
        // SAFETY: allocated by `create` with the same layout, by the allocator `Box` uses, and the
        // exchange lets one caller in once.
        drop(unsafe { Box::from_raw(object) });
    }
}

impl<'a> Call<'a> {
    /// The context behind a handle.
    pub(super) fn context(&mut self, handle: *const polar_context) -> Result<&'a Context> {
        let context = get(handle)?;
        self.enter(&context.log);
        Ok(context)
    }

    /// The model behind a handle.
    pub(super) fn model(&mut self, handle: *const polar_model) -> Result<&'a Model> {
        let model = get(handle)?;
        self.enter(&model.log);
        Ok(model)
    }

    /// The routers behind a handle that may be NULL.
    pub(super) fn routers(&mut self, handle: *const polar_routers) -> Result<Option<&'a Routers>> {
        if handle.is_null() {
            return Ok(None);
        }
        let routers = get(handle)?;
        self.enter(&routers.log);
        Ok(Some(routers))
    }

    /// The engine behind a handle.
    pub(super) fn engine(&mut self, handle: *const polar_engine) -> Result<&'a Engine> {
        let engine = get(handle)?;
        self.engine = Some(&engine.engine);
        self.enter(&engine.log);
        Ok(engine)
    }

    /// The tokenizer behind a handle.
    pub(super) fn tokenizer(&mut self, handle: *const polar_tokenizer) -> Result<&'a Tokenizer> {
        let tokenizer = get(handle)?;
        self.enter(&tokenizer.log);
        Ok(tokenizer)
    }

    /// The operators behind a handle. They have no log: errors go to the caller alone.
    pub(super) fn op_library(&mut self, handle: *const polar_op_library) -> Result<&'a OpLibrary> {
        get(handle)
    }

    fn enter(&mut self, log: &'a Log) {
        self.log = Some(log);
        #[cfg(any(test, feature = "fault"))]
        super::fault::tick();
    }
}

/// Handles are used from any thread; this fails to compile when a value is not fit for that.
const _: () = {
    const fn any_thread<T: Send + Sync>() {}
    any_thread::<Context>();
    any_thread::<Model>();
    any_thread::<Routers>();
    any_thread::<Engine>();
    any_thread::<Tokenizer>();
    any_thread::<OpLibrary>();
};
