//! Who has which shares.
//!
//! What an owner wants that another already has is not mounted once more. So an owner's shares stay,
//! when it ends, for as long as others use them.

use std::collections::{BTreeMap, BTreeSet};

/// Owners and their shares, of which `S` tells when two are the same.
#[derive(Debug)]
pub struct Owners<S>(BTreeMap<String, Owner<S>>);

#[derive(Debug)]
struct Owner<S> {
    /// The shares that are mounted for the owner, in order.
    shares: Vec<S>,
    /// Other owners whose shares it uses.
    uses: BTreeSet<String>,
    has_ended: bool,
}

impl<S> Default for Owners<S> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<S> Owners<S> {
    /// The owners that have not ended.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let present = self.0.iter().filter(|(_, owner)| !owner.has_ended);
        present.map(|(name, _)| name.as_str())
    }

    /// Whether an owner of this name has shares here, ended or not.
    #[must_use]
    pub fn knows(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The owner of a share that is wanted, and the share.
    #[must_use]
    pub fn find(&self, is_wanted: impl Fn(&S) -> bool) -> Option<(&str, &S)> {
        self.0.iter().find_map(|(name, owner)| {
            let share = owner.shares.iter().find(|share| is_wanted(share))?;
            Some((name.as_str(), share))
        })
    }

    /// All owners, also those that have ended: their names, shares, whose shares they use, and whether they have.
    pub fn all(&self) -> impl Iterator<Item = (&str, &[S], &BTreeSet<String>, bool)> {
        let owners = self.0.iter();
        owners.map(|(name, owner)| (&**name, &*owner.shares, &owner.uses, owner.has_ended))
    }

    /// All shares that are mounted.
    pub fn shares(&self) -> impl Iterator<Item = &S> {
        self.0.values().flat_map(|owner| &owner.shares)
    }

    /// Notes a new owner.
    pub fn add(&mut self, name: String, shares: Vec<S>, uses: BTreeSet<String>) {
        let has_ended = false;
        self.0.insert(
            name,
            Owner {
                shares,
                uses,
                has_ended,
            },
        );
    }

    /// Notes that an owner has ended. Unknown owners are ignored.
    pub fn end(&mut self, name: &str) {
        if let Some(owner) = self.0.get_mut(name) {
            owner.uses.clear();
            owner.has_ended = true;
        }
    }

    /// An owner that has ended and whose shares nobody uses, with them.
    #[must_use]
    pub fn unused(&self) -> Option<(String, &[S])> {
        let is_used = |name: &str| self.0.values().any(|owner| owner.uses.contains(name));
        let mut ended = self.0.iter().filter(|(_, owner)| owner.has_ended);
        let (name, owner) = ended.find(|(name, _)| !is_used(name))?;
        Some((name.clone(), &owner.shares))
    }

    /// Forgets an owner.
    pub fn forget(&mut self, name: &str) {
        self.0.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uses(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// Forgets what can be; returns what that was.
    fn collect(owners: &mut Owners<char>) -> Vec<String> {
        let mut gone = Vec::new();
        while let Some((name, _)) = owners.unused() {
            owners.forget(&name);
            gone.push(name);
        }
        gone
    }

    #[test]
    fn shares_outlive_their_owner_while_others_use_them() {
        let mut owners = Owners::default();
        owners.add("a".into(), vec!['x', 'y'], uses(&[]));
        assert_eq!(owners.find(|share| *share == 'y'), Some(("a", &'y')));
        owners.add("b".into(), vec!['z'], uses(&["a"]));
        owners.add("c".into(), vec![], uses(&["a", "b"]));
        assert_eq!(owners.unused(), None);
        owners.end("a");
        assert_eq!(owners.names().collect::<Vec<_>>(), ["b", "c"]);
        assert!(owners.knows("a"));
        // Still there for the next one.
        assert_eq!(owners.find(|share| *share == 'x'), Some(("a", &'x')));
        assert_eq!(collect(&mut owners), [""; 0]);
        owners.end("b");
        assert_eq!(collect(&mut owners), [""; 0], "used by c, both");
        owners.end("c");
        assert_eq!(collect(&mut owners), ["a", "b", "c"]);
        assert_eq!(owners.find(|share| *share == 'x'), None);
    }

    #[test]
    fn an_owner_may_end_twice_or_be_unknown() {
        let mut owners = Owners::default();
        owners.add("a".into(), vec!['x'], uses(&[]));
        owners.end("a");
        owners.end("a");
        owners.end("nobody");
        assert_eq!(owners.unused(), Some(("a".into(), &['x'][..])));
        assert_eq!(collect(&mut owners), ["a"]);
        assert!(!owners.knows("a"));
    }
}
