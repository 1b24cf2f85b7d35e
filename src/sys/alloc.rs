//! Aligned, zeroed buffers whose allocation may fail without ending the process.
//!
//! Every buffer starts on a 64-byte boundary, so one vector load never crosses a cache line. Big
//! ones start on a 2 MiB boundary and ask for huge pages: streaming weights through 4 KiB pages
//! costs a page walk every 64 lines.

use crate::error::{Error, Result};
use std::alloc::Layout;
use std::cell::Cell;
use std::io::Read;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Alignment of every buffer.
pub const ALIGN: usize = 64;
/// From this size on a buffer is mapped on its own, in huge pages where the system has them.
const BIG: usize = 1 << 20;
const HUGE: usize = 2 << 20;

/// A plain number: any bytes are a value, and all zero bytes are zero.
///
/// # Safety
/// Implementors have no padding, no invalid bit pattern and no destructor.
pub unsafe trait Pod: Copy + Default + Send + Sync + 'static {}

macro_rules! pod { ($($t:ty)*) => { $(
    // SAFETY: a primitive number has no padding and no invalid bit pattern.
    unsafe impl Pod for $t {}
)* } }
pod!(u8 i8 u16 u32 i32 u64 f32);

/// A zeroed buffer of fixed length.
pub struct Buf<T: Pod> {
    data: NonNull<T>,
    len: usize,
    /// Bytes mapped, or 0 when the allocator gave them.
    mapped: usize,
}

// SAFETY: a `Buf` owns its memory like a `Vec` does.
unsafe impl<T: Pod> Send for Buf<T> {}
// SAFETY: shared access only reads.
unsafe impl<T: Pod> Sync for Buf<T> {}

thread_local! {
    static ASKED: Cell<u64> = const { Cell::new(0) };
}

/// Bytes of the buffers that `body` asked for on this thread. Memory that nobody writes costs nothing, so
/// what is made only to be counted and dropped is cheap.
pub fn counted<T>(body: impl FnOnce() -> T) -> (T, u64) {
    let before = ASKED.get();
    let value = body();
    (value, ASKED.get() - before)
}

