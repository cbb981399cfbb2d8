use error_reporter::Report;
use proptest::prelude::*;

use super::*;

fn exit() -> Exit {
    Exit {
        code: 0,
        reason: Reason::Completed,
        message: String::new(),
        at_ns: 1,
    }
}

fn error() -> PodError {
    PodError::precondition("test", "test")
}

fn events() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::CreateDone),
        Just(Event::CreateFailed(error())),
        Just(Event::Start),
        Just(Event::StartDone),
        Just(Event::StartFailed(error(), exit())),
        Just(Event::StartUnanswered(error())),
        (0_u64..3).prop_map(|s| Event::Stop {
            grace: Duration::from_secs(s)
        }),
        Just(Event::GraceOver),
        Just(Event::KillOver),
        Just(Event::Exited(exit())),
        Just(Event::Drained),
        Just(Event::Remove),
        Just(Event::RemoveDone),
        Just(Event::RemoveFailed(error())),
    ]
}

/// Applies events; returns the last state and all effects in order.
fn run(events: impl IntoIterator<Item = Event>) -> (State, Vec<Effect>) {
    let mut all = Vec::new();
    let mut state = State::Creating;
    for event in events {
        let (next, effects) = step(state, event);
        state = next;
        all.extend(effects);
    }
    (state, all)
}

#[test]
fn a_start_that_comes_too_late_is_told_of_the_end() {
    let exit = Exit {
        code: 137,
        reason: Reason::VmGone,
        message: "the VM ended: guest kernel panic".into(),
        at_ns: 1,
    };
    let (state, _) = run([Event::CreateDone, Event::Exited(exit), Event::Drained]);
    let (_, effects) = step(state, Event::Start);
    let [Effect::Answer(Wait::Started, Err(error))] = effects.as_slice() else {
        panic!("{effects:?}");
    };
    let text = Report::new(error).to_string();
    assert!(text.contains("exit code 137"), "{text}");
    assert!(text.contains("guest kernel panic"), "{text}");
}

fn count(effects: &[Effect], test: impl Fn(&Effect) -> bool) -> usize {
    effects.iter().filter(|e| test(e)).count()
}

proptest! {
    #[test]
    fn a_process_is_started_and_terminated_once_at_most(
        sequence in prop::collection::vec(events(), 0..60),
    ) {
        let (_, effects) = run(sequence);
        prop_assert!(count(&effects, |e| matches!(e, Effect::Start)) <= 1);
        prop_assert!(count(&effects, |e| matches!(e, Effect::Terminate)) <= 1);
        prop_assert!(count(&effects, |e| matches!(e, Effect::Forget)) <= 1);
        prop_assert!(count(&effects, |e| matches!(e, Effect::Drain)) <= 1);
    }

    #[test]
    fn news_come_in_order_and_once(sequence in prop::collection::vec(events(), 0..60)) {
        let (_, effects) = run(sequence);
        let news: Vec<u8> = effects
            .iter()
            .filter_map(|e| match e {
                Effect::Announce(News::Created) => Some(0),
                Effect::Announce(News::Started) => Some(1),
                Effect::Announce(News::Stopped) => Some(2),
                Effect::Announce(News::Removed) => Some(3),
                _ => None,
            })
            .collect();
        prop_assert!(news.windows(2).all(|w| w[0] < w[1]), "{news:?}");
    }

    #[test]
    fn an_end_is_saved_before_it_is_answered(sequence in prop::collection::vec(events(), 0..60)) {
        let mut state = State::Creating;
        for event in sequence {
            let (next, effects) = step(state, event);
            state = next;
            let saved = effects.iter().position(|e| matches!(e, Effect::Save));
            let stopped = effects
                .iter()
                .position(|e| matches!(e, Effect::Announce(News::Stopped)));
            if let Some(stopped) = stopped {
                prop_assert!(saved.is_some_and(|saved| saved < stopped));
            }
        }
    }

    #[test]
    fn nothing_follows_the_end(sequence in prop::collection::vec(events(), 0..60)) {
        let mut state = State::Creating;
        for event in sequence {
            let was_gone = state == State::Gone;
            let (next, effects) = step(state, event);
            if was_gone {
                prop_assert_eq!(&next, &State::Gone);
                prop_assert!(effects.iter().all(|e| matches!(e, Effect::Answer(..))));
            }
            state = next;
        }
    }

    #[test]
    fn every_wait_is_answered_in_the_end(
        sequence in prop::collection::vec(events(), 0..60),
        stop in any::<bool>(),
    ) {
        // After a stop or remove, a guest that does its part brings an answer.
        let (mut state, _) = run(sequence);
        let (wait, event) = if stop {
            (Wait::Stopped, Event::Stop { grace: Duration::from_secs(1) })
        } else {
            (Wait::Removed, Event::Remove)
        };
        if matches!(state, State::Creating) {
            state = step(state, Event::CreateDone).0;
        }
        if matches!(state, State::Starting | State::EndedEarly(_)) {
            state = step(state, Event::StartDone).0;
        }
        if !stop && matches!(state, State::Removing(_)) {
            return Ok(());
        }
        let answers = |effects: &[Effect]| {
            effects.iter().any(|e| matches!(e, Effect::Answer(w, _) if *w == wait))
        };
        let (mut state, mut effects) = step(state, event);
        let mut steps = 0;
        while !answers(&effects) {
            let next = match state {
                State::Terminating(_) | State::Killing(_) => Event::Exited(exit()),
                State::Draining(..) => Event::Drained,
                State::Removing(_) => Event::RemoveDone,
                ref other => panic!("{other:?} waits for nothing"),
            };
            (state, effects) = step(state, next);
            steps += 1;
            prop_assert!(steps < 6, "no answer");
        }
    }
}

