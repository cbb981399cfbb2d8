//! What the guest calls containers: by their own ids, but for those that it had before it was this pod's, in a
//! checkpoint. All that is said to the agent, or by it, goes through here.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Names of containers. Clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Names(Arc<Mutex<HashMap<String, String>>>);

impl Names {
    /// Notes that the guest calls a container otherwise.
    pub(crate) fn note(&self, container: &str, guest: &str) {
        self.names().insert(container.to_owned(), guest.to_owned());
    }

    /// What the guest calls a container, to tell it.
    pub(crate) fn tell(&self, container: &str) -> String {
        let names = self.names();
        names
            .get(container)
            .map_or(container, String::as_str)
            .to_owned()
    }

    /// Makes the container's id of what the guest was heard to call it.
    pub(crate) fn hear(&self, guest: &mut String) {
        let names = self.names();
        if let Some((container, _)) = names.iter().find(|(_, name)| *name == guest) {
            container.clone_into(guest);
        }
    }

    fn names(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_have_their_own_names_but_for_those_that_were_noted() {
        let names = Names::default();
        names.note("new", "old");
        assert_eq!(names.tell("new"), "old");
        assert_eq!(names.clone().tell("other"), "other");
        for (guest, container) in [("old", "new"), ("other", "other")] {
            let mut name = guest.to_owned();
            names.hear(&mut name);
            assert_eq!(name, container);
        }
    }
}
