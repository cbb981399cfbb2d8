//! The life of a sandbox.
//!
//! ```text
//!            BringUpDone              Stop                StopDone             Remove
//! Starting ──────────────▶ Ready ──────────────▶ Stopping ────────▶ Stopped ─────────▶ Removing
//!    │                      │ VmGone               ▲   │ StopFailed   ▲                │   │
//!    │ BringUpFailed        ▼        Stop          │   ▼              └────────────────┘   │
//!    │ (all undone)       Broken ──────────────────┘  Broken            RemoveFailed        │
//!    ▼                      ▲                                                       RemoveDone
//!  Gone                     └── BringUpFailed (something is left)                           ▼
//!                                                                                         Gone
//! ```
//!
//! `Broken` is a sandbox whose VM is gone while its network (or more) is still there: it is
//! reported as not ready, and `Stop` finishes the tear-down. `Remove` in any state but `Stopped`
//! stops first. A daemon that starts finds `Starting`, `Stopping` and `Removing` sandboxes of the
//! one before as `Broken`.

use serde::{Deserialize, Serialize};

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// Its parts are being made.
    Starting,
    /// VM and agent are up.
    Ready,
    /// The VM is gone, other parts may be left.
    Broken,
    /// Containers, VM and network are being ended; then it is kept, or removed.
    Stopping(After),
    /// Only records, logs and names are left.
    Stopped,
    /// They are being removed.
    Removing,
    /// Nothing is left.
    Gone,
}

/// What comes after a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum After {
    /// The sandbox stays, stopped.
    Keep,
    /// It is removed.
    Remove,
}

/// What happens to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    BringUpDone,
    /// `left`: something could not be undone.
    BringUpFailed {
        left: bool,
    },
    VmGone,
    Stop,
    StopDone,
    StopFailed,
    Remove,
    RemoveDone,
    RemoveFailed,
}

/// What follows from an event, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Write the record.
    Save,
    /// End the containers' records with the VM.
    FailContainers,
    /// End containers, VM and network; answers with `StopDone` or `StopFailed`.
    TearDown,
    /// Delete disks, directories and records; answers with `RemoveDone` or `RemoveFailed`.
    Delete,
    /// Tell that it is ready, stopped, removed.
    Announce(News),
    /// Give its name back and end its task.
    Forget,
}

/// News for those who follow events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum News {
    Created,
    Stopped,
    Removed,
}

/// Decides.
pub(crate) fn step(state: State, event: Event) -> (State, Vec<Effect>) {
    use Effect::{Announce, Delete, FailContainers, Forget, Save, TearDown};
    use Event as E;
    use State as S;
    match (state, event) {
        (S::Starting, E::BringUpDone) => (S::Ready, vec![Save, Announce(News::Created)]),
        (S::Starting, E::BringUpFailed { left: false }) => (S::Gone, vec![Forget]),
        (S::Starting, E::BringUpFailed { left: true }) => (S::Broken, vec![Save]),

        (S::Ready, E::VmGone) => (
            S::Broken,
            vec![FailContainers, Save, Announce(News::Stopped)],
        ),
        (S::Ready | S::Broken, E::Stop) => (S::Stopping(After::Keep), vec![Save, TearDown]),
        // Also one whose VM is up, but not what it goes on with.
        (S::Starting | S::Ready | S::Broken, E::Remove) => {
            (S::Stopping(After::Remove), vec![Save, TearDown])
        }

        (S::Stopping(After::Keep), E::Remove) => (S::Stopping(After::Remove), vec![]),
        (S::Stopping(After::Keep), E::StopDone) => {
            (S::Stopped, vec![Save, Announce(News::Stopped)])
        }
        (S::Stopping(After::Remove), E::StopDone) => {
            (S::Removing, vec![Announce(News::Stopped), Delete])
        }
        (S::Stopping(_), E::StopFailed) => (S::Broken, vec![Save]),

        (S::Stopped, E::Remove) => (S::Removing, vec![Delete]),
        (S::Removing, E::RemoveDone) => (S::Gone, vec![Announce(News::Removed), Forget]),
        (S::Removing, E::RemoveFailed) => (S::Stopped, vec![]),

        // Repetitions, and news that come too late.
        (state, _) => (state, vec![]),
    }
}

