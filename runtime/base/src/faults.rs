//! Points at which a test can have the daemon killed, stopped, or refused a write. A program that is
//! built without the feature `faults`, as the released one is, has nothing of it.
//!
//! A point is behind each effect that outlives the daemon: a record, a process, a change in a VM, in its
//! guest, in a namespace or a cgroup, a finished directory. To be killed there is to have done it and to
//! know nothing of it any more; to be killed before it is to be killed behind the one before. What all
//! effects of a kind go through takes the point as an argument ([`point`]), so a new one does not compile
//! without; the fault run then asks for it, and fails while it is not reached.
//!
//! ```text
//! $HULL_FAULTS            serial action point nth    what is to happen, once: written by the test
//! $HULL_FAULTS.fired      there when it did
//! $HULL_FAULTS.trace      serial point, a line for each that was reached, for the action `trace`
//! $HULL_FAULTS.clock      seconds by which the wall clock is off
//! ```
//!
//! Actions are `kill` (SIGKILL), `stop` (SIGSTOP), `enospc` and `eio` (of writes, from the nth on until the
//! file is gone) and `trace`.

use std::io;

macro_rules! points {
    ($($(#[$about:meta])* $name:ident($kind:ident) = $text:literal,)*) => {
        /// A point.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Point {
            $($(#[$about])* $name,)*
        }

        impl Point {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// What the test calls it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// What can happen there.
            #[must_use]
            pub fn kind(self) -> Kind {
                match self {
                    $(Self::$name => Kind::$kind,)*
                }
            }
        }
    };
}

/// What a point is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Behind an effect: the daemon can end there.
    Effect,
    /// Before a write: it can fail.
    Write,
}

points! {
    /// A stage of bring-up: the record is on disk, with a plan of the network.
    SandboxPlanned(Effect) = "sandbox-planned",
    /// Another: its directories and cgroup are there.
    SandboxPrepared(Effect) = "sandbox-prepared",
    /// Another: network, VMM and scratch disk are there.
    SandboxAssembled(Effect) = "sandbox-assembled",
    /// Another: the VM runs, and its agent answers.
    SandboxBooted(Effect) = "sandbox-booted",
    /// The last: it is up.
    SandboxUp(Effect) = "sandbox-up",
    /// A sandbox's record is written.
    SandboxRecorded(Effect) = "sandbox-recorded",
    /// A container's record is written.
    ContainerRecorded(Effect) = "container-recorded",
    /// A container's record is deleted.
    ContainerForgotten(Effect) = "container-forgotten",
    /// A sandbox's record is deleted, and those of its containers.
    SandboxForgotten(Effect) = "sandbox-forgotten",
    /// The store of records is open, and has its tables.
    StoreOpened(Effect) = "store-opened",
    /// A pod's directories are made.
    DirectoriesMade(Effect) = "directories-made",
    /// A pod's directories are removed.
    DirectoriesRemoved(Effect) = "directories-removed",
    /// A pod's cgroup is made.
    CgroupMade(Effect) = "cgroup-made",
    /// A pod's cgroup is removed.
    CgroupRemoved(Effect) = "cgroup-removed",
    /// A pod's scratch disk is made.
    ScratchMade(Effect) = "scratch-made",
    /// A pod's network namespace is made.
    NetnsMade(Effect) = "netns-made",
    /// A CNI plugin has answered.
    PluginRan(Effect) = "plugin-ran",
    /// How far CNI came is on disk.
    CniKept(Effect) = "cni-kept",
    /// The pod's interface leads to a tap.
    TapJoined(Effect) = "tap-joined",
    /// A pod's network namespace is removed.
    NetnsRemoved(Effect) = "netns-removed",
    /// A process of a pod runs, and nobody has written who it is.
    ProcessStarted(Effect) = "process-started",
    /// Who the process is, is written.
    ProcessNoted(Effect) = "process-noted",
    /// A process of a pod was killed, because it did not end by itself.
    ProcessKilled(Effect) = "process-killed",
    /// The VMM has its configuration.
    VmConfigured(Effect) = "vm-configured",
    /// The VM runs.
    VmStarted(Effect) = "vm-started",
    /// The VM has a device more.
    VmAttached(Effect) = "vm-attached",
    /// A VMM was told how much memory its guest may have.
    VmPlugged(Effect) = "vm-plugged",
    /// The VM has a device less.
    VmDetached(Effect) = "vm-detached",
    /// The VM stands still.
    VmPaused(Effect) = "vm-paused",
    /// The VM that stands still is written to files.
    VmSaved(Effect) = "vm-saved",
    /// The VM goes on.
    VmResumed(Effect) = "vm-resumed",
    /// The VMM was told to end.
    VmStopped(Effect) = "vm-stopped",
    /// The VMM was asked something that changes nothing.
    VmAsked(Effect) = "vm-asked",
    /// The agent was greeted.
    AgentGreeted(Effect) = "agent-greeted",
    /// The guest knows its pod.
    GuestConfigured(Effect) = "guest-configured",
    /// The guest has mounted a disk.
    StorageMounted(Effect) = "storage-mounted",
    /// The guest has unmounted a disk.
    StorageUnmounted(Effect) = "storage-unmounted",
    /// The guest has a container.
    GuestCreated(Effect) = "guest-created",
    /// A container's first process runs.
    GuestStarted(Effect) = "guest-started",
    /// A container was signalled.
    GuestSignalled(Effect) = "guest-signalled",
    /// The guest has removed a container.
    GuestDeleted(Effect) = "guest-deleted",
    /// A command runs in a container.
    GuestExecuted(Effect) = "guest-executed",
    /// The guest's events are followed.
    GuestFollowed(Effect) = "guest-followed",
    /// The guest powers off.
    GuestShutDown(Effect) = "guest-shut-down",
    /// The guest's containers stand still.
    GuestFrozen(Effect) = "guest-frozen",
    /// They go on.
    GuestThawed(Effect) = "guest-thawed",
    /// The guest has other limits, links, routes or copies of volumes than before.
    GuestChanged(Effect) = "guest-changed",
    /// The file server has shared paths of the host.
    PathsShared(Effect) = "paths-shared",
    /// The file server has ended shares of a container.
    PathsUnshared(Effect) = "paths-unshared",
    /// A log has lines that are not noted.
    LogWritten(Effect) = "log-written",
    /// The note says how far the log is.
    LogNoted(Effect) = "log-noted",
    /// A checkpoint has its files, aside.
    CheckpointSaved(Effect) = "checkpoint-saved",
    /// A checkpoint is at its place.
    CheckpointKept(Effect) = "checkpoint-kept",
    /// A layer, or an image's disk, is at its place.
    ImageKept(Effect) = "image-kept",
    /// The records of images are changed.
    ImageRecorded(Effect) = "image-recorded",
    /// What no image needs is gone.
    ImageCollected(Effect) = "image-collected",

    /// The store of records is written.
    StoreWrite(Write) = "store-write",
    /// The store of records is synced.
    StoreSync(Write) = "store-sync",
    /// A copy of a record is written.
    CopyWrite(Write) = "copy-write",
    /// The records of images are written.
    ImagesWrite(Write) = "images-write",
    /// The records of images are synced.
    ImagesSync(Write) = "images-sync",
    /// A file of a layer is made, or synced.
    LayerWrite(Write) = "layer-write",
    /// An image's disk is made.
    DiskWrite(Write) = "disk-write",
    /// An image's disk, or a layer, is moved to its place.
    ImageWrite(Write) = "image-write",
    /// A log is opened, or made.
    LogOpen(Write) = "log-open",
    /// A log is appended to.
    LogWrite(Write) = "log-write",
    /// How far a log is, is noted.
    NoteWrite(Write) = "note-write",
    /// Who a process is, is noted.
    ProcessWrite(Write) = "process-write",
    /// How far CNI came is written.
    CniWrite(Write) = "cni-write",
    /// A checkpoint is completed.
    CheckpointWrite(Write) = "checkpoint-write",
    /// A scratch disk is written.
    ScratchWrite(Write) = "scratch-write",
}

/// Has reached a point behind an effect.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn point(_: Point) {}

/// Is about to write.
///
/// # Errors
/// Those that a test asks for.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn write(_: Point) -> io::Result<()> {
    Ok(())
}

/// Has reached a point behind an effect.
#[cfg(feature = "faults")]
pub fn point(point: Point) {
    // Only a write fails.
    let _ = armed::reach(point);
}

/// Is about to write.
///
/// # Errors
/// Those that a test asks for.
#[cfg(feature = "faults")]
pub fn write(point: Point) -> io::Result<()> {
    armed::reach(point)
}

/// How far a test has set the wall clock, nanoseconds.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub(crate) fn clock_ns() -> i64 {
    0
}

