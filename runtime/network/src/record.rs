//! What is known of a pod's network from its set-up to its tear-down.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{cni, guest::GuestNetwork, link::MAX_LINKS};

/// What tear-down needs to know; the caller keeps it for the life of the pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// The sandbox id (CNI_CONTAINERID).
    pub pod_id: String,
    /// The namespace's file.
    pub netns: PathBuf,
    /// The pod's addresses, the primary one first; empty before set-up.
    pub ips: Vec<IpAddr>,
    /// How many interfaces it had at set-up; 0 before.
    #[serde(default)]
    pub links: u8,
    /// The interfaces that lead into the guest, by the numbers of their taps; empty before set-up, and
    /// in records that do not tell.
    #[serde(default)]
    pub(crate) joined: BTreeMap<u8, String>,
    /// How many queues its taps have, where they can; 0, in records that do not tell: one.
    #[serde(default)]
    pub(crate) queues: u8,
    /// How CNI was called.
    pub(crate) attachment: cni::Attachment,
}

impl NetworkRecord {
    /// The numbers of its taps.
    #[must_use]
    pub fn numbers(&self) -> Vec<u8> {
        if self.joined.is_empty() {
            (0..self.links).collect()
        } else {
            self.joined.keys().copied().collect()
        }
    }

    /// Notes the interfaces that lead into the guest from the start, the pod's own first.
    pub fn join_first(&mut self, names: impl IntoIterator<Item = String>) {
        self.joined = (0..).zip(names).collect();
        // MAX_LINKS is far below.
        self.links = u8::try_from(self.joined.len()).unwrap_or(u8::MAX);
    }

    /// Notes that an interface leads into the guest from now on; returns its number. None: no number
    /// is free, or the record does not tell which are.
    pub fn join(&mut self, name: &str) -> Option<u8> {
        if self.joined.is_empty() {
            return None;
        }
        let mut numbers = (1..).take(MAX_LINKS - 1);
        let number = numbers.find(|number| !self.joined.contains_key(number))?;
        self.joined.insert(number, name.to_owned());
        Some(number)
    }

    /// Notes that one does not any more.
    pub fn part(&mut self, number: u8) {
        self.joined.remove(&number);
    }

    /// The numbers of interfaces that are gone.
    #[must_use]
    pub fn gone(&self, now: &GuestNetwork) -> Vec<u8> {
        let joined = self.joined.iter();
        let gone = joined.filter(|(_, name)| now.missing.contains(name));
        let numbers = gone.map(|(number, _)| *number);
        // Without the pod's own there is no network.
        numbers.filter(|number| *number > 0).collect()
    }
}
