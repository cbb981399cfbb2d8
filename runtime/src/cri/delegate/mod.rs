//! One socket for all of a node: pods that other CRI runtimes have, beside those that are VMs.
//!
//! kubelet has one runtime, and a node has pods that no VM can hold (kube-proxy, agents of networks). A handler with
//! a `delegate` gives its pods to another runtime, whose CRI socket that is. [`Router`] is what is served, and
//! decides of each call whose it is:
//!
//! ```text
//!            ┌ names a pod or container ─▶ Hull, if it has that, else the runtime that has
//! kubelet ─▶ ┤ names an image           ─▶ who is to use it
//!            └ lists                    ─▶ all of them
//! ```
//!
//! Nothing about it is on disk: what the others have, they tell. So Hull and they may end and start as they like, and
//! what they had before Hull came is a part of the node too. One that is away or slow is not waited for by those
//! who ask for lists: its pods are told as they were last, their containers as unknown, because kubelet would
//! make pods anew that are gone.
//!
//! Read in this order: [`peer`] (another runtime), [`router`], [`runtime_service`], [`image_service`], [`images`] (which
//! runtime gets an image).

mod credentials;
mod image_service;
mod images;
mod peer;
mod router;
mod runtime_service;

pub(crate) use self::router::Router;