/// How far a test has set the wall clock, nanoseconds.
#[cfg(feature = "faults")]
pub(crate) fn clock_ns() -> i64 {
    armed::clock_ns()
}

#[cfg(feature = "faults")]
mod armed {
    use std::{
        env,
        ffi::OsString,
        fs::{self, OpenOptions},
        io::{self, Write},
        path::PathBuf,
        sync::{Mutex, OnceLock, PoisonError},
        thread,
        time::Duration,
    };

    use rustix::{
        io::Errno,
        process::{Signal, getpid, kill_process},
    };

    use super::Point;

    /// What is armed, and how often its point was reached.
    static REACHED: Mutex<(String, u32)> = Mutex::new((String::new(), 0));

    fn file(suffix: &str) -> Option<PathBuf> {
        static FILE: OnceLock<Option<OsString>> = OnceLock::new();
        let mut path = FILE.get_or_init(|| env::var_os("HULL_FAULTS")).clone()?;
        path.push(suffix);
        Some(path.into())
    }

    pub(super) fn clock_ns() -> i64 {
        let text = file(".clock").and_then(|path| fs::read_to_string(path).ok());
        let seconds: i64 = text.and_then(|text| text.parse().ok()).unwrap_or(0);
        seconds.saturating_mul(1_000_000_000)
    }

