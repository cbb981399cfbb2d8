//! The users that VMMs run as: one for each pod, which has it alone as long as it exists.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hull_spec::{config::UserRange, error::PodError};

/// How many hold each user that is taken.
type Taken = BTreeMap<u32, usize>;

/// The users of the node.
#[derive(Debug)]
pub(crate) struct Users {
    range: UserRange,
    taken: Arc<Mutex<Taken>>,
}

/// A user, free again when nobody holds it any more.
#[derive(Debug)]
pub(crate) struct User {
    id: u32,
    taken: Arc<Mutex<Taken>>,
}

impl Users {
    pub(crate) fn new(range: UserRange) -> Self {
        let taken = Arc::default();
        Self { range, taken }
    }

    /// A user that nobody has.
    ///
    /// # Errors
    /// [`PodError::ResourceExhausted`]
    pub(crate) fn take(&self) -> Result<User, PodError> {
        let mut taken = lock(&self.taken);
        let free = self.range.pods().find(|id| !taken.contains_key(id));
        let id = free.ok_or_else(|| PodError::ResourceExhausted {
            action: "find a user for the VMM".into(),
            reason: format!(
                "{} pods have one each, as many as are configured",
                taken.len()
            ),
        })?;
        taken.insert(id, 1);
        Ok(self.hold(id))
    }

    /// The user that a pod has by its record.
    pub(crate) fn claim(&self, id: u32) -> User {
        *lock(&self.taken).entry(id).or_default() += 1;
        self.hold(id)
    }

    fn hold(&self, id: u32) -> User {
        let taken = Arc::clone(&self.taken);
        User { id, taken }
    }
}

impl User {
    /// Its number, and that of its group.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut taken = lock(&self.taken);
        let holders = taken.get(&self.id).copied().unwrap_or_default();
        if holders > 1 {
            taken.insert(self.id, holders - 1);
        } else {
            taken.remove(&self.id);
        }
    }
}

fn lock(taken: &Mutex<Taken>) -> MutexGuard<'_, Taken> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_user_of_its_own_as_long_as_it_exists() {
        let range = UserRange::new(1000, 4).unwrap();
        let users = Users::new(range);
        // As after a restart; the first of the range is not for pods, nor is what is outside.
        let (adopted, older) = (users.claim(1002), users.claim(0));
        let again = users.claim(1002);
        let (one, two) = (users.take().unwrap(), users.take().unwrap());
        assert_eq!((one.id(), two.id()), (1001, 1003));
        let none = users.take().unwrap_err();
        assert!(matches!(none, PodError::ResourceExhausted { .. }), "{none}");
        drop((one, older, adopted));
        let one = users.take().unwrap();
        assert_eq!(one.id(), 1001);
        users.take().unwrap_err();
        drop(again);
        assert_eq!(users.take().unwrap().id(), 1002);
    }
}
