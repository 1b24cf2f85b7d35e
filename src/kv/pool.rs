//! The page allocator: a free list and a count per page. A page is free, or held as many times
//! as its count says (more than once when sequences will share a prefix).

use crate::error::{Result, try_vec, try_with_capacity};

/// All pages of one engine.
#[derive(Debug)]
pub struct PagePool {
    /// Free pages; the last one is handed out next, so recently used memory stays warm.
    free: Vec<u32>,
    counts: Vec<u16>,
    /// For [`PagePool::check`], so that checking after each step of a debug build allocates nothing.
    seen: Vec<u16>,
}

impl PagePool {
    /// `pages` free pages, numbered from 0.
    pub fn new(pages: usize) -> Result<PagePool> {
        let counts = try_vec(pages, 0u16, "page counts")?;
        let mut free = try_with_capacity(pages, "free pages")?;
        free.extend((0..pages as u32).rev());
        let seen = try_vec(pages, 0u16, "page counts")?;
        Ok(PagePool { free, counts, seen })
    }

    /// Pages in all.
    pub fn total(&self) -> usize {
        self.counts.len()
    }

    /// Pages nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes a free page.
    pub fn take(&mut self) -> Option<u32> {
        let page = self.free.pop()?;
        self.counts[page as usize] = 1;
        Some(page)
    }

    /// Gives a held page back.
    pub fn release(&mut self, page: u32) {
        let count = &mut self.counts[page as usize];
        debug_assert!(*count > 0, "page {page} released while free");
        *count -= 1;
        if *count == 0 {
            self.free.push(page);
        }
    }

    /// Checks that each page is either free or held, and that `held` (every block table of the
    /// engine, one after the other) accounts for every holder. For tests and debug builds.
    pub fn check<'a>(&mut self, held: impl Iterator<Item = &'a u32>) -> std::result::Result<(), String> {
        let seen = &mut self.seen;
        seen.fill(0);
        for &page in held {
            seen[page as usize] += 1;
        }
        if *seen != self.counts {
            let page = seen.iter().zip(&self.counts).position(|(a, b)| a != b).unwrap_or(0);
            return Err(format!("page {page}: {} holders, count {}", seen[page], self.counts[page]));
        }
        let zero = self.counts.iter().filter(|&&c| c == 0).count();
        if zero != self.free.len() {
            return Err(format!("{zero} pages unheld, {} in the free list", self.free.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back() {
        let mut pool = PagePool::new(3).unwrap();
        let held: Vec<u32> = (0..3).map(|_| pool.take().unwrap()).collect();
        assert_eq!(held, [0, 1, 2]);
        assert_eq!(pool.take(), None);
        pool.check(held.iter()).unwrap();
        pool.release(1);
        assert_eq!(pool.free(), 1);
        pool.check([0, 2].iter()).unwrap();
        assert!(pool.check([0, 1, 2].iter()).is_err());
        assert_eq!(pool.take(), Some(1));
    }
}
