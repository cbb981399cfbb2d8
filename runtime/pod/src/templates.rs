//! Templates: guests that were booted once and belong to nobody yet, for VMs of pods to go on from.
//!
//! ```text
//! first pod of a class ──▶ making ──▶ ready ──▶ later pods are clones
//!   it boots, and so do       ▲ │       │
//!   those that come meanwhile │ └───────┴─▶ failed: the class boots for some minutes
//!                             └─────────────────┘
//! ```
//!
//! A class is what clones must have in common: VMM, kernel, guest root, AppArmor, vCPUs, memory, and who may share.
//! Each is told by what the file system says of the file, so that an update is another class. What else
//! must fit, the VMM's build and the processor, the VMM refuses by itself.
//!
//! A template is made in a VM of its own, which nothing of a pod ever gets to, and is two sealed files in
//! memory: they are there once for all clones, and gone with the daemon. Its agent has told its version,
//! and has done nothing else.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    ops::Range,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use hull_base::{blocking, metrics};
use hull_spec::{config::PodsConfig, id::PodId, info::TemplateCounts, size::VmSize};
use hull_vm::pagemap::private_pages;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use tokio::time::Instant;

/// Templates that are kept; each has the memory of its guest that is not zeros, some 40 MiB.
const KEPT: usize = 4;
/// How long a class boots whose template failed. A host that was busy is worth another try; what is
/// wrong with the class costs a boot in so much time.
const AFTER_FAILURE: Duration = Duration::from_secs(600);

/// The most that clones copy at once, in bytes: some MiB are usual. More in more parts than a message has room for
/// is not kept.
const MAX_WRITTEN: u64 = 16 << 20;
const MAX_PARTS: usize = 4096;

/// A template.
#[derive(Debug)]
pub(crate) struct Template {
    /// The class.
    pub label: String,
    /// What its VMM wrote.
    state: OwnedFd,
    memory: OwnedFd,
    /// What its first clone has written of the memory until it was configured, and others will too.
    written: OnceLock<Vec<Range<u64>>>,
}

impl Template {
    /// A template whose files are to be written yet.
    ///
    /// # Errors
    /// When the host has no memory for them.
    pub(crate) fn new(label: &str) -> io::Result<Self> {
        let file = |name| memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
        Ok(Self {
            label: label.to_owned(),
            state: file("template-state")?,
            memory: file("template-memory")?,
            written: OnceLock::new(),
        })
    }

    /// From here on nobody can change it.
    ///
    /// # Errors
    /// When somebody has its files mapped to write to them.
    pub(crate) fn seal(&self) -> io::Result<()> {
        let all = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        fcntl_add_seals(&self.state, all)?;
        Ok(fcntl_add_seals(&self.memory, all)?)
    }

    /// Returns the files for a VMM: state, memory.
    ///
    /// # Errors
    /// When the daemon has no more descriptors.
    pub(crate) fn files(&self) -> io::Result<[OwnedFd; 2]> {
        Ok([self.state.try_clone()?, self.memory.try_clone()?])
    }

    /// Returns what a clone is going to write of the memory, as far as that is known.
    pub(crate) fn written(&self) -> Vec<Range<u64>> {
        self.written.get().cloned().unwrap_or_default()
    }

    /// Looks at what the first clone, whose VMM is `pid`, has written. No program of a tenant has run in it.
    pub(crate) async fn learn(self: &Arc<Self>, pid: u32) {
        if self.written.get().is_some() {
            return;
        }
        let template = Arc::clone(self);
        let found = blocking(move || {
            let memory = File::from(template.memory.try_clone()?).metadata()?;
            private_pages(pid, &memory)
        });
        match found.await {
            Ok(parts) => {
                let bytes: u64 = parts.iter().map(|part| part.end - part.start).sum();
                tracing::debug!(bytes, "what clones write is known");
                if bytes <= MAX_WRITTEN && parts.len() <= MAX_PARTS {
                    let _ = self.written.set(parts);
                }
            }
            Err(error) => tracing::debug!(%error, "what clones write can't be looked at"),
        }
    }
}

/// Why a VM boots and is no clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cold {
    /// It is the first of its class.
    First,
    /// The template is being made.
    Making,
    /// It could not be made, or a clone of it did not come up.
    Failed,
    /// A file of the class can't be looked at.
    Class,
    /// The VMM refused the template, or a device for the clone.
    Refused,
    /// The clone ended, refused to wake or said something that is wrong.
    Lost,
    /// The clone took too long.
    Late,
}

