//! Device memory that gives itself back, and offsets within one allocation.

use super::device::Device;
use super::params::Ptr;
use crate::error::{Error, Result, Status};
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