/// What a new daemon makes of the state that an earlier one wrote.
pub(crate) fn after_restart(state: State) -> State {
    match state {
        State::Starting | State::Stopping(_) | State::Removing => State::Broken,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn events() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::BringUpDone),
            any::<bool>().prop_map(|left| Event::BringUpFailed { left }),
            Just(Event::VmGone),
            Just(Event::Stop),
            Just(Event::StopDone),
            Just(Event::StopFailed),
            Just(Event::Remove),
            Just(Event::RemoveDone),
            Just(Event::RemoveFailed),
        ]
    }

    proptest! {
        #[test]
        fn nothing_follows_the_end(sequence in prop::collection::vec(events(), 0..40)) {
            let mut state = State::Starting;
            let mut forgotten = 0;
            for event in sequence {
                let was = state;
                let (next, effects) = step(state, event);
                state = next;
                forgotten += effects.iter().filter(|e| **e == Effect::Forget).count();
                if was == State::Gone {
                    prop_assert_eq!(state, State::Gone);
                    prop_assert!(effects.is_empty());
                }
            }
            prop_assert_eq!(forgotten, usize::from(state == State::Gone));
        }

        #[test]
        fn a_network_is_never_forgotten(sequence in prop::collection::vec(events(), 0..40)) {
            // Deleting begins only after a tear-down that succeeded, or with nothing to tear down.
            let mut state = State::Starting;
            let mut torn_down = false;
            for event in sequence {
                let was = state;
                let (next, effects) = step(state, event);
                if matches!((was, event), (State::Stopping(_), Event::StopDone)) {
                    torn_down = true;
                }
                if effects.contains(&Effect::Delete) {
                    prop_assert!(torn_down);
                }
                state = next;
            }
        }

        #[test]
        fn stop_and_remove_lead_to_the_end_from_everywhere(
            sequence in prop::collection::vec(events(), 0..20),
        ) {
            let mut state = State::Starting;
            for event in sequence {
                state = step(state, event).0;
            }
            let mut todo = vec![Event::BringUpDone, Event::Remove];
            let mut steps = 0;
            while let Some(event) = todo.pop() {
                let (next, effects) = step(state, event);
                state = next;
                for effect in effects {
                    match effect {
                        Effect::TearDown => todo.push(Event::StopDone),
                        Effect::Delete => todo.push(Event::RemoveDone),
                        _ => {}
                    }
                }
                if todo.is_empty() && state != State::Gone {
                    // What was under way when the random events ended.
                    todo.push(match state {
                        State::Starting => Event::BringUpDone,
                        State::Stopping(_) => Event::StopDone,
                        State::Removing => Event::RemoveDone,
                        _ => Event::Remove,
                    });
                }
                steps += 1;
                prop_assert!(steps < 20);
            }
            prop_assert_eq!(state, State::Gone);
        }
    }

    #[test]
    fn a_start_that_fails_late_is_undone() {
        let (next, effects) = step(State::Starting, Event::Remove);
        assert_eq!(next, State::Stopping(After::Remove));
        assert!(effects.contains(&Effect::TearDown));
    }

    #[test]
    fn a_daemon_that_died_leaves_no_transition_behind() {
        for state in [
            State::Starting,
            State::Stopping(After::Keep),
            State::Stopping(After::Remove),
            State::Removing,
        ] {
            assert_eq!(after_restart(state), State::Broken);
        }
        assert_eq!(after_restart(State::Ready), State::Ready);
        assert_eq!(after_restart(State::Stopped), State::Stopped);
    }
}