impl Cold {
    fn name(self) -> &'static str {
        match self {
            Self::First => "no template yet",
            Self::Making => "template is being made",
            Self::Failed => "template failed before",
            Self::Class => "class is not known",
            Self::Refused => "VMM refused the template",
            Self::Lost => "clone failed",
            Self::Late => "clone took too long",
        }
    }
}

/// What there is of a class.
#[derive(Debug)]
enum State {
    Making,
    Ready(Arc<Template>),
    /// Since when.
    Failed(Instant),
}

impl State {
    /// Whether a template is to be made.
    fn is_over(&self) -> bool {
        matches!(self, Self::Failed(since) if since.elapsed() >= AFTER_FAILURE)
    }
}

/// The templates of the node.
#[derive(Debug, Default)]
pub(crate) struct Templates(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// By label, the one that was used last at the end.
    kept: Vec<(String, State)>,
    clones: u64,
    cold: BTreeMap<Cold, u64>,
}

impl Templates {
    /// What was counted since the daemon started.
    pub(crate) fn counts(&self) -> TemplateCounts {
        let inner = self.inner();
        let is_ready = |(_, state): &&(String, State)| matches!(state, State::Ready(_));
        TemplateCounts {
            ready: inner.kept.iter().filter(is_ready).count(),
            clones: inner.clones,
            cold: inner.cold.iter().map(|(why, n)| (why.name(), *n)).collect(),
        }
    }

    /// Counts a VM that is a clone.
    pub(crate) fn cloned(&self) {
        self.inner().clones += 1;
    }

    /// Counts a VM that boots, and says why.
    pub(crate) fn boots(&self, pod: &PodId, why: Cold, details: &str) {
        let reason = why.name();
        match why {
            Cold::First | Cold::Making => {
                tracing::info!(%pod, reason, "the VM boots, it is no clone");
            }
            _ => tracing::warn!(%pod, reason, details, "the VM boots, it is no clone"),
        }
        metrics::COLD.count(&[reason]);
        *self.inner().cold.entry(why).or_default() += 1;
    }

