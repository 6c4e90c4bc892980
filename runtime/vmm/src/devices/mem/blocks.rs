//! Which blocks are plugged.

use std::ops::Range;

/// A bit for each block of the usable region.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    is_plugged: Vec<bool>,
    plugged: usize,
}

impl Blocks {
    /// Adds blocks, unplugged, up to `count` in all.
    pub(super) fn grow(&mut self, count: usize) {
        if count > self.is_plugged.len() {
            self.is_plugged.resize(count, false);
        }
    }

    /// How many are plugged.
    pub(super) fn plugged(&self) -> usize {
        self.plugged
    }

    /// How many of a range are.
    pub(super) fn count(&self, range: &Range<usize>) -> usize {
        let blocks = self.is_plugged.get(range.clone()).unwrap_or_default();
        blocks.iter().filter(|is_plugged| **is_plugged).count()
    }

    /// Plugs or unplugs a range, which is not so yet.
    pub(super) fn set(&mut self, range: Range<usize>, is_plugged: bool) {
        let changed = range.len();
        if let Some(blocks) = self.is_plugged.get_mut(range) {
            blocks.fill(is_plugged);
            self.plugged = match is_plugged {
                true => self.plugged.saturating_add(changed),
                false => self.plugged.saturating_sub(changed),
            };
        }
    }

    /// Unplugs all.
    pub(super) fn clear(&mut self) {
        self.is_plugged.fill(false);
        self.plugged = 0;
    }
}
