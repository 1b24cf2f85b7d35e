//! Bytes across the border: extensible structs in and out, arrays, strings. Whatever a caller may
//! get wrong short of a wild pointer is checked here.
//!
//! An extensible struct starts with its size as its writer knows it. A caller's smaller struct reads
//! as if the missing fields were zero; in a larger one the bytes we do not know must be zero.

use super::op_types::{polar_op_attention, polar_op_head_selection, polar_op_mlp, polar_op_neuron_selection};
use super::types::{
    polar_context_options, polar_device_info, polar_engine_options, polar_error, polar_estimate,
    polar_load_options, polar_model_info, polar_stats,
};
use crate::error::{Error, Result, Status};
use std::ffi::{OsStr, c_char};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// No struct of this ABI will grow beyond this: a larger size is an uninitialised field.
const MAX_STRUCT: usize = 4096;
/// Longest array, in bytes: a larger one is a mistake in its length, to be found before it is read.
const MAX_ARRAY: usize = 1 << 40;
/// Longest path.
const MAX_PATH: usize = 4096;

/// A struct with a `struct_size`.
///
/// # Safety
/// Plain data, `repr(C)`, `u32` size first, no padding, any bit pattern valid.
pub(super) unsafe trait Extensible: Copy {
    /// Its name, for messages.
    const NAME: &'static str;
    /// Its size in the first version of the ABI.
    const FIRST_SIZE: usize;
}

macro_rules! extensible {
    ($($type:ident: $first:literal;)*) => {$(
        // SAFETY: as the definition in `types` shows; a test asserts that there is no padding.
        unsafe impl Extensible for $type {
            const NAME: &'static str = stringify!($type);
            const FIRST_SIZE: usize = $first;
        }
        const _: () = assert!(size_of::<$type>() >= $first);
    )*};
}

extensible! {
    polar_error: 256;
    polar_context_options: 40;
    polar_device_info: 176;
    polar_load_options: 16;
    polar_model_info: 200;
    polar_engine_options: 64;
    polar_estimate: 96;
    polar_stats: 184;
    polar_op_attention: 152;
    polar_op_head_selection: 112;
    polar_op_neuron_selection: 104;
    polar_op_mlp: 96;
}