impl<T: Pod> Buf<T> {
    /// `len` zeros; `what` names them in the error.
    pub fn zeroed(len: usize, what: &'static str) -> Result<Buf<T>> {
        if len == 0 {
            return Ok(Buf { data: NonNull::dangling(), len: 0, mapped: 0 });
        }
        let bytes = len.checked_mul(size_of::<T>()).ok_or(Error::no_memory(what))?;
        ASKED.set(ASKED.get().saturating_add(bytes as u64));
        if bytes >= BIG {
            let (data, mapped) = map(bytes).ok_or(Error::no_memory(what))?;
            return Ok(Buf { data: data.cast(), len, mapped });
        }
        // SAFETY: the layout's size is not zero.
        let data = unsafe { std::alloc::alloc_zeroed(layout(bytes)) };
        let data = NonNull::new(data).ok_or(Error::no_memory(what))?;
        Ok(Buf { data: data.cast(), len, mapped: 0 })
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// The same memory as elements of another type; trailing bytes that make no whole one are left out.
    pub fn view<U: Pod>(&self) -> &[U] {
        // SAFETY: the buffer is 64-byte aligned (or empty and dangling for `T`, then the length is
        // 0 and the pointer below is aligned for `U`), and any bytes make a `U`.
        unsafe { std::slice::from_raw_parts(self.base::<U>(), self.bytes() / size_of::<U>()) }
    }

    /// See [`Buf::view`].
    pub fn view_mut<U: Pod>(&mut self) -> &mut [U] {
        // SAFETY: as in `view`, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.base::<U>(), self.bytes() / size_of::<U>()) }
    }

    fn base<U>(&self) -> *mut U {
        if self.len == 0 { NonNull::dangling().as_ptr() } else { self.data.as_ptr().cast() }
    }
}

impl<T: Pod> Default for Buf<T> {
    fn default() -> Buf<T> {
        Buf { data: NonNull::dangling(), len: 0, mapped: 0 }
    }
}

impl<T: Pod> Deref for Buf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `data` points to `len` initialised elements, or `len` is 0 and it is aligned.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T: Pod> DerefMut for Buf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl<T: Pod> Drop for Buf<T> {
    fn drop(&mut self) {
        if self.len == 0 {
            return;
        }
        if self.mapped > 0 {
            unmap(self.data.cast(), self.mapped);
        } else {
            // SAFETY: allocated in `zeroed` with the same layout.
            unsafe { std::alloc::dealloc(self.data.as_ptr().cast(), layout(self.bytes())) }
        }
    }
}

fn layout(bytes: usize) -> Layout {
    // SAFETY: 64 is a power of two, and `bytes` < BIG stays far below isize::MAX when rounded up.
    unsafe { Layout::from_size_align_unchecked(bytes, ALIGN) }
}

/// `bytes` zeros on a huge-page boundary, and how many bytes to unmap.
#[cfg(unix)]
fn map(bytes: usize) -> Option<(NonNull<u8>, usize)> {
    let size = bytes.checked_next_multiple_of(HUGE)?;
    let span = size.checked_add(HUGE)?;
    // SAFETY: an anonymous private mapping at an address the system chooses touches nothing of ours.
    let base = unsafe {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        libc::mmap(std::ptr::null_mut(), span, prot, flags, -1, 0)
    };
    if base == libc::MAP_FAILED {
        return None;
    }
    let base: *mut u8 = base.cast();
    let before = base.align_offset(HUGE);
    // SAFETY: both cuts lie inside the mapping just made and outside the part that is kept.
    unsafe {
        let data = base.add(before);
        if before > 0 {
            libc::munmap(base.cast(), before);
        }
        libc::munmap(data.add(size).cast(), span - before - size);
        // Only a wish: without huge pages everything still works, slower.
        #[cfg(target_os = "linux")]
        libc::madvise(data.cast(), size, libc::MADV_HUGEPAGE);
        NonNull::new(data).map(|d| (d, size))
    }
}

#[cfg(unix)]
fn unmap(data: NonNull<u8>, size: usize) {
    // SAFETY: exactly what `map` kept, and nobody refers to it any more.
    unsafe {
        libc::munmap(data.as_ptr().cast(), size);
    }
}

#[cfg(not(unix))]
fn map(bytes: usize) -> Option<(NonNull<u8>, usize)> {
    let layout = Layout::from_size_align(bytes, ALIGN).ok()?;
    // SAFETY: the size is not zero.
    NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).map(|d| (d, bytes))
}

#[cfg(not(unix))]
fn unmap(data: NonNull<u8>, size: usize) {
    // SAFETY: allocated in `map` with the same layout.
    unsafe { std::alloc::dealloc(data.as_ptr(), Layout::from_size_align_unchecked(size, ALIGN)) }
}

/// Memory the system can still give without swapping, in bytes; `None` where it does not say.
pub fn available() -> Option<u64> {
    meminfo("MemAvailable:")
}

/// Memory of the machine, in bytes; `None` where it does not say.
pub fn total() -> Option<u64> {
    meminfo("MemTotal:")
}

fn meminfo(field: &str) -> Option<u64> {
    // Both fields are among the first lines. No allocation: this answers also when memory is short.
    let mut bytes = [0u8; 1024];
    let n = std::fs::File::open("/proc/meminfo").ok()?.read(&mut bytes).ok()?;
    let text = std::str::from_utf8(&bytes[..n]).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroed_and_aligned_at_every_size() {
        for len in [0, 1, 63, 64, 4097, BIG / 4 - 1, BIG / 4, BIG + 5] {
            let mut b = Buf::<f32>::zeroed(len, "test").unwrap();
            assert_eq!(b.len(), len);
            assert!(b.iter().all(|&v| v == 0.0));
            assert_eq!(b.as_ptr() as usize % if len == 0 { 4 } else { ALIGN }, 0);
            b.iter_mut().for_each(|v| *v = 1.0);
            assert_eq!(b.view::<u16>().len(), 2 * len);
        }
    }

    #[test]
    fn refuses_what_cannot_be() {
        assert!(Buf::<f32>::zeroed(usize::MAX / 2, "huge").is_err());
        assert!(Buf::<u8>::zeroed(isize::MAX as usize, "huge").is_err());
        assert!(Buf::<u8>::zeroed(usize::MAX - 10, "huge").is_err());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn knows_free_memory() {
        assert!(available().unwrap() > 1 << 20 && total() > available());
    }
}