    pub(super) fn reach(point: Point) -> io::Result<()> {
        let Some(path) = file("") else { return Ok(()) };
        let mut reached = REACHED.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(armed) = fs::read_to_string(&path) else {
            return Ok(());
        };
        let words: Vec<&str> = armed.split_ascii_whitespace().collect();
        let [serial, action, name, nth] = words[..] else {
            return Ok(());
        };
        if action == "trace" {
            let trace = file(".trace").unwrap_or_default();
            let mut trace = OpenOptions::new().append(true).create(true).open(trace)?;
            return writeln!(trace, "{serial} {}", point.name());
        }
        if name != point.name() {
            return Ok(());
        }
        if reached.0 != armed {
            *reached = (armed.clone(), 0);
        }
        reached.1 += 1;
        if reached.1 < nth.parse().unwrap_or(1) {
            return Ok(());
        }
        fs::write(file(".fired").unwrap_or_default(), serial)?;
        let end = |signal| -> io::Result<()> {
            fs::remove_file(&path)?;
            kill_process(getpid(), signal)?;
            Ok(())
        };
        match action {
            "kill" => {
                end(Signal::KILL)?;
                loop {
                    thread::sleep(Duration::from_secs(1));
                }
            }
            "stop" => {
                end(Signal::STOP)?;
                // A moment passes before a process stops that has signalled itself.
                thread::sleep(Duration::from_millis(20));
                Ok(())
            }
            "enospc" => Err(Errno::NOSPC.into()),
            _ => Err(Errno::IO.into()),
        }
    }
}