/// All zero.
pub(super) fn zeroed<T: Extensible>() -> T {
    // SAFETY: any bit pattern is valid for an `Extensible`.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

/// Reads the caller's struct; NULL reads as all zero, which means all defaults.
pub(super) fn read<T: Extensible>(from: *const T) -> Result<T> {
    let mut value = zeroed::<T>();
    if from.is_null() {
        return Ok(value);
    }
    let size = struct_size(from)?;
    let bytes = from.cast::<u8>();
    let known = size.min(size_of::<T>());
    // SAFETY: the caller's struct has `size` bytes, ours `size_of::<T>()`; `known` is at most both.
    unsafe { bytes.copy_to_nonoverlapping((&raw mut value).cast(), known) };
    for i in known..size {
        // SAFETY: `i` is below the size the caller gave.
        if unsafe { bytes.add(i).read() } != 0 {
            return Err(Error::new(
                Status::E_ABI,
                format!("{} has a field set at byte {i} that this library does not know", T::NAME),
            ));
        }
    }
    Ok(value)
}

/// Reads a struct that must be there.
pub(super) fn required<T: Extensible>(from: *const T) -> Result<T> {
    if from.is_null() { Err(null(T::NAME)) } else { read(from) }
}

/// Whether `write` will accept this, for calls that have much to do before they write.
pub(super) fn check_out<T: Extensible>(to: *const T) -> Result<()> {
    if to.is_null() { Err(null(T::NAME)) } else { struct_size(to).map(|_| ()) }
}

/// Writes our struct into the caller's, except for its size field.
pub(super) fn write<T: Extensible>(to: *mut T, value: &T) -> Result<()> {
    if to.is_null() {
        return Err(null(T::NAME));
    }
    let size = struct_size(to)?;
    let known = size.min(size_of::<T>());
    let skip = size_of::<u32>();
    // SAFETY: both structs have at least `known` bytes and `struct_size` made sure of more than
    // `skip`; the rest of the caller's `size` bytes are fields of a later version and become zero.
    unsafe {
        let bytes = to.cast::<u8>();
        (&raw const *value).cast::<u8>().add(skip).copy_to_nonoverlapping(bytes.add(skip), known - skip);
        bytes.add(known).write_bytes(0, size - known);
    }
    Ok(())
}

/// Fills a struct of the caller's size with zeros and that size. Sizes that make no sense are left
/// for the call that gets the struct to refuse.
pub(super) fn init<T: Extensible>(to: *mut T, size: usize) {
    if to.is_null() || !(size_of::<u32>()..=MAX_STRUCT).contains(&size) {
        return;
    }
    // SAFETY: the caller says there are `size` bytes, which is at least the size field.
    unsafe {
        to.cast::<u8>().write_bytes(0, size);
        to.cast::<u32>().write_unaligned(size as u32);
    }
}

fn struct_size<T: Extensible>(of: *const T) -> Result<usize> {
    aligned(of, T::NAME)?;
    // SAFETY: not NULL (checked by the callers), aligned, and the size field is always there.
    let size = unsafe { of.cast::<u32>().read() } as usize;
    if (T::FIRST_SIZE..=MAX_STRUCT).contains(&size) {
        return Ok(size);
    }
    let what = if size < T::FIRST_SIZE { "at least" } else { "known are" };
    let known = if size < T::FIRST_SIZE { T::FIRST_SIZE } else { size_of::<T>() };
    Err(Error::new(Status::E_ABI, format!("{}.struct_size is {size}, {what} {known}", T::NAME)))
}

/// Whether an error struct can be written; NULL is fine.
pub(super) fn check_error_struct(err: *const polar_error) -> Result<()> {
    if err.is_null() { Ok(()) } else { check_out(err) }
}

/// Writes an error into the caller's struct, which `check_error_struct` has seen; NULL is fine.
pub(super) fn write_error(err: *mut polar_error, e: &Error) {
    let mut value = polar_error {
        struct_size: 0,
        code: e.status.0,
        os_code: e.os_code,
        device_code: e.device_code,
        message: [0; 240],
    };
    put_text(&mut value.message, &e.message);
    // NULL is refused, which is right here: there is nobody to tell.
    let _ = write(err, &value);
}

/// Copies `text` into a fixed field, cut at a character, always terminated.
pub(super) fn put_text(field: &mut [c_char], text: &str) {
    let most = text.len().min(field.len() - 1);
    let len = (0..=most).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    for (to, from) in field.iter_mut().zip(text.as_bytes()[..len].iter().chain(std::iter::repeat(&0))) {
        *to = *from as c_char;
    }
}

/// A caller's array: `len` may be 0 with any pointer.
pub(super) fn slice<'a, T: Copy>(first: *const T, len: usize, name: &str) -> Result<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    array(first, len, name)?;
    // SAFETY: not NULL, aligned, at most `MAX_ARRAY` bytes; the caller says `len` elements are
    // there and that nobody writes them during the call.
    Ok(unsafe { std::slice::from_raw_parts(first, len) })
}

/// A caller's array to be filled: `len` may be 0 with any pointer.
pub(super) fn slice_mut<'a, T: Copy>(first: *mut T, len: usize, name: &str) -> Result<&'a mut [T]> {
    if len == 0 {
        return Ok(&mut []);
    }
    array(first, len, name)?;
    // SAFETY: as in `slice`, and nobody else reads or writes them; any bit pattern is a valid T for
    // the numbers this is used with.
    Ok(unsafe { std::slice::from_raw_parts_mut(first, len) })
}

/// Where to put one result.
pub(super) fn out<'a, T>(to: *mut T, name: &str) -> Result<&'a mut MaybeUninit<T>> {
    aligned(to, name)?;
    // SAFETY: aligned; `as_mut` checks NULL; the caller says one element is there for us alone.
    unsafe { to.cast::<MaybeUninit<T>>().as_mut() }.ok_or_else(|| null(name))
}

/// Checks an array's pointer and size without looking at its elements.
pub(super) fn array<T>(first: *const T, len: usize, name: &str) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    if first.is_null() {
        return Err(null(name));
    }
    aligned(first, name)?;
    match len.checked_mul(size_of::<T>()) {
        Some(bytes) if bytes <= MAX_ARRAY => Ok(()),
        _ => Err(Error::limit(format!("{name} has {len} elements, more than fit into memory"))),
    }
}

/// A caller's path.
pub(super) fn path<'a>(first: *const c_char, len: usize) -> Result<&'a Path> {
    if len > MAX_PATH {
        return Err(Error::limit(format!("path has {len} bytes, at most {MAX_PATH} are allowed")));
    }
    let bytes = slice(first.cast::<u8>(), len, "path")?;
    if bytes.is_empty() {
        return Err(Error::invalid("path is empty"));
    }
    if bytes.contains(&0) {
        return Err(Error::invalid("path holds a NUL byte"));
    }
    Ok(Path::new(OsStr::from_bytes(bytes)))
}