    /// Finds the template of a class, and puts the class last.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn find(&self, label: &str) -> Result<Arc<Template>, Cold> {
        let mut inner = self.inner();
        let Some(at) = inner.kept.iter().position(|(kept, _)| kept == label) else {
            return Err(Cold::First);
        };
        inner.kept[at..].rotate_left(1);
        match inner.kept.last() {
            Some((_, State::Ready(template))) => Ok(Arc::clone(template)),
            Some((_, State::Failed(_))) => Err(Cold::Failed),
            _ => Err(Cold::Making),
        }
    }

    /// Whether the caller is to make the template of this class, which it then has to tell of
    /// ([`Self::made`]).
    pub(crate) fn claim(&self, label: &str) -> bool {
        let mut inner = self.inner();
        if inner
            .kept
            .iter()
            .any(|(kept, state)| kept == label && !state.is_over())
        {
            return false;
        }
        inner.kept.retain(|(kept, _)| kept != label);
        if inner.kept.len() == KEPT {
            inner.kept.remove(0);
        }
        inner.kept.push((label.to_owned(), State::Making));
        true
    }

    /// Tells what became of a template that was to be made; none: it failed.
    pub(crate) fn made(&self, label: &str, template: Option<Template>) {
        let state = match template {
            Some(template) => State::Ready(Arc::new(template)),
            None => State::Failed(Instant::now()),
        };
        self.set(label, state);
    }

    /// Has VMs of this template's class boot for a while.
    pub(crate) fn discard(&self, template: &Template) {
        self.set(&template.label, State::Failed(Instant::now()));
    }

    /// A class that was dropped meanwhile stays so.
    fn set(&self, label: &str, state: State) {
        let mut inner = self.inner();
        if let Some((_, kept)) = inner.kept.iter_mut().find(|(kept, _)| kept == label) {
            *kept = state;
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the name of a class.
///
/// # Errors
/// When a file is not there.
pub(crate) fn label(config: &PodsConfig, scope: &str, size: VmSize) -> io::Result<String> {
    let mut label = format!("{} vCPUs, {} MiB", size.vcpus, size.memory_mib);
    for (what, path) in [
        ("vmm", &config.vmm),
        ("kernel", &config.kernel),
        ("root", &config.guest_root),
    ] {
        let file = path.metadata()?;
        let version = (file.dev(), file.ino(), file.size(), file.mtime_nsec());
        let (device, inode, size, nanos) = version;
        let seconds = file.mtime();
        label += &format!(", {what} {device:x}.{inode:x}.{size:x}.{seconds:x}.{nanos:x}");
    }
    if config.apparmor.is_some() {
        label += ", AppArmor";
    }
    if !scope.is_empty() {
        label += &format!(", {scope}");
    }
    Ok(label)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn template(label: &str) -> Option<Template> {
        Some(Template::new(label).unwrap())
    }

    #[test]
    fn a_class_is_made_once_and_few_are_kept() {
        let templates = Templates::default();
        assert_eq!(templates.find("a").unwrap_err(), Cold::First);
        assert!(templates.claim("a") && !templates.claim("a"));
        assert_eq!(templates.find("a").unwrap_err(), Cold::Making);
        templates.made("a", template("a"));
        assert!(!templates.claim("a"));
        for label in ["b", "c", "d"] {
            assert!(templates.claim(label));
        }
        assert_eq!(templates.counts().ready, 1);
        // The one that was used longest ago goes: not this one, it is used now.
        templates.find("a").unwrap();
        assert!(templates.claim("e"));
        templates.find("a").unwrap();
        assert_eq!(templates.find("b").unwrap_err(), Cold::First);
        // What was made for a class that is gone is dropped.
        templates.made("b", template("b"));
        assert_eq!(templates.counts().ready, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_class_whose_template_failed_boots_for_a_while() {
        let templates = Templates::default();
        assert!(templates.claim("a"));
        templates.made("a", template("a"));
        let lost = templates.find("a").unwrap();
        templates.discard(&lost);
        for _ in 0..2 {
            assert_eq!(templates.find("a").unwrap_err(), Cold::Failed);
            tokio::time::advance(AFTER_FAILURE / 2).await;
            assert!(!templates.claim("a"));
            tokio::time::advance(AFTER_FAILURE / 2).await;
            assert!(templates.claim("a") && !templates.claim("a"));
            assert_eq!(templates.find("a").unwrap_err(), Cold::Making);
            templates.made("a", None);
        }
    }

    #[test]
    fn what_changes_a_guest_changes_its_class() {
        let dir = tempfile::tempdir().unwrap();
        let config = PodsConfig::new(dir.path(), dir.path(), dir.path());
        let size = VmSize {
            vcpus: 1,
            memory_mib: 256,
            ..VmSize::UNKNOWN
        };
        assert!(label(&config, "", size).is_err(), "no files");
        for file in [&config.vmm, &config.kernel, &config.guest_root] {
            std::fs::write(file, "1").unwrap();
        }
        let mut labels = vec![
            label(&config, "", size).unwrap(),
            label(&config, "team-a", size).unwrap(),
            label(&config, "", VmSize { vcpus: 2, ..size }).unwrap(),
        ];
        assert_eq!(label(&config, "", size).unwrap(), labels[0]);
        let confined = PodsConfig {
            apparmor: Some(dir.path().into()),
            ..config.clone()
        };
        labels.push(label(&confined, "", size).unwrap());
        let longest = label(&confined, &"n".repeat(63), VmSize::UNKNOWN).unwrap();
        assert!(longest.len() <= hull_proto_vmm::MAX_LABEL, "{longest}");
        for file in [&config.vmm, &config.kernel, &config.guest_root] {
            let new = file.with_extension("new");
            std::fs::write(&new, "1").unwrap();
            std::fs::rename(new, file).unwrap();
            labels.push(label(&config, "", size).unwrap());
        }
        let count = labels.len();
        labels.sort();
        labels.dedup();
        assert_eq!(labels.len(), count);
    }

    #[test]
    fn a_sealed_template_does_not_change() {
        let template = Template::new("x").unwrap();
        template.seal().unwrap();
        for file in template.files().unwrap().map(File::from) {
            assert!(file.write_at(b"x", 0).is_err());
            assert!(file.set_len(1).is_err());
        }
    }
}