#[test]
fn a_process_that_ends_before_its_start_is_answered_may_have_been_started() {
    let (state, effects) = run([
        Event::CreateDone,
        Event::Start,
        Event::Exited(exit()),
        Event::StartDone,
        Event::Drained,
    ]);
    assert_eq!(state, State::Exited(exit()));
    let answers = count(&effects, |e| {
        matches!(e, Effect::Answer(Wait::Started, Ok(())))
    });
    assert_eq!(answers, 1);
}

#[test]
fn a_command_that_was_not_executed_is_a_failed_start() {
    let ended = Exit {
        code: 127,
        reason: Reason::Error,
        ..exit()
    };
    let failed = Exit {
        code: 128,
        reason: Reason::StartError,
        message: "not found".into(),
        at_ns: 2,
    };
    let (state, effects) = run([
        Event::CreateDone,
        Event::Start,
        Event::Exited(ended),
        Event::StartFailed(error(), failed.clone()),
    ]);
    assert_eq!(state, State::Exited(failed));
    assert_eq!(
        count(&effects, |e| matches!(
            e,
            Effect::Answer(Wait::Started, Err(_))
        )),
        1
    );
    assert_eq!(
        count(&effects, |e| matches!(e, Effect::Announce(News::Started))),
        0
    );
}

#[test]
fn a_second_stop_may_only_shorten_the_grace() {
    let (state, effects) = run([
        Event::CreateDone,
        Event::Start,
        Event::StartDone,
        Event::Stop {
            grace: Duration::from_secs(30),
        },
        Event::Stop {
            grace: Duration::from_secs(5),
        },
        Event::Stop {
            grace: Duration::ZERO,
        },
    ]);
    assert_eq!(state, State::Killing(After::Keep));
    assert_eq!(count(&effects, |e| matches!(e, Effect::Terminate)), 1);
    let saved = effects.iter().rposition(|e| matches!(e, Effect::Save));
    let sent = effects.iter().position(|e| matches!(e, Effect::Terminate));
    assert!(saved < sent, "it is written before it is sent");
    assert_eq!(count(&effects, |e| matches!(e, Effect::ArmGrace(_))), 2);
    assert_eq!(count(&effects, |e| matches!(e, Effect::Kill)), 1);
}

#[test]
fn a_running_container_is_killed_before_it_is_removed() {
    let (state, effects) = run([
        Event::CreateDone,
        Event::Start,
        Event::StartDone,
        Event::Remove,
        Event::Exited(exit()),
        Event::Drained,
        Event::RemoveDone,
    ]);
    assert_eq!(state, State::Gone);
    let kill = effects.iter().position(|e| matches!(e, Effect::Kill));
    let delete = effects.iter().position(|e| matches!(e, Effect::Delete));
    assert!(kill.unwrap() < delete.unwrap());
}

#[test]
fn a_start_that_failed_leaves_an_exited_container() {
    let failed = Exit {
        code: 128,
        reason: Reason::StartError,
        ..exit()
    };
    let (state, _) = run([
        Event::CreateDone,
        Event::Start,
        Event::StartFailed(error(), failed.clone()),
    ]);
    assert_eq!(state, State::Exited(failed));
    let (_, effects) = step(state, Event::Start);
    assert!(matches!(
        effects[..],
        [Effect::Answer(Wait::Started, Err(_))]
    ));
}

/// Its process may run: nobody is told that it ended before the guest says so.
#[test]
fn a_container_whose_start_was_not_answered_is_killed_first() {
    let begin = [
        Event::CreateDone,
        Event::Start,
        Event::StartUnanswered(error()),
    ];
    let (state, effects) = run(begin);
    assert_eq!(state, State::Killing(After::Keep));
    let stopped = |effect: &Effect| matches!(effect, Effect::Announce(News::Stopped));
    let failed = |effect: &Effect| matches!(effect, Effect::Answer(Wait::Started, Err(_)));
    assert_eq!(count(&effects, |effect| matches!(effect, Effect::Kill)), 1);
    assert_eq!((count(&effects, failed), count(&effects, stopped)), (1, 0));
    let (state, _) = step(state, Event::Exited(exit()));
    let (state, effects) = step(state, Event::Drained);
    assert_eq!(state, State::Exited(exit()));
    assert_eq!(count(&effects, stopped), 1);

    // Its end was told before.
    let (state, _) = run([Event::CreateDone, Event::Start, Event::Exited(exit())]);
    let (state, effects) = step(state, Event::StartUnanswered(error()));
    assert_eq!(state, State::Draining(After::Keep, exit()));
    assert_eq!(count(&effects, failed), 1);
}

/// The next daemon reads what was written last.
#[test]
fn a_start_is_on_disk_before_it_is_answered() {
    for before in [vec![], vec![Event::Exited(exit())]] {
        let begin = [Event::CreateDone, Event::Start].into_iter();
        let (state, _) = run(begin.chain(before));
        let (_, effects) = step(state, Event::StartDone);
        let at = |wanted: fn(&Effect) -> bool| effects.iter().position(wanted);
        let saved = at(|effect| matches!(effect, Effect::Save));
        let answered = at(|effect| matches!(effect, Effect::Answer(Wait::Started, Ok(()))));
        assert!(saved.is_some() && saved < answered, "{effects:?}");
    }
}