/// A caller's text.
pub(super) fn text<'a>(first: *const c_char, len: usize, name: &str) -> Result<&'a str> {
    let bytes = slice(first.cast::<u8>(), len, name)?;
    std::str::from_utf8(bytes)
        .map_err(|e| Error::invalid(format!("{name} is not UTF-8 at byte {}", e.valid_up_to())))
}

fn aligned<T>(pointer: *const T, name: &str) -> Result<()> {
    if pointer.is_aligned() { Ok(()) } else { Err(Error::invalid(format!("{name} is not aligned"))) }
}

fn null(name: &str) -> Error {
    Error::invalid(format!("{name} is NULL"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn new_error() -> polar_error {
        polar_error { struct_size: size_of::<polar_error>() as u32, ..zeroed() }
    }

    pub(crate) fn text(field: &[c_char]) -> String {
        let bytes: Vec<u8> = field.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
        String::from_utf8(bytes).expect("cut at a character")
    }

    /// A load_options struct of a later version.
    #[repr(C, align(8))]
    struct Later {
        now: polar_load_options,
        new_field: u64,
    }

    fn later(size: u32, new_field: u64) -> Later {
        Later { now: polar_load_options { struct_size: size, device: 7, ..zeroed() }, new_field }
    }

    #[test]
    fn sizes_follow_the_rule() {
        let read_size = |size, tail| {
            let l = later(size, tail);
            // The pointer is to the whole, so that reading beyond the first field is allowed.
            read((&raw const l).cast::<polar_load_options>()).map(|o| o.device)
        };
        assert_eq!(read_size(16, 1), Ok(7));
        assert_eq!(read_size(24, 0), Ok(7));
        for (size, tail) in [(0, 0), (15, 0), (24, 1), (4097, 0), (u32::MAX, 0)] {
            assert_eq!(read_size(size, tail).map_err(|e| e.status), Err(Status::E_ABI), "{size}");
        }
        assert_eq!(read::<polar_load_options>(std::ptr::null()).map(|o| o.device), Ok(0));
    }

    #[test]
    fn a_later_callers_new_fields_become_zero() {
        let mut l = later(24, 99);
        let value = polar_load_options { struct_size: 0, device: 3, weight_dtype: 4, flags: 5 };
        write((&raw mut l).cast(), &value).expect("fits");
        assert_eq!((l.now.struct_size, l.now.device, l.now.flags, l.new_field), (24, 3, 5, 0));
    }

    #[test]
    fn init_keeps_within_the_size() {
        let mut l = later(0, 99);
        init((&raw mut l).cast::<polar_load_options>(), 16);
        assert_eq!((l.now.struct_size, l.now.device, l.new_field), (16, 0, 99));
        init(&raw mut l.now, 0);
        init(&raw mut l.now, usize::MAX);
        init::<polar_load_options>(std::ptr::null_mut(), 16);
        assert_eq!(l.now.struct_size, 16);
    }

    #[test]
    fn long_errors_are_cut_at_a_character() {
        let mut err = new_error();
        write_error(&mut err, &Error::invalid("ü".repeat(200)));
        assert_eq!(text(&err.message), "ü".repeat(119));
        assert_eq!(err.code, Status::E_INVALID.0);
        write_error(std::ptr::null_mut(), &Error::invalid("nobody listens"));
    }

    #[test]
    fn arrays_are_checked_without_being_read() {
        assert_eq!(slice::<u32>(std::ptr::null(), 0, "a"), Ok(&[][..]));
        assert!(slice::<u32>(std::ptr::null(), 1, "a").is_err());
        let x = [1u32, 2];
        assert_eq!(slice(x.as_ptr(), 2, "a"), Ok(&x[..]));
        assert_eq!(array(x.as_ptr(), usize::MAX, "a").map_err(|e| e.status), Err(Status::E_LIMIT));
        assert_eq!(array(x.as_ptr(), usize::MAX / 4, "a").map_err(|e| e.status), Err(Status::E_LIMIT));
        let crooked = x.as_ptr().cast::<u8>().wrapping_add(1).cast::<u32>();
        assert_eq!(array(crooked, 1, "a").map_err(|e| e.status), Err(Status::E_INVALID));
    }

    #[test]
    fn paths_are_bytes_without_nul() {
        let p = |s: &'static [u8]| path(s.as_ptr().cast(), s.len()).map_err(|e| e.status);
        assert_eq!(p(b"/a/b"), Ok(Path::new("/a/b")));
        assert_eq!(p(b""), Err(Status::E_INVALID));
        assert_eq!(p(b"a\0b"), Err(Status::E_INVALID));
        assert_eq!(path(c"x".as_ptr(), MAX_PATH + 1).map_err(|e| e.status), Err(Status::E_LIMIT));
    }
}
