//! The pages of one sequence, in token order.

use super::{PAGE_TOKENS, PagePool, pages_for};
use crate::error::{Result, try_with_capacity};

/// A sequence's pages: token `t` lives in page `pages()[t / PAGE_TOKENS]`.
#[derive(Debug, Default)]
pub struct BlockTable {
    pages: Vec<u32>,
}

impl BlockTable {
    /// An empty table with room for `max_tokens` tokens, so that growing allocates nothing.
    pub fn with_room(max_tokens: usize) -> Result<BlockTable> {
        Ok(BlockTable { pages: try_with_capacity(pages_for(max_tokens), "block table")? })
    }

    /// Page numbers.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Tokens the pages can hold.
    pub fn room(&self) -> usize {
        self.pages.len() * PAGE_TOKENS
    }

    /// Grows to hold `tokens`; takes nothing and answers false when the pool has too few pages.
    pub fn grow(&mut self, tokens: usize, pool: &mut PagePool) -> bool {
        let missing = pages_for(tokens).saturating_sub(self.pages.len());
        if missing > pool.free() {
            return false;
        }
        for _ in 0..missing {
            match pool.take() {
                Some(page) => self.pages.push(page),
                None => return false,
            }
        }
        true
    }

    /// Gives back the pages behind the first `tokens` tokens.
    pub fn shrink(&mut self, tokens: usize, pool: &mut PagePool) {
        while self.pages.len() > pages_for(tokens) {
            if let Some(page) = self.pages.pop() {
                pool.release(page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grow_takes_all_or_nothing() {
        let mut pool = PagePool::new(3).unwrap();
        let mut table = BlockTable::with_room(64).unwrap();
        assert!(table.grow(17, &mut pool));
        assert_eq!(table.pages().len(), 2);
        assert!(!table.grow(49, &mut pool));
        assert_eq!((table.pages().len(), pool.free()), (2, 1));
        assert!(table.grow(48, &mut pool));
        table.shrink(16, &mut pool);
        assert_eq!((table.pages().len(), pool.free()), (1, 2));
        table.shrink(0, &mut pool);
        assert_eq!(pool.free(), 3);
    }
}
