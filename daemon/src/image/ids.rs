//! Whose ids the files of a container have: those of the node, as a user namespace has them.

use crate::pod::config::IdMapping;

/// The ranges of a user namespace.
#[derive(Clone, Debug, Default)]
pub struct Ids {
    /// Users; empty: as they are.
    pub uids: Vec<IdMapping>,
    /// Groups; empty: as they are.
    pub gids: Vec<IdMapping>,
}

impl Ids {
    /// A user as the namespace has it, if it has a name for it.
    pub(super) fn user(&self, id: u32) -> Option<u32> {
        inside(&self.uids, id)
    }

    /// The same for a group.
    pub(super) fn group(&self, id: u32) -> Option<u32> {
        inside(&self.gids, id)
    }
}

fn inside(ranges: &[IdMapping], id: u32) -> Option<u32> {
    if ranges.is_empty() {
        return Some(id);
    }
    ranges.iter().find_map(|range| {
        let offset = id.checked_sub(range.host_id)?;
        (offset < range.length).then(|| range.container_id + offset)
    })
}
