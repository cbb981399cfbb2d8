//! What may happen to a pod and its containers, and what follows: pure functions
//! `(State, Event) → (State, effects)`. The driver runs the effects and feeds back the results.

pub(crate) mod container;
pub(crate) mod sandbox;
