//! Memory that gives itself back: on the device, and on the host for copies that run beside it; and
//! offsets within one allocation.

use super::device::Device;
use super::params::Ptr;
use crate::error::{Error, Result, Status};
use std::ptr::NonNull;
use std::sync::Arc;

/// One allocation.
pub(super) struct Memory<D: Device> {
    device: Arc<D>,
    pub(super) at: Ptr,
}

/// An error that names both numbers unless `bytes` fit into what is free: said before anything is taken.
pub(super) fn check_room<D: Device>(device: &D, what: &str, bytes: u64) -> Result<()> {
    let free = device.free_memory()?;
    if bytes <= free {
        return Ok(());
    }
    let name = device.name();
    let text = format!("{what}: {bytes} bytes are needed, {free} are free on {name}");
    Err(Error::new(Status::E_DEVICE_NOMEM, text))
}

impl<D: Device> Memory<D> {
    /// `bytes` of zeros.
    pub(super) fn zeroed(device: &Arc<D>, bytes: u64) -> Result<Memory<D>> {
        let at = device.alloc(bytes)?;
        let memory = Memory { device: Arc::clone(device), at };
        device.zero(at, bytes)?;
        Ok(memory)
    }
}

impl<D: Device> Drop for Memory<D> {
    fn drop(&mut self) {
        self.device.free(self.at);
    }
}

/// Words of host memory that copies read or write while the host goes on (page-locked on a GPU).
pub(super) struct HostWords<D: Device> {
    device: Arc<D>,
    at: NonNull<u8>,
    count: usize,
    /// Reached when the last copy from here is done; 0: none was made.
    mark: u64,
}

// SAFETY: plain memory that only this object addresses; access goes through `&self` and `&mut self`.
unsafe impl<D: Device> Send for HostWords<D> {}
// SAFETY: as above.
unsafe impl<D: Device> Sync for HostWords<D> {}

impl<D: Device> HostWords<D> {
    /// `count` zeros.
    pub(super) fn zeroed(device: &Arc<D>, count: usize) -> Result<HostWords<D>> {
        let at = device.alloc_host(count.max(1).saturating_mul(4))?;
        let mut words = HostWords { device: Arc::clone(device), at, count, mark: 0 };
        words.words_mut()?.fill(0);
        Ok(words)
    }

    /// The words, once no copy from here is under way.
    pub(super) fn words_mut(&mut self) -> Result<&mut [u32]> {
        if self.mark != 0 {
            self.device.reached(self.mark)?;
        }
        // SAFETY: `alloc_host` gave this many bytes, aligned for words, to this object alone.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr().cast(), self.count) })
    }

    /// The words; of a copy to here, only what the device has finished.
    pub(super) fn words(&self) -> &[u32] {
        // SAFETY: as in `words_mut`.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr().cast(), self.count) }
    }

    fn bytes(&mut self, count: usize) -> &mut [u8] {
        // SAFETY: as in `words_mut`; any bytes are words.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), 4 * count.min(self.count)) }
    }

    /// Starts a copy of the first `count` words to the device.
    pub(super) fn send(&mut self, to: Ptr, count: usize) -> Result<()> {
        let device = Arc::clone(&self.device);
        device.send(to, self.bytes(count))?;
        self.mark = device.mark(self.mark)?;
        Ok(())
    }

    /// Starts a copy of `count` words from the device to here.
    pub(super) fn fetch(&mut self, from: Ptr, count: usize) -> Result<()> {
        let device = Arc::clone(&self.device);
        device.fetch(self.bytes(count), from)
    }
}

impl<D: Device> Drop for HostWords<D> {
    fn drop(&mut self) {
        if self.mark != 0 {
            self.device.unmark(self.mark);
        }
        self.device.free_host(self.at);
    }
}

/// Hands out consecutive places; run once from 0 to learn the size, then from the real address.
pub(super) struct Places {
    next: u64,
}

impl Places {
    pub(super) fn from(at: Ptr) -> Places {
        Places { next: at.0 }
    }

    /// A place of `count` elements of `size` bytes.
    pub(super) fn take(&mut self, count: usize, size: usize) -> Ptr {
        let at = self.next;
        let bytes = (count as u64).saturating_mul(size as u64);
        self.next = at.saturating_add(bytes.next_multiple_of(256));
        Ptr(at)
    }

    /// Bytes handed out, when it began at 0.
    pub(super) fn used(&self) -> u64 {
        self.next
    }
}
